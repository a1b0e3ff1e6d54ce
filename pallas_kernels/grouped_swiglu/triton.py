"""Gate and up in one Triton kernel, SwiGLU in its epilogue, rows read where their tokens are.

It multiplies as `grouped_matmul/triton.py` does, and with its tiles.

Shape letters: X tokens or rows, R rows sorted by expert, K width, F expert hidden size, E experts.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import triton

from pallas_kernels.grouped_matmul.row_tiles import list_row_tiles
from pallas_kernels.grouped_swiglu import triton_kernels
from pallas_kernels.jax_triton_launch import launch
from pallas_kernels.triton_tiles import BLOCKS_SIDE_BY_SIDE, matmul_tile


@functools.partial(jax.jit, static_argnames="save_inputs")
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
) -> tuple[jax.Array, ...]:
    """(hidden_RF, gate_RF, up_RF), or (hidden_RF,) without `save_inputs`; hidden is rounded once, from float32.

    Args:
      x_XK: bfloat16 or float32; with `token_R` no copy of its rows is made.
      gate, up: [E, K, F] of the same dtype; with `scales` int8 or float8_e4m3fn, and [E, F, K].
      token_R: int32, the token in `x_XK` of each row; out of range for padding rows. None: `x_XK` holds the rows.
      weights_R: factor of each row, any floating dtype; None is one.
      scales: of gate and up, float32 [E, F].
      save_inputs: also store what the activation was given, for the backward pass.
    """
    num_rows, width = (x_XK if token_R is None else token_R).shape[0], x_XK.shape[1]
    num_experts, hidden = gate.shape[0], gate.shape[2 if scales is None else 1]
    tile = matmul_tile(x_XK.dtype, num_rows, num_experts, is_quantized=scales is not None)
    features = tile.BN // 2  # of gate and of up: together a matmul's memory and registers
    tasks = list_row_tiles(group_sizes_E, num_rows, tile.BM, with_padding=True)
    num_tasks = tasks.starts.shape[0]
    weights_R = None if weights_R is None else weights_R.astype(jnp.float32)
    row_operands = (token_R, weights_R, tasks.experts, tasks.starts, tasks.stops)
    return launch(
        triton_kernels.activate_rows,
        (x_XK, gate, up, *(scales or (None, None)), *row_operands),
        [jax.ShapeDtypeStruct((num_rows, hidden), x_XK.dtype)] * (3 if save_inputs else 1),
        name="grouped_swiglu",
        grid=(num_tasks * triton.cdiv(hidden, features),),
        num_warps=tile.warps,
        num_stages=tile.stages,
        num_tasks=num_tasks,
        num_experts=num_experts,
        num_tokens=x_XK.shape[0],
        K=width,
        F=hidden,
        w_stride_K=hidden if scales is None else 1,
        w_stride_F=1 if scales is None else width,
        has_scales=scales is not None,
        has_tokens=token_R is not None,
        has_weights=weights_R is not None,
        saves_inputs=save_inputs,
        BM=tile.BM,
        BK=tile.BK,
        BF=features,
        tasks_side_by_side=BLOCKS_SIDE_BY_SIDE,
        **({} if save_inputs else {"gate_inputs_ptr": None, "up_inputs_ptr": None}),
    )
