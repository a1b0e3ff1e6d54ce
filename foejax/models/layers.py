"""Small pieces every block is made of: parameters, RMSNorm, rotary embedding.

Shape letters: N tokens, D width, K head size.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


def high_precision(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """float64 for float64, otherwise float32: the dtype of router, norms, softmax and loss."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def make_param(
    rngs: nnx.Rngs,
    initializer: Initializer,
    logical_axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    *,
    high_precision_use: bool = False,
) -> nnx.Param:
    """A parameter with one logical axis name per dimension.

    Args:
      dtype: compute dtype of the model; the parameter itself is kept in `high_precision(dtype)`.
      high_precision_use: the parameter is also used in high precision (norms, router, embedding) and not cast to
        `dtype` on its way into a layer.
    """
    assert len(logical_axes) == len(shape), (logical_axes, shape)
    kept = high_precision(dtype)
    value = initializer(rngs.params(), shape, kept)
    return nnx.Param(value, logical_axes=logical_axes, use_dtype=kept if high_precision_use else jnp.dtype(dtype))


def make_norm(
    rngs: nnx.Rngs, logical_axes: tuple[str | None, ...], shape: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> nnx.Param:
    """An RMSNorm weight, ones at the start."""
    return make_param(rngs, nnx.initializers.ones, logical_axes, shape, dtype, high_precision_use=True)


def mean_square(x: jax.Array, axis: int | tuple[int, ...] = -1) -> jax.Array:
    """Mean of the squares in high precision, dimensions kept."""
    return jnp.mean(jnp.square(x.astype(high_precision(x.dtype))), axis=axis, keepdims=True)


def rms_norm(
    x: jax.Array,
    weight: jax.Array,
    eps: float,
    axis: int | tuple[int, ...] = -1,
    *,
    squares: jax.Array | None = None,
) -> jax.Array:
    """RMSNorm (Zhang and Sennrich, 2019) in high precision; `weight` has the rank of `x`.

    `squares` is what `mean_square` gives, where it is over more than `x` holds.
    """
    squares = mean_square(x, axis) if squares is None else squares
    return (x.astype(squares.dtype) * jax.lax.rsqrt(squares + eps) * weight).astype(x.dtype)


def rotary_angles(positions_N: jax.Array, head_dim: int, base: float, scaling_factor: float) -> jax.Array:
    """Angles [N, K/2] of the rotary embedding (Su et al., 2021), positions divided by `scaling_factor`."""
    dtype = jnp.result_type(float)
    exponent = jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim
    frequency = 1.0 / (jnp.asarray(base, dtype) ** exponent)
    return (positions_N.astype(dtype) / scaling_factor)[:, None] * frequency[None, :]


def apply_rotary(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotate the two halves of the last dimension of `x` by `angles`, whose rank is that of `x`."""
    wide = x.astype(high_precision(x.dtype))
    first, second = jnp.split(wide, 2, axis=-1)
    cos, sin = jnp.cos(angles).astype(wide.dtype), jnp.sin(angles).astype(wide.dtype)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(x.dtype)
