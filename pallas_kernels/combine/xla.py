"""Combine in plain XLA, written so that its compiler for GPUs makes one kernel of the sum and one of both gradients.

Neither holds an array of size N * k * D beside its operands and results there.

Shape letters: R rows, D width, N tokens, k choices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def refusal(rows_shape: tuple[int, ...], row_shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> str | None:
    """Takes everything."""
    return None


def weighted_sum(rows_RD: jax.Array, row_Nk: jax.Array, weights_Nk: jax.Array) -> jax.Array:
    """out_ND: each token's weighted rows, added in the order of its choices; contract as in `api.combine`."""
    sum_dtype = np.promote_types(rows_RD.dtype, np.float32)
    out_ND = jnp.zeros((row_Nk.shape[0], rows_RD.shape[1]), sum_dtype)
    for choice in range(row_Nk.shape[1]):
        row_N = row_Nk[:, choice]
        weight_N = jnp.where(_is_index(row_N, rows_RD.shape[0]), weights_Nk[:, choice].astype(sum_dtype), 0)
        out_ND = out_ND + weight_N[:, None] * _take(rows_RD, row_N).astype(sum_dtype)
    return out_ND.astype(rows_RD.dtype)


def gradients(
    dout_ND: jax.Array, rows_RD: jax.Array, row_Nk: jax.Array, weights_Nk: jax.Array, choice_R: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """drows_RD, gathered through `choice_R`, and dweights_Nk, the rows' products with the token's gradient."""
    sum_dtype = np.promote_types(rows_RD.dtype, np.float32)
    tokens, k = row_Nk.shape
    token_R = jnp.where(_is_index(choice_R, tokens * k), choice_R // k, tokens)
    weight_R = _take(weights_Nk.reshape(-1), choice_R).astype(sum_dtype)
    dout_RD = _take(dout_ND, token_R).astype(sum_dtype)
    drows_RD = weight_R[:, None] * dout_RD
    # A row of no choice may hold NaN; no choice reads its product.
    product_R = jnp.sum(rows_RD.astype(sum_dtype) * dout_RD, axis=1)
    return drows_RD.astype(rows_RD.dtype), _take(product_R, row_Nk).astype(weights_Nk.dtype)


def _is_index(index: jax.Array, size: int) -> jax.Array:
    return (index >= 0) & (index < size)


def _take(array: jax.Array, index: jax.Array) -> jax.Array:
    """Entries along the first axis; zero where the index is out of range, below zero too."""
    if array.shape[0] == 0:
        return jnp.zeros_like(array, shape=index.shape + array.shape[1:])
    index = jnp.where(index < 0, array.shape[0], index)
    return jnp.take(array, index, axis=0, mode="fill", fill_value=0)
