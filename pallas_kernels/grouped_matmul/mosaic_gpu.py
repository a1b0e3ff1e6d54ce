"""Grouped matmul for Hopper GPUs (sm_90a) in Pallas Mosaic GPU; `pallas_kernels/hopper.py` says how such kernels work.

The two compute warpgroups own the left and the right half of a thread block's output columns. The weight gradient is
the same pipeline turned round: it runs along an expert's rows, as many steps as there are, and rows of other experts
are masked in the first and last step.

Shape letters: R rows, K contracted features, N output features, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, hopper_row_tiles, hopper_swapped
from pallas_kernels.hopper_tiles import (
    COMPUTE_WARPGROUPS,
    SwappedTiles,
    Tiles,
    matmul_tiles,
    swapped_tiles,
    weight_gradient_tiles,
)


def refusal(
    x_shape: tuple[int, ...],
    w_shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    *,
    transpose_rhs: bool = False,
    weight_dtype: jax.typing.DTypeLike | None = None,
) -> str | None:
    """Why these operands cannot be taken, or None.

    Args:
      weight_dtype: of quantised weights; None where they have the rows' dtype.
    """
    return hopper.refusal(dtype, x_shape[0], w_shape[1:], transpose_rhs=transpose_rhs, weight_dtype=weight_dtype)


def matmul(
    x_RK: jax.Array,
    w_EKN: jax.Array,
    group_sizes_E: jax.Array,
    *,
    transpose_rhs: bool = False,
    scales_EN: jax.Array | None = None,
    tiles: Tiles | SwappedTiles | None = None,
) -> jax.Array:
    """y_RN = rows of `x_RK` times their expert's matrix; contract as in `api.grouped_matmul`, without a gradient.

    Args:
      w_EKN: [E, N, K] with `transpose_rhs`; then int8 or float8_e4m3fn if there are scales.
      scales_EN: float32, by which the sums are multiplied before they are rounded.
      tiles: overrides the choice of `pallas_kernels/hopper_tiles.py`, and with it the kernel.
    """
    num_rows, contracted = x_RK.shape
    num_experts, features = w_EKN.shape[0], w_EKN.shape[1 if transpose_rhs else 2]
    tiles = tiles or swapped_tiles(num_rows, num_experts, w_EKN.dtype.itemsize, num_weights=1)
    if isinstance(tiles, SwappedTiles):
        scales = () if scales_EN is None else (scales_EN,)
        return hopper_swapped.multiply(
            x_RK, (w_EKN,), group_sizes_E, transposed=transpose_rhs, scales=scales, tiles=tiles
        )
    if scales_EN is not None:
        raise ValueError(f"tiles={tiles}: weights of 8 bits take SwappedTiles only")
    tiles = tiles or matmul_tiles(num_rows, num_experts, contracted, features, transpose_rhs=transpose_rhs)
    operands = hopper_row_tiles.make_operands(x_RK, (w_EKN,), group_sizes_E, tiles=tiles)
    kernel = functools.partial(_matmul_kernel, tiles=tiles, transpose_rhs=transpose_rhs)
    return hopper.launch("grouped_matmul", kernel, (operands.x_RK.shape[0], features), operands)[:num_rows]


def _matmul_kernel(operands: hopper_row_tiles.Operands, y_RN: Any, *, tiles: Tiles, transpose_rhs: bool) -> None:
    half = tiles.columns // COMPUTE_WARPGROUPS
    own = pl.ds(lax.axis_index("warpgroup") * half, half)

    def multiply(x: Any, weights: Any, sums: Any) -> None:
        (w,) = weights
        plgpu.wgmma(sums[0], x, w.at[own].T if transpose_rhs else w.at[:, own])

    def finish(part: hopper_row_tiles.Part, sums: Any) -> None:
        part.store(y_RN, values=sums[0].astype(y_RN.dtype))

    hopper_row_tiles.multiply_tiles(
        operands,
        [y_RN],
        tiles=tiles,
        columns=tiles.columns,
        transposed=transpose_rhs,
        part=(tiles.rows, half),
        multiply=multiply,
        finish=finish,
    )


def weight_gradient(
    x_RK: jax.Array, dy_RN: jax.Array, group_sizes_E: jax.Array, *, tiles: Tiles | None = None
) -> jax.Array:
    """dw_EKN: for each expert the sum over its rows of x outer dy, summed in float32; zero without rows."""
    num_rows, num_experts = x_RK.shape[0], group_sizes_E.shape[0]
    tiles = tiles or weight_gradient_tiles(x_RK.shape[1], dy_RN.shape[1])
    if not tiles.suit_every_kernel:
        raise ValueError(f"tiles={tiles}: the weight gradient takes tiles of 128 rows and depth 64 only")
    x_RK, dy_RN = hopper.pad_rows(x_RK, tiles.depth), hopper.pad_rows(dy_RN, tiles.depth)
    ends_E = jnp.minimum(jnp.cumsum(group_sizes_E, dtype=jnp.int32), num_rows)
    starts_E = jnp.concatenate([jnp.zeros_like(ends_E[:1]), ends_E[:-1]])
    shape = (num_experts, x_RK.shape[1], dy_RN.shape[1])
    kernel = functools.partial(_weight_gradient_kernel, tiles=tiles)
    return hopper.launch("grouped_matmul_weight_gradient", kernel, shape, _Rows(x_RK, dy_RN, starts_E, ends_E))


class _Rows(NamedTuple):
    """Operands of the weight gradient: the rows, and where each expert's start and stop."""

    x_RK: Any
    dy_RN: Any
    starts_E: Any
    stops_E: Any


def _weight_gradient_kernel(operands: _Rows, dw_EKN: Any, *, tiles: Tiles) -> None:
    x_RK, dy_RN, starts_E, stops_E = operands
    rows, columns, depth = tiles.rows, tiles.columns, tiles.depth
    half = columns // COMPUTE_WARPGROUPS
    num_rows, (num_experts, contracted, features) = x_RK.shape[0], dw_EKN.shape
    pipeline = functools.partial(_gradient_pipeline, num_rows=num_rows, tiles=tiles)
    unused = pipeline(hopper.nothing, hopper.nothing, steps=jnp.int32(1), base=0)
    scratch = {
        "allocations": unused.get_allocations(x_RK, dy_RN),
        "memory": hopper.store_memory(rows)[0],
        "masked": plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
        "drained": hopper.drain_barrier(),
    }

    @hopper.for_each_tile((num_experts, contracted // rows, features // columns), tiles.snake, scratch)
    def _(expert: Any, row: Any, block: Any, *, allocations: Any, memory: Any, masked: Any, drained: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")
        start, stop = starts_E[expert], stops_E[expert]
        base = lax.div(start, hopper.ROW_ALIGNMENT) * hopper.ROW_ALIGNMENT
        steps = jnp.where(stop > start, lax.div(stop - base + (depth - 1), depth), 0)

        def add(indices: Any, x: Any, dy: Any, sums: Any) -> Any:
            (step,) = indices

            @pl.when((step == 0) | (step == steps - 1))
            def _() -> None:
                wanted = base + step * depth
                loaded = jnp.minimum(wanted, num_rows - depth)
                _mask_rows(x, dy, jnp.maximum(start, wanted) - loaded, stop - loaded, warpgroup, masked)

            plgpu.wgmma(sums, x.T, dy.at[:, pl.ds(warpgroup * half, half)])
            plgpu.wgmma_wait(1)
            return sums

        def compute(run: Callable[[Any], Any]) -> None:
            @functools.partial(pl.run_scoped, sums=plgpu.ACC((rows, half), jnp.float32))
            def _(sums: Any) -> None:
                run(sums)
                values = sums[...].astype(dw_EKN.dtype)
                plgpu.barrier_arrive(drained)
                columns_here = pl.ds(block * columns + warpgroup * half, half)
                hopper.store_tile(
                    memory.at[warpgroup], values, dw_EKN.at[expert, pl.ds(row * rows, rows), columns_here]
                )

        x, dy = x_RK.at[:, pl.ds(row * rows, rows)], dy_RN.at[:, pl.ds(block * columns, columns)]
        pipeline(add, compute, steps=steps, base=base)(x, dy, allocations=allocations)
        hopper.await_drained(drained)


def _gradient_pipeline(
    body: Callable[..., Any], compute: Callable[..., Any], *, steps: Any, base: Any, num_rows: int, tiles: Tiles
) -> Any:
    """Pipeline along an expert's rows, from row `base` on; the last step may load rows again rather than past R."""

    def rows_of(step: Any) -> tuple[Any, int]:
        first = jnp.minimum(base + step * tiles.depth, num_rows - tiles.depth)
        return pl.multiple_of(first, hopper.ROW_ALIGNMENT), 0

    def block(width: int) -> hopper.Block:
        return hopper.Block((pl.Element(tiles.depth), width), rows_of)

    blocks = (block(tiles.rows), block(tiles.columns))
    return hopper.pipeline(body, compute, (steps,), blocks, tiles.stages, delay_release=1)


def _mask_rows(x: Any, dy: Any, start: Any, stop: Any, warpgroup: Any, masked: Any) -> None:
    """Zero all rows but [start, stop) of both blocks, each warpgroup a half of either, and wait for each other.

    Both are masked: either may hold NaN, or another expert's values, in rows that are not this expert's.
    """
    for ref in (x, dy):
        width = ref.shape[1] // COMPUTE_WARPGROUPS
        own = ref.at[:, pl.ds(warpgroup * width, width)]
        values = own[...]
        row = plgpu.layout_cast(plgpu.broadcasted_iota(jnp.int32, values.shape, 0), plgpu.Layout.WGMMA)
        own[...] = jnp.where((row >= start) & (row < stop), values, jnp.zeros_like(values))
    plgpu.commit_smem()
    plgpu.barrier_arrive(masked)
    plgpu.barrier_wait(masked)
