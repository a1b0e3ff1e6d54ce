"""Grouped matmul for the CPU: a C++ kernel (`cpu_kernel.cc`), compiled for the machine and called by XLA.

With a few rows an expert, as in decoding, the work is to read the weights, and XLA's matmuls of such shapes take longer
for it (`experiments/bench_cpu_kernels.py` says how much). A row's result does not depend on the rows beside it.
Transposed weights and the gradient of the weights are left to `xla`.

Shape letters: R rows sorted by expert, K contracted features, N output features, E experts.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.grouped_matmul import xla
from pallas_kernels.host_kernel import HostKernel

KERNEL = HostKernel(Path(__file__).with_name("cpu_kernel.cc"), "foejax_grouped_matmul")

weight_gradient = xla.weight_gradient


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
    return KERNEL.call(result, x_RK, w_EKN, group_sizes_E)


def refusal(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    dtype: DTypeLike,
    *,
    transpose_rhs: bool,
    weight_dtype: DTypeLike | None,
) -> str | None:
    """Why these operands or this machine are not for the kernel; None if they are. Every shape is taken."""
    if weight_dtype is not None:
        return f"cpu has no kernel for weights in 8 bits, these are {jnp.dtype(weight_dtype)}"
    return KERNEL.refusal(dtype)
