"""Facts about the machine and the software, as a result must name them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

_REPOSITORY = Path(__file__).resolve().parents[2]
_PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "jax-triton", "triton", "torch", "tokamax", "numpy",
)  # fmt: skip
_L2_CACHE_SIZE = 38  # CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE of the CUDA driver
_LARGEST_KNOWN_L2 = 128 * 2**20


def facts(command: str, dry_run: bool) -> dict[str, Any]:
    """Device, driver, versions, sources and command."""
    device = jax.devices()[0]
    return {
        "dry_run": dry_run,
        "device": "cpu (dry run)" if dry_run else device.device_kind,
        "devices": 1,
        "gpu": None if dry_run else _nvidia_smi(),
        "l2_bytes": 0 if dry_run else l2_bytes(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "commit": _git_commit(),
        "sources": _hash("*.py"),
        "tables": _hash("*.json"),
        "command": command,
    }


def l2_bytes() -> int:
    """Size of the GPU's L2 cache from its driver; where it does not say, more than any GPU has."""
    size = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        driver.cuInit(0)
        failed = driver.cuDeviceGetAttribute(ctypes.byref(size), _L2_CACHE_SIZE, 0)
    except (OSError, AttributeError):
        failed = 1
    return _LARGEST_KNOWN_L2 if failed or size.value <= 0 else size.value


@functools.cache
def _hash(pattern: str) -> str:
    """Hash of the kernels' files: results of different kernels or tiles must not meet in one report."""
    digest = hashlib.sha256()
    for path in sorted((_REPOSITORY / "pallas_kernels").rglob(pattern)):
        digest.update(path.relative_to(_REPOSITORY).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi() -> str | None:
    query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
    return _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")


def _git_commit() -> str | None:
    return _output("git", "-C", str(_REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12")


def _output(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip().splitlines()[0] if result.stdout.strip() else None
