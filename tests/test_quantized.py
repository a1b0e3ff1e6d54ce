"""Weights in 8 bits: what quantising promises, and that products are those with the weights they stand for."""

from __future__ import annotations

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.extra import numpy as hnp

from pallas_kernels import grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul.api import GroupedMatmulError
from pallas_kernels.quantized import QuantizedWeights, dequantize, quantize

DTYPES = ("int8", "float8_e4m3fn")
SIZES = (17, 0, 30, 9)
ROWS = 64


def random_weights(*shape: int, seed: int = 0) -> jax.Array:
    """Features of very different magnitude, one of them all zeros."""
    random = np.random.default_rng(seed)
    magnitude = 10.0 ** random.uniform(-4, 4, size=shape[-1])
    magnitude[1] = 0
    return jnp.asarray(random.normal(size=shape) * magnitude, jnp.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis.given(
    w=hnp.arrays(np.float32, (1, 6, 2), elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False))
)
@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
def test_no_weight_is_further_away_than_the_formats_steps(dtype: str, w: np.ndarray) -> None:
    hypothesis.assume(not np.any((w != 0) & (np.abs(w) < 2.0**-60)))
    quantized = quantize(jnp.asarray(w), dtype)
    found, w = np.asarray(dequantize(quantized), np.float64), w.astype(np.float64)
    scale = np.asarray(quantized.scales_EN, np.float64)[:, None, :]
    bound = {"int8": 0.5 * scale, "float8_e4m3fn": np.maximum(np.abs(w) / 16, scale * 2.0**-10)}[dtype]
    assert np.all(np.abs(found - w) <= bound * (1 + 1e-5))
    assert np.all(found[w == 0] == 0)


@pytest.mark.parametrize(("dtype", "largest"), [("int8", 127), ("float8_e4m3fn", 448)])
def test_the_largest_weight_of_a_feature_is_the_formats_largest(dtype: str, largest: int) -> None:
    quantized = quantize(random_weights(3, 32, 5), dtype)
    assert quantized.shape == (3, 32, 5)
    assert quantized.values_ENK.shape == (3, 5, 32) and quantized.values_ENK.dtype == dtype
    peaks = np.abs(np.asarray(quantized.values_ENK).astype(np.float32)).max(axis=2)
    assert np.all(np.delete(peaks, 1, axis=1) == largest) and not peaks[:, 1].any()


@functools.cache
def operands(dtype: str, rows: str) -> tuple[jax.Array, QuantizedWeights, QuantizedWeights, jax.Array]:
    """Rows, gate and up in 8 bits, sizes; rows past the last group are NaN."""
    x_RK = np.random.default_rng(1).normal(size=(ROWS, 24))
    x_RK[sum(SIZES) :] = np.nan
    gate, up = (quantize(random_weights(4, 24, 40, seed=seed) / 24, dtype) for seed in (2, 3))
    return jnp.asarray(x_RK, rows), gate, up, jnp.asarray(SIZES, jnp.int32)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("rows", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_with_the_dequantized_weights(dtype: str, rows: str, implementation: str) -> None:
    x_RK, w, _, sizes = operands(dtype, rows)
    found = jax.jit(grouped_matmul, static_argnames="implementation")(x_RK, w, sizes, implementation=implementation)
    assert found.dtype == rows
    x, w_EKN = np.asarray(x_RK).astype(np.float64), np.asarray(dequantize(w), np.float64)
    expert_R = np.repeat(np.arange(4), SIZES)
    expected = np.einsum("rk,rkn->rn", x[: len(expert_R)], w_EKN[expert_R])
    peak_N = np.abs(expected).max(axis=0, initial=0)
    error = np.abs(np.asarray(found).astype(np.float64)[: len(expert_R)] - expected)
    assert np.all(error <= {"float32": 2e-6, "bfloat16": 2.0**-8}[rows] * peak_N)
    assert not np.any(found[len(expert_R) :])


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_is_that_of_the_products(dtype: str) -> None:
    x_RK, gate, up, sizes = operands(dtype, "float32")
    gates, ups = (grouped_matmul(x_RK, w, sizes) for w in (gate, up))
    found = grouped_swiglu(x_RK, gate, up, sizes)
    np.testing.assert_allclose(found, jax.nn.silu(gates) * ups, rtol=1e-5, atol=1e-5)
    reference = np.asarray(grouped_swiglu(x_RK, gate, up, sizes, implementation="reference"))
    assert np.all(np.abs(found - reference) <= 1e-5 * np.abs(reference).max(axis=0))


def test_no_gradient_is_said_and_not_wrong() -> None:
    x_RK, gate, up, sizes = operands("int8", "float32")
    for function in (
        lambda x: grouped_matmul(x, gate, sizes).sum(),
        lambda x: grouped_swiglu(x, gate, up, sizes).sum(),
    ):
        with pytest.raises(GroupedMatmulError, match="weights in 8 bits have no gradient"):
            jax.grad(function)(x_RK)


def test_bad_arguments_name_the_way_out() -> None:
    x_RK, gate, up, sizes = operands("int8", "float32")
    with pytest.raises(ValueError, match="dtype='int4': choose one of"):
        quantize(jnp.ones((1, 2, 3)), "int4")
    with pytest.raises(ValueError, match=r"w_EKN has shape \(2, 3\): give it the axes \[E, K, N\]"):
        quantize(jnp.ones((2, 3)), "int8")
    with pytest.raises(GroupedMatmulError, match="transpose_rhs=True with weights in 8 bits"):
        grouped_matmul(x_RK, gate, sizes, transpose_rhs=True)
    with pytest.raises(GroupedMatmulError, match=r"scales_EN has shape \(40,\) and values_ENK \(4, 40, 24\)"):
        grouped_matmul(x_RK, gate._replace(scales_EN=gate.scales_EN[0]), sizes)
    with pytest.raises(GroupedMatmulError, match=r"gate_EKF is int8\(4, 24, 40\) and up_EKF is float32\(4, 24, 40\)"):
        grouped_swiglu(x_RK, gate, dequantize(up), sizes)
