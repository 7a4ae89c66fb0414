"""Text of every kind becomes one token file, once, whole or not at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from triaxial import BadInput
from triaxial.model.spec import load_model_spec
from triaxial.train import documents
from triaxial.train.corpus import Corpus, build_corpus
from triaxial.train.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, load_tokenizer


def tokens_of(corpus: Corpus) -> list[int]:
    """All tokens but the last, which is a label only."""
    ids, _ = corpus.batch(np.array([0]), corpus.manifest.tokens - 1)
    return [int(token) for token in ids[0]]


def text_of(corpus: Corpus) -> str:
    ids, labels = corpus.batch(np.array([0]), corpus.manifest.tokens - 1)
    return ByteTokenizer().decode([*ids[0], labels[0, -1]])


def build(source: Path, cache: Path, tokenizer: Tokenizer | None = None) -> Corpus:
    return build_corpus(source, tokenizer or ByteTokenizer(), cache)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-pair tokenizer.json whose end-of-document token has the id 0."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat " * 20], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


# ---- sources


def test_text_file_is_one_document(data: Path, cache: Path) -> None:
    (data / "a.txt").write_text("héllo\r\nworld", encoding="utf-8", newline="")
    corpus = build(data / "a.txt", cache)
    assert text_of(corpus) == "héllo\r\nworld\0"
    assert corpus.manifest.documents == 1


def test_jsonl_lines_are_documents(data: Path, cache: Path) -> None:
    (data / "a.jsonl").write_text('{"text": "one"}\n\n{"text": ""}\n{"text": "two", "id": 3}')
    corpus = build(data / "a.jsonl", cache)
    assert text_of(corpus) == "one\0two\0"
    assert corpus.manifest.documents == 2


def test_parquet_rows_are_documents(data: Path, cache: Path) -> None:
    table = pyarrow.table({"text": ["one", None, "two", "three"], "n": [1, 2, 3, 4]})
    parquet.write_table(table, data / "a.parquet", row_group_size=2)
    assert text_of(build(data / "a.parquet", cache)) == "one\0two\0three\0"


def test_folder_is_read_in_the_order_of_relative_paths(data: Path, cache: Path) -> None:
    for name in ("b.txt", "sub/a.py", "a.md", ".hidden.txt", ".git/x.txt", "site-packages/x.py", "sub/image.png"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text(name)
    (data / "c.jsonl").write_text('{"text": "c"}')
    corpus = build(data, cache)
    assert text_of(corpus) == "a.md\0b.txt\0c\0sub/a.py\0"
    assert corpus.manifest.files == 4


def test_files_that_are_not_text_are_skipped_and_counted(data: Path, cache: Path) -> None:
    (data / "good.txt").write_text("good")
    (data / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (data / "cut.txt").write_bytes("caf\u00e9".encode()[:-1])
    (data / "binary.c").write_bytes(b"a\0b")
    corpus = build(data, cache)
    assert text_of(corpus) == "good\0"
    assert corpus.manifest.skipped_files == 3


def test_blocks_may_end_inside_a_character(data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BLOCK_BYTES", 5)
    text = "añ€𝄞" * 50 + "\n" + "x" * 100
    (data / "a.txt").write_text(text, encoding="utf-8")
    corpus = build(data / "a.txt", cache)
    assert text_of(corpus) == text + "\0"
    assert corpus.manifest.documents == 1


def test_a_large_file_streams_through(data: Path, cache: Path) -> None:
    with (data / "a.txt").open("w") as out:
        for _ in range(64):
            out.write("x" * (1 << 20))  # one line of 64 MiB
    tracemalloc.start()
    build(data / "a.txt", cache)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 48 << 20  # its tokens alone are 128 MiB


# ---- tokenizers


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.encode("utf-8", errors="replace").decode()
    assert ids.max(initial=0) < tokenizer.vocab == load_model_spec("tiny-byte").vocab


def test_bytes_decode_what_a_model_makes_up() -> None:
    assert ByteTokenizer().decode(np.array([104, 105, 255, 195])) == "hi\ufffd\ufffd"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_tokenizer_json_round_trip(text: str, bpe: Path) -> None:
    tokenizer = load_tokenizer(bpe)
    assert tokenizer.decode(tokenizer.encode(text)) == text.encode("utf-8", errors="replace").decode()


def test_tokenizer_json_separates_documents(bpe: Path, data: Path, cache: Path) -> None:
    (data / "a.jsonl").write_text('{"text": "the cat"}\n{"text": "the mat"}\n')
    tokenizer = load_tokenizer(bpe.parent)
    corpus = build(data / "a.jsonl", cache, tokenizer)
    the_cat, the_mat = tokenizer.encode("the cat").tolist(), tokenizer.encode("the mat").tolist()
    assert tokenizer.separator == 0
    assert tokens_of(corpus) == [*the_cat, 0, *the_mat]
    assert len(the_cat) < len("the cat")


def test_end_of_document_token_named_by_the_model_wins(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(bpe.read_bytes())
    cat = JsonTokenizer(bpe).encode("a").item()
    for named in ("a", {"content": "a"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        assert JsonTokenizer(tmp_path / "tokenizer.json").separator == cat
    for nothing in ("[]", "no json", '{"eos_token": ["a"]}', '{"eos_token": null}'):
        (tmp_path / "tokenizer_config.json").write_text(nothing)
        assert JsonTokenizer(tmp_path / "tokenizer.json").separator == 0


def test_large_vocabularies_take_four_bytes_a_token(data: Path, cache: Path) -> None:
    class Wide(ByteTokenizer):
        vocab, separator, fingerprint = 100_000, 99_999, "wide"

    (data / "a.txt").write_text("ab")
    corpus = build(data / "a.txt", cache, Wide())
    assert corpus.manifest.dtype == "uint32"
    assert tokens_of(corpus) == [97, 98]
    assert corpus.manifest.max_id == 99_999


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"version": "1.0"}'])
def test_not_a_tokenizer_is_bad_input(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BadInput, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(BadInput, match="missing"):
        load_tokenizer(tmp_path / "missing.json")


# ---- cache


def test_cache_is_reused_until_files_or_tokenizer_change(data: Path, cache: Path, bpe: Path) -> None:
    def builds(tokenizer: Tokenizer) -> bool:
        calls: list[tuple[int, int]] = []
        build_corpus(data, tokenizer, cache, lambda done, total: calls.append((done, total)))
        return bool(calls)

    (data / "a.txt").write_text("one")
    assert builds(ByteTokenizer())
    assert not builds(ByteTokenizer())
    assert builds(load_tokenizer(bpe))
    (data / "a.txt").write_text("two!")
    assert builds(ByteTokenizer())
    os.utime(data / "a.txt", ns=(0, 0))
    assert builds(ByteTokenizer())
    (data / "a.txt").rename(data / "b.txt")
    assert builds(ByteTokenizer())


def test_progress_ends_at_all_bytes(data: Path, cache: Path) -> None:
    (data / "a.txt").write_text("one")
    (data / "b.jsonl").write_text('{"text": "x"}\n' * 10)
    parquet.write_table(pyarrow.table({"text": ["x"] * 10}), data / "c.parquet")
    (data / "d.txt").write_bytes(b"\xff")
    calls: list[tuple[int, int]] = []
    build_corpus(data, ByteTokenizer(), cache, lambda done, total: calls.append((done, total)))
    size = sum(path.stat().st_size for path in data.iterdir())
    assert calls == sorted(calls)
    assert calls[-1] == (size, size)


def _killed_builder(data: Path, cache: Path) -> None:
    build_corpus(data, ByteTokenizer(), cache, lambda done, total: os.kill(os.getpid(), signal.SIGKILL))


def test_a_killed_build_leaves_nothing_behind(data: Path, cache: Path) -> None:
    (data / "a.txt").write_text("text")
    process = multiprocessing.get_context("spawn").Process(target=_killed_builder, args=(data, cache))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.suffix for path in cache.iterdir() if path.is_dir()] == [".unfinished"]
    assert text_of(build(data, cache)) == "text\0"
    assert not [path for path in cache.iterdir() if path.suffix == ".unfinished"]


def test_a_failed_build_leaves_nothing_behind(data: Path, cache: Path) -> None:
    (data / "a.jsonl").write_text('{"text": "good"}\n{')
    with pytest.raises(BadInput):
        build(data, cache)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def _build_and_count(data: Path, cache: Path) -> bool:
    calls: list[int] = []
    corpus = build_corpus(data, ByteTokenizer(), cache, lambda done, total: calls.append(done))
    assert corpus.manifest.tokens == 200 * 1001
    return bool(calls)


def test_of_many_builders_one_builds(data: Path, cache: Path) -> None:
    for number in range(200):
        (data / f"{number}.txt").write_text("x" * 1000)
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        built = pool.starmap(_build_and_count, [(data, cache)] * 8)
    assert sum(built) == 1


# ---- samples


@pytest.fixture
def counting(data: Path, cache: Path) -> Corpus:
    """Tokens 1, 2, ..., 100 and the separator."""
    (data / "a.txt").write_bytes(bytes(range(1, 101)))
    return build(data / "a.txt", cache)


def test_samples_share_no_input_and_labels_are_one_ahead(counting: Corpus) -> None:
    assert counting.num_samples(10) == 10
    ids, labels = counting.batch(np.array([0, 9, 3]), 10)
    assert ids.dtype == labels.dtype == np.int64
    assert ids[:, 0].tolist() == [1, 91, 31]
    assert ids[1].tolist() == list(range(91, 101))
    assert labels[1].tolist() == [*range(92, 101), 0]


def test_every_token_but_the_first_is_a_label_once(counting: Corpus) -> None:
    _, labels = counting.batch(np.arange(counting.num_samples(10)), 10)
    assert labels.ravel().tolist() == [*range(2, 101), 0]


@pytest.mark.parametrize(
    ("held_out", "validation"), [(0.0, []), (0.001, [9]), (0.01, [9]), (0.3, [7, 8, 9]), (0.89, [*range(1, 10)])]
)
def test_validation_is_the_tail(counting: Corpus, held_out: float, validation: list[int]) -> None:
    train, held = counting.split(10, held_out)
    assert [*held] == validation
    assert [*train, *held] == [*range(10)]


def test_split_holds_out_one_percent_by_default(counting: Corpus) -> None:
    assert counting.split(1) == (range(99), range(99, 100))


def test_too_little_data_is_bad_input(counting: Corpus) -> None:
    assert counting.num_samples(100) == 1
    with pytest.raises(BadInput, match=r"sequence length 101 needs 102 tokens and .* holds 101: use a shorter"):
        counting.num_samples(101)
    with pytest.raises(BadInput, match="too few to keep 1 for validation"):
        counting.split(100)
    assert counting.split(100, 0.0) == (range(1), range(1, 1))


def test_tokens_beyond_the_model_are_bad_input(counting: Corpus) -> None:
    counting.require_vocab(101)
    with pytest.raises(BadInput, match="token id 100 and the model's vocabulary is 100: use the tokenizer that"):
        counting.require_vocab(100)


# ---- bad input


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        ({}, "missing", "no data at .*missing: give a"),
        ({}, ".", "holds no .txt, .jsonl, .parquet or source code file"),
        ({"a.bin": b"x"}, ".", "holds no .txt, .jsonl, .parquet or source code file"),
        ({"a.txt": b""}, ".", r"holds no text \(1 files, 0 of them not UTF-8\)"),
        ({"a.txt": b"\xff"}, ".", r"holds no text \(1 files, 1 of them not UTF-8\)"),
        ({"a.txt": b"\xff"}, "a.txt", r"a\.txt holds no text \(1 files, 1 of them not UTF-8\)"),
        ({"a.jsonl": b'{"text": "x"}\n{"text": \n'}, ".", "a.jsonl, line 2: not a JSON record"),
        ({"a.jsonl": b'{"text": "\xff"}'}, ".", "a.jsonl, line 1: not a JSON record"),
        ({"a.jsonl": b"[" * 100_000}, ".", "a.jsonl, line 1: not a JSON record"),
        ({"a.jsonl": b'\n{"content": "x"}'}, ".", 'a.jsonl, line 2: the record needs a field "text"'),
        ({"a.jsonl": b'{"text": 3}'}, ".", 'a.jsonl, line 1: the record needs a field "text"'),
        ({"a.jsonl": b"[3]"}, ".", 'a.jsonl, line 1: the record needs a field "text"'),
        ({"a.parquet": b"PAR1 no"}, ".", "a.parquet is not a readable parquet file"),
    ],
)
def test_bad_sources(files: dict[str, bytes], source: str, message: str, data: Path, cache: Path) -> None:
    for name, content in files.items():
        (data / name).write_bytes(content)
    with pytest.raises(BadInput, match=message):
        build(data / source, cache)


def test_parquet_without_the_column_names_those_it_has(data: Path, cache: Path) -> None:
    parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), data / "a.parquet")
    with pytest.raises(BadInput, match=r'a\.parquet has no column "text"; its columns: body, n'):
        build(data, cache)
    parquet.write_table(pyarrow.table({"text": [1]}), data / "a.parquet")
    with pytest.raises(BadInput, match='column "text" holds int64, not text'):
        build(data, cache)


def test_a_cache_that_cannot_be_made_is_bad_input(data: Path) -> None:
    (data / "a.txt").write_text("x")
    with pytest.raises(BadInput, match=r"cannot turn .* into tokens"):
        build(data, data / "a.txt" / "cache")
