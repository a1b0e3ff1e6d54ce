"""Where things are kept that are costly to make and can be made again, outside the repository."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "FOEJAX_CACHE"


def cache_folder(*parts: str) -> Path:
    """A folder of the cache: `$FOEJAX_CACHE`, or `~/.cache/foejax`, and the given parts below it."""
    root = os.environ.get(CACHE_VARIABLE)
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "foejax").joinpath(*parts)
