"""Documents from named corpora and from a user's own files."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from foejax.data.corpora import fetch_corpus, list_corpora
from foejax.data.errors import DataError


@dataclass(frozen=True)
class Document:
    """One text with what is known about it (title, year, package ...)."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


def read_documents(corpus: str | Path, text_field: str = "text") -> Iterator[Document]:
    """Documents of a corpus in a fixed order; texts without a visible character are skipped.

    Args:
      corpus: the name of a corpus (fetched when absent); or a path to a text file (one document), to `.jsonl`,
        `.jsonl.gz` or `.parquet` (one document a row), or to a folder that is searched for such files.
      text_field: the field that holds the text in JSONL and Parquet; the other fields become metadata.

    Raises:
      DataError: unknown corpus, no text, text that is not UTF-8, broken JSON, or a missing field.
    """
    path = corpus_path(corpus)
    files = _files_below(path) if path.is_dir() else [path]
    for file in files:
        empty = True
        for document in _reader(file)(file, text_field):
            if document.text.strip():
                empty = False
                yield document
        if empty:
            raise DataError(f"{file} holds no text: remove it or give another data.corpus")


def corpus_path(corpus: str | Path) -> Path:
    """Where the documents of a corpus lie; a named corpus is fetched when it is not cached.

    Raises:
      DataError: neither a known name nor an existing path.
    """
    known = list_corpora()
    if str(corpus) in known:
        return fetch_corpus(str(corpus))
    path = Path(corpus).expanduser()
    if path.exists():
        return path
    raise DataError(
        f"data.corpus={str(corpus)!r} is neither an existing path nor a known corpus: "
        f"choose one of {', '.join(sorted(known))} or give a path"
    )


Reader = Callable[[Path, str], Iterator[Document]]


def _reader(path: Path) -> Reader:
    name = path.name.lower()
    return next((reader for suffix, reader in _READERS.items() if name.endswith(suffix)), _read_text)


def _files_below(folder: Path) -> list[Path]:
    known = tuple(_READERS)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.lower().endswith(known))
    if not files:
        raise DataError(f"{folder} holds no {', '.join(known)} file: give another data.corpus")
    return files


def _decode(content: bytes, path: Path, offset: int = 0) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 at byte {offset + error.start} (0x{content[error.start]:02x}): "
            "convert it, for example with iconv -t utf-8"
        ) from None


def _read_text(path: Path, text_field: str) -> Iterator[Document]:
    yield Document(_decode(path.read_bytes(), path), {"file": path.name})


def _read_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    with _open(path) as lines:
        offset = 0
        for number, raw in enumerate(_checked_lines(lines, path), start=1):
            line = _decode(raw, path, offset)
            offset += len(raw)
            if line.strip():
                yield _from_row(_parse_json(line, path, number), text_field, f"{path} line {number}")


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _checked_lines(lines: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        yield from lines
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}): copy it again") from error


def _parse_json(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} line {number} is not JSON ({error}): JSONL holds one object a line") from None
    if not isinstance(row, dict):
        raise DataError(f"{path} line {number} holds a {type(row).__name__}: JSONL holds one object a line")
    return row


def _read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path} needs pyarrow to be read: pip install pyarrow") from None
    try:
        table = parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if text_field not in names:
            raise DataError(_missing_field(text_field, names, str(path)))
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                yield _from_row(row, text_field, str(path))
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file ({error}): copy it again or rename it") from error


def _from_row(row: dict[str, Any], text_field: str, where: str) -> Document:
    if text_field not in row:
        raise DataError(_missing_field(text_field, list(row), where))
    text = row[text_field]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {text_field!r} holds {type(text).__name__}, not text: "
            "choose the field that holds text with data.text_field"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise DataError(f"{where}: field {text_field!r} is not Unicode at character {error.start}: repair it") from None
    return Document(text, {key: value for key, value in row.items() if key != text_field})


def _missing_field(text_field: str, names: list[str], where: str) -> str:
    return f"{where} has no field data.text_field={text_field!r}: the fields there are {', '.join(names) or 'none'}"


_READERS: dict[str, Reader] = {
    ".txt": _read_text,
    ".md": _read_text,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".parquet": _read_parquet,
}
