"""Grouped matmul in Triton, through jax-triton: two kernels (`triton_kernels.py`) and how they are started.

Addresses are formed by pointer, so groups may start at any row and K and N need not be multiples of a block. Weights of
8 bits are read as such and converted to the rows' dtype in registers; their scales multiply the float32 sum.

Shape letters: R rows sorted by expert, K contracted features, N output features and E experts.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import triton
from jax.typing import DTypeLike

from pallas_kernels.grouped_matmul import triton_kernels
from pallas_kernels.grouped_matmul.row_tiles import list_row_tiles
from pallas_kernels.jax_triton_launch import launch
from pallas_kernels.triton_tiles import (
    BLOCKS_SIDE_BY_SIDE,
    MATMUL_TILES,
    WEIGHT_GRADIENT_TILES,
    choose_tile,
    matmul_tile,
)


@functools.partial(jax.jit, static_argnames="transpose_rhs")
def matmul(
    x_RK: jax.Array,
    w_EKN: jax.Array,
    group_sizes_E: jax.Array,
    *,
    transpose_rhs: bool = False,
    scales_EN: jax.Array | None = None,
) -> jax.Array:
    """y_RN = rows of `x_RK` times their expert's matrix; contract as in `api.grouped_matmul`, without a gradient.

    With `scales_EN`, float32, the weights are int8 or float8_e4m3fn [E, N, K], and `transpose_rhs` is True.
    """
    num_rows, contracted = x_RK.shape
    num_experts, features = w_EKN.shape[0], w_EKN.shape[1 if transpose_rhs else 2]
    tile = matmul_tile(x_RK.dtype, num_rows, num_experts, is_quantized=scales_EN is not None)
    tasks = list_row_tiles(group_sizes_E, num_rows, tile.BM, with_padding=True)
    num_tasks = tasks.starts.shape[0]
    (y_RN,) = launch(
        triton_kernels.multiply_rows,
        (x_RK, w_EKN, scales_EN, tasks.experts, tasks.starts, tasks.stops),
        [jax.ShapeDtypeStruct((num_rows, features), x_RK.dtype)],
        name="grouped_matmul",
        grid=(num_tasks * triton.cdiv(features, tile.BN),),
        num_warps=tile.warps,
        num_stages=tile.stages,
        num_tasks=num_tasks,
        num_experts=num_experts,
        K=contracted,
        N=features,
        w_stride_K=1 if transpose_rhs else features,
        w_stride_N=contracted if transpose_rhs else 1,
        has_scales=scales_EN is not None,
        tasks_side_by_side=BLOCKS_SIDE_BY_SIDE,
        **tile.blocks,
    )
    return y_RN


@jax.jit
def weight_gradient(x_RK: jax.Array, dy_RN: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """dw_EKN: for each expert the sum over its rows of x outer dy, summed in float32; zero without rows."""
    num_rows, contracted = x_RK.shape
    num_experts, features = group_sizes_E.shape[0], dy_RN.shape[1]
    tile = choose_tile(WEIGHT_GRADIENT_TILES, x_RK.dtype, num_rows, num_experts)
    # Row at which each expert starts, and the row at which the last one ends.
    bounds = jnp.pad(jnp.minimum(jnp.cumsum(group_sizes_E, dtype=jnp.int32), num_rows), (1, 0))
    (dw_EKN,) = launch(
        triton_kernels.contract_rows,
        (x_RK, dy_RN, bounds),
        [jax.ShapeDtypeStruct((num_experts, contracted, features), x_RK.dtype)],
        name="grouped_matmul_weight_gradient",
        grid=(num_experts * triton.cdiv(contracted, tile.BK) * triton.cdiv(features, tile.BN),),
        num_warps=tile.warps,
        num_stages=tile.stages,
        K=contracted,
        N=features,
        blocks_side_by_side=BLOCKS_SIDE_BY_SIDE,
        **tile.blocks,
    )
    return dw_EKN


def refusal(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    dtype: DTypeLike,
    *,
    transpose_rhs: bool = False,
    weight_dtype: DTypeLike | None = None,
) -> str | None:
    """Why this backend cannot multiply such operands, as a clause; None if it can. Every shape is taken."""
    name = jnp.dtype(dtype).name
    if name not in MATMUL_TILES:
        return f"triton takes {' and '.join(MATMUL_TILES)} only, not {name}"
    return None if weight_dtype is None else _refusal_of_weights(jnp.dtype(weight_dtype).name)


def _refusal_of_weights(name: str) -> str | None:
    if name not in ("int8", "float8_e4m3fn"):
        return f"triton takes quantised weights of int8 and float8_e4m3fn only, not {name}"
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))  # "9.0"; other devices have none, or a name
    if name == "float8_e4m3fn" and capability[:1].isdigit() and float(capability) < 8.9:
        return f"triton takes float8_e4m3fn weights from compute capability 8.9 on, not {capability}"
    return None
