"""Everything that talks between devices. Functions ending in `_local` run inside `shard_map`."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Mesh axes over which `x` is known to differ between devices; empty outside `shard_map`."""
    return jax.typeof(x).manual_axis_type.varying


def vary_local(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Mark `x` as varying over `axes`; the transpose of this mark is a psum of the cotangents over them."""
    missing = tuple(axis for axis in axes if axis not in varying_axes(x))
    return lax.pcast(x, missing, to="varying") if missing else x


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_param_local(shard: jax.Array, axis: str, dim: int, dtype: jnp.dtype) -> jax.Array:
    """All-gather a parameter shard along `dim` over mesh axis `axis`, in `dtype`.

    The gradient is reduce-scattered in the dtype of the shard, so that parameters kept in fp32 get fp32 sums although
    the forward pass moves bf16.
    """
    return lax.all_gather(shard.astype(dtype), axis, axis=dim, tiled=True)


def _gather_param_fwd(shard: jax.Array, axis: str, dim: int, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    return gather_param_local(shard, axis, dim, dtype), jnp.zeros((), shard.dtype)


def _gather_param_bwd(axis: str, dim: int, dtype: jnp.dtype, like: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    return (reduce_scatter_local(grad.astype(like.dtype), axis, dim),)


gather_param_local.defvjp(_gather_param_fwd, _gather_param_bwd)


def gather_local(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """All-gather along `dim` over mesh axis `axis`; the gradient goes through `reduce_scatter_local`."""
    return gather_param_local(x, axis, dim, x.dtype)


def reduce_scatter_local(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Sum over mesh axis `axis`, of which this device gets its slice along `dim`.

    Between several processes on CPU it is an all-reduce and a slice: Gloo's reduce-scatter returns wrong sums for
    slices of some MB (jax issue 40830) and gives up after 30 s (40831).
    """
    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
    size = x.shape[dim] // lax.axis_size(axis)
    return lax.dynamic_slice_in_dim(lax.psum(x, axis), lax.axis_index(axis) * size, size, axis=dim)


def all_to_all_local(x_P: jax.Array, axis: str) -> jax.Array:
    """Block p of the leading dimension goes to device p of `axis`; block q of the result came from device q."""
    return lax.all_to_all(x_P, axis, split_axis=0, concat_axis=0, tiled=False)
