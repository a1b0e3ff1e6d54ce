"""Checks of results at any size: products by random projections, everything else element by element.

Shape letters: R rows sorted by expert, K contracted features, N output features, E experts.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from experiments.kernel_bench.operands import normal


def direction(features: int) -> jax.Array:
    """The random vector that results are projected on, bfloat16."""
    return normal(jax.random.key(7), (features,))


@functools.partial(jax.jit, static_argnames="step")
def projected_product(step: str, left: jax.Array, right: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """A product times `direction`, in float32, without the product: y = x w means y v = x (w v).

    Args:
      step: "forward" of rows [R, K] and weights [E, K, N], "dgrad" of rows [R, N] and the same weights, "wgrad" of rows
        [R, K] and rows [R, N].

    Returns:
      [R], or for wgrad [E, K].
    """
    project = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision="highest")
    ends_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
    expert_R = (jnp.arange(left.shape[0], dtype=jnp.int32)[:, None] >= ends_E[None, :]).sum(1, dtype=jnp.int32)
    v = direction(right.shape[1] if step == "dgrad" else right.shape[-1]).astype(right.dtype)
    if step == "wgrad":
        belongs_RE = expert_R[:, None] == jnp.arange(sizes_E.shape[0], dtype=jnp.int32)[None, :]
        weighted_RE = jnp.where(belongs_RE, project("rn,n->r", right, v)[:, None], 0.0)
        return project("rk,re->ek", left.astype(jnp.float32), weighted_RE)
    each_E = project("ekn,n->ek" if step == "forward" else "ekn,k->en", right, v)
    return (left.astype(jnp.float32) * each_E[expert_R]).sum(-1)


def projection_fault(result: jax.Array, projected: jax.Array, tolerance: float) -> str | None:
    """Why a product [..., N] of any size does not fit its projection [...]; None if every row of it does.

    A single wrong element moves its row's projection by many times the rounding error.

    Args:
      tolerance: of a row's norm; rounding each element to bfloat16 moves a projection by 0.0011 of it at one sigma.
    """
    bad, worst = (float(value) for value in _projection_error(result, projected, tolerance))
    return f"{int(bad)} rows of the result are wrong, by up to {worst:.3g} of a row's norm" if bad else None


@jax.jit
def _projection_error(result: jax.Array, projected: jax.Array, tolerance: float) -> tuple[jax.Array, jax.Array]:
    """How many rows are off (NaN included) and by how much at most, in units of the row's norm."""
    v = direction(result.shape[-1])
    got = jnp.einsum("...n,n->...", result, v, preferred_element_type=jnp.float32, precision="highest")
    # The floor only catches rows of exact zeros, whose norm is zero.
    norm = jnp.sqrt(jnp.square(result.astype(jnp.float32)).sum(-1)) + 1e-6
    error = jnp.abs(got - projected)
    return jnp.sum(~(error <= tolerance * norm)), jnp.nanmax(error / norm)


def element_fault(result: jax.Array, expected: jax.Array, tolerance: float) -> str | None:
    """Why a result does not fit the expected one; None if every element does.

    Args:
      tolerance: of an element, plus as much of the typical size of the result, or of the element's row if it is larger.
    """
    bad, worst = (float(value) for value in _element_error(result, expected, tolerance))
    return f"{int(bad)} elements are wrong, by up to {worst:.3g} of their typical size" if bad else None


@jax.jit
def _element_error(result: jax.Array, expected: jax.Array, tolerance: float) -> tuple[jax.Array, jax.Array]:
    """How many elements are off (NaN included) and by how much at most, in units of the typical size."""
    squares = jnp.square(expected)
    typical = jnp.sqrt(jnp.maximum(squares.mean(), squares.mean(-1, keepdims=True))) + 1e-30
    error = jnp.abs(result.astype(expected.dtype) - expected)
    return jnp.sum(~(error <= tolerance * (jnp.abs(expected) + typical))), jnp.nanmax(error / typical)
