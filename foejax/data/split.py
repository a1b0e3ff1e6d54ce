"""Which documents are held out for validation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from foejax.data.documents import Document
from foejax.data.errors import DataError

Part = Literal["train", "validation"]


@dataclass(frozen=True)
class Split:
    """A division of a corpus, decided from document sizes alone.

    Attributes:
      validation: indices of documents held out whole.
      tail_of: the document whose tail is held out instead, where every document is too large to be held out whole.
      tail_fraction: share of that document's characters in its tail.
    """

    validation: frozenset[int]
    tail_of: int | None = None
    tail_fraction: float = 0.0


def choose_split(sizes: Sequence[int], fraction: float, seed: int) -> Split:
    """Hold out documents of about `fraction` of all bytes.

    Documents are visited in an order drawn from `seed`; one is held out when that brings the held-out bytes nearer
    to the wanted number. When none does (one document, or all are larger than twice the wanted bytes), the tail of
    the largest document is held out.

    Args:
      sizes: UTF-8 bytes of each document.
      fraction: wanted share of validation bytes, above 0 and below 1.
    """
    wanted, taken = fraction * sum(sizes), 0
    chosen: set[int] = set()
    for index in np.random.default_rng(seed).permutation(len(sizes)).tolist():
        if abs(taken + sizes[index] - wanted) < abs(taken - wanted) and len(chosen) < len(sizes) - 1:
            chosen.add(index)
            taken += sizes[index]
    if chosen:
        return Split(frozenset(chosen))
    largest = int(np.argmax(sizes))
    return Split(frozenset(), largest, wanted / sizes[largest])


def split_documents(documents: Iterable[Document], split: Split) -> Iterator[tuple[Part, str]]:
    """Texts of a corpus, in its order, each with the part that it belongs to.

    Raises:
      DataError: the only documents are too short to leave text on both sides of the cut.
    """
    for index, document in enumerate(documents):
        if index == split.tail_of:
            head, tail = _cut(document.text, split.tail_fraction)
            yield "train", head
            yield "validation", tail
        else:
            yield ("validation" if index in split.validation else "train"), document.text


def _cut(text: str, tail_fraction: float) -> tuple[str, str]:
    """Head and tail; the cut moves to the next line end where there is one in the first half of the tail."""
    position = round(len(text) * (1 - tail_fraction))
    line_end = text.find("\n", position, position + (len(text) - position) // 2)
    position = position if line_end < 0 else line_end + 1
    head, tail = text[:position], text[position:]
    if not (head.strip() and tail.strip()):
        raise DataError(
            f"the corpus leaves no validation document: its largest document has {len(text)} characters; "
            "give more text or a larger data.validation_fraction"
        )
    return head, tail


def scan(documents: Iterable[Document]) -> tuple[list[int], str]:
    """UTF-8 bytes of each document, and a digest of all texts in order."""
    sizes, digest = [], hashlib.sha256()
    for document in documents:
        content = document.text.encode("utf-8")
        sizes.append(len(content))
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return sizes, digest.hexdigest()
