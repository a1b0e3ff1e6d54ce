"""Grouped SwiGLU in plain XLA: two grouped matmuls and the activation.

Shape letters: X tokens or rows, R rows, K width, F expert hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from pallas_kernels.gathered_rows import take_rows
from pallas_kernels.grouped_matmul import xla
from pallas_kernels.grouped_swiglu.activation import activate


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
    matmul: Callable[..., jax.Array] = xla.matmul,
) -> tuple[jax.Array, ...]:
    """(hidden_RF, gate_RF, up_RF), or (hidden_RF,) without `save_inputs`; contract as in `api.grouped_swiglu`.

    Args:
      gate, up: [E, K, F]; with `scales` of 8 bits and [E, F, K].
      token_R: the token in `x_XK` of each row; None: `x_XK` holds the rows.
      weights_R: factor of each row, 0 for padding; None is one.
      scales: of gate and up, [E, F].
      save_inputs: return gate and up as well.
      matmul: a backend's grouped matmul.
    """
    x_RK = x_XK if token_R is None else take_rows(x_XK, token_R)
    gate_RF, up_RF = (
        matmul(x_RK, w, group_sizes_E, transpose_rhs=scales is not None, scales_EN=scales_EF)
        for w, scales_EF in zip((gate, up), scales or (None, None), strict=True)
    )
    hidden_RF = activate(gate_RF, up_RF, weights_R)
    return (hidden_RF, gate_RF, up_RF) if save_inputs else (hidden_RF,)
