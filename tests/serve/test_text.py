"""Text comes whole: no part of a character, nothing of a stop text, the same as decoding all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from triaxial import BadInput
from triaxial.serve.text import ByteTokenizer, JsonTokenizer, TextStream, load_text_tokenizer

TEXT = "Zürich – 東京, naïve 👩‍👩‍👧 end"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> JsonTokenizer:
    """A tokenizer of single bytes in the form of GPT-2's: every character beyond ASCII takes several tokens."""
    tokenizer = Tokenizer(
        models.BPE({symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return JsonTokenizer(folder / "tokenizer.json")


def pieces(stream: TextStream, tokens: list[int]) -> list[str]:
    return [stream.add([token], last=i == len(tokens) - 1) for i, token in enumerate(tokens)]


@pytest.mark.parametrize("kind", ["bytes", "json"])
def test_pieces_join_to_the_text_and_none_is_broken(kind: str, byte_level: JsonTokenizer) -> None:
    tokenizer = ByteTokenizer() if kind == "bytes" else byte_level
    tokens = tokenizer.encode(TEXT)
    assert len(tokens) == len(TEXT.encode())
    shown = pieces(TextStream(tokenizer), tokens)
    assert "".join(shown) == TEXT
    assert not any("\ufffd" in piece for piece in shown)
    assert max(len(piece) for piece in shown) == 1


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    assert pieces(TextStream(ByteTokenizer()), list("aé".encode()[:2])) == ["a", "\ufffd"]


def test_special_tokens_make_no_text(byte_level: JsonTokenizer) -> None:
    assert byte_level.decode([*byte_level.encode("ab"), 256]) == "ab"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("aab aac", ["aac"], "aab "),
        ("abababc", ["ababc"], "ab"),
        ("nothing here", ["nowhere"], "nothing here"),
        ("ends with sto", ["stop"], "ends with sto"),
        ("x東y", ["東"], "x"),
        ("both b and a", ["a", "b"], ""),
    ],
)
def test_stop_texts_end_the_text_before_them(text: str, stop: list[str], expected: str) -> None:
    stream = TextStream(ByteTokenizer(), stop)
    assert "".join(pieces(stream, ByteTokenizer().encode(text))) == expected
    assert stream.stopped == (expected != text)


def test_nothing_of_a_stop_text_is_shown_before_it_is_clear() -> None:
    stream = TextStream(ByteTokenizer(), ["END"])
    assert [stream.add([ord(c)], last=False) for c in "aENxEND"] == ["a", "", "", "ENx", "", "", ""]
    assert stream.stopped


def test_stop_texts_wait_for_min_tokens() -> None:
    stream = TextStream(ByteTokenizer(), ["a"], min_tokens=3)
    assert "".join(pieces(stream, list(b"aabca"))) == "aabc"


def test_several_tokens_at_once_stop_at_the_same_place() -> None:
    stream = TextStream(ByteTokenizer(), ["c"])
    assert stream.add(list(b"abcd"), last=True) == "ab"


def test_without_a_tokenizer_there_is_no_text(tmp_path: Path) -> None:
    assert TextStream(None).add([1, 2], last=True) == ""


def test_the_model_says_which_tokenizer_is_its_own(byte_level: JsonTokenizer, tmp_path: Path) -> None:
    assert isinstance(load_text_tokenizer(Path("tiny-byte")), ByteTokenizer)
    assert load_text_tokenizer(Path("llama-3.1-8b")) is None
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="is not a tokenizer"):
        load_text_tokenizer(tmp_path)
