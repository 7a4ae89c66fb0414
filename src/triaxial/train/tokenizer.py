"""Text to token ids and back: bytes, or any Hugging Face `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from triaxial import BadInput

# Names under which published tokenizers keep their end-of-document token, when tokenizer_config.json names none.
END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


class Tokenizer(Protocol):
    """What the corpus and the generation loop need of a tokenizer."""

    @property
    def vocab(self) -> int:
        """Smallest vocabulary that holds every id."""

    @property
    def separator(self) -> int | None:
        """The id between documents; None when there is no such token, and documents follow one another."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the ids of any text may change."""

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Ids of the text, without special tokens around it."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Ids of each text, on all cores where that helps."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; what is no valid text becomes U+FFFD."""


class ByteTokenizer:
    """UTF-8 bytes as ids. NUL, which text does not hold, separates documents, so 256 ids are enough."""

    vocab = 256
    separator = 0
    fingerprint = "bytes"

    def encode(self, text: str) -> NDArray[np.uint32]:
        return np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8).astype(np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")


class JsonTokenizer:
    """A `tokenizer.json`, run by the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        import tokenizers  # here, so that training on bytes does without it

        try:
            text = path.read_text(encoding="utf-8")
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception for anything it cannot read
            raise BadInput(f"{path} is not a tokenizer.json: {error}") from None
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab: int = max(ids.values(), default=-1) + 1
        names = (_named_end(path.with_name("tokenizer_config.json")), *END_OF_DOCUMENT)
        self.separator: int | None = next((ids[name] for name in names if name in ids), None)
        self.fingerprint = hashlib.sha256(f"{text}\0{self.separator}".encode()).hexdigest()

    def encode(self, text: str) -> NDArray[np.uint32]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        # JSON can smuggle lone surrogates into a str, and Rust's strings cannot hold them.
        clean = [text.encode("utf-8", errors="replace").decode("utf-8") for text in texts]
        encodings = self._tokenizer.encode_batch_fast(clean, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


def load_tokenizer(path: Path | None) -> Tokenizer:
    """The byte tokenizer, or the one in a `tokenizer.json` or in the model folder that holds one.

    Raises:
        BadInput: no such file, or not a tokenizer.
    """
    if path is None:
        return ByteTokenizer()
    return JsonTokenizer(path / "tokenizer.json" if path.is_dir() else path)


def _named_end(config: Path) -> str | None:
    """`eos_token` of a tokenizer_config.json, which writes it as text or as an object."""
    try:
        named: Any = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None  # the file is optional, and only this one name is wanted from it
    name = named.get("content") if isinstance(named, dict) else named
    return name if isinstance(name, str) else None
