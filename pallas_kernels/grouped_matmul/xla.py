"""Grouped matmul in plain XLA: a loop over row tiles that runs only as often as there are tiles in use.

`jax.lax.ragged_dot` does E times the useful work on CPU and GPU; here a tile of rows meets one expert's matrix, so the
excess is the unused part of each expert's last tile. The loop's length is data, and JAX does not differentiate such
loops in reverse: `api.py` makes these functions each other's gradients instead.

Shape letters: R rows, K contracted features, N output features, E experts, M rows of a tile.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul.row_tiles import RowTiles, list_row_tiles
from pallas_kernels.varying import cast_to_varying, varying_axes

_SMALLEST_TILE, _LARGEST_TILE = 8, 128

# JAX 0.10 on CPU stores a bfloat16 tile by way of a float32 copy of the whole result, in every turn of the loop.
_STORING_BFLOAT16_IS_EMULATED = jax.__version_info__ < (0, 11)


def matmul(
    x_RK: jax.Array,
    w_EKN: jax.Array,
    group_sizes_E: jax.Array,
    *,
    transpose_rhs: bool = False,
    scales_EN: jax.Array | None = None,
) -> jax.Array:
    """y_RN = rows of `x_RK` times their expert's matrix; contract as in `api.grouped_matmul`, without a gradient.

    With `scales_EN` the weights are of 8 bits, and an expert's are converted while its tile is multiplied.
    """
    num_rows, num_experts = x_RK.shape[0], w_EKN.shape[0]
    num_features = w_EKN.shape[1 if transpose_rhs else 2]
    axes = varying_axes(x_RK, w_EKN, group_sizes_E)
    y_RN = cast_to_varying(jnp.zeros((num_rows, num_features), x_RK.dtype), axes)
    if y_RN.size == 0 or x_RK.size == 0:
        return y_RN
    height = tile_height(num_rows, num_experts)
    tiles = list_row_tiles(group_sizes_E, num_rows, height)
    contraction = (((1,), (1 if transpose_rhs else 0,)), ((), ()))

    def multiply_tile(index: jax.Array, y_RN: jax.Array) -> jax.Array:
        first_row, in_use_M1 = _window(tiles, index, height)
        x_MK = lax.dynamic_slice_in_dim(x_RK, first_row, height)
        expert = tiles.experts[index]
        w_KN = lax.dynamic_index_in_dim(w_EKN, expert, keepdims=False).astype(x_RK.dtype)
        y_MN = lax.dot_general(x_MK, w_KN, contraction, preferred_element_type=_sum_dtype(x_RK))
        if scales_EN is not None:
            y_MN = y_MN * lax.dynamic_index_in_dim(scales_EN, expert).astype(y_MN.dtype)
        y_MN = _to_storable(y_MN.astype(x_RK.dtype))
        other_MN = lax.dynamic_slice_in_dim(y_RN, first_row, height)
        return lax.dynamic_update_slice_in_dim(y_RN, jnp.where(in_use_M1, y_MN, other_MN), first_row, 0)

    return _from_storable(lax.fori_loop(0, tiles.num_live, multiply_tile, _to_storable(y_RN)), x_RK.dtype)


def weight_gradient(x_RK: jax.Array, dy_RN: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """dw_EKN: for each expert the sum over its rows of x outer dy, summed in at least float32; zero without rows."""
    num_rows, num_experts = x_RK.shape[0], group_sizes_E.shape[0]
    dw_shape = (num_experts, x_RK.shape[1], dy_RN.shape[1])
    axes = varying_axes(x_RK, dy_RN, group_sizes_E)
    dw_EKN = cast_to_varying(jnp.zeros(dw_shape, x_RK.dtype), axes)
    if dw_EKN.size == 0 or num_rows == 0:
        return dw_EKN
    sum_KN = cast_to_varying(jnp.zeros(dw_shape[1:], _sum_dtype(x_RK)), axes)
    height = tile_height(num_rows, num_experts)
    tiles = list_row_tiles(group_sizes_E, num_rows, height)

    def add_tile(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        sum_KN, dw_EKN = carry
        first_row, in_use_M1 = _window(tiles, index, height)
        # Both sides are masked: either may hold NaN in rows that are not this expert's.
        x_MK, dy_MN = (
            jnp.where(in_use_M1, rows, jnp.zeros_like(rows))
            for rows in (lax.dynamic_slice_in_dim(side, first_row, height) for side in (x_RK, dy_RN))
        )
        product_KN = lax.dot_general(x_MK, dy_MN, (((0,), (0,)), ((), ())), preferred_element_type=sum_KN.dtype)
        expert = tiles.experts[index]
        same_expert = (index > 0) & (tiles.experts[jnp.maximum(index - 1, 0)] == expert)
        sum_KN = product_KN + jnp.where(same_expert, sum_KN, jnp.zeros_like(sum_KN))
        # One expert's float32 sum, stored after every tile: for all experts it would be twice a bfloat16 gradient.
        dw_KN = _to_storable(sum_KN.astype(x_RK.dtype))
        return sum_KN, lax.dynamic_update_index_in_dim(dw_EKN, dw_KN, expert, 0)

    _, dw_EKN = lax.fori_loop(0, tiles.num_live, add_tile, (sum_KN, _to_storable(dw_EKN)))
    return _from_storable(dw_EKN, x_RK.dtype)


def tile_height(num_rows: int, num_experts: int) -> int:
    """Rows of a tile: about an expert's mean share up to 32 rows, half of it beyond, as a power of two.

    Taller tiles waste compute in each expert's last tile, lower ones read the weights more often.
    """
    share = max(num_rows // num_experts, 1)
    power_of_two = 1 << (max(share // 2, min(share, 32)).bit_length() - 1)
    return min(max(power_of_two, _SMALLEST_TILE), _LARGEST_TILE, num_rows)


def _sum_dtype(array: jax.Array) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if array.dtype == jnp.float64 else jnp.float32)


def _to_storable(array: jax.Array) -> jax.Array:
    """The form in which a loop carries its result: the array itself, or its bits where storing bfloat16 is emulated."""
    if _STORING_BFLOAT16_IS_EMULATED and array.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(array, jnp.uint16)
    return array


def _from_storable(array: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return array if array.dtype == dtype else lax.bitcast_convert_type(array, dtype)


def _window(tiles: RowTiles, index: jax.Array, height: int) -> tuple[jax.Array, jax.Array]:
    """First row of the `height` rows to load, and which of them [M, 1] belong to the tile."""
    first_row = tiles.firsts[index]
    row_M1 = first_row + jnp.arange(height, dtype=jnp.int32)[:, None]
    return first_row, (row_M1 >= tiles.starts[index]) & (row_M1 < tiles.stops[index])
