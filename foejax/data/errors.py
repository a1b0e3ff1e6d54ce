"""The one error of this room."""

from __future__ import annotations


class DataError(ValueError):
    """Text, tokens or a corpus that cannot be used; the message names it and the way out."""
