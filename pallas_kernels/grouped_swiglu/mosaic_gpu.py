"""Gate and up in one Hopper kernel, SwiGLU in its epilogue; `pallas_kernels/hopper.py` says how such kernels work.

Either compute warpgroup owns half of a tile's rows and keeps two sums, the gate's and the up's, so that what it
multiplies never leaves its registers.

Shape letters: R rows, K width, F expert hidden size, E experts, L listed row tiles.
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
from pallas_kernels.hopper_tiles import COMPUTE_WARPGROUPS, Tiles, swiglu_tiles


def swiglu(
    x_RK: jax.Array,
    gate_EKF: jax.Array,
    up_EKF: jax.Array,
    group_sizes_E: jax.Array,
    weights_R: jax.Array | None,
    *,
    save_inputs: bool,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, ...]:
    """(hidden_RF, gate_RF, up_RF), or (hidden_RF,) without `save_inputs`; hidden is rounded once, from float32.

    Args:
      weights_R: factor of each row, 0 for padding; None is one.
      save_inputs: also store what the activation was given, for the backward pass.
      tiles: overrides the choice of `pallas_kernels/hopper_tiles.py`; gate and up have half of the columns each.
    """
    num_rows, (num_experts, width, hidden) = x_RK.shape[0], gate_EKF.shape
    tiles = tiles or swiglu_tiles(num_rows, num_experts, width, hidden)
    if not tiles.suit_every_kernel:
        raise ValueError(f"tiles={tiles}: grouped_swiglu takes tiles of 128 rows and depth 64 only")
    x_RK = hopper.pad_rows(x_RK, tiles.rows)
    listed = list_row_tiles(group_sizes_E, x_RK.shape[0], tiles.rows, alignment=hopper.ROW_ALIGNMENT, with_padding=True)
    steps = hopper.num_steps(width, tiles.depth)
    arguments = [x_RK, gate_EKF, up_EKF, listed.experts, listed.firsts, listed.starts, listed.stops, steps]
    if weights_R is not None:
        arguments.append(jnp.pad(weights_R.astype(jnp.float32), (0, x_RK.shape[0] - num_rows)))
    body = functools.partial(_kernel, tiles=tiles, weighted=weights_R is not None)
    body.__name__ = "grouped_swiglu"  # type: ignore[attr-defined]
    shapes = ((x_RK.shape[0], hidden),) * (3 if save_inputs else 1)
    return tuple(result[:num_rows] for result in hopper.launch(body, shapes, arguments))


def _kernel(
    x_RK: Any,
    gate_EKF: Any,
    up_EKF: Any,
    experts_L: Any,
    firsts_L: Any,
    starts_L: Any,
    stops_L: Any,
    steps: Any,
    *weights_and_results: Any,
    tiles: Tiles,
    weighted: bool,
) -> None:
    weights_R, results = (weights_and_results[0], weights_and_results[1:]) if weighted else (None, weights_and_results)
    depth, columns = tiles.depth, tiles.columns // 2
    rows = tiles.rows // COMPUTE_WARPGROUPS
    num_experts, (listed,), hidden = gate_EKF.shape[0], experts_L.shape, gate_EKF.shape[2]
    grid = (listed, hidden // columns)
    x_block = ((tiles.rows, depth), lambda step: (0, step))
    w_block = hopper.weight_block(columns, depth, transposed=False)

    def pipeline(body: Callable[..., Any], compute: Callable[..., Any]) -> Any:
        return hopper.pipeline(body, compute, steps[0], (x_block, w_block, w_block), tiles.stages)

    @functools.partial(
        pl.run_scoped,
        allocations=pipeline(hopper.nothing, hopper.nothing).get_allocations(x_RK, gate_EKF.at[0], up_EKF.at[0]),
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
            own_first = pl.multiple_of(first + warpgroup * rows, hopper.ROW_ALIGNMENT)
            store = functools.partial(
                hopper.store_rows,
                memory=[part.at[warpgroup] for part in memory],
                first=own_first,
                column=block * columns,
                start=jnp.maximum(start, own_first),
                stop=jnp.minimum(stop, own_first + rows),
            )

            def multiply(_: Any, x: Any, gate: Any, up: Any, sums: Any) -> Any:
                own = x.at[pl.ds(warpgroup * rows, rows)]
                plgpu.wgmma(sums[0], own, gate)
                plgpu.wgmma(sums[1], own, up)
                plgpu.wgmma_wait(1)
                return sums

            def compute(run: Callable[[Any], Any]) -> None:
                sum_type = plgpu.ACC((rows, columns), jnp.float32)

                @functools.partial(pl.run_scoped, gate=sum_type, up=sum_type)
                def _(gate: Any, up: Any) -> None:
                    run((gate, up))
                    gate_sums, up_sums = gate[...], up[...]
                    plgpu.barrier_arrive(drained)
                    for result, sums in zip(results[1:], (gate_sums, up_sums), strict=False):
                        store(result, values=sums.astype(x_RK.dtype))
                    hidden = gate_sums / (1.0 + jnp.exp(-gate_sums)) * up_sums
                    if weights_R is not None:
                        layout = plgpu.Layout.WGMMA.reduce(1)
                        weights = plgpu.load(weights_R.at[pl.ds(own_first, rows)], layout=layout, optimized=False)
                        hidden = hidden * lax.broadcast_in_dim(weights, hidden.shape, (0,))
                    store(results[0], values=hidden.astype(x_RK.dtype))

            @pl.when((stop > start) & (expert < num_experts))
            def _() -> None:
                weights = (
                    hopper.weight_columns(w, expert, block * columns, columns, transposed=False)
                    for w in (gate_EKF, up_EKF)
                )
                pipeline(multiply, compute)(x_RK.at[pl.ds(first, tiles.rows)], *weights, allocations=allocations)
                hopper.await_drained(drained)

            @pl.when((stop > start) & (expert == num_experts) & (warpgroup < COMPUTE_WARPGROUPS))
            def _() -> None:
                zeros = plgpu.layout_cast(jnp.zeros((rows, columns), x_RK.dtype), plgpu.Layout.WGMMA)
                for result in results:
                    store(result, values=zeros)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
