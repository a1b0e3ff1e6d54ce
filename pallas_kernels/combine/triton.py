"""Combine as Triton kernels: a program per token forward, a program per row for both gradients.

The backward kernel goes through the rows, because a row has one token at most: with the token's gradient in registers
it writes the row's gradient and the product that is its weight's gradient, each to a place of its own.

Shape letters: R rows, D width, N tokens, k choices; inside the kernels W columns of a tile.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from pallas_kernels.jax_triton_launch import launch

_MOST_CHOICES = 64
_WIDEST_TILE, _NARROWEST_TILE = 1024, 128
_COLUMNS_OF_A_WARP = 256
"""16 bytes a thread of bfloat16, the widest load."""


def refusal(rows_shape: tuple[int, ...], row_shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> str | None:
    """Why these operands cannot be taken, or None."""
    if row_shape[1] > _MOST_CHOICES:
        return f"triton unrolls over the choices and takes k up to {_MOST_CHOICES}, not {row_shape[1]}"
    return None


@jax.jit
def weighted_sum(rows_RD: jax.Array, row_Nk: jax.Array, weights_Nk: jax.Array) -> jax.Array:
    """out_ND: each token's weighted rows, added in the order of its choices; contract as in `api.combine`."""
    num_rows, columns = rows_RD.shape
    tokens, k = row_Nk.shape
    width = tile_width(columns)
    (out_ND,) = launch(
        _weighted_sum_kernel,
        (rows_RD, row_Nk, weights_Nk, num_rows),
        [jax.ShapeDtypeStruct((tokens, columns), rows_RD.dtype)],
        name="combine",
        grid=(tokens, triton.cdiv(columns, width)),
        num_warps=max(width // _COLUMNS_OF_A_WARP, 1),
        COLUMNS=columns,
        K=k,
        WIDTH=width,
    )
    return out_ND


@jax.jit
def gradients(
    dout_ND: jax.Array, rows_RD: jax.Array, row_Nk: jax.Array, weights_Nk: jax.Array, choice_R: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """drows_RD, gathered through `choice_R`, and dweights_Nk, the rows' products with the token's gradient."""
    num_rows, columns = rows_RD.shape
    tokens, k = row_Nk.shape
    width = tile_width(columns)
    sum_dtype = np.promote_types(rows_RD.dtype, np.float32)
    if rows_RD.size == 0:
        return jnp.zeros_like(rows_RD), jnp.zeros_like(weights_Nk)  # there is nothing to take from
    drows_RD, product_R = launch(
        _gradients_kernel,
        (dout_ND, rows_RD, weights_Nk, choice_R, tokens * k),
        [jax.ShapeDtypeStruct(rows_RD.shape, rows_RD.dtype), jax.ShapeDtypeStruct((num_rows,), sum_dtype)],
        name="combine_gradients",
        grid=(num_rows,),
        num_warps=max(width // _COLUMNS_OF_A_WARP, 1),
        COLUMNS=columns,
        K=k,
        WIDTH=width,
    )
    row_Nk = jnp.where(row_Nk < 0, num_rows, row_Nk)
    dweights_Nk = jnp.take(product_R, row_Nk, axis=0, mode="fill", fill_value=0)
    return drows_RD, dweights_Nk.astype(weights_Nk.dtype)


def tile_width(columns: int) -> int:
    """Columns of a program's tile: a power of two, without a remainder where a wide one divides the columns."""
    divisor = min(columns & -columns, _WIDEST_TILE)
    if divisor >= _COLUMNS_OF_A_WARP:
        return divisor
    return min(max(triton.next_power_of_2(max(columns, 1)), _NARROWEST_TILE), _WIDEST_TILE)


@triton.jit
def _weighted_sum_kernel(  # type: ignore[no-untyped-def]
    rows_ptr,
    row_ptr,
    weights_ptr,
    num_rows,
    out_ptr,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    sum_type: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    token = tl.program_id(0).to(tl.int64)
    column_W = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    exists_W = column_W < COLUMNS
    sum_W = tl.zeros((WIDTH,), sum_type)
    for choice in tl.static_range(K):
        row = tl.load(row_ptr + token * K + choice)
        has_row = (row >= 0) & (row < num_rows)
        weight = tl.load(weights_ptr + token * K + choice, mask=has_row, other=0).to(sum_type)
        values_W = tl.load(rows_ptr + row.to(tl.int64) * COLUMNS + column_W, mask=exists_W & has_row, other=0)
        sum_W += weight * values_W.to(sum_type)
    tl.store(out_ptr + token * COLUMNS + column_W, sum_W.to(out_ptr.dtype.element_ty), mask=exists_W)


@triton.jit
def _gradients_kernel(  # type: ignore[no-untyped-def]
    dout_ptr,
    rows_ptr,
    weights_ptr,
    choice_ptr,
    num_choices,
    drows_ptr,
    products_ptr,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
):
    sum_type: tl.constexpr = products_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    choice = tl.load(choice_ptr + row)
    has_token = (choice >= 0) & (choice < num_choices)
    weight = tl.load(weights_ptr + choice, mask=has_token, other=0).to(sum_type)
    token = (choice // K).to(tl.int64)
    product_W = tl.zeros((WIDTH,), sum_type)
    for start in range(0, COLUMNS, WIDTH):
        column_W = start + tl.arange(0, WIDTH)
        exists_W = column_W < COLUMNS
        dout_W = tl.load(dout_ptr + token * COLUMNS + column_W, mask=exists_W & has_token, other=0).to(sum_type)
        values_W = tl.load(rows_ptr + row * COLUMNS + column_W, mask=exists_W & has_token, other=0).to(sum_type)
        drow_W = (weight * dout_W).to(drows_ptr.dtype.element_ty)
        tl.store(drows_ptr + row * COLUMNS + column_W, drow_W, mask=exists_W)
        product_W += dout_W * values_W
    tl.store(products_ptr + row, tl.sum(product_W, 0))
