"""`Corpus`: a body of text as one memory-mapped file of token ids, built once and read by every rank."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from triaxial import BadInput
from triaxial.train.documents import Piece, TextReader, list_files
from triaxial.train.tokenizer import Tokenizer

FORMAT = 2  # of the token file and its manifest; part of the cache key
TOKENS_FILE, MANIFEST_FILE = "tokens.bin", "manifest.json"
BATCH_CHARACTERS = 4 << 20

Progress = Callable[[int, int], None]
"""Told bytes read so far and bytes in all."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the token file holds."""

    source: str
    tokens: int
    documents: int
    files: int
    skipped_files: int
    """Files of a folder that are not UTF-8 text."""
    max_id: int
    dtype: str
    digest: str
    """Of the tokens, by which data is recognized wherever it lies."""


class Corpus:
    """Token ids of all documents, one after the other, cut into samples of any length.

    Sample i of length s is tokens i*s to i*s + s; its labels are the same tokens one further on, so samples share
    no input and every token but the first is predicted once an epoch.
    """

    def __init__(self, folder: Path) -> None:
        """Open what `build_corpus` left in `folder`; tokens are read when asked for."""
        self.manifest = Manifest(**json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8")))
        self._tokens: NDArray[Any] = np.memmap(folder / TOKENS_FILE, dtype=self.manifest.dtype, mode="r")

    def num_samples(self, seq_len: int) -> int:
        """Samples of `seq_len` tokens, at least 1.

        Raises:
            BadInput: the data is shorter than one sample and its last label.
        """
        samples = (self.manifest.tokens - 1) // seq_len
        if samples < 1:
            raise BadInput(
                f"sequence length {seq_len} needs {seq_len + 1} tokens and {self.manifest.source} holds "
                f"{self.manifest.tokens}: use a shorter sequence or more data"
            )
        return samples

    def split(self, seq_len: int, held_out: float = 0.01) -> tuple[range, range]:
        """Indices of the training samples and, from the tail, of the validation samples.

        Args:
            held_out: share of samples kept for validation, in [0, 1); above 0 at least one sample is.

        Raises:
            BadInput: too little data for one sample of each.
        """
        samples = self.num_samples(seq_len)
        validation = max(1, round(samples * held_out)) if held_out > 0 else 0
        if validation >= samples:
            raise BadInput(
                f"{self.manifest.source} holds {samples} samples of {seq_len} tokens, too few to keep {validation} for "
                "validation: use a shorter sequence, more data, or no validation"
            )
        return range(samples - validation), range(samples - validation, samples)

    def batch(self, indices: NDArray[np.int64], seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and next-token labels of the samples, each [n, seq_len]."""
        positions = indices[:, None] * seq_len + np.arange(seq_len + 1)  # [n, seq_len + 1]
        tokens = self._tokens[positions].astype(np.int64)
        return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])

    def require_vocab(self, vocab: int) -> None:
        """Raises BadInput when a token of the data has no row in a model's embedding."""
        if self.manifest.max_id >= vocab:
            raise BadInput(
                f"{self.manifest.source} holds token id {self.manifest.max_id} and the model's vocabulary is {vocab}: "
                "use the tokenizer that belongs to the model"
            )


def build_corpus(source: Path, tokenizer: Tokenizer, cache: Path, progress: Progress | None = None) -> Corpus:
    """Tokenize `source` into `cache`, or reuse what an earlier call left there for the same files and tokenizer.

    Documents stream through in blocks, so the corpus never has to fit in memory. Several processes may call this at
    once: one builds and the others wait for it.

    Args:
        source: a `.txt`, `.jsonl` (field "text"), `.parquet` (column "text") or other text file, or a folder of such
            files and source code.
        cache: a folder, made if missing.
        progress: called with bytes read and bytes in all.

    Raises:
        BadInput: no text at `source`, a record that cannot be read, or a cache that cannot be written.
    """
    try:
        files = list_files(source)
        target = cache / _fingerprint(source, files, tokenizer)
        if not target.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with _sole_builder(target.with_suffix(".lock")):
                if not target.exists():
                    _build(source, files, tokenizer, target, progress or (lambda done, total: None))
        return Corpus(target)
    except OSError as error:
        raise BadInput(f"cannot turn {source} into tokens: {error}") from None


def _fingerprint(source: Path, files: list[Path], tokenizer: Tokenizer) -> str:
    """Key of the cache: changes with any file's name, size or time, and with the tokenizer."""
    parts: list[tuple[str, int, int]] = []
    for path in files:
        stat = path.stat()
        name = path.name if path == source else path.relative_to(source).as_posix()
        parts.append((name, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps([FORMAT, tokenizer.fingerprint, parts]).encode()).hexdigest()[:24]


@contextmanager
def _sole_builder(lock: Path) -> Iterator[None]:
    """Hold the lock file; the kernel lets go of it when a builder is killed."""
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(source: Path, files: list[Path], tokenizer: Tokenizer, target: Path, progress: Progress) -> None:
    """Write tokens and manifest beside `target` and rename them into place, so that it is whole or not there."""
    unfinished = target.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a builder that was killed: the lock says it is nobody's
    unfinished.mkdir()
    try:
        manifest = _write_tokens(source, files, tokenizer, unfinished / TOKENS_FILE, progress)
        (unfinished / MANIFEST_FILE).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_tokens(source: Path, files: list[Path], tokenizer: Tokenizer, target: Path, progress: Progress) -> Manifest:
    dtype = np.dtype(np.uint16 if tokenizer.vocab <= 1 << 16 else np.uint32)
    reader = TextReader(files)
    with target.open("wb") as out:
        writer = _TokenWriter(out, tokenizer.separator, dtype)
        for batch in _batches(reader):
            for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
                writer.add(ids, piece.ends_document)
            progress(batch[-1].position, reader.total_bytes)
    progress(reader.total_bytes, reader.total_bytes)
    if writer.tokens == 0:
        raise BadInput(f"{source} holds no text ({len(files)} files, {reader.skipped_files} of them not UTF-8)")
    return Manifest(
        source=str(source),
        tokens=writer.tokens,
        documents=writer.documents,
        files=len(files) - reader.skipped_files,
        skipped_files=reader.skipped_files,
        max_id=writer.max_id,
        dtype=dtype.name,
        digest=writer.digest.hexdigest(),
    )


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces of about BATCH_CHARACTERS together: enough to keep every core at work, little enough to hold."""
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _TokenWriter:
    """Appends documents to the token file and counts what it holds."""

    def __init__(self, out: BinaryIO, separator: int | None, dtype: np.dtype[Any]) -> None:
        self._out, self._separator, self._dtype = out, separator, dtype
        self._within_document = False
        self.digest = hashlib.blake2b(dtype.name.encode(), digest_size=16)
        self.tokens = self.documents = self.max_id = 0

    def add(self, ids: NDArray[np.uint32], ends_document: bool) -> None:
        self._put(ids)
        if ends_document and self._within_document:  # an empty document leaves no trace
            if self._separator is not None:
                self._put(np.array([self._separator], dtype=np.uint32))
            self.documents += 1
            self._within_document = False

    def _put(self, ids: NDArray[np.uint32]) -> None:
        if ids.size:
            written = ids.astype(self._dtype).data
            self._out.write(written)
            self.digest.update(written)
            self._within_document = True
            self.tokens += ids.size
            self.max_id = max(self.max_id, int(ids.max()))
