"""Prose from 21 documentation packages of Debian 12: manuals, reference pages, dictionaries, essays."""

from __future__ import annotations

import gzip
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from foejax.data.errors import DataError
from foejax.data.recipes.clients import apt_download, unpack_deb
from foejax.data.recipes.prose import RepeatFilter, is_prose, paragraphs_of_text
from foejax.data.recipes.recipe import Recipe
from foejax.data.storage import progress_bar

# The versions that the figures in docs/data.md were measured with.
PACKAGES = {
    "anarchism": "15.3-3",
    "exim4-doc-html": "4.96-1",
    "openjdk-17-doc": "17.0.19+10-1~deb12u2",
    "postgresql-doc-15": "15.18-0+deb12u1",
    "r-doc-html": "4.2.2.20221110-2",
    "fortunes": "1:1.99.1-7.3",
    "dict-jargon": "4.4.7-3.1",
    "dict-devil": "1.0-13.1",
    "git-doc": "1:2.39.5-0+deb12u3",
    "dict-foldoc": "20230119-1",
    "dict-gcide": "0.48.5+nmu2",
    "libreoffice-help-en-us": "4:7.4.7-1+deb12u14",
    "cppreference-doc-en-html": "20170409-2",
    "python-django-doc": "3:3.2.25-0+deb12u3",
    "fp-docs-3.2.2": "3.2.2+dfsg-20",
    "perl-doc": "5.36.0-7+deb12u3",
    "linux-doc-6.1": "6.1.176-1",
    "python3.11-doc": "3.11.2-6+deb12u8",
    "wx3.2-doc": "3.2.2+dfsg-2",
    "sqlite3-doc": "3.40.1-2+deb12u2",
    "llvm-14-doc": "1:14.0.6-12",
}

# Collections of short entries become documents of about this many characters.
_COLLECTION_PIECE = 8_000

# Shorter pages say little but what their template says ("This is the complete list of members for ...").
_MIN_DOCUMENT = 200


def _download(workdir: Path) -> list[dict[str, str]]:
    _html_extractor()  # a missing library is told before 135 MB are fetched
    sources = []
    with progress_bar() as progress:
        for package, version in progress.track(PACKAGES.items(), description="downloading packages"):
            record = apt_download(package, workdir)
            if record["version"] != version:
                warnings.warn(
                    f"{package} is at version {record['version']}, not {version}: text and figures differ a little",
                    stacklevel=2,
                )
            sources.append(record)
    return sources


def _documents(workdir: Path) -> Iterator[dict[str, Any]]:
    extract, repeats = _html_extractor(), RepeatFilter()
    with progress_bar() as progress:
        for package in progress.track(PACKAGES, description="extracting prose"):
            root = workdir / "unpacked"
            unpack_deb(next(workdir.glob(f"{package}_*.deb")), root)
            for path in _text_files(root):
                paragraphs = list(repeats.keep(filter(is_prose, _paragraphs(path, extract))))
                for piece in _pieces(paragraphs, _COLLECTION_PIECE if _is_collection(path) else None):
                    if len(piece) >= _MIN_DOCUMENT:
                        yield {"text": piece, "package": package, "file": path.relative_to(root).as_posix()}
            shutil.rmtree(root)


def _html_extractor() -> Callable[[str], str]:
    try:
        from resiliparse.extract.html2text import extract_plain_text
    except ImportError:
        raise DataError(
            "data.corpus=debian-docs needs resiliparse to read HTML: pip install 'foejax[corpora]'"
        ) from None
    return lambda html: extract_plain_text(html, main_content=True, list_bullets=False, alt_texts=False)


def _is_collection(path: Path) -> bool:
    return path.name.endswith(".dict.dz") or path.parent.name == "fortunes"


def _plain_name(path: Path) -> str:
    return path.name.removesuffix(".gz")


def _text_files(root: Path) -> Iterator[Path]:
    """HTML first, so that a plain-text copy of a page counts as the repetition."""
    paths = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    readable = [
        path for path in paths if "_sources" not in path.parts and not path.name.startswith(("changelog", "NEWS"))
    ]
    yield from (path for path in readable if _plain_name(path).endswith((".html", ".htm")))
    for path in readable:
        fortune = path.parent.as_posix().endswith("games/fortunes") and "." not in path.name
        if fortune or _plain_name(path).endswith((".txt", ".md", ".rst", ".pod", ".dict.dz")):
            yield path


def _paragraphs(path: Path, extract: Callable[[str], str]) -> Iterator[str]:
    content = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
    text = _decode(content)
    if _plain_name(path).endswith((".html", ".htm")):
        # The extractor puts each block on a line of its own.
        return (" ".join(line.split()) for line in extract(text).splitlines())
    return paragraphs_of_text(_without_markup(text, path))


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _without_markup(text: str, path: Path) -> str:
    if path.suffix == ".dz":
        return re.sub(r"[{}]|\[(1913 Webster|PJC|WordNet [\d.]+)[^\]]*\]", "", text)
    if path.suffix == ".pod":
        return re.sub(r"^=\w+|\b[BCFIL]<+ ?|(?<=\S) ?>+(?=[\s.,;:)])", "", text, flags=re.MULTILINE)
    return text


def _pieces(paragraphs: list[str], size: int | None) -> Iterator[str]:
    """Paragraphs joined to documents: one, or as many as `size` characters each ask for."""
    piece: list[str] = []
    for paragraph in paragraphs:
        piece.append(paragraph)
        if size and sum(map(len, piece)) >= size:
            yield "\n\n".join(piece) + "\n"
            piece = []
    if piece:
        yield "\n\n".join(piece) + "\n"


RECIPE = Recipe(
    name="debian-docs",
    version=1,
    description="prose of 21 documentation packages, 106 MB, from Debian 12 by apt-get; needs foejax[corpora]",
    licence="free licences of the packages (GPL, GFDL, PSF, BSD and others): fetched, not redistributed",
    download=_download,
    documents=_documents,
)
