"""Text to tokens and back, piece by piece as tokens come, and the texts that end an answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from triaxial import BadInput
from triaxial.model.spec import load_model_spec

_BYTES = 256
_UNFINISHED = "\ufffd"
"""What tokenizers decode a part of a character to."""


class TextTokenizer(Protocol):
    """What an answer needs of a tokenizer."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text; `special` adds those that the model expects around it."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones; what is no valid text becomes U+FFFD."""


class JsonTokenizer:
    """A model folder's `tokenizer.json`, run by the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        import tokenizers  # here, so that models without one do without it

        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception for anything it cannot read
            raise BadInput(f"{path} is not a tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str, special: bool = True) -> list[int]:
        # JSON can smuggle lone surrogates into a str, and Rust's strings cannot hold them.
        clean = text.encode("utf-8", errors="replace").decode("utf-8")
        ids: list[int] = self._tokenizer.encode(clean, add_special_tokens=special).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


class ByteTokenizer:
    """UTF-8 bytes as tokens: what `triaxial train` reads without a tokenizer."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


def load_text_tokenizer(model: Path) -> TextTokenizer | None:
    """The tokenizer of a model folder; bytes where a model without one has 256 tokens; None otherwise.

    Raises:
        BadInput: a tokenizer.json that is none.
    """
    folder = model if model.is_dir() else model.parent
    path = folder / "tokenizer.json"
    if model.exists() and path.is_file():
        return JsonTokenizer(path)
    return ByteTokenizer() if load_model_spec(str(model)).vocab == _BYTES else None


class TextStream:
    """The text of one answer: never a part of a character, nor what may turn out to be a stop text."""

    def __init__(self, tokenizer: TextTokenizer | None, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._tokenizer, self._stop, self._min_tokens = tokenizer, [text for text in stop if text], min_tokens
        self._tokens: list[int] = []
        self._prefix = self._read = 0  # tokens before `read` are out; those from `prefix` on decide how others decode
        self._held = ""
        self.stopped = False
        """A stop text has come; the text ends before it."""

    def add(self, tokens: Sequence[int], last: bool) -> str:
        """What can be shown now; with `last` all of it. Tokens after a stop text add nothing."""
        shown = ""
        for token in tokens:
            if not self.stopped:
                self._tokens.append(token)
                shown += self._release(self._decode(flush=False))
        if last and not self.stopped:
            shown += self._release(self._decode(flush=True)) + self._held
            self._held = ""
        return shown

    def _decode(self, flush: bool) -> str:
        """The text of the tokens that are not out yet, if it is whole."""
        if self._tokenizer is None:
            return ""
        before = self._tokenizer.decode(self._tokens[self._prefix : self._read])
        after = self._tokenizer.decode(self._tokens[self._prefix :])
        if len(after) <= len(before) or (after.endswith(_UNFINISHED) and not flush):
            return ""
        self._prefix, self._read = self._read, len(self._tokens)
        return after[len(before) :]

    def _release(self, new: str) -> str:
        """Put off what may be the beginning of a stop text."""
        text = self._held + new
        if len(self._tokens) < self._min_tokens:  # nothing ends here, but what is shown counts as passed
            self._held = ""
            return text
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
