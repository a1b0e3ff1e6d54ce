"""The Hopper kernel with swapped operands, as matmul and as SwiGLU, in Mosaic's interpreter, against float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from kernels.cases import CASES, Operands, assert_close, expected_results, make_operands
from kernels.eight_bits import every_number, out_of_eight_bits
from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import mosaic_gpu
from pallas_kernels.grouped_matmul.api import GroupedMatmulError
from pallas_kernels.grouped_swiglu import mosaic_gpu as fused
from pallas_kernels.hopper_tiles import SwappedTiles, Tiles, by_rule, swapped_tiles
from pallas_kernels.quantized import quantize

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("mosaic_interpreter")]


def quantized(name: str, seed: int, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random values [E, N, K] and scales [E, N], NaN for experts without rows, and what they stand for, [E, K, N]."""
    random, case = np.random.default_rng(seed), CASES[name]
    values = random.choice(every_number(dtype), (len(case.group_sizes), case.features, case.contracted))
    scales = (random.random(values.shape[:2]) * 2.0 / case.contracted).astype(np.float32)
    scales[np.asarray(case.group_sizes) == 0] = np.nan
    return values, scales, out_of_eight_bits(values, scales)


def assert_no_races() -> None:
    assert not interpret_pallas_call.get_races().races_found


@pytest.mark.parametrize(
    ("name", "rows", "transpose_rhs"),
    [
        ("sizes_of_one", 8, False),
        ("fewer_rows_than_a_tile", 16, True),
        ("empty_experts_and_padding", 32, False),
        ("empty_experts_and_padding", 8, True),
        ("only_padding", 8, False),
    ],
)
def test_matmul(name: str, rows: int, transpose_rhs: bool) -> None:
    x_RK, w_EKN, dy_RN, sizes = operands = make_operands(CASES[name], "bfloat16")
    expected, tiles = expected_results(operands), SwappedTiles(rows, stages=2)
    found = mosaic_gpu.matmul(
        dy_RN if transpose_rhs else x_RK, w_EKN, jnp.asarray(sizes), transpose_rhs=transpose_rhs, tiles=tiles
    )
    assert_close(np.asarray(found), expected.dx_RK if transpose_rhs else expected.y_RN, "bfloat16")
    assert_no_races()


@pytest.mark.parametrize(
    ("name", "dtype", "rows"),
    [
        ("sizes_of_one", "int8", 8),
        ("empty_experts_and_padding", "int8", 16),
        ("empty_experts_and_padding", "float8_e4m3fn", 32),
        ("rows_no_multiple_of_eight", "float8_e4m3fn", 64),
    ],
)
def test_matmul_of_8_bits(name: str, dtype: str, rows: int) -> None:
    operands = make_operands(CASES[name], "bfloat16")
    values, scales, w_EKN = quantized(name, 0, dtype)
    y_RN = mosaic_gpu.matmul(
        operands.x_RK,
        values,
        jnp.asarray(operands.group_sizes_E),
        transpose_rhs=True,
        scales_EN=scales,
        tiles=SwappedTiles(rows, stages=2),
    )
    assert_close(np.asarray(y_RN), expected_results(operands._replace(w_EKN=w_EKN)).y_RN, "bfloat16")
    assert_no_races()


@pytest.mark.parametrize(
    ("name", "dtype", "rows", "weighted"),
    [
        ("sizes_of_one", "bfloat16", 8, True),
        ("empty_experts_and_padding", "bfloat16", 32, False),
        ("empty_experts_and_padding", "int8", 16, True),
        ("sizes_of_one", "float8_e4m3fn", 8, False),
        ("rows_no_multiple_of_eight", "float8_e4m3fn", 64, True),
        ("only_padding", "int8", 8, True),
    ],
)
def test_swiglu(name: str, dtype: str, rows: int, weighted: bool) -> None:
    operands = make_operands(CASES[name], "bfloat16")
    scales = None
    if dtype == "bfloat16":
        shrink = np.asarray(CASES[name].contracted ** -0.5, operands.w_EKN.dtype)
        gate, up = operands.w_EKN * shrink, operands.w_EKN[::-1, ::-1] * shrink
        exact = gate, up
    else:
        (gate, *gate_rest), (up, *up_rest) = (quantized(name, seed, dtype) for seed in (1, 2))
        scales, exact = zip(gate_rest, up_rest, strict=True)
    gate_RF, up_RF = (expected_results(operands._replace(w_EKN=w_EKN)).y_RN for w_EKN in exact)
    weights_R = row_weights(operands)
    expected = gate_RF / (1 + np.exp(-gate_RF)) * up_RF * (weights_R[:, None] if weighted else 1)
    (hidden_RF,) = fused.swiglu(
        operands.x_RK,
        gate,
        up,
        jnp.asarray(operands.group_sizes_E),
        weights_R=jnp.asarray(weights_R) if weighted else None,
        scales=scales,
        save_inputs=False,
        tiles=SwappedTiles(rows, stages=2),
    )
    assert_swiglu_close(hidden_RF, expected)
    assert_no_races()


def row_weights(operands: Operands) -> np.ndarray:
    """A weight for each live row; 0 for padding."""
    rows = np.arange(len(operands.x_RK))
    weights = np.random.default_rng(1).random(len(rows))
    return np.where(rows < operands.group_sizes_E.sum(), weights, 0).astype(np.float32)


def assert_swiglu_close(actual: jax.Array, expected: np.ndarray) -> None:
    found = np.asarray(actual).astype(np.float64)
    np.testing.assert_allclose(found, expected, rtol=2.0**-8, atol=1e-5 * np.abs(expected).max(initial=0.0))
    assert not np.any(found[expected == 0])


def test_swiglu_takes_the_rows_of_its_tokens() -> None:
    """A row without a token is padding; the weights choose the kernel that reads few rows."""
    operands = make_operands(CASES["sizes_of_one"], "bfloat16")
    num_rows, live = len(operands.x_RK), int(operands.group_sizes_E.sum())
    token_R = np.where(np.arange(num_rows) < live, np.arange(num_rows)[::-1] % live, num_rows)
    x_RK = np.where((token_R < num_rows)[:, None], operands.x_RK[token_R % num_rows], np.nan)
    shrink = np.asarray(CASES["sizes_of_one"].contracted ** -0.5, operands.w_EKN.dtype)
    gate, up = operands.w_EKN * shrink, operands.w_EKN[::-1] * shrink
    gathered = operands._replace(x_RK=x_RK)
    gate_RF, up_RF = (expected_results(gathered._replace(w_EKN=w_EKN)).y_RN for w_EKN in (gate, up))
    (hidden_RF,) = fused.swiglu(
        jnp.asarray(operands.x_RK),
        gate,
        up,
        jnp.asarray(operands.group_sizes_E),
        token_R=jnp.asarray(token_R, jnp.int32),
        save_inputs=False,
    )
    assert_swiglu_close(hidden_RF, gate_RF / (1 + np.exp(-gate_RF)) * up_RF)
    assert_no_races()


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def test_which_operands_choose_it() -> None:
    """Few rows an expert on average, or weights of 8 bits; not where the backward pass needs more than the result."""
    tiles = [swapped_tiles(rows, 64, 2, num_weights=1) for rows in (1, 64, 512, 1024, 2048, 2049)]
    assert [each and each.rows for each in tiles] == [8, 8, 16, 32, 64, None]
    assert swapped_tiles(65_536, 64, 1, num_weights=2) is not None
    x, w, sizes = bf16(64, 128), bf16(17, 128, 128), jax.ShapeDtypeStruct((17,), jnp.int32)
    assert "grouped_matmul_swapped" in str(jax.make_jaxpr(mosaic_gpu.matmul)(x, w, sizes))

    def swiglu(save_inputs: bool) -> str:
        return str(jax.make_jaxpr(functools.partial(fused.swiglu, save_inputs=save_inputs))(x, w, w, sizes))

    assert "grouped_swiglu_swapped" in swiglu(save_inputs=False)
    assert "grouped_swiglu_swapped" not in swiglu(save_inputs=True)

    many_rows = bf16(17 * 64, 128)

    def quantized_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return grouped_matmul(x, quantize(w, "int8"), sizes, implementation="mosaic_gpu")

    assert "grouped_matmul_swapped" in str(jax.make_jaxpr(quantized_matmul)(many_rows, w, sizes))


def test_what_it_cannot_take() -> None:
    x, sizes = jnp.zeros((8, 128), jnp.bfloat16), jnp.zeros(2, jnp.int32)
    values, scales = jnp.zeros((2, 128, 128), jnp.int8), jnp.zeros((2, 128))
    quantized = quantize(jnp.zeros((2, 128, 192)), "int8")
    with pytest.raises(GroupedMatmulError, match="multiples of 128 only, not 192"):
        grouped_matmul(x, quantized, sizes, implementation="mosaic_gpu")
    refusal = mosaic_gpu.refusal(x.shape, values.shape, x.dtype, transpose_rhs=True, weight_dtype=jnp.int4)
    assert refusal == "mosaic_gpu takes weights of int8 or float8_e4m3fn, not int4"
    refusal = mosaic_gpu.refusal(x.shape, values.shape, x.dtype, weight_dtype=jnp.int8)
    assert refusal == "mosaic_gpu takes weights of 8 bits with the contracted axis last only"
    assert mosaic_gpu.refusal(x.shape, values.shape, x.dtype, transpose_rhs=True, weight_dtype=jnp.int8) is None
    tiles: Tiles | SwappedTiles = by_rule(128, 128)
    with pytest.raises(ValueError, match="weights of 8 bits take SwappedTiles only"):
        mosaic_gpu.matmul(x, values, sizes, transpose_rhs=True, scales_EN=scales, tiles=tiles)
    with pytest.raises(ValueError, match="weights of 8 bits take SwappedTiles and inference only"):
        fused.swiglu(x, values, values, sizes, scales=(scales, scales), save_inputs=False, tiles=tiles)
    tiles = SwappedTiles(8, 2)
    with pytest.raises(ValueError, match="does not save what the activation was given"):
        fused.swiglu(x, values, values, sizes, scales=(scales, scales), save_inputs=True, tiles=tiles)
