"""A stack of ordinary products. XLA computes them, but for a few rows on a CPU.

A decoding step multiplies a few rows with every matrix of the model. The grouped matmul's C++ kernel, to which a stack
is experts with equally many rows, reads the weights faster than XLA's products on a CPU.

Shape letters: S members of the stack, N rows of each, K contracted features, F output features.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.grouped_matmul import cpu
from pallas_kernels.varying import cast_to_varying, varying_axes

FEW_ROWS = 64
"""Rows up to which the kernel is taken; products of more are bound by arithmetic."""


def stacked_matmul(x_SNK: jax.Array, w_SKF: jax.Array, *, dtype: DTypeLike | None = None) -> jax.Array:
    """x[s] @ w[s] for every member of the stack, summed in at least float32 and rounded once.

    Differentiable in both operands. Inside `jax.shard_map` they may vary over different mesh axes.

    Args:
      x_SNK: [S, N, K] bfloat16, float32 or float64.
      w_SKF: [S, K, F], same dtype.
      dtype: of the result; None is that of the operands.

    Returns:
      y_SNF: [S, N, F].
    """
    dtype = jnp.dtype(dtype or x_SNK.dtype)
    fits = x_SNK.shape[1] <= FEW_ROWS and dtype in (x_SNK.dtype, jnp.float32)
    if not fits or cpu.KERNEL.refusal(x_SNK.dtype) is not None:
        return _in_xla(x_SNK, w_SKF, dtype)
    # Casting here, outside the custom gradient, leaves it to JAX to sum a replicated operand's gradient over the mesh.
    axes = varying_axes(x_SNK, w_SKF)
    return _in_kernel(cast_to_varying(x_SNK, axes), cast_to_varying(w_SKF, axes), dtype)


def _in_xla(x_SNK: jax.Array, w_SKF: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.einsum("snk,skf->snf", x_SNK, w_SKF, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _in_kernel(x_SNK: jax.Array, w_SKF: jax.Array, dtype: jnp.dtype) -> jax.Array:
    stack, rows, contracted = x_SNK.shape
    sizes_S = cast_to_varying(jnp.full(stack, rows, jnp.int32), varying_axes(x_SNK))
    y_RF = cpu.matmul(x_SNK.reshape(-1, contracted), w_SKF, sizes_S, dtype=dtype)
    return y_RF.reshape(stack, rows, -1)


def _forward(x_SNK: jax.Array, w_SKF: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _in_kernel(x_SNK, w_SKF, dtype), (x_SNK, w_SKF)


def _backward(dtype: jnp.dtype, residuals: tuple[jax.Array, jax.Array], dy_SNF: jax.Array) -> tuple[jax.Array, ...]:
    return jax.vjp(functools.partial(_in_xla, dtype=dtype), *residuals)[1](dy_SNF)


_in_kernel.defvjp(_forward, _backward)
