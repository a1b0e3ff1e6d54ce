"""Stacked products of few and of many rows against float64, with their gradients, also under shard_map."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.stacked_matmul import FEW_ROWS, stacked_matmul

FEW, MANY = 5, FEW_ROWS + 1


def make_operands(rows: int, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, w and a cotangent, all positive, so that errors are relative to the result."""
    random = np.random.default_rng(0)
    shapes = ((3, rows, 34), (3, 34, 40), (3, rows, 40))
    x, w, dy = (jnp.asarray(random.uniform(0.5, 1.5, size=shape), dtype) for shape in shapes)
    return x, w, dy


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize(
    ("dtype", "result"), [("float32", None), ("bfloat16", None), ("bfloat16", "float32"), ("float64", None)]
)
def test_product_and_gradients(rows: int, dtype: str, result: str | None) -> None:
    with jax.enable_x64(dtype == "float64"):
        x, w, dy = make_operands(rows, dtype)
        product = jax.jit(functools.partial(stacked_matmul, dtype=result))
        y, transpose = jax.vjp(product, x, w)
        dx, dw = transpose(dy.astype(y.dtype))
        uses_kernel = "foejax_grouped_matmul" in str(jax.make_jaxpr(product)(x, w))
    assert y.dtype == (result or dtype) and dx.dtype == dw.dtype == dtype
    assert uses_kernel == (rows == FEW and dtype != "float64")
    exact_x, exact_w, exact_dy = (np.asarray(array, np.float64) for array in (x, w, dy))
    for found, exact in (
        (y, exact_x @ exact_w),
        (dx, exact_dy @ exact_w.swapaxes(1, 2)),
        (dw, exact_x.swapaxes(1, 2) @ exact_dy),
    ):
        rtol = {"bfloat16": 2.0**-8, "float32": 1e-5, "float64": 1e-12}[str(found.dtype)]
        np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=rtol)


def test_a_replicated_operand_gets_its_gradient_summed_over_the_mesh() -> None:
    x, w, dy = make_operands(4 * FEW, "float32")
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        stacked_matmul, mesh=mesh, in_specs=(P(None, "data"), P()), out_specs=P(None, "data"), check_vma=True
    )
    actual = jax.jit(lambda x, w: jax.vjp(sharded, x, w)[1](dy))(x, w)
    expected = jax.vjp(lambda x, w: jnp.einsum("snk,skf->snf", x, w), x, w)[1](dy)
    for found, wanted in zip(actual, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
