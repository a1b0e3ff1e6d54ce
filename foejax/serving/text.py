"""Text of tokens as they come: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]


class TextStream:
    """The growing text of one continuation."""

    def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
        """`decode` turns token ids into text, with U+FFFD for bytes that are no character yet."""
        self.text = ""
        self._decode, self._stop = decode, tuple(stop)
        self._tokens: list[int] = []
        self._shown = 0
        self._settled = self._read = 0

    def append(self, tokens: Sequence[int]) -> bool:
        """Take further tokens; True where a stop string has come up, before which the text then ends."""
        for token in tokens:
            self._tokens.append(token)
            # A window of tokens is decoded with and without the new ones: some tokenizers write a token otherwise at
            # the start of a text than inside it.
            before = self._decode(self._tokens[self._settled : self._read])
            after = self._decode(self._tokens[self._settled :])
            if len(after) <= len(before) or after.endswith("\ufffd"):
                continue
            self._settled, self._read = self._read, len(self._tokens)
            if self._extend(after[len(before) :]):
                return True
        return False

    def finish(self) -> None:
        """No more tokens: bytes that never became a character are shown as U+FFFD."""
        before = self._decode(self._tokens[self._settled : self._read])
        after = self._decode(self._tokens[self._settled :])
        self._read = len(self._tokens)
        self._extend(after[len(before) :])

    def take(self, *, finished: bool) -> str:
        """What has become certain since the last call; all the rest once `finished`."""
        end = len(self.text) if finished else len(self.text) - self._held_back()
        new = self.text[self._shown : end]
        self._shown = max(end, self._shown)
        return new

    def _extend(self, new: str) -> bool:
        start = max(len(self.text) - max(map(len, self._stop), default=0), 0)
        self.text += new
        places = [place for place in (self.text.find(stop, start) for stop in self._stop) if place >= 0]
        if places:
            self.text = self.text[: min(places)]
        return bool(places)

    def _held_back(self) -> int:
        """Characters at the end with which a stop string begins."""
        longest = max(map(len, self._stop), default=0) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stop):
                return length
        return 0
