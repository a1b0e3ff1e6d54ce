"""The public grouped SwiGLU: checks its arguments, picks a backend and ties it to its gradients.

Shape letters: X tokens or rows, R rows sorted by expert, K width, F expert hidden size, E experts.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.backends import load_backend
from pallas_kernels.gathered_rows import GatheredRows, take_rows
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.grouped_matmul.api import (
    GroupedMatmulError,
    Implementation,
    choose_implementation,
    refuse_gradient,
)
from pallas_kernels.grouped_swiglu.activation import activate
from pallas_kernels.quantized import QuantizedWeights, Weights
from pallas_kernels.varying import cast_to_varying, varying_axes

PREACTIVATIONS = "grouped_swiglu_preactivations"
"""Checkpoint name of gate and up, the residuals of the backward pass: save them by it, or have them computed again."""


def grouped_swiglu(
    x_XK: jax.Array,
    gate_EKF: Weights,
    up_EKF: Weights,
    group_sizes_E: jax.Array,
    *,
    rows: GatheredRows | None = None,
    row_weights_R: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """weight * silu(x gate_e) * (x up_e) for rows sorted by expert: the first half of SwiGLU (arXiv 2002.05202, eq. 6).

    Rows, groups and padding as in `grouped_matmul`: rows past `group_sizes_E.sum()` give exactly zero and no gradient,
    whatever they hold. The activation is computed in at least float32. Differentiable once, in reverse mode, in all
    operands but the sizes; inside `jax.shard_map` operands may vary over different mesh axes.

    Args:
      x_XK: bfloat16, float32 or float64; the rows [R, K], or with `rows` the tokens [N, K] that they are copies of.
      gate_EKF, up_EKF: [E, K, F], same dtype; or both in 8 bits, see `pallas_kernels.quantized`, without a gradient.
      group_sizes_E: [E] integers >= 0.
      rows: which token each row is. The Triton kernel then reads the tokens themselves; others copy them first. The
        backward pass gathers them again, so that tokens are saved for it and not rows.
      row_weights_R: [R], of any floating dtype, a factor of each row (the router's weight of that choice); None: one.
      implementation: the backend; None picks one and logs it once. "mosaic_gpu" and "triton" are one kernel, the others
        two grouped matmuls and a fused activation.

    Returns:
      hidden_RF: [R, F], same dtype as `x_XK`.

    Raises:
      GroupedMatmulError: shapes or dtypes that do not fit together, or a backend that cannot take them. Under
        `jax.grad`: weights in 8 bits.
    """
    x_shape = _check_arguments(x_XK, gate_EKF, up_EKF, rows, row_weights_R)
    backend = choose_implementation(
        jax.ShapeDtypeStruct(x_shape, x_XK.dtype), gate_EKF, group_sizes_E, implementation=implementation
    )
    (gate, gate_scales), (up, up_scales) = (
        w if isinstance(w, QuantizedWeights) else (w, None) for w in (gate_EKF, up_EKF)
    )
    scales = None if gate_scales is None or up_scales is None else (gate_scales, up_scales)
    operands = _Operands(x_XK, gate, up, scales, group_sizes_E.astype(jnp.int32), rows, row_weights_R)
    axes = varying_axes(*jax.tree.leaves(operands))
    operands = jax.tree.map(lambda operand: cast_to_varying(operand, axes), operands)
    with jax.named_scope("grouped_swiglu"):
        if row_weights_R is not None:
            weights_R = jnp.where(_live_rows(operands), operands.weights_R, jnp.zeros_like(operands.weights_R))
            operands = operands._replace(weights_R=weights_R)
        return _reference(operands) if backend == "reference" else _with_own_gradient(operands, backend)


def _check_arguments(
    x_XK: jax.Array, gate: Weights, up: Weights, rows: GatheredRows | None, row_weights_R: jax.Array | None
) -> tuple[int, ...]:
    """Shape of the rows, [R, K]."""
    if jax.tree.map(jnp.shape, gate) != jax.tree.map(jnp.shape, up) or _dtype(gate) != _dtype(up):
        raise GroupedMatmulError(
            f"gate_EKF is {_dtype(gate)}{gate.shape} and up_EKF is {_dtype(up)}{up.shape}: make them alike"
        )
    if rows is None:
        shape = x_XK.shape
    elif rows.token_R.ndim != 1 or rows.row_AN.shape[1:] != x_XK.shape[:1]:
        raise GroupedMatmulError(
            f"rows.token_R has shape {rows.token_R.shape} and rows.row_AN {rows.row_AN.shape}: give them the axes "
            f"[R] and [A, N] with the {x_XK.shape[0]} tokens of x_XK"
        )
    else:
        shape = (*rows.token_R.shape, *x_XK.shape[1:])
    if row_weights_R is not None and row_weights_R.shape != shape[:1]:
        raise GroupedMatmulError(f"row_weights_R has shape {row_weights_R.shape}: give one per row, {shape[:1]}")
    return shape


def _dtype(weights: Weights) -> jnp.dtype:
    return (weights.values_ENK if isinstance(weights, QuantizedWeights) else weights).dtype


class _Operands(NamedTuple):
    """What a backend is given; see `xla.swiglu`."""

    x_XK: jax.Array
    gate: jax.Array
    up: jax.Array
    scales: tuple[jax.Array, jax.Array] | None
    group_sizes_E: jax.Array
    rows: GatheredRows | None
    weights_R: jax.Array | None

    def copied_rows(self) -> jax.Array:
        return self.x_XK if self.rows is None else take_rows(self.x_XK, self.rows.token_R)


def _live_rows(operands: _Operands) -> jax.Array:
    num_rows = (operands.x_XK if operands.rows is None else operands.rows.token_R).shape[0]
    return jnp.arange(num_rows, dtype=jnp.int32) < operands.group_sizes_E.sum(dtype=jnp.int32)


def _reference(operands: _Operands) -> jax.Array:
    transposed, scales = operands.scales is not None, operands.scales or (None, None)
    gate_RF, up_RF = (
        reference.matmul(
            operands.copied_rows(), w, operands.group_sizes_E, transpose_rhs=transposed, scales_EN=scales_EF
        )
        for w, scales_EF in zip((operands.gate, operands.up), scales, strict=True)
    )
    return activate(gate_RF, up_RF, operands.weights_R)


def _run(operands: _Operands, backend: str, *, save_inputs: bool) -> tuple[jax.Array, ...]:
    """(hidden_RF,), or with `save_inputs` (hidden_RF, gate_RF, up_RF)."""
    return load_backend("grouped_swiglu", backend).swiglu(
        operands.x_XK,
        operands.gate,
        operands.up,
        operands.group_sizes_E,
        token_R=None if operands.rows is None else operands.rows.token_R,
        weights_R=operands.weights_R,
        scales=operands.scales,
        save_inputs=save_inputs,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _with_own_gradient(operands: _Operands, backend: str) -> jax.Array:
    (hidden_RF,) = _run(operands, backend, save_inputs=False)
    return hidden_RF


_Residuals = tuple[_Operands, jax.Array, jax.Array]


def _forward(operands: _Operands, backend: str) -> tuple[jax.Array, _Residuals]:
    refuse_gradient(operands.scales)
    hidden_RF, gate_RF, up_RF = _run(operands, backend, save_inputs=True)
    gate_RF, up_RF = checkpoint_name((gate_RF, up_RF), PREACTIVATIONS)
    return hidden_RF, (operands, gate_RF, up_RF)


def _backward(backend: str, residuals: _Residuals, grad_RF: jax.Array) -> tuple[_Operands]:
    operands, gate_RF, up_RF = residuals
    sizes, rows, x_RK = operands.group_sizes_E, operands.rows, operands.copied_rows()
    # A padding row's gradient may be NaN. The matmuls below leave such rows out, the sum over a row does not.
    grad_RF = jnp.where(_live_rows(operands)[:, None], grad_RF, jnp.zeros_like(grad_RF))
    _, transpose = jax.vjp(activate, gate_RF, up_RF, operands.weights_R)
    d_gate_RF, d_up_RF, d_weights_R = transpose(grad_RF)
    module = load_backend("grouped_matmul", backend)
    dx_RK = module.matmul(d_gate_RF, operands.gate, sizes, transpose_rhs=True) + module.matmul(
        d_up_RF, operands.up, sizes, transpose_rhs=True
    )
    gradients = _Operands(
        x_XK=dx_RK if rows is None else take_rows(dx_RK, rows.row_AN).sum(axis=0),
        gate=module.weight_gradient(x_RK, d_gate_RF, sizes),
        up=module.weight_gradient(x_RK, d_up_RF, sizes),
        scales=None,
        group_sizes_E=None,  # type: ignore[arg-type]  # integers have no gradient
        rows=None,
        weights_R=d_weights_R,
    )
    return (gradients,)


_with_own_gradient.defvjp(_forward, _backward)
