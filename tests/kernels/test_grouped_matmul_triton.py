"""The Triton backend: its numbers in Triton's interpreter, and its compilation for an H200.

Shape letters: R rows, K contracted features, N output features, E experts.
"""

from __future__ import annotations

import importlib
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels.cases import CASES, Case, Expected, assert_close, expected_results, make_operands
from pallas_kernels import grouped_matmul
from pallas_kernels.deviceless import compile_for_h200, h200_mesh
from pallas_kernels.grouped_matmul import triton as backend
from pallas_kernels.grouped_matmul.api import GroupedMatmulError

pytestmark = pytest.mark.kernels

SHARED_MEMORY_SINCE_AMPERE = 99 * 1024
# K and N that are no multiples of a block, and mean group sizes for which the shared cases have none.
ODD_CASES = {
    "edges_below_a_block": Case(200, 40, 24, (30, 1, 57, 16, 80, 16)),
    "edges_above_a_block": Case(200, 70, 130, (0, 100, 0, 1, 64, 0)),
    "odd_features": Case(100, 33, 17, (61, 39)),
    "one_tall_expert": Case(301, 64, 40, (290,)),
    "fewer_rows_than_experts": Case(3, 8, 16, (0, 1, 0, 0, 1, 0, 0, 0)),
    "sixty_four_single_rows": Case(64, 48, 150, (1,) * 64),
}
ALL_CASES = CASES | ODD_CASES
CHECKS = [(name, dtype) for name in ALL_CASES for dtype in backend.MATMUL_TILES]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Expected]:
    """Product and gradients of every case, from one process in which Triton interprets its kernels."""
    requests: list[tuple[str, tuple[np.ndarray, ...], dict[str, bool]]] = []
    for name, dtype in CHECKS:
        x_RK, w_EKN, dy_RN, group_sizes_E = make_operands(ALL_CASES[name], dtype)
        requests += [
            ("matmul_call", (x_RK, w_EKN, group_sizes_E), {"transpose_rhs": False}),
            ("matmul_call", (dy_RN, w_EKN, group_sizes_E), {"transpose_rhs": True}),
            ("weight_gradient_call", (x_RK, dy_RN, group_sizes_E), {}),
        ]
    folder, root = tmp_path_factory.mktemp("interpreter"), Path(__file__).parents[2]
    (folder / "requests").write_bytes(pickle.dumps(requests))
    command = [sys.executable, str(Path(__file__).with_name("triton_interpreter.py"))]
    command += [str(folder / "requests"), str(folder / "results")]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = iter(pickle.loads((folder / "results").read_bytes()))
    return {check: Expected(next(results), next(results), next(results)) for check in CHECKS}


@pytest.mark.xdist_group("triton_interpreter")
@pytest.mark.parametrize(("name", "dtype"), CHECKS)
def test_product_and_gradients(interpreted: dict[tuple[str, str], Expected], name: str, dtype: str) -> None:
    expected = expected_results(make_operands(ALL_CASES[name], dtype))
    for found, wanted in zip(interpreted[name, dtype], expected, strict=True):
        assert found.dtype == dtype
        assert_close(found, wanted, dtype)


def test_cases_reach_every_tile() -> None:
    means = [case.rows / len(case.group_sizes) for case in ALL_CASES.values()]
    for table in (backend.MATMUL_TILES, backend.WEIGHT_GRADIENT_TILES):
        for tiles in table.values():
            assert {next(limit for limit in tiles if mean <= limit) for mean in means} == set(tiles)


class Compilation(NamedTuple):
    """One kernel: what jax-triton handed to XLA."""

    ptx: str
    shared_memory: int  # bytes


class Compiler:
    """Records the kernels that jax-triton compiles, and answers in the place of a device what it compiles for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        library = importlib.import_module("jax_triton.triton_lib")
        self.capability = 90
        self.compiled: list[Compilation] = []
        self._compile = library.compile_ttir_inplace
        monkeypatch.setattr(library, "compile_ttir_inplace", self._record)
        monkeypatch.setattr(library, "_COMPILED_KERNEL_CACHE", {})
        monkeypatch.setattr(library.triton_kernel_call_lib, "get_compute_capability", lambda device: self.capability)

    def _record(self, *arguments: Any) -> Any:
        result = self._compile(*arguments)
        self.compiled.append(Compilation(result.binary, result.shared_mem_bytes))
        return result


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return Compiler(monkeypatch)


def spilled_bytes(ptx: str, folder: Path) -> int:
    """What the assembler says of registers that did not fit."""
    ptxas = importlib.import_module("triton.knobs").nvidia.ptxas.path
    (folder / "kernel.ptx").write_text(ptx)
    command = [ptxas, "-arch=sm_90a", "-v", str(folder / "kernel.ptx"), "-o", str(folder / "kernel.cubin")]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    stores, loads = re.findall(r"(\d+) bytes spill", report)
    return int(stores) + int(loads)


def assert_one_good_kernel(compiler: Compiler, dtype: str, height: int, folder: Path) -> None:
    """On the right tensor cores, with asynchronous copies, within shared memory and registers.

    Args:
      height: rows of the block that the kernel computes; wgmma starts at 64.
    """
    (kernel,) = compiler.compiled
    instructions = {name for name in ("wgmma.mma_async", "mma.sync", "fma.rn.f32") if name in kernel.ptx}
    if dtype == "bfloat16":
        assert instructions == {"wgmma.mma_async" if height >= 64 else "mma.sync"}
    else:
        assert instructions == {"fma.rn.f32"} and "tf32" not in kernel.ptx
    assert "cp.async" in kernel.ptx
    assert 0 < kernel.shared_memory <= SHARED_MEMORY_SINCE_AMPERE
    assert spilled_bytes(kernel.ptx, folder) == 0


def abstract(dtype: str, *shapes: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def tiles_of(table: dict[str, dict[float, backend.Tile]]) -> list[tuple[str, float]]:
    return [(dtype, limit) for dtype, tiles in table.items() for limit in tiles]


def rows_reaching(limit: float, experts: int) -> int:
    return experts * (4096 if limit == math.inf else int(limit))


@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), tiles_of(backend.MATMUL_TILES))
def test_matmul_compiles_for_h200(
    compiler: Compiler, tmp_path: Path, dtype: str, limit: float, transpose_rhs: bool
) -> None:
    rows, experts, contracted, features = rows_reaching(limit, 8), 8, 2048, 1024
    w_shape = (experts, features, contracted) if transpose_rhs else (experts, contracted, features)
    operands = [*abstract(dtype, (rows, contracted), w_shape), *abstract("int32", (experts,))]
    compiled = compile_for_h200(lambda *args: backend.matmul(*args, transpose_rhs=transpose_rhs), *operands)
    assert "triton_kernel_call" in (compiled.as_text() or "")
    assert compiled.out_info.shape == (rows, features) and compiled.out_info.dtype == dtype
    assert_one_good_kernel(compiler, dtype, backend.MATMUL_TILES[dtype][limit].BM, tmp_path)


@pytest.mark.parametrize(("dtype", "limit"), tiles_of(backend.WEIGHT_GRADIENT_TILES))
def test_weight_gradient_compiles_for_h200(compiler: Compiler, tmp_path: Path, dtype: str, limit: float) -> None:
    rows, experts, contracted, features = rows_reaching(limit, 8), 8, 2048, 1024
    operands = [*abstract(dtype, (rows, contracted), (rows, features)), *abstract("int32", (experts,))]
    compiled = compile_for_h200(lambda *args: backend.weight_gradient(*args), *operands)
    assert "triton_kernel_call" in (compiled.as_text() or "")
    assert compiled.out_info.shape == (experts, contracted, features) and compiled.out_info.dtype == dtype
    assert_one_good_kernel(compiler, dtype, backend.WEIGHT_GRADIENT_TILES[dtype][limit].BK, tmp_path)


def products(x_RK: jax.Array, w_EKN: jax.Array, dy_RN: jax.Array, group_sizes_E: jax.Array) -> tuple[jax.Array, ...]:
    y_RN = backend.matmul(x_RK, w_EKN, group_sizes_E)
    dx_RK = backend.matmul(dy_RN, w_EKN, group_sizes_E, transpose_rhs=True)
    return y_RN, dx_RK, backend.weight_gradient(x_RK, dy_RN, group_sizes_E)


@pytest.mark.parametrize("dtype", backend.MATMUL_TILES)
def test_odd_shapes_compile_for_h200(compiler: Compiler, dtype: str) -> None:
    """Neither K nor N is a multiple of anything, and all weights together are beyond int32."""
    rows, experts, contracted, features = 1000, 300, 2777, 2689
    assert experts * contracted * features > 2**31
    shapes = ((rows, contracted), (experts, contracted, features), (rows, features))
    compile_for_h200(products, *abstract(dtype, *shapes), *abstract("int32", (experts,)))
    assert len(compiler.compiled) == 3


@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_kernels_lower_for_other_gpus(compiler: Compiler, capability: int) -> None:
    """Ampere, Ada and both Blackwells, with the tallest tiles."""
    compiler.capability = capability
    operands = [*abstract("bfloat16", (4096, 2048), (8, 2048, 1024), (4096, 1024)), *abstract("int32", (8,))]
    jax.jit(lambda *args: products(*args)).trace(*operands).lower(lowering_platforms=("cuda",))
    assert len(compiler.compiled) == 3
    for kernel in compiler.compiled:
        assert ("tcgen05.mma" if capability == 100 else "mma.sync") in kernel.ptx
        assert 0 < kernel.shared_memory <= SHARED_MEMORY_SINCE_AMPERE


def test_inside_shard_map_results_vary_as_all_operands_together(compiler: Compiler) -> None:
    """With the gradients of the public function; weights are the same on all devices, so theirs is summed."""
    mesh, axes = h200_mesh(("data", "expert"), (2, 2)), {"data", "expert"}

    def local(x_RK: jax.Array, w_EKN: jax.Array, sizes: jax.Array) -> tuple[jax.Array, ...]:
        def multiply(x_RK: jax.Array, w_EKN: jax.Array) -> jax.Array:
            return grouped_matmul(x_RK, w_EKN, sizes, implementation="triton")

        y_RN, transpose = jax.vjp(multiply, x_RK, w_EKN)
        assert jax.typeof(y_RN).manual_axis_type.varying == axes
        assert jax.typeof(backend.weight_gradient(x_RK, y_RN, sizes)).manual_axis_type.varying == axes
        return transpose(y_RN)

    specs = (P("data"), P(), P("expert"))
    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[:2]))
    operands = [*abstract("bfloat16", (256, 64), (8, 64, 32)), *abstract("int32", (16,))]
    compiled = sharded.lower(*operands).compile()
    assert "all-reduce" in (compiled.as_text() or "")
    assert len(compiler.compiled) == 3


@pytest.mark.parametrize("multiply", [backend.matmul, backend.weight_gradient])
def test_nothing_is_launched_without_rows(multiply: Callable[..., jax.Array]) -> None:
    second = jnp.ones((2, 5, 3)) if multiply is backend.matmul else jnp.ones((0, 3))
    result = multiply(jnp.ones((0, 5)), second, jnp.zeros((2,), jnp.int32))
    np.testing.assert_array_equal(result, np.zeros((0, 3) if multiply is backend.matmul else (2, 5, 3)))


def test_refusals_name_the_reason() -> None:
    assert backend.refusal((4, 3), (2, 3, 5), "bfloat16") is None
    with jax.enable_x64(True), pytest.raises(GroupedMatmulError, match="triton takes .* only, not float64; .*: xla"):
        grouped_matmul(jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.ones(2, jnp.int32), implementation="triton")
    backend.why_not_importable.cache_clear()
    try:
        with mock.patch.dict(sys.modules, {"jax_triton": None}):
            reason = backend.refusal((4, 3), (2, 3, 5), jnp.float32, transpose_rhs=True)
    finally:
        backend.why_not_importable.cache_clear()
    assert reason is not None
    assert reason.startswith("the triton backend needs the extra foejax[triton]: pip install foejax[triton]")
