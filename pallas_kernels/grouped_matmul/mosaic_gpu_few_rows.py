"""Grouped matmul for Hopper GPUs where experts have few rows each, as in decoding: bound by reading the weights.

The operands change places: the tensor core's 64 fixed rows are features of the weights, and its free side, 8 to 32
wide, is an expert's tokens. So a few tokens waste no tile, and experts without rows are never read. Each thread block
leaves a tile of y transposed, [features, tokens]; XLA gathers the rows from there, which is little at such sizes.

Shape letters: R rows, K contracted features, N output features, E experts, L listed row tiles, M rows of a tile.
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
from pallas_kernels.grouped_matmul.row_tiles import list_row_tiles
from pallas_kernels.hopper_tiles import COMPUTE_WARPGROUPS, FewRowsTiles


def matmul(
    x_RK: jax.Array, w_EKN: jax.Array, group_sizes_E: jax.Array, *, transpose_rhs: bool, tiles: FewRowsTiles
) -> jax.Array:
    """y_RN = rows of `x_RK` times their expert's matrix; contract as in `api.grouped_matmul`, without a gradient."""
    num_rows, features = x_RK.shape[0], w_EKN.shape[1 if transpose_rhs else 2]
    x_RK = hopper.pad_rows(x_RK, tiles.rows)
    listed = list_row_tiles(group_sizes_E, x_RK.shape[0], tiles.rows, alignment=hopper.ROW_ALIGNMENT)
    body = functools.partial(_kernel, tiles=tiles, transpose_rhs=transpose_rhs)
    body.__name__ = "grouped_matmul_few_rows"  # type: ignore[attr-defined]
    steps = hopper.num_steps(x_RK.shape[1], tiles.depth)
    arguments = (x_RK, w_EKN, listed.experts, listed.firsts, listed.starts, listed.stops, steps)
    y_LNM = hopper.launch(body, (listed.experts.shape[0], features, tiles.rows), arguments)
    row_R = jnp.arange(num_rows, dtype=jnp.int32)
    # Tiles follow each other in rows; entries not in use stand at the end and hold no rows.
    tile_R = jnp.searchsorted(jnp.where(listed.stops > listed.starts, listed.stops, num_rows + 1), row_R, side="right")
    tile_R = jnp.minimum(tile_R, listed.experts.shape[0] - 1)
    live_R = (row_R >= listed.starts[tile_R]) & (row_R < listed.stops[tile_R])
    y_RN = y_LNM[tile_R, :, jnp.clip(row_R - listed.firsts[tile_R], 0, tiles.rows - 1)]
    return jnp.where(live_R[:, None], y_RN, jnp.zeros_like(y_RN))


def _kernel(
    x_RK: Any,
    w_EKN: Any,
    experts_L: Any,
    firsts_L: Any,
    starts_L: Any,
    stops_L: Any,
    steps: Any,
    y_LNM: Any,
    *,
    tiles: FewRowsTiles,
    transpose_rhs: bool,
) -> None:
    rows, depth, features = tiles.rows, tiles.depth, 64
    columns = COMPUTE_WARPGROUPS * features
    grid = (experts_L.shape[0], y_LNM.shape[1] // columns)
    x_block = ((rows, depth), lambda step: (0, step))
    w_block = hopper.weight_block(columns, depth, transposed=transpose_rhs)

    def pipeline(body: Callable[..., Any], compute: Callable[..., Any]) -> Any:
        return hopper.pipeline(body, compute, steps[0], (x_block, w_block), tiles.stages)

    @functools.partial(
        pl.run_scoped,
        allocations=pipeline(hopper.nothing, hopper.nothing).get_allocations(x_RK, w_EKN.at[0]),
        memory=plgpu.SMEM((COMPUTE_WARPGROUPS, features, rows), y_LNM.dtype),
        drained=hopper.drain_barrier(),
        collective_axes="warpgroup",
    )
    def _(allocations: Any, memory: Any, drained: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")
        own = pl.ds(warpgroup * features, features)

        @plgpu.nd_loop(grid, collective_axes="block")
        def _(loop: Any) -> None:
            tile, block = loop.index
            expert, first = experts_L[tile], pl.multiple_of(firsts_L[tile], hopper.ROW_ALIGNMENT)

            def multiply(_: Any, x: Any, w: Any, sums: Any) -> Any:
                plgpu.wgmma(sums, w.at[own] if transpose_rhs else w.at[:, own].T, x.T)
                plgpu.wgmma_wait(1)
                return sums

            def compute(run: Callable[[Any], Any]) -> None:
                @functools.partial(pl.run_scoped, sums=plgpu.ACC((features, rows), jnp.float32))
                def _(sums: Any) -> None:
                    run(sums)
                    values = sums[...].astype(y_LNM.dtype)
                    plgpu.barrier_arrive(drained)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    memory[warpgroup] = values
                    plgpu.commit_smem()
                    target = y_LNM.at[tile, pl.ds(block * columns + warpgroup * features, features)]
                    plgpu.copy_smem_to_gmem(memory.at[warpgroup], target)

            @pl.when(stops_L[tile] > starts_L[tile])
            def _() -> None:
                w = hopper.weight_columns(w_EKN, expert, block * columns, columns, transposed=transpose_rhs)
                pipeline(multiply, compute)(x_RK.at[pl.ds(first, rows)], w, allocations=allocations)
                hopper.await_drained(drained)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
