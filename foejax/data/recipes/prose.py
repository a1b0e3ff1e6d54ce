"""Prose out of documentation: paragraphs that read like sentences, each kept once."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator

_STOP_WORDS = frozenset(
    "a about after all also an and any are as at be been before but by can could do does each for from had has have he "
    "her him his how i if in into is it its made may more most must my no not now of on one only or other our out over "
    "she should so some such than that the their them then there these they this those to two up us use used was we "
    "were what when where which while who will with would you your".split()
)
_MIN_CHARACTERS = 80
_MIN_WORDS = 12
_MIN_LETTER_SHARE = 0.62
_MIN_STOP_WORD_SHARE = 0.22

_SHINGLE_WORDS = 8
_SAMPLE_ONE_IN = 4
_REPEATED_SHARE = 0.6


def paragraphs_of_text(text: str) -> Iterator[str]:
    """Paragraphs of plain text, each on one line; empty lines and lines that hold only `%` separate them."""
    for paragraph in re.split(r"\n[ \t]*%?[ \t]*(?=\n)", text):
        yield " ".join(paragraph.split())


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads like sentences: long enough, mostly letters, with the usual share of stop words."""
    if len(paragraph) < _MIN_CHARACTERS:
        return False
    words = paragraph.split()
    if len(words) < _MIN_WORDS or sum(map(str.isalpha, paragraph)) < _MIN_LETTER_SHARE * len(paragraph):
        return False
    stop_words = sum(word.strip(".,;:!?()\"'").lower() in _STOP_WORDS for word in words)
    return stop_words >= _MIN_STOP_WORD_SHARE * len(words)


class RepeatFilter:
    """Drops paragraphs that were seen before, wholly or nearly.

    A paragraph is a near-duplicate when 60% of its sampled 8-word shingles occurred in paragraphs that were kept.
    A shingle is sampled by the checksum of its first word, so that two copies of a text sample the same ones.
    """

    def __init__(self) -> None:
        self._paragraphs: set[bytes] = set()
        self._shingles: set[int] = set()
        self._anchors: dict[str, bool] = {}

    def keep(self, paragraphs: Iterable[str]) -> Iterator[str]:
        """The paragraphs that bring something new, in order."""
        for paragraph in paragraphs:
            words = re.findall(r"\w+", paragraph.lower())
            digest = hashlib.blake2b(" ".join(words).encode("utf-8"), digest_size=8).digest()
            if digest in self._paragraphs:
                continue
            self._paragraphs.add(digest)
            shingles = set(self._sample(words))
            if not shingles or len(shingles & self._shingles) < _REPEATED_SHARE * len(shingles):
                self._shingles |= shingles
                yield paragraph

    def _sample(self, words: list[str]) -> Iterator[int]:
        for start in range(len(words) - _SHINGLE_WORDS + 1):
            if self._is_anchor(words[start]):
                yield zlib.crc32(" ".join(words[start : start + _SHINGLE_WORDS]).encode("utf-8"))

    def _is_anchor(self, word: str) -> bool:
        found = self._anchors.get(word)
        if found is None:
            found = self._anchors[word] = zlib.crc32(word.encode("utf-8")) % _SAMPLE_ONE_IN == 0
        return found
