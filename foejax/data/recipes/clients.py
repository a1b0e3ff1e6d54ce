"""Package clients as they are configured on the machine: pip, npm, apt-get."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from foejax.data.errors import DataError

# pip asks an sdist's build backend for metadata even when it only downloads, which would fetch setuptools and run the
# archive's setup.py. This stand-in answers instead: nothing more is downloaded and no code of the archive runs.
_METADATA_BACKEND = """
import pathlib

class Backend:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, metadata_directory, config_settings=None):
        folder = pathlib.Path(metadata_directory, "{name}-{version}.dist-info")
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        return folder.name

__legacy__ = Backend()
"""


def pip_download_sdist(name: str, version: str, sha256: str, workdir: Path) -> dict[str, str]:
    """Download one sdist with this interpreter's pip and check it; returns its manifest record."""
    with tempfile.TemporaryDirectory(prefix="foejax-pip-") as backend:
        package = Path(backend, "setuptools")
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "build_meta.py").write_text(_METADATA_BACKEND.format(name=name, version=version))
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-build-isolation", "--dest", str(workdir), f"{name}=={version}"]
        _run(command, workdir, {"PYTHONPATH": backend, "PIP_USE_PEP517": "1"})
    return _checked(workdir / f"{name}-{version}.tar.gz", f"{name}=={version}", version, sha256)


def npm_pack(name: str, version: str, sha256: str, workdir: Path) -> dict[str, str]:
    """Download one npm package as a tarball and check it; returns its manifest record."""
    _run(["npm", "pack", "--silent", f"{name}@{version}"], workdir)
    archive = workdir / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    return _checked(archive, f"{name}@{version}", version, sha256)


def apt_download(name: str, workdir: Path) -> dict[str, str]:
    """Download one Debian package without installing it; returns its manifest record.

    Debian replaces packages at point releases, so the version is recorded rather than required.
    """
    _run(["apt-get", "download", name], workdir)
    archive = next(workdir.glob(f"{name}_*.deb"))
    version = _run(["dpkg-deb", "--field", str(archive), "Version"], workdir).strip()
    return {"package": name, "version": version, "sha256": _sha256(archive), "file": archive.name}


def unpack_deb(archive: Path, folder: Path) -> None:
    """Unpack the files of a Debian package into `folder`."""
    _run(["dpkg-deb", "--extract", str(archive), str(folder)], archive.parent)


def _run(command: list[str], workdir: Path, environment: dict[str, str] | None = None) -> str:
    """Output of a program; DataError when it is missing or fails."""
    if shutil.which(command[0]) is None:
        raise DataError(f"{command[0]} is not installed: install it, or choose another data.corpus")
    result = subprocess.run(
        command, cwd=workdir, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    if result.returncode:
        lines = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower() or line.startswith("E:")]
        reason = (errors or lines or ["no message"])[-1]
        shown = " ".join(["pip" if command[1:3] == ["-m", "pip"] else command[0], command[-1]])
        raise DataError(f"{shown} failed ({reason}): check the network and the client's settings, then try again")
    return result.stdout


def _checked(archive: Path, package: str, version: str, expected: str) -> dict[str, str]:
    found = _sha256(archive)
    if found != expected:
        raise DataError(
            f"{package} has sha256 {found} where {expected} is expected: the download is damaged or the registry "
            "serves another file; try again, and if it stays so use a registry that you trust"
        )
    return {"package": package, "version": version, "sha256": found, "file": archive.name}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
