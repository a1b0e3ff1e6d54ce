"""The frame of the Hopper kernels whose results are rows: each tile is some rows of one expert times its weights.

Shape letters: R rows, K contracted features, N output features, E experts, L listed row tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul.row_tiles import list_row_tiles
from pallas_kernels.hopper_tiles import COMPUTE_WARPGROUPS, Tiles


class Operands(NamedTuple):
    """Operands of such a kernel: arrays for `hopper.launch`, references in the kernel.

    Attributes:
      x_RK: rows, as many as `hopper.pad_rows` makes of them.
      weights: one or more of [E, K, N], or [E, N, K].
      experts_L, firsts_L, starts_L, stops_L: see `RowTiles`.
      steps: int32 [1], along the contraction.
      weights_R: float32 factor of each row, or None.
    """

    x_RK: Any
    weights: tuple[Any, ...]
    experts_L: Any
    firsts_L: Any
    starts_L: Any
    stops_L: Any
    steps: Any
    weights_R: Any


def make_operands(
    x_RK: jax.Array,
    weights: Sequence[jax.Array],
    group_sizes_E: jax.Array,
    weights_R: jax.Array | None = None,
    *,
    tiles: Tiles,
) -> Operands:
    """Rows padded to what TMA takes, and the list of their tiles."""
    x_RK = hopper.pad_rows(x_RK, tiles.rows)
    listed = list_row_tiles(group_sizes_E, x_RK.shape[0], tiles.rows, alignment=hopper.ROW_ALIGNMENT, with_padding=True)
    steps = jnp.full((1,), x_RK.shape[1] // tiles.depth, jnp.int32)
    if weights_R is not None:
        weights_R = hopper.pad_rows(weights_R.astype(jnp.float32), tiles.rows)
    return Operands(x_RK, tuple(weights), *listed[:4], steps, weights_R)


class Part(NamedTuple):
    """What a compute warpgroup owns of a tile.

    Attributes:
      first: row of the operands at which it starts.
      store: `store(y_RN, values=...)` stores the part, [rows, columns] in registers, into a result.
    """

    first: Any
    store: Callable[..., None]


def multiply_tiles(
    operands: Operands,
    results: Sequence[Any],
    *,
    tiles: Tiles,
    columns: int,
    transposed: bool,
    part: tuple[int, int],
    multiply: Callable[[Any, Sequence[Any], Sequence[Any]], None],
    finish: Callable[[Part, Sequence[Any]], None],
) -> None:
    """Multiplies the rows of every tile by their expert's weights; rows past the last group become zeros.

    Args:
      columns: of the results in a tile.
      transposed: the weights are stored [E, N, K].
      part: rows and columns of a tile that a compute warpgroup owns: all of the one, half of the other.
      multiply: `multiply(x, weights, sums)` issues the products of one step and leaves them running; the operands are
        in shared memory, with a sum of the part's shape for each weight.
      finish: `finish(part, sums)` stores what becomes of the sums, float32 in registers.
    """
    x_RK, weights, experts_L, firsts_L, starts_L, stops_L, steps = operands[:7]
    num_experts, x_block = weights[0].shape[0], hopper.Block((tiles.rows, tiles.depth), lambda step: (0, step))
    blocks = (x_block, *(_weight_block(columns, tiles.depth, transposed) for _ in weights))

    def pipeline(body: Callable[..., Any], compute: Callable[..., Any]) -> Any:
        return hopper.pipeline(body, compute, (steps[0],), blocks, tiles.stages, delay_release=1)

    def step(_: Any, x: Any, *weights_and_sums: Any) -> Any:
        *weights, sums = weights_and_sums
        multiply(x, weights, sums)
        plgpu.wgmma_wait(1)
        return sums

    allocations = pipeline(hopper.nothing, hopper.nothing).get_allocations(x_RK, *(w.at[0] for w in weights))
    scratch = {"allocations": allocations, "memory": hopper.store_memory(part[0]), "drained": hopper.drain_barrier()}

    @hopper.for_each_tile((1, experts_L.shape[0], results[0].shape[1] // columns), tiles.snake, scratch)
    def _(_plane: Any, tile: Any, block: Any, *, allocations: Any, memory: Any, drained: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")
        expert, start, stop = experts_L[tile], starts_L[tile], stops_L[tile]
        first, column = pl.multiple_of(firsts_L[tile], hopper.ROW_ALIGNMENT), block * columns
        own = _own_part(part, tiles.rows, first, column, start, stop, [ref.at[warpgroup] for ref in memory])

        def compute(run: Callable[[Any], Any]) -> None:
            finish(own, _sums(run, part, len(weights), drained))

        @pl.when((stop > start) & (expert < num_experts))
        def _() -> None:
            span = pl.ds(column, columns)
            loaded = [w.at[expert, span] if transposed else w.at[expert, :, span] for w in weights]
            pipeline(step, compute)(x_RK.at[pl.ds(first, tiles.rows)], *loaded, allocations=allocations)
            hopper.await_drained(drained)

        @pl.when((stop > start) & (expert == num_experts) & (warpgroup < COMPUTE_WARPGROUPS))
        def _() -> None:
            zeros = plgpu.layout_cast(jnp.zeros(part, jnp.bfloat16), plgpu.Layout.WGMMA)
            for result in results:
                own.store(result, values=zeros)


def _sums(run: Callable[[Any], Any], shape: tuple[int, int], count: int, drained: Any) -> list[Any]:
    """What a pipeline sums up, in registers; `drained` learns that nothing in shared memory is read any more."""

    def scope(*sums: Any) -> list[Any]:
        run(sums)
        values = [each[...] for each in sums]
        plgpu.barrier_arrive(drained)
        return values

    return pl.run_scoped(scope, *(plgpu.ACC(shape, jnp.float32) for _ in range(count)))


def _weight_block(columns: int, depth: int, transposed: bool) -> hopper.Block:
    if transposed:
        return hopper.Block((columns, depth), lambda step: (0, step))
    return hopper.Block((depth, columns), lambda step: (step, 0))


def _own_part(
    part: tuple[int, int], rows: int, first: Any, column: Any, start: Any, stop: Any, memory: Sequence[Any]
) -> Part:
    warpgroup = lax.axis_index("warpgroup")
    if part[0] == rows:
        column = column + warpgroup * part[1]
    else:
        first = pl.multiple_of(first + warpgroup * part[0], hopper.ROW_ALIGNMENT)
        start, stop = jnp.maximum(start, first), jnp.minimum(stop, first + part[0])
    store = functools.partial(hopper.store_rows, memory=memory, first=first, column=column, start=start, stop=stop)
    return Part(first, store)
