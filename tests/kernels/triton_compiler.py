"""What tests of Triton kernels share to compile them for GPUs that are not there."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

SHARED_MEMORY_SINCE_AMPERE = 99 * 1024


class Kernel(NamedTuple):
    """What jax-triton handed to XLA."""

    ptx: str
    shared_memory: int  # bytes


class Compiler:
    """Records the kernels that jax-triton compiles, and answers in the place of a device what it compiles for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        library = importlib.import_module("jax_triton.triton_lib")
        self.capability = 90
        self.compiled: list[Kernel] = []
        self._compile = library.compile_ttir_inplace
        jax.clear_caches()
        monkeypatch.setattr(library, "compile_ttir_inplace", self._record)
        monkeypatch.setattr(library, "_COMPILED_KERNEL_CACHE", {})
        monkeypatch.setattr(library.triton_kernel_call_lib, "get_compute_capability", lambda device: self.capability)

    def _record(self, *arguments: Any) -> Any:
        result = self._compile(*arguments)
        self.compiled.append(Kernel(result.binary, result.shared_mem_bytes))
        return result


def assert_fits_registers_and_memory(kernel: Kernel, folder: Path) -> None:
    """No spills and no stack, within the shared memory of every GPU since Ampere."""
    assert kernel.shared_memory <= SHARED_MEMORY_SINCE_AMPERE
    ptxas = importlib.import_module("triton.knobs").nvidia.ptxas.path
    (folder / "kernel.ptx").write_text(kernel.ptx)
    command = [ptxas, "-arch=sm_90a", "-v", str(folder / "kernel.ptx"), "-o", str(folder / "kernel.cubin")]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", report) == ["0"] * 3, report


def assert_multiplies_well(kernel: Kernel, dtype: str, height: int, folder: Path) -> None:
    """On the right tensor cores, with asynchronous copies, within shared memory and registers.

    Args:
      dtype: of the rows.
      height: rows of the block that the kernel computes; wgmma starts at 64.
    """
    on_tensor_cores = {name for name in ("wgmma.mma_async", "mma.sync") if name in kernel.ptx}
    if dtype == "bfloat16":
        assert on_tensor_cores == {"wgmma.mma_async" if height >= 64 else "mma.sync"}
    else:
        assert not on_tensor_cores and "fma.rn.f32" in kernel.ptx
    assert "cp.async" in kernel.ptx and kernel.shared_memory > 0
    assert_fits_registers_and_memory(kernel, folder)


def abstract(dtype: str, *shapes: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
