"""The fused SwiGLU in Triton: its numbers in Triton's interpreter, and its compilation for an H200.

Shape letters: X tokens or rows, R rows, K width, F expert hidden size, E experts.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels.cases import CASES, Case, assert_close, expected_results, make_operands
from kernels.eight_bits import EIGHT_BITS, in_eight_bits, out_of_eight_bits
from kernels.triton_compiler import SHARED_MEMORY_SINCE_AMPERE, Compiler, abstract, assert_multiplies_well
from kernels.triton_interpreter import run_interpreted
from pallas_kernels import grouped_matmul, grouped_swiglu
from pallas_kernels.backends import load_backend
from pallas_kernels.deviceless import compile_for_h200, h200_mesh
from pallas_kernels.gathered_rows import GatheredRows
from pallas_kernels.quantized import QuantizedWeights
from pallas_kernels.triton_tiles import MATMUL_TILES, QUANTIZED_TILES

pytestmark = pytest.mark.kernels


class Variant(NamedTuple):
    """One of the kernel's paths: dtype of weights in 8 bits, rows by token, row weights, inputs of the activation."""

    weights: str | None = None
    gathered: bool = False
    weighted: bool = False
    saves: bool = False


VARIANTS = {
    "weighted_saved": Variant(weighted=True, saves=True),
    "gathered": Variant(gathered=True),
    "gathered_weighted_saved": Variant(gathered=True, weighted=True, saves=True),
    "int8": Variant("int8"),
    "int8_gathered_weighted": Variant("int8", gathered=True, weighted=True),
    "e4m3_gathered": Variant("float8_e4m3fn", gathered=True),
}
SMALL_CASES = {name: case for name, case in CASES.items() if name != "many_experts"} | {
    "edges_below_a_block": Case(200, 40, 24, (30, 1, 57, 16, 80, 16)),
    "edges_above_a_block": Case(200, 70, 130, (0, 100, 0, 1, 64, 0)),
    "odd_features": Case(100, 33, 17, (61, 39)),
    "decode": Case(24, 96, 80, (1, 0, 0, 3, 1, 0, 2, 1, 1, 0, 0, 9)),
}
CHECKS = [(case, variant, "bfloat16") for case in SMALL_CASES for variant in VARIANTS]
CHECKS += [(case, variant, "float32") for case in SMALL_CASES for variant in VARIANTS if "gathered" in variant]


class Operands(NamedTuple):
    """What `swiglu` takes, in the order of its arguments."""

    x_XK: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    group_sizes_E: np.ndarray
    token_R: np.ndarray | None
    weights_R: np.ndarray | None
    scales: tuple[np.ndarray, np.ndarray] | None


@functools.cache
def operands_and_expected(case: Case, variant: Variant, dtype: str) -> tuple[Operands, tuple[np.ndarray, ...]]:
    """Random operands, and hidden, gate and up in float64. What no result may depend on is NaN.

    That is padding rows, tokens that no row is, and their weights; and weights of experts without rows (in 8 bits their
    scales). Some rows of a group have a token out of range, and are zeros.
    """
    random = np.random.default_rng(7)
    x_RK, gate_EKF, _, sizes = make_operands(case, dtype)
    up_EKF = random.normal(size=gate_EKF.shape).astype(gate_EKF.dtype)
    live, row_R = min(sizes.sum(), case.rows), np.arange(case.rows)
    shrink = case.contracted**-0.5  # so that the activation bends
    gate_EKF, up_EKF = ((w.astype("f8") * shrink).astype(w.dtype) for w in (gate_EKF, up_EKF))
    x_XK, token_R = x_RK, None
    if variant.gathered:
        x_XK = random.normal(size=(live // 2 + 2, case.contracted)).astype(x_RK.dtype)
        x_XK[-1] = np.nan
        out_of_range = np.resize([len(x_XK), -1, 2**31 - 1, -(2**31)], case.rows)
        token_R = np.where(row_R % 7 == 6, out_of_range, random.integers(0, len(x_XK) - 1, case.rows))
        token_R[live:] = np.where(row_R[live:] % 2, len(x_XK) - 1, out_of_range[live:])
        x_RK = np.where(row_R[:, None] % 7 == 6, 0, x_XK[np.clip(token_R, 0, len(x_XK) - 1)])
    weights_R = np.where(row_R < live, random.normal(size=case.rows), np.nan) if variant.weighted else None
    gate, up, scales = gate_EKF, up_EKF, None
    if variant.weights is not None:
        (gate, gate_scales), (up, up_scales) = (in_eight_bits(w, variant.weights) for w in (gate, up))
        scales = (gate_scales, up_scales)
        gate_EKF, up_EKF = out_of_eight_bits(gate, gate_scales), out_of_eight_bits(up, up_scales)
    products = make_operands(case, dtype)._replace(x_RK=x_RK)
    gate_RF, up_RF = (expected_results(products._replace(w_EKN=w)).y_RN for w in (gate_EKF, up_EKF))
    hidden_RF = gate_RF / (1 + np.exp(-gate_RF)) * up_RF
    if weights_R is not None:
        weights_R = weights_R.astype("f4")
        hidden_RF[:live] *= weights_R[:live, None].astype("f8")
    for unused in (gate, up) if scales is None else scales:
        unused[sizes == 0] = np.nan
    token_R = None if token_R is None else token_R.astype(np.int32)
    operands = Operands(x_XK, gate, up, sizes, token_R, weights_R, scales)
    return operands, (hidden_RF, gate_RF, up_RF)[: 3 if variant.saves else 1]


def run(*operands: Any, save_inputs: bool) -> tuple[jax.Array, ...]:
    x_XK, gate, up, sizes, token_R, weights_R, scales = operands
    return load_backend("grouped_swiglu", "triton").swiglu(
        x_XK, gate, up, sizes, token_R=token_R, weights_R=weights_R, scales=scales, save_inputs=save_inputs
    )


@jax.disable_jit()  # operations compiled one by one serve all variants of a case
def run_checks() -> dict[tuple[str, str, str], tuple[jax.Array, ...]]:
    results = {}
    for case, variant, dtype in CHECKS:
        operands, _ = operands_and_expected(SMALL_CASES[case], VARIANTS[variant], dtype)
        results[case, variant, dtype] = run(*jax.tree.map(jnp.asarray, operands), save_inputs=VARIANTS[variant].saves)
    return results


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], tuple[np.ndarray, ...]]:
    return run_interpreted(run_checks, tmp_path_factory.mktemp("interpreter"))


@pytest.mark.xdist_group("swiglu_interpreter")
@pytest.mark.parametrize(("case", "variant", "dtype"), CHECKS)
def test_hidden_and_what_the_activation_was_given(
    interpreted: dict[tuple[str, str, str], tuple[np.ndarray, ...]], case: str, variant: str, dtype: str
) -> None:
    _, expected = operands_and_expected(SMALL_CASES[case], VARIANTS[variant], dtype)
    for found, wanted in zip(interpreted[case, variant, dtype], expected, strict=True):
        assert found.dtype == dtype
        assert_close(found, wanted, dtype)


def test_cases_reach_every_tile() -> None:
    means = [case.rows / len(case.group_sizes) for case in SMALL_CASES.values()]
    for table in (MATMUL_TILES, QUANTIZED_TILES):
        for tiles in table.values():
            assert {next(limit for limit in tiles if mean <= limit) for mean in means} == set(tiles)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return Compiler(monkeypatch)


def abstract_operands(rows: int, experts: int, width: int, hidden: int, dtype: str, variant: Variant) -> Operands:
    """Of a model of which each token goes to two experts."""
    w_shape = (experts, width, hidden) if variant.weights is None else (experts, hidden, width)
    (x, *_), (gate, up) = abstract(dtype, (rows // 2, width)), abstract(variant.weights or dtype, w_shape, w_shape)
    scales = abstract("float32", (experts, hidden), (experts, hidden))
    return Operands(
        x_XK=x if variant.gathered else abstract(dtype, (rows, width))[0],
        gate=gate,
        up=up,
        group_sizes_E=abstract("int32", (experts,))[0],
        token_R=abstract("int32", (rows,))[0] if variant.gathered else None,
        weights_R=abstract("float32", (rows,))[0] if variant.weighted else None,
        scales=None if variant.weights is None else (scales[0], scales[1]),
    )


def tiles_of(weights: str | None) -> dict[str, Any]:
    return MATMUL_TILES if weights is None else QUANTIZED_TILES


@pytest.mark.parametrize(
    ("weights", "dtype", "limit"),
    [(w, dtype, limit) for w in (None, *EIGHT_BITS) for dtype in MATMUL_TILES for limit in tiles_of(w)[dtype]],
)
def test_compiles_for_h200(compiler: Compiler, tmp_path: Path, weights: str | None, dtype: str, limit: float) -> None:
    """With everything fused that there is, and no copy of rows or weights in memory."""
    variant = Variant(weights, gathered=True, weighted=True, saves=weights is None)
    rows = 8 * (4096 if limit == math.inf else int(limit))
    operands = abstract_operands(rows, 8, 2048, 1024, dtype, variant)
    compiled = compile_for_h200(functools.partial(run, save_inputs=variant.saves), *operands)
    assert [(out.shape, out.dtype) for out in compiled.out_info] == [((rows, 1024), dtype)] * (
        3 if variant.saves else 1
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 2**16
    (kernel,) = compiler.compiled
    assert_multiplies_well(kernel, dtype, tiles_of(weights)[dtype][limit].BM, tmp_path)


@pytest.mark.parametrize("weights", [None, *EIGHT_BITS])
@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_lowers_for_other_gpus_and_odd_shapes(compiler: Compiler, capability: int, weights: str | None) -> None:
    """Ampere, Ada and both Blackwells; the odd weights, all together, are beyond int32."""
    if weights == "float8_e4m3fn" and capability == 80:
        return  # `refusal` says so
    compiler.capability = capability
    variant = Variant(weights, gathered=True)
    for shape in ((4096, 8, 2048, 1024), (1000, 300, 2777, 2689)):
        operands = abstract_operands(*shape, "bfloat16", variant)
        jax.jit(functools.partial(run, save_inputs=False)).trace(*operands).lower(lowering_platforms=("cuda",))
    assert len(compiler.compiled) == 2
    for kernel in compiler.compiled:
        assert 0 < kernel.shared_memory <= SHARED_MEMORY_SINCE_AMPERE


def test_inside_shard_map_results_vary_as_all_operands_together(compiler: Compiler) -> None:
    """With the gradients of the public function; weights are the same on all devices, so theirs is summed."""
    mesh, axes = h200_mesh(("data", "expert"), (2, 2)), {"data", "expert"}

    def local(x_RK: jax.Array, w_EKF: jax.Array, sizes: jax.Array) -> tuple[jax.Array, ...]:
        def activate(x_RK: jax.Array, w_EKF: jax.Array) -> jax.Array:
            return grouped_swiglu(x_RK, w_EKF, w_EKF, sizes, implementation="triton")

        hidden_RF, transpose = jax.vjp(activate, x_RK, w_EKF)
        assert jax.typeof(hidden_RF).manual_axis_type.varying == axes
        direct = run(x_RK, w_EKF, w_EKF, sizes, None, None, None, save_inputs=True)
        assert all(jax.typeof(array).manual_axis_type.varying == axes for array in direct)
        return transpose(hidden_RF)

    specs = (P("data"), P(), P("expert"))
    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[:2]))
    operands = [*abstract("bfloat16", (256, 64), (8, 64, 32)), *abstract("int32", (16,))]
    compiled = sharded.lower(*operands).compile()
    assert "all-reduce" in (compiled.as_text() or "")
    assert "grouped_swiglu" in str(jax.make_jaxpr(sharded)(*operands))


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_the_public_functions_hand_tokens_and_scales_to_the_kernels(compiler: Compiler, dtype: str) -> None:
    """A decode step of 64 tokens with two experts each: no copy of their rows, and no weights in another form.

    Of 512 output features only, so that their memory has no room for such a copy.
    """

    def decode(x_NK: jax.Array, *operands: Any) -> jax.Array:
        gate, up, down, sizes, rows, weights_R = operands
        hidden_RF = grouped_swiglu(x_NK, gate, up, sizes, rows=rows, row_weights_R=weights_R, implementation="triton")
        return grouped_matmul(hidden_RF, down, sizes, implementation="triton")

    values, scales = abstract(dtype, (64, 1024, 2048), (64, 512, 1024)), abstract("float32", (64, 1024), (64, 512))
    up, down = map(QuantizedWeights, values, scales)
    (sizes,), (x_NK,), (weights_R,) = (
        abstract("int32", (64,)),
        abstract("bfloat16", (64, 2048)),
        abstract("float32", (128,)),
    )
    rows = GatheredRows(*abstract("int32", (128,), (2, 64)))
    compiled = compile_for_h200(decode, x_NK, up, up, down, sizes, rows, weights_R)
    text = compiled.as_text() or ""
    assert text.count('custom_call_target="triton_kernel_call"') == len(compiler.compiled) == 2
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 128 * 1024 + 2**16  # hidden, and the tasks


def test_nothing_is_launched_without_rows_or_tokens() -> None:
    w, sizes = jnp.ones((2, 5, 3)), jnp.zeros((2,), jnp.int32)
    for tokens, rows in ((4, 0), (0, 4)):
        token_R = jnp.full((rows,), tokens, jnp.int32)
        results = run(jnp.ones((tokens, 5)), w, w, sizes, token_R, None, None, save_inputs=True)
        for result in results:
            np.testing.assert_array_equal(result, np.zeros((rows, 3)))
