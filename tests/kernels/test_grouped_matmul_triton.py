"""The Triton backend: its numbers in Triton's interpreter, and its compilation for an H200.

Shape letters: R rows, K contracted features, N output features, E experts.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels.cases import CASES, Case, Expected, assert_close, expected_results, make_operands
from kernels.eight_bits import EIGHT_BITS, every_number, in_eight_bits, out_of_eight_bits
from kernels.triton_compiler import SHARED_MEMORY_SINCE_AMPERE, Compiler, abstract, assert_multiplies_well
from kernels.triton_interpreter import run_interpreted
from pallas_kernels import grouped_matmul
from pallas_kernels.backends import load_backend
from pallas_kernels.deviceless import compile_for_h200, h200_mesh
from pallas_kernels.grouped_matmul.api import GroupedMatmulError
from pallas_kernels.triton_tiles import MATMUL_TILES, QUANTIZED_TILES, WEIGHT_GRADIENT_TILES, Tile

pytestmark = pytest.mark.kernels

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
CHECKS = [(name, dtype) for name in ALL_CASES for dtype in MATMUL_TILES]
# Without the case of many experts, which takes long in the interpreter and is about what both kinds of weights share.
QUANTIZED_CHECKS = [(*check, weights) for check in CHECKS for weights in EIGHT_BITS if check[0] != "many_experts"]


def backend() -> ModuleType:
    """Imported late, because environments without Triton collect these tests too."""
    return load_backend("grouped_matmul", "triton")


class QuantizedOperands(NamedTuple):
    x_RK: np.ndarray
    values_ENK: np.ndarray
    scales_EN: np.ndarray
    group_sizes_E: np.ndarray


def quantized_operands(case: Case, dtype: str, weights: str) -> QuantizedOperands:
    """Weights in 8 bits of features of very different magnitude; scales of experts without rows are NaN."""
    x_RK, w_EKN, _, sizes = make_operands(case, dtype)
    magnitude_N = 10 ** np.random.default_rng(1).uniform(-2, 2, size=case.features)
    values_ENK, scales_EN = in_eight_bits(w_EKN.astype(np.float64) * magnitude_N, weights)
    scales_EN[sizes == 0] = np.nan
    return QuantizedOperands(x_RK, values_ENK, scales_EN, sizes)


class Interpreted(NamedTuple):
    """What the kernels gave, by the names of the checks."""

    plain: dict[tuple[str, str], Expected]
    quantized: dict[tuple[str, str, str], jax.Array]
    numbers: dict[tuple[str, str], jax.Array]


@jax.disable_jit()  # operations compiled one by one serve several checks
def run_checks() -> Interpreted:
    plain, quantized, numbers = {}, {}, {}
    for name, dtype in CHECKS:
        x_RK, w_EKN, dy_RN, group_sizes_E = map(jnp.asarray, make_operands(ALL_CASES[name], dtype))
        plain[name, dtype] = Expected(*products(x_RK, w_EKN, dy_RN, group_sizes_E))
    for name, dtype, weights in QUANTIZED_CHECKS:
        x_RK, w, scales_EN, sizes = map(jnp.asarray, quantized_operands(ALL_CASES[name], dtype, weights))
        found = backend().matmul(x_RK, w, sizes, transpose_rhs=True, scales_EN=scales_EN)
        quantized[name, dtype, weights] = found
    for dtype in MATMUL_TILES:
        for weights in EIGHT_BITS:
            values_ENK = jnp.asarray(every_number(weights))[None, None]
            x_RK, size = jnp.eye(values_ENK.shape[2], dtype=dtype), jnp.asarray([values_ENK.shape[2]])
            scale = jnp.full((1, 1), 0.5, jnp.float32)
            numbers[dtype, weights] = backend().matmul(x_RK, values_ENK, size, transpose_rhs=True, scales_EN=scale)
    return Interpreted(plain, quantized, numbers)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Interpreted:
    return run_interpreted(run_checks, tmp_path_factory.mktemp("interpreter"))


@pytest.mark.xdist_group("matmul_interpreter")
@pytest.mark.parametrize(("name", "dtype"), CHECKS)
def test_product_and_gradients(interpreted: Interpreted, name: str, dtype: str) -> None:
    expected = expected_results(make_operands(ALL_CASES[name], dtype))
    for found, wanted in zip(interpreted.plain[name, dtype], expected, strict=True):
        assert found.dtype == dtype
        assert_close(found, wanted, dtype)


@pytest.mark.xdist_group("matmul_interpreter")
@pytest.mark.parametrize(("name", "dtype", "weights"), QUANTIZED_CHECKS)
def test_product_with_weights_in_8_bits(interpreted: Interpreted, name: str, dtype: str, weights: str) -> None:
    """Feature by feature, since their magnitudes differ."""
    _, values_ENK, scales_EN, _ = quantized_operands(ALL_CASES[name], dtype, weights)
    operands = make_operands(ALL_CASES[name], dtype)._replace(w_EKN=out_of_eight_bits(values_ENK, scales_EN))
    expected = expected_results(operands).y_RN
    found = interpreted.quantized[name, dtype, weights]
    assert found.dtype == dtype and found.shape == expected.shape
    for found_R, expected_R in zip(found.T, expected.T, strict=True):
        assert_close(found_R, expected_R, dtype)


@pytest.mark.xdist_group("matmul_interpreter")
@pytest.mark.parametrize("weights", EIGHT_BITS)
@pytest.mark.parametrize("dtype", MATMUL_TILES)
def test_every_number_of_8_bits_converts_exactly(interpreted: Interpreted, dtype: str, weights: str) -> None:
    numbers = every_number(weights)
    assert len(numbers) == {"int8": 255, "float8_e4m3fn": 254}[weights]
    np.testing.assert_array_equal(interpreted.numbers[dtype, weights][:, 0].astype("f8"), numbers.astype("f8") / 2)


def test_cases_reach_every_tile() -> None:
    means = [case.rows / len(case.group_sizes) for case in ALL_CASES.values()]
    for table in (MATMUL_TILES, QUANTIZED_TILES, WEIGHT_GRADIENT_TILES):
        for tiles in table.values():
            assert {next(limit for limit in tiles if mean <= limit) for mean in means} == set(tiles)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return Compiler(monkeypatch)


def tiles_of(table: dict[str, dict[float, Tile]]) -> list[tuple[str, float]]:
    return [(dtype, limit) for dtype, tiles in table.items() for limit in tiles]


def rows_reaching(limit: float, experts: int) -> int:
    return experts * (4096 if limit == math.inf else int(limit))


@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), tiles_of(MATMUL_TILES))
def test_matmul_compiles_for_h200(
    compiler: Compiler, tmp_path: Path, dtype: str, limit: float, transpose_rhs: bool
) -> None:
    rows, experts, contracted, features = rows_reaching(limit, 8), 8, 2048, 1024
    w_shape = (experts, features, contracted) if transpose_rhs else (experts, contracted, features)
    operands = [*abstract(dtype, (rows, contracted), w_shape), *abstract("int32", (experts,))]
    compiled = compile_for_h200(lambda *args: backend().matmul(*args, transpose_rhs=transpose_rhs), *operands)
    assert "triton_kernel_call" in (compiled.as_text() or "")
    assert compiled.out_info.shape == (rows, features) and compiled.out_info.dtype == dtype
    (kernel,) = compiler.compiled
    assert_multiplies_well(kernel, dtype, MATMUL_TILES[dtype][limit].BM, tmp_path)


@pytest.mark.parametrize("weights", EIGHT_BITS)
@pytest.mark.parametrize(("dtype", "limit"), tiles_of(QUANTIZED_TILES))
def test_matmul_with_weights_in_8_bits_compiles_for_h200(
    compiler: Compiler, tmp_path: Path, dtype: str, limit: float, weights: str
) -> None:
    """Without the weights in another form in memory, and e4m3 by the instruction that converts pairs."""
    rows, experts, contracted, features = rows_reaching(limit, 8), 8, 2048, 1024
    operands = [*abstract(dtype, (rows, contracted)), *abstract(weights, (experts, features, contracted))]
    operands += [*abstract("int32", (experts,)), *abstract("float32", (experts, features))]
    compiled = compile_for_h200(multiply_quantized, *operands)
    assert compiled.out_info.shape == (rows, features) and compiled.out_info.dtype == dtype
    assert compiled.memory_analysis().temp_size_in_bytes < 2**16
    (kernel,) = compiler.compiled
    assert_multiplies_well(kernel, dtype, QUANTIZED_TILES[dtype][limit].BM, tmp_path)
    assert ("cvt.rn.f16x2.e4m3x2" in kernel.ptx) == (weights == "float8_e4m3fn")
    assert "cvt.bf16.f16" not in kernel.ptx


@pytest.mark.parametrize(("dtype", "limit"), tiles_of(WEIGHT_GRADIENT_TILES))
def test_weight_gradient_compiles_for_h200(compiler: Compiler, tmp_path: Path, dtype: str, limit: float) -> None:
    rows, experts, contracted, features = rows_reaching(limit, 8), 8, 2048, 1024
    operands = [*abstract(dtype, (rows, contracted), (rows, features)), *abstract("int32", (experts,))]
    compiled = compile_for_h200(lambda *args: backend().weight_gradient(*args), *operands)
    assert "triton_kernel_call" in (compiled.as_text() or "")
    assert compiled.out_info.shape == (experts, contracted, features) and compiled.out_info.dtype == dtype
    (kernel,) = compiler.compiled
    assert_multiplies_well(kernel, dtype, WEIGHT_GRADIENT_TILES[dtype][limit].BK, tmp_path)


def products(x_RK: jax.Array, w_EKN: jax.Array, dy_RN: jax.Array, group_sizes_E: jax.Array) -> tuple[jax.Array, ...]:
    y_RN = backend().matmul(x_RK, w_EKN, group_sizes_E)
    dx_RK = backend().matmul(dy_RN, w_EKN, group_sizes_E, transpose_rhs=True)
    return y_RN, dx_RK, backend().weight_gradient(x_RK, dy_RN, group_sizes_E)


def multiply_quantized(x_RK: jax.Array, w_ENK: jax.Array, sizes: jax.Array, scales_EN: jax.Array) -> jax.Array:
    return backend().matmul(x_RK, w_ENK, sizes, transpose_rhs=True, scales_EN=scales_EN)


@pytest.mark.parametrize("dtype", MATMUL_TILES)
def test_odd_shapes_compile_for_h200(compiler: Compiler, dtype: str) -> None:
    """Neither K nor N is a multiple of anything, and all weights together are beyond int32."""
    rows, experts, contracted, features = 1000, 300, 2777, 2689
    assert experts * contracted * features > 2**31
    shapes = ((rows, contracted), (experts, contracted, features), (rows, features))
    compile_for_h200(products, *abstract(dtype, *shapes), *abstract("int32", (experts,)))
    assert len(compiler.compiled) == 3
    for weights in EIGHT_BITS:
        operands = [*abstract(dtype, shapes[0]), *abstract(weights, (experts, features, contracted))]
        operands += [*abstract("int32", (experts,)), *abstract("float32", (experts, features))]
        compile_for_h200(multiply_quantized, *operands)
    assert len(compiler.compiled) == 5


@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_kernels_lower_for_other_gpus(compiler: Compiler, capability: int) -> None:
    """Ampere, Ada and both Blackwells, with the tallest tiles."""
    compiler.capability = capability
    operands = [*abstract("bfloat16", (4096, 2048), (8, 2048, 1024), (4096, 1024)), *abstract("int32", (8,))]
    jax.jit(lambda *args: products(*args)).trace(*operands).lower(lowering_platforms=("cuda",))
    assert len(compiler.compiled) == 3
    for weights in EIGHT_BITS if capability >= 89 else ("int8",):
        operands = [*abstract("bfloat16", (4096, 2048)), *abstract(weights, (8, 1024, 2048))]
        operands += [*abstract("int32", (8,)), *abstract("float32", (8, 1024))]
        jax.jit(multiply_quantized).trace(*operands).lower(lowering_platforms=("cuda",))
    assert len(compiler.compiled) == (5 if capability >= 89 else 4)
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
        assert jax.typeof(backend().weight_gradient(x_RK, y_RN, sizes)).manual_axis_type.varying == axes
        return transpose(y_RN)

    specs = (P("data"), P(), P("expert"))
    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[:2]))
    operands = [*abstract("bfloat16", (256, 64), (8, 64, 32)), *abstract("int32", (16,))]
    compiled = sharded.lower(*operands).compile()
    assert "all-reduce" in (compiled.as_text() or "")
    assert len(compiler.compiled) == 3


@pytest.mark.parametrize("operation", ["matmul", "weight_gradient"])
def test_nothing_is_launched_without_rows(operation: str) -> None:
    second = jnp.ones((2, 5, 3)) if operation == "matmul" else jnp.ones((0, 3))
    result = getattr(backend(), operation)(jnp.ones((0, 5)), second, jnp.zeros((2,), jnp.int32))
    np.testing.assert_array_equal(result, np.zeros((0, 3) if operation == "matmul" else (2, 5, 3)))


def test_refusals_name_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend().refusal((4, 3), (2, 3, 5), "bfloat16") is None
    with jax.enable_x64(True), pytest.raises(GroupedMatmulError, match="triton takes .* only, not float64; .*: xla"):
        grouped_matmul(jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.ones(2, jnp.int32), implementation="triton")
    shapes = ((4, 3), (2, 5, 3), "bfloat16")
    assert "int8 and float8_e4m3fn only, not int4" in str(backend().refusal(*shapes, weight_dtype="int4"))
    for capability in ("8.9", "9.0", "12.0", "gfx942", "8.0"):
        monkeypatch.setattr(jax, "devices", [SimpleNamespace(compute_capability=capability)].copy)
        assert backend().refusal(*shapes, transpose_rhs=True, weight_dtype="int8") is None
        reason = backend().refusal(*shapes, transpose_rhs=True, weight_dtype="float8_e4m3fn")
        assert (reason is None) == (capability != "8.0")
    assert reason == "triton takes float8_e4m3fn weights from compute capability 8.9 on, not 8.0"


def test_without_its_packages_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    for name in ("pallas_kernels.grouped_matmul.triton", "pallas_kernels.jax_triton_launch"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(GroupedMatmulError, match=r"triton needs the extra foejax\[triton\] .*; these can: .*xla"):
        grouped_matmul(jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.ones(2, jnp.int32), implementation="triton")
