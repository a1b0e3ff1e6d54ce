"""Gate and up in one Hopper kernel, SwiGLU in its epilogue; `pallas_kernels/hopper.py` says how such kernels work.

Either compute warpgroup owns half of a tile's rows and keeps two sums, the gate's and the up's, so that what it
multiplies never leaves its registers. `pallas_kernels/hopper_swapped.py` serves few rows an expert, and weights of 8
bits.

Shape letters: X tokens or rows, R rows, K width, F expert hidden size, E experts.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, hopper_row_tiles, hopper_swapped
from pallas_kernels.gathered_rows import take_rows
from pallas_kernels.hopper_tiles import COMPUTE_WARPGROUPS, SwappedTiles, Tiles, swapped_tiles, swiglu_tiles


def swiglu(
    x_XK: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    group_sizes_E: jax.Array,
    *,
    token_R: jax.Array | None = None,
    weights_R: jax.Array | None = None,
    scales: tuple[jax.Array, jax.Array] | None = None,
    save_inputs: bool,
    tiles: Tiles | SwappedTiles | None = None,
) -> tuple[jax.Array, ...]:
    """(hidden_RF, gate_RF, up_RF), or (hidden_RF,) without `save_inputs`; hidden is rounded once, from float32.

    Args:
      gate, up: bfloat16 [E, K, F]; with `scales` int8 or float8_e4m3fn [E, F, K].
      token_R: the token in `x_XK` of each row; None: `x_XK` holds the rows. TMA cannot gather rows on Hopper, so they
        are copied first.
      weights_R: factor of each row, 0 for padding; None is one.
      scales: of gate and up, float32 [E, F].
      save_inputs: also store what the activation was given, for the backward pass; not with `scales`.
      tiles: overrides the choice of `pallas_kernels/hopper_tiles.py`, and with it the kernel; of `Tiles`' columns gate
        and up have half each.
    """
    x_RK = x_XK if token_R is None else take_rows(x_XK, token_R)
    (num_rows, width), num_experts, hidden = x_RK.shape, gate.shape[0], gate.shape[1 if scales else 2]
    if tiles is None and not save_inputs:
        tiles = swapped_tiles(num_rows, num_experts, gate.dtype.itemsize, num_weights=2)
    tiles = tiles or swiglu_tiles(num_rows, num_experts, width, hidden)
    if isinstance(tiles, SwappedTiles):
        if save_inputs:
            raise ValueError(f"tiles={tiles}: this kernel does not save what the activation was given; choose Tiles")
        multiply = functools.partial(hopper_swapped.multiply, transposed=scales is not None, scales=scales or ())
        return (multiply(x_RK, (gate, up), group_sizes_E, weights_R=weights_R, tiles=tiles),)
    if scales:
        raise ValueError(
            f"tiles={tiles}, save_inputs={save_inputs}: weights of 8 bits take SwappedTiles and inference only"
        )
    if not tiles.suit_every_kernel:
        raise ValueError(f"tiles={tiles}: grouped_swiglu takes tiles of 128 rows and depth 64 only")
    operands = hopper_row_tiles.make_operands(x_RK, (gate, up), group_sizes_E, weights_R, tiles=tiles)
    shapes = ((operands.x_RK.shape[0], hidden),) * (3 if save_inputs else 1)
    results = hopper.launch("grouped_swiglu", functools.partial(_kernel, tiles=tiles), shapes, operands)
    return tuple(result[:num_rows] for result in results)


def _kernel(operands: hopper_row_tiles.Operands, *results: Any, tiles: Tiles) -> None:
    rows, columns = tiles.rows // COMPUTE_WARPGROUPS, tiles.columns // 2
    own = pl.ds(lax.axis_index("warpgroup") * rows, rows)

    def multiply(x: Any, weights: Any, sums: Any) -> None:
        for each, w in zip(sums, weights, strict=True):
            plgpu.wgmma(each, x.at[own], w)

    def finish(part: hopper_row_tiles.Part, sums: Any) -> None:
        for result, each in zip(results[1:], sums, strict=False):
            part.store(result, values=each.astype(result.dtype))
        hidden = hopper.swiglu(*sums)
        if operands.weights_R is not None:
            factors = operands.weights_R.at[pl.ds(part.first, rows)]
            factors = plgpu.load(factors, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
            hidden = hidden * lax.broadcast_in_dim(factors, hidden.shape, (0,))
        part.store(results[0], values=hidden.astype(results[0].dtype))

    hopper_row_tiles.multiply_tiles(
        operands,
        results,
        tiles=tiles,
        columns=columns,
        transposed=False,
        part=(rows, columns),
        multiply=multiply,
        finish=finish,
    )
