"""`foejax data list` and `foejax data fetch NAME`."""

from __future__ import annotations

import argparse
from typing import Any


def run_list(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """One line a corpus."""
    from foejax.data import list_corpora

    for name, description in list_corpora().items():
        print(f"{name:16} {description}")


def run_fetch(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Fetch a corpus, or find it in the cache, and say what it is."""
    from foejax.data import fetch_corpus, read_manifest

    path = fetch_corpus(options.name)
    manifest = read_manifest(options.name)
    print(f"{path}: {manifest['documents']:,} documents, {manifest['text_bytes']:,} bytes of text")
