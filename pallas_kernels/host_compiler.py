"""C++ functions that XLA calls on a CPU: compiled for the machine at hand when first needed, kept in the cache.

The compiler is that of the machine (`$CXX`, `c++`, `g++` or `clang++`). The header that XLA wants is part of jaxlib.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax

from pallas_kernels.disk_cache import cache_folder

logger = logging.getLogger("pallas_kernels")

_HEADER = Path(__file__).with_name("host_kernel.h")
_OPTIONS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-Wno-psabi")
_SECONDS = 300


class _CompilerError(RuntimeError):
    """There is no C++ compiler, or it could not compile the source."""


@functools.cache
def register(source: Path, name: str) -> str | None:
    """Makes the XLA handler `name` of a C++ source known to JAX as the CPU's custom call of that name, once.

    Args:
      source: the file; it defines the handler by `XLA_FFI_DEFINE_HANDLER_SYMBOL`.
      name: of the handler and of the custom call.

    Returns:
      None, or why it cannot be had on this machine.
    """
    try:
        library = ctypes.cdll.LoadLibrary(str(_compile(source)))
    except (OSError, subprocess.SubprocessError, _CompilerError) as error:
        return str(error)
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return None


def _compile(source: Path) -> Path:
    """The shared library of a source, from the cache or from the compiler."""
    headers = ["-isystem", jax.ffi.include_dir(), "-I", str(_HEADER.parent)]
    command = [*_find_compiler(), *_OPTIONS, *_machine_options(), *headers, str(source)]
    library = cache_folder("compiled") / f"{source.stem}-{_fingerprint(command, source)}.so"
    if library.exists():
        return library
    logger.info("compiling %s with %s", source.name, command[0])
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        unfinished = Path(folder) / library.name  # several processes may compile at once: the last one's stays
        done = _run([*command, "-o", str(unfinished)])
        if done.returncode != 0:
            first_error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-300:])
            raise _CompilerError(f"{command[0]} could not compile {source.name}: {first_error}")
        unfinished.replace(library)
    return library


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS)


def _find_compiler() -> list[str]:
    """The command that compiles C++; `$CXX` may hold options besides the compiler."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    raise _CompilerError(f"no C++ compiler ({' '.join(chosen) or 'c++, g++ or clang++'}): install one, or set CXX")


def _machine_options() -> list[str]:
    return ["-march=native"] if platform.machine() in ("x86_64", "AMD64") else ["-mcpu=native"]


def _fingerprint(command: list[str], source: Path) -> str:
    """Changes with the source, the command, the compiler, jaxlib and the processor's abilities."""
    compiler = _run([command[0], "--version"])
    texts = [path.read_text(encoding="utf-8") for path in (source, _HEADER)]
    parts = [*command[:-1], *texts, compiler.stdout, jax.lib.__version__, _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """The abilities that Linux lists; elsewhere the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
