"""Grouped products for Hopper GPUs with their operands swapped: for few rows an expert, and for weights of 8 bits.

The tensor core's 64 fixed rows are features of the weights, and its free side, 8 to 64 wide, is an expert's tokens. So
a few tokens waste no tile, as in decoding, which is bound by reading the weights; experts without rows are never read.
There is one weight, or gate and up, which SwiGLU joins. Weights of 8 bits become bfloat16 in registers, from where the
tensor core takes this side alone; their scales multiply the float32 sums.

All tiles of a thread block pass through one pipeline, so that memory does not wait for a tile to end. Each step's
products are awaited at once: the next step would overwrite the registers that they read.

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
from pallas_kernels.hopper_tiles import COMPUTE_WARPGROUPS, SWAPPED_COLUMNS, SWAPPED_DEPTH, SwappedTiles

_FEATURES = SWAPPED_COLUMNS // COMPUTE_WARPGROUPS
"""Output features of a tile that a compute warpgroup owns: the tensor core's fixed rows."""


class _Operands(NamedTuple):
    """Arrays for `hopper.launch`, references in the kernel.

    Attributes:
      counts: int32 [3]: steps along K, listed tiles of experts, listed tiles in all with those of padding behind them.
      others: see `multiply` and `RowTiles`.
    """

    x_RK: Any
    weights: tuple[Any, ...]
    scales: tuple[Any, ...]
    weights_R: Any
    experts_L: Any
    firsts_L: Any
    starts_L: Any
    stops_L: Any
    counts: Any


def multiply(
    x_RK: jax.Array,
    weights: Sequence[jax.Array],
    group_sizes_E: jax.Array,
    *,
    transposed: bool,
    scales: Sequence[jax.Array] = (),
    weights_R: jax.Array | None = None,
    tiles: SwappedTiles,
) -> jax.Array:
    """y_RN: rows of `x_RK` times their expert's matrix, or SwiGLU of the products with two; rounded once.

    Args:
      weights: one, or gate and up: bfloat16 [E, K, N], or [E, N, K] if `transposed`, as int8 and float8_e4m3fn must be.
      scales: of weights of 8 bits, float32 [E, N] each.
      weights_R: factor of each row, 0 for padding; None is one.
    """
    num_rows, features = x_RK.shape[0], weights[0].shape[1 if transposed else 2]
    x_RK = hopper.pad_rows(x_RK, tiles.rows)
    if weights_R is not None:
        weights_R = hopper.pad_rows(weights_R.astype(jnp.float32), tiles.rows)
    listed = list_row_tiles(group_sizes_E, x_RK.shape[0], tiles.rows, alignment=hopper.ROW_ALIGNMENT, with_padding=True)
    of_padding_L = (listed.experts == weights[0].shape[0]) & (listed.stops > listed.starts)
    of_experts = listed.num_live - of_padding_L.sum(dtype=jnp.int32)
    counts = jnp.stack([jnp.int32(x_RK.shape[1] // SWAPPED_DEPTH), of_experts, listed.num_live])
    operands = _Operands(x_RK, tuple(weights), tuple(scales), weights_R, *listed[:4], counts)
    name = "grouped_matmul_swapped" if len(weights) == 1 else "grouped_swiglu_swapped"
    kernel = functools.partial(_kernel, rows=tiles.rows, stages=tiles.stages, transposed=transposed)
    return hopper.launch(name, kernel, (x_RK.shape[0], features), operands)[:num_rows]


class _Schedule(NamedTuple):
    """Which products a thread block makes: of all pairs of a listed tile and a block of features, every n-th."""

    thread_block: Any
    thread_blocks: int
    feature_blocks: int

    def num_own(self, listed: Any) -> Any:
        """Own products among those of the first `listed` tiles."""
        ahead = self.thread_blocks - 1 - self.thread_block
        return lax.div(listed * self.feature_blocks + ahead, jnp.int32(self.thread_blocks))

    def place(self, product: Any) -> tuple[Any, Any]:
        """(listed tile, block of features) of an own product."""
        index = self.thread_block + product * self.thread_blocks
        return lax.div(index, self.feature_blocks), lax.rem(index, self.feature_blocks)


def _kernel(operands: _Operands, y_RN: Any, *, rows: int, stages: int, transposed: bool) -> None:
    schedule = _Schedule(lax.axis_index("block"), lax.axis_size("block"), y_RN.shape[1] // SWAPPED_COLUMNS)
    steps, tiles_of_experts, all_tiles = (operands.counts[index] for index in range(3))
    grid, loads = (schedule.num_own(tiles_of_experts), steps), _loads(operands, schedule, rows, transposed)

    def pipeline(body: Callable[..., Any], compute: Callable[..., Any]) -> Any:
        return hopper.pipeline(body, compute, grid, loads, stages, delay_release=0)

    @functools.partial(
        pl.run_scoped,
        allocations=pipeline(hopper.nothing, hopper.nothing).get_allocations(operands.x_RK, *operands.weights),
        memory=plgpu.SMEM((COMPUTE_WARPGROUPS, rows, _FEATURES), y_RN.dtype),
        collective_axes="warpgroup",
    )
    def _(allocations: Any, memory: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")
        zeros = plgpu.layout_cast(jnp.zeros((_FEATURES, rows), jnp.float32), plgpu.Layout.WGMMA)

        def finish(product: Any, sums: Sequence[Any] | None) -> None:
            tile, block = schedule.place(product)
            column = block * SWAPPED_COLUMNS + warpgroup * _FEATURES
            values = zeros if sums is None else _join(sums, operands, tile, column)
            _store(y_RN, memory.at[warpgroup], values, operands, tile, column)

        def step(indices: Any, x: Any, *weights_and_sums: Any) -> Any:
            *weights, sums = weights_and_sums
            product, depth = indices
            sums = [total + part for total, part in zip(sums, _products(weights, x, transposed), strict=True)]

            def start_anew(sums: Any) -> Any:
                finish(product, sums)
                return [zeros for _ in sums]

            return lax.cond(depth == steps - 1, start_anew, lambda sums: sums, sums)

        pipeline(step, lambda run: run([zeros for _ in operands.weights]))(
            operands.x_RK, *operands.weights, allocations=allocations
        )

        @pl.when(warpgroup < COMPUTE_WARPGROUPS)
        def _() -> None:
            @pl.loop(grid[0], schedule.num_own(all_tiles))
            def _(product: Any) -> None:
                finish(product, None)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _loads(operands: _Operands, schedule: _Schedule, rows: int, transposed: bool) -> list[hopper.Block]:
    """What a step loads of the rows and of each weight."""

    def place_of_rows(product: Any, depth: Any) -> tuple[Any, ...]:
        tile, _ = schedule.place(product)
        return pl.multiple_of(operands.firsts_L[tile], hopper.ROW_ALIGNMENT), depth

    def place_of_weights(product: Any, depth: Any) -> tuple[Any, ...]:
        tile, block = schedule.place(product)
        expert = operands.experts_L[tile]
        return (expert, block, depth) if transposed else (expert, depth, block)

    shape = (None, SWAPPED_COLUMNS, SWAPPED_DEPTH) if transposed else (None, SWAPPED_DEPTH, SWAPPED_COLUMNS)
    return [
        hopper.Block((pl.Element(rows), SWAPPED_DEPTH), place_of_rows),
        *(hopper.Block(shape, place_of_weights, w.dtype) for w in operands.weights),
    ]


def _products(weights: Sequence[Any], x: Any, transposed: bool) -> list[Any]:
    """Of this warpgroup's features of each weight with a block of rows: float32 [features, rows] in registers."""
    own = pl.ds(lax.axis_index("warpgroup") * _FEATURES, _FEATURES)

    def left(w: Any) -> Any:
        if w.dtype == jnp.bfloat16:
            return w.at[own] if transposed else w.at[:, own].T
        values = w[own]
        # Hopper converts e4m3 to 16 bits as float16 only.
        return (values.astype(jnp.float32) if w.dtype == jnp.float8_e4m3fn else values).astype(jnp.bfloat16)

    def scope(*sums: Any) -> list[Any]:
        for each, w in zip(sums, weights, strict=True):
            plgpu.wgmma(each, left(w), x.T)
        if weights[0].dtype != jnp.bfloat16:
            plgpu.commit_smem()  # orders the reads of the weights before what TMA writes there next
        return [each[...] for each in sums]

    return pl.run_scoped(scope, *(plgpu.ACC((_FEATURES, x.shape[0]), jnp.float32) for _ in weights))


def _join(sums: Sequence[Any], operands: _Operands, tile: Any, column: Any) -> Any:
    """What becomes of the sums [features, rows] of each weight: scales, SwiGLU of two, factors of the rows."""
    layout = plgpu.Layout.WGMMA
    if operands.scales:
        own = (operands.experts_L[tile], pl.ds(column, _FEATURES))
        scales = [plgpu.load(ref.at[own], layout=layout.reduce(1), optimized=False) for ref in operands.scales]
        sums = [each * lax.broadcast_in_dim(scale, each.shape, (0,)) for each, scale in zip(sums, scales, strict=True)]
    values = sums[0] if len(sums) == 1 else hopper.swiglu(*sums)
    if operands.weights_R is None:
        return values
    span = pl.ds(pl.multiple_of(operands.firsts_L[tile], hopper.ROW_ALIGNMENT), values.shape[1])
    factors = plgpu.load(operands.weights_R.at[span], layout=layout.reduce(0), optimized=False)
    return values * lax.broadcast_in_dim(factors, values.shape, (1,))


def _store(y_RN: Any, memory: Any, values: Any, operands: _Operands, tile: Any, column: Any) -> None:
    """Store the tile's own rows of `values`, [features, rows], from `column` on; `memory` is [rows, features]."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    memory.T[...] = values.astype(y_RN.dtype)
    plgpu.commit_smem()
    first, start, stop = operands.firsts_L[tile], operands.starts_L[tile], operands.stops_L[tile]
    hopper.store_runs(y_RN, memory, first=first, column=column, start=start, stop=stop, longest=memory.shape[0])
