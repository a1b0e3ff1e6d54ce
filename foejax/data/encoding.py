"""A corpus as token ids: written once, then memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from foejax.data.errors import DataError
from foejax.data.split import Part
from foejax.data.storage import atomic_folder, progress_bar
from foejax.data.tokenizer import Tokenizer

_PARTS: tuple[Part, ...] = ("train", "validation")
_CHARACTERS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class TokenStream:
    """The documents of one part end to end, each led by `eos_id`.

    Attributes:
      tokens: [N] uint16 or uint32.
      offsets: [number of documents + 1] int64; document i is `tokens[offsets[i]:offsets[i + 1]]`.
      eos_id: the id that leads every document. So the token that follows any token in its document, or closes that
        document, is the next one of the stream.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    eos_id: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1


def encode_corpus(texts: Iterable[tuple[Part, str]], tokenizer: Tokenizer, folder: Path) -> dict[Part, TokenStream]:
    """Encode both parts of a corpus into `folder`, or open what an earlier call left there.

    Args:
      texts: documents with their parts; read only when `folder` is absent.
      folder: a name that follows from texts, split and tokenizer.

    Raises:
      DataError: a part without documents, or a full disk.
    """
    if not folder.is_dir():
        with atomic_folder(folder) as target:
            _write(texts, tokenizer, target)
    streams = {part: _open(folder, part) for part in _PARTS}
    for part, stream in streams.items():
        if not stream.num_documents:
            raise DataError(f"the corpus leaves no {part} document: give more text or change data.validation_fraction")
    return streams


def _open(folder: Path, part: Part) -> TokenStream:
    header = json.loads((folder / "header.json").read_text(encoding="utf-8"))
    path = folder / f"{part}.bin"
    tokens = np.memmap(path, header["dtype"], "r") if path.stat().st_size else np.empty(0, header["dtype"])
    return TokenStream(tokens, np.load(folder / f"{part}_offsets.npy"), header["eos_id"])


def _write(texts: Iterable[tuple[Part, str]], tokenizer: Tokenizer, folder: Path) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    lengths: dict[Part, list[int]] = {part: [] for part in _PARTS}
    outputs = {part: (folder / f"{part}.bin").open("wb") for part in _PARTS}
    try:
        with progress_bar() as progress:
            task = progress.add_task("encoding documents", total=None)
            for chunk in _chunks(texts):
                for (part, _), ids in zip(chunk, tokenizer.encode_batch([text for _, text in chunk]), strict=True):
                    outputs[part].write(np.array([tokenizer.eos_id, *ids], dtype).tobytes())
                    lengths[part].append(len(ids) + 1)
                progress.advance(task, len(chunk))
    finally:
        for output in outputs.values():
            output.close()
    for part in _PARTS:
        np.save(folder / f"{part}_offsets.npy", np.cumsum([0, *lengths[part]], dtype=np.int64))
    header = {"dtype": dtype.name, "eos_id": tokenizer.eos_id, "vocab_size": tokenizer.vocab_size}
    (folder / "header.json").write_text(json.dumps(header), encoding="utf-8")


def _chunks(texts: Iterable[tuple[Part, str]]) -> Iterator[list[tuple[Part, str]]]:
    """Documents in lists of a few MB, so that encoding runs in parallel and memory stays bounded."""
    chunk: list[tuple[Part, str]] = []
    size = 0
    for part, text in texts:
        chunk.append((part, text))
        size += len(text)
        if size >= _CHARACTERS_AT_ONCE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
