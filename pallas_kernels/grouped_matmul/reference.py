"""The oracle: one gathered weight matrix per row. Memory grows as R * K * N, so it is for tests and toy sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def matmul(
    x_RK: jax.Array,
    w_EKN: jax.Array,
    group_sizes_E: jax.Array,
    *,
    transpose_rhs: bool = False,
    scales_EN: jax.Array | None = None,
) -> jax.Array:
    """`grouped_matmul` in the plainest form, differentiated by JAX: nothing is shared with the other backends."""
    sum_dtype = jnp.float64 if x_RK.dtype == jnp.float64 else jnp.float32
    dtype = x_RK.dtype
    rows_R = jnp.arange(x_RK.shape[0], dtype=jnp.int32)
    ends_E = jnp.cumsum(group_sizes_E, dtype=jnp.int32)
    expert_R = (rows_R[:, None] >= ends_E[None, :]).sum(1, dtype=jnp.int32)
    in_use_R1 = (expert_R < group_sizes_E.shape[0])[:, None]
    # Padding is replaced before the product, because a NaN times zero is a NaN in the weights' gradient.
    x_RK = jnp.where(in_use_R1, x_RK, jnp.zeros_like(x_RK)).astype(sum_dtype)
    expert_R = jnp.minimum(expert_R, group_sizes_E.shape[0] - 1)
    y_RN = jnp.einsum("rk,rnk->rn" if transpose_rhs else "rk,rkn->rn", x_RK, w_EKN.astype(sum_dtype)[expert_R])
    if scales_EN is not None:
        y_RN = y_RN * scales_EN.astype(sum_dtype)[expert_R]
    return jnp.where(in_use_R1, y_RN, jnp.zeros_like(y_RN)).astype(dtype)
