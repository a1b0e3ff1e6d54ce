"""The oracle: all chosen rows in one array, summed by an einsum. Memory grows as N * k * D, so it is for tests.

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
    """`combine` in the plainest form, differentiated by JAX: nothing is shared with the other backends."""
    if rows_RD.shape[0] == 0:
        return jnp.zeros((row_Nk.shape[0], rows_RD.shape[1]), rows_RD.dtype)
    sum_dtype = np.promote_types(rows_RD.dtype, np.float32)
    has_row_Nk = (row_Nk >= 0) & (row_Nk < rows_RD.shape[0])
    rows_NkD = rows_RD.astype(sum_dtype)[jnp.where(has_row_Nk, row_Nk, 0)]
    # Both factors are replaced, because a NaN times zero is a NaN.
    rows_NkD = jnp.where(has_row_Nk[:, :, None], rows_NkD, 0)
    weights_Nk = jnp.where(has_row_Nk, weights_Nk.astype(sum_dtype), 0)
    return jnp.einsum("nk,nkd->nd", weights_Nk, rows_NkD, precision="highest").astype(rows_RD.dtype)
