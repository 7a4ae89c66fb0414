"""Where text comes from: `.txt`, `.jsonl` and `.parquet` files, source code, and folders of them."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from triaxial import BadInput

BLOCK_BYTES = 1 << 20

# Endings of files in a folder that are read as text, one document each. A file named on its own is read whatever its
# ending.
TEXT_ENDINGS = frozenset(
    (  # noqa: SIM905 - one a line would take a page
        ".txt .md .rst .tex .html .css .xml .json .yaml .yml .toml .ini .cfg .csv .sql .py .pyi .pyx .c .h .cc .cpp "
        ".cxx .hh .hpp .cu .cuh .rs .go .java .kt .scala .cs .js .jsx .ts .tsx .rb .php .pl .lua .r .jl .swift .m .hs "
        ".ml .ex .erl .clj .lisp .el .vim .sh .bash .zsh .ps1 .bat .cmake .mk .proto .f90"
    ).split()
)
RECORD_ENDINGS = frozenset((".jsonl", ".parquet"))
INSTALLED_FOLDERS = frozenset(("node_modules", "site-packages"))
"""Other people's packages inside a source tree; hidden folders are left out as well."""


class Piece(NamedTuple):
    """A run of text within one document, so that a document of any length passes through in blocks."""

    text: str
    ends_document: bool
    position: int
    """Bytes that are behind us, for progress."""


def list_files(source: Path) -> list[Path]:
    """Files to read, in an order that depends on their relative paths alone. Hidden files and folders and installed
    packages are left out.

    Raises:
        BadInput: nothing there, or a folder without a file of a known ending.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise BadInput(f"no data at {source}: give a .txt, .jsonl or .parquet file, or a folder of text or source code")
    files: list[Path] = []
    for folder, folders, names in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in INSTALLED_FOLDERS]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        files += [path for path in paths if path.suffix.lower() in TEXT_ENDINGS | RECORD_ENDINGS and path.is_file()]
    if not files:
        raise BadInput(f"folder {source} holds no .txt, .jsonl, .parquet or source code file")
    return sorted(files, key=lambda path: path.relative_to(source).as_posix())


class TextReader:
    """Iterates once over the text of files: a `.jsonl` or `.parquet` file is its records, any other is one document.

    Files that are not UTF-8 text are counted in `skipped_files`. Iterating raises BadInput for a record that cannot
    be read, naming file and line, and for a file without the column `text`.
    """

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self.total_bytes = sum(path.stat().st_size for path in files)
        self.skipped_files = 0

    def __iter__(self) -> Iterator[Piece]:
        behind = 0
        for path in self._files:
            for piece in self._pieces(path):
                yield piece._replace(position=behind + piece.position)
            behind += path.stat().st_size

    def _pieces(self, path: Path) -> Iterator[Piece]:
        ending = path.suffix.lower()
        if ending == ".jsonl":
            return _jsonl_pieces(path)
        if ending == ".parquet":
            return _parquet_pieces(path)
        if _is_text(path):
            return _text_pieces(path)
        self.skipped_files += 1
        return iter(())


def _is_text(path: Path) -> bool:
    """UTF-8 without NUL. A pass of its own, so that no half of a file reaches the corpus."""
    try:
        return not any("\0" in piece.text for piece in _text_pieces(path))
    except UnicodeDecodeError:
        return False


def _text_pieces(path: Path) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8")()  # a block may end inside a character
    with path.open("rb") as handle:
        while block := handle.read(BLOCK_BYTES):
            block += handle.readline(BLOCK_BYTES)  # cut between lines, where tokenizers cut too
            yield Piece(decoder.decode(block), False, handle.tell())
        yield Piece(decoder.decode(b"", final=True), True, handle.tell())


def _jsonl_pieces(path: Path) -> Iterator[Piece]:
    position = 0
    with path.open("rb") as handle:
        for number, line in enumerate(handle, start=1):
            position += len(line)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                raise BadInput(f"{path}, line {number}: not a JSON record") from None
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise BadInput(f'{path}, line {number}: the record needs a field "text" that holds text')
            yield Piece(text, True, position)


def _parquet_pieces(path: Path) -> Iterator[Piece]:
    import pyarrow  # here, so that other files do without it
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise BadInput(f'{path} has no column "text"; its columns: {", ".join(file.schema_arrow.names)}')
            size, rows, done = path.stat().st_size, file.metadata.num_rows, 0
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    done += 1
                    if text is None:
                        continue
                    if not isinstance(text, str):
                        raise BadInput(f'{path}: column "text" holds {batch.schema.types[0]}, not text')
                    yield Piece(text, True, size * done // rows)
    except pyarrow.ArrowException as error:
        reason, *_ = str(error).split("\n")
        raise BadInput(f"{path} is not a readable parquet file: {reason}") from None
