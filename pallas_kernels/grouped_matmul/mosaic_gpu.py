"""Grouped matmul for Hopper GPUs (sm_90a) in Pallas Mosaic GPU; `pallas_kernels/hopper.py` says how such kernels work.

The two compute warpgroups own the left and the right half of a thread block's output columns. The weight gradient is
the same pipeline turned round: it runs along an expert's rows, as many steps as there are, and rows of other experts
are masked in the first and last step.

Shape letters: R rows, K contracted features, N output features, E experts, L listed row tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul import mosaic_gpu_few_rows
from pallas_kernels.grouped_matmul.row_tiles import list_row_tiles
from pallas_kernels.hopper_tiles import (
    COMPUTE_WARPGROUPS,
    FewRowsTiles,
    Tiles,
    few_rows_tiles,
    matmul_tiles,
    weight_gradient_tiles,
)


def refusal(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *, transpose_rhs: bool = False
) -> str | None:
    """Why these operands cannot be taken, or None."""
    return hopper.refusal(dtype, x_shape[0], w_shape[1:])


def matmul(
    x_RK: jax.Array,
    w_EKN: jax.Array,
    group_sizes_E: jax.Array,
    *,
    transpose_rhs: bool = False,
    tiles: Tiles | FewRowsTiles | None = None,
) -> jax.Array:
    """y_RN = rows of `x_RK` times their expert's matrix; contract as in `api.grouped_matmul`, without a gradient.

    Args:
      tiles: overrides the choice of `pallas_kernels/hopper_tiles.py`, and with it the kernel.
    """
    num_rows, contracted = x_RK.shape
    features = w_EKN.shape[1 if transpose_rhs else 2]
    tiles = tiles or few_rows_tiles(num_rows, w_EKN.shape[0])
    if isinstance(tiles, FewRowsTiles):
        return mosaic_gpu_few_rows.matmul(x_RK, w_EKN, group_sizes_E, transpose_rhs=transpose_rhs, tiles=tiles)
    tiles = tiles or matmul_tiles(num_rows, w_EKN.shape[0], contracted, features)
    x_RK = hopper.pad_rows(x_RK, tiles.rows)
    listed = list_row_tiles(group_sizes_E, x_RK.shape[0], tiles.rows, alignment=hopper.ROW_ALIGNMENT, with_padding=True)
    steps = hopper.num_steps(contracted, tiles.depth)
    arguments = (x_RK, w_EKN, listed.experts, listed.firsts, listed.starts, listed.stops, steps)
    body = functools.partial(_matmul_kernel, tiles=tiles, transpose_rhs=transpose_rhs)
    body.__name__ = "grouped_matmul"  # type: ignore[attr-defined]
    return hopper.launch(body, (x_RK.shape[0], features), arguments)[:num_rows]


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
    body = functools.partial(_weight_gradient_kernel, tiles=tiles)
    body.__name__ = "grouped_matmul_weight_gradient"  # type: ignore[attr-defined]
    shape = (num_experts, x_RK.shape[1], dy_RN.shape[1])
    return hopper.launch(body, shape, (x_RK, dy_RN, starts_E, ends_E))


def _matmul_kernel(
    x_RK: Any,
    w_EKN: Any,
    experts_L: Any,
    firsts_L: Any,
    starts_L: Any,
    stops_L: Any,
    steps: Any,
    y_RN: Any,
    *,
    tiles: Tiles,
    transpose_rhs: bool,
) -> None:
    rows, columns, depth = tiles.rows, tiles.columns, tiles.depth
    half = columns // COMPUTE_WARPGROUPS
    num_experts, (listed,) = w_EKN.shape[0], experts_L.shape
    grid = (listed, y_RN.shape[1] // columns)
    x_block = ((rows, depth), lambda step: (0, step))
    w_block = hopper.weight_block(columns, depth, transposed=transpose_rhs)

    def pipeline(body: Callable[..., Any], compute: Callable[..., Any]) -> Any:
        return hopper.pipeline(body, compute, steps[0], (x_block, w_block), tiles.stages)

    @functools.partial(
        pl.run_scoped,
        allocations=pipeline(hopper.nothing, hopper.nothing).get_allocations(x_RK, w_EKN.at[0]),
        memory=hopper.store_memory(rows),
        drained=hopper.drain_barrier(),
        collective_axes="warpgroup",
    )
    def _(allocations: Any, memory: Any, drained: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")

        @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="block")
        def _(loop: Any) -> None:
            tile, block = plgpu.planar_snake(loop.index[0], grid, 0, tiles.snake)
            expert, first = experts_L[tile], pl.multiple_of(firsts_L[tile], hopper.ROW_ALIGNMENT)
            start, stop = starts_L[tile], stops_L[tile]
            own = pl.ds(warpgroup * half, half)
            store = functools.partial(
                hopper.store_rows,
                y_RN,
                memory=[part.at[warpgroup] for part in memory],
                first=first,
                column=block * columns + warpgroup * half,
                start=start,
                stop=stop,
            )

            def multiply(_: Any, x: Any, w: Any, sums: Any) -> Any:
                plgpu.wgmma(sums, x, w.at[own].T if transpose_rhs else w.at[:, own])
                plgpu.wgmma_wait(1)
                return sums

            def compute(run: Callable[[Any], Any]) -> None:
                @functools.partial(pl.run_scoped, sums=plgpu.ACC((rows, half), jnp.float32))
                def _(sums: Any) -> None:
                    run(sums)
                    values = sums[...].astype(y_RN.dtype)
                    plgpu.barrier_arrive(drained)
                    store(values=values)

            @pl.when((stop > start) & (expert < num_experts))
            def _() -> None:
                w = hopper.weight_columns(w_EKN, expert, block * columns, columns, transposed=transpose_rhs)
                pipeline(multiply, compute)(x_RK.at[pl.ds(first, rows)], w, allocations=allocations)
                hopper.await_drained(drained)

            @pl.when((stop > start) & (expert == num_experts) & (warpgroup < COMPUTE_WARPGROUPS))
            def _() -> None:
                zeros = plgpu.layout_cast(jnp.zeros((rows, half), y_RN.dtype), plgpu.Layout.WGMMA)
                store(values=zeros)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _weight_gradient_kernel(x_RK: Any, dy_RN: Any, starts_E: Any, stops_E: Any, dw_EKN: Any, *, tiles: Tiles) -> None:
    rows, columns, depth = tiles.rows, tiles.columns, tiles.depth
    half = columns // COMPUTE_WARPGROUPS
    num_rows, (num_experts, contracted, features) = x_RK.shape[0], dw_EKN.shape
    grid = (contracted // rows, features // columns)

    @functools.partial(
        pl.run_scoped,
        allocations=_gradient_pipeline(
            hopper.nothing, hopper.nothing, jnp.int32(1), 0, num_rows, tiles
        ).get_allocations(x_RK, dy_RN),
        memory=hopper.store_memory(rows)[0],
        masked=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
        drained=hopper.drain_barrier(),
        collective_axes="warpgroup",
    )
    def _(allocations: Any, memory: Any, masked: Any, drained: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")

        @plgpu.nd_loop((num_experts * grid[0] * grid[1],), collective_axes="block")
        def _(loop: Any) -> None:
            expert = lax.div(loop.index[0], grid[0] * grid[1])
            row, block = plgpu.planar_snake(lax.rem(loop.index[0], grid[0] * grid[1]), grid, 0, tiles.snake)
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
                    target = dw_EKN.at[expert, pl.ds(row * rows, rows), columns_here]
                    hopper.store_tile(memory.at[warpgroup], values, target)

            pipeline = _gradient_pipeline(add, compute, steps, base, num_rows, tiles)
            pipeline(
                x_RK.at[:, pl.ds(row * rows, rows)],
                dy_RN.at[:, pl.ds(block * columns, columns)],
                allocations=allocations,
            )
            hopper.await_drained(drained)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _gradient_pipeline(
    body: Callable[..., Any], compute: Callable[..., Any], steps: Any, base: Any, num_rows: int, tiles: Tiles
) -> Any:
    """Pipeline along an expert's rows, from row `base` on; the last step may load rows again rather than past R."""

    def rows_of(step: Any) -> tuple[Any, int]:
        first = jnp.minimum(base + step * tiles.depth, num_rows - tiles.depth)
        return pl.multiple_of(first, hopper.ROW_ALIGNMENT), 0

    def block(width: int) -> Any:
        return (pl.Element(tiles.depth), width), rows_of

    return hopper.pipeline(body, compute, steps, (block(tiles.rows), block(tiles.columns)), tiles.stages)


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
