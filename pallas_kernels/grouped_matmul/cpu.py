"""Grouped matmul for the CPU: a C++ kernel (`cpu_kernel.cc`), compiled for the machine and called by XLA.

With a few rows an expert, as in decoding, the work is to read the weights: XLA's matmuls of such shapes read them at a
third of the speed of the memory, the kernel at most of it. A row's result does not depend on the rows beside it.
Transposed weights and the gradient of the weights are left to `xla`.

Shape letters: R rows sorted by expert, K contracted features, N output features, E experts.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.backends import device_kind
from pallas_kernels.grouped_matmul import xla
from pallas_kernels.host_compiler import register
from pallas_kernels.varying import cast_to_varying, varying_axes

_SOURCE, _NAME = Path(__file__).with_name("cpu_kernel.cc"), "foejax_grouped_matmul"

weight_gradient = xla.weight_gradient


# Under `jax.jit`, because an eager `shard_map` would keep the result of one device only.
@functools.partial(jax.jit, static_argnames=("transpose_rhs", "dtype"))
def matmul(
    x_RK: jax.Array,
    w_EKN: jax.Array,
    group_sizes_E: jax.Array,
    *,
    transpose_rhs: bool = False,
    scales_EN: jax.Array | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """y_RN = rows of `x_RK` times their expert's matrix; contract as in `api.grouped_matmul`, without a gradient.

    `dtype` is that of the result: float32, or by default that of the rows.
    """
    dtype = jnp.dtype(dtype or x_RK.dtype)
    if transpose_rhs or x_RK.size == 0 or w_EKN.size == 0:
        y_RN = xla.matmul(x_RK, w_EKN, group_sizes_E, transpose_rhs=transpose_rhs, scales_EN=scales_EN)
        return y_RN.astype(dtype)
    result = jax.ShapeDtypeStruct((x_RK.shape[0], w_EKN.shape[2]), dtype)
    y_RN = jax.ffi.ffi_call(_NAME, result, vmap_method="sequential")(x_RK, w_EKN, group_sizes_E)
    # JAX types the result as equal on all devices, but it varies as the operands do.
    return cast_to_varying(y_RN, varying_axes(x_RK, w_EKN, group_sizes_E))


def refusal(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    dtype: DTypeLike,
    *,
    transpose_rhs: bool,
    weight_dtype: DTypeLike | None,
) -> str | None:
    """Why these operands or this machine are not for the kernel, or None."""
    if device_kind() != "cpu":
        return f"cpu runs on CPUs, the default device is {device_kind()}"
    if weight_dtype is not None:
        return f"cpu has no kernel for weights in 8 bits, these are {jnp.dtype(weight_dtype)}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"cpu takes bfloat16 and float32, the rows are {jnp.dtype(dtype)}"
    reason = register(_SOURCE, _NAME)
    return None if reason is None else f"cpu has no kernel here ({reason})"
