"""The JSON file of each part, which is written whenever something has been found and gone on from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PARTS = ("bytes", "loss", "speed", "load")


def part_file(folder: Path, part: str) -> Path:
    """Where a part keeps what it has found."""
    return folder / f"{part}.json"


def read_part(folder: Path, part: str) -> dict[str, Any] | None:
    """What a part has found; None before it has run."""
    path = part_file(folder, part)
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_part(folder: Path, part: str, found: Mapping[str, Any]) -> None:
    """Replace the file of a part as a whole."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{part}.json.unfinished"
    unfinished.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, part_file(folder, part))


def open_part(folder: Path, part: str, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """A part's file to add runs to: the one there is, or an empty one of these settings.

    Args:
      settings: what all runs of the file have in common, plain JSON values.
      facts: machine and command, for the report.

    Raises:
      ValueError: the file there is was made with other settings.
    """
    found = read_part(folder, part)
    if found is None:
        return {"facts": dict(facts), "settings": dict(settings), "runs": []}
    if found["settings"] != dict(settings):
        raise ValueError(
            f"{part_file(folder, part)} was made with {found['settings']}, and this run has {dict(settings)}: remove "
            "it, or choose another --out"
        )
    return found
