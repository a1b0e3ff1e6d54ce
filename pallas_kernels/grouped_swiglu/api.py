"""The public grouped SwiGLU: gate and up projections of every expert, joined by the activation.

Shape letters: R rows sorted by expert, K width, F expert hidden size, E experts.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.backends import load_backend
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.grouped_matmul.api import GroupedMatmulError, Implementation, choose_implementation
from pallas_kernels.varying import cast_to_varying, varying_axes

PREACTIVATIONS = "grouped_swiglu_preactivations"
"""Checkpoint name of gate and up, the residuals of the backward pass: save them by it, or have them computed again."""


def grouped_swiglu(
    x_RK: jax.Array,
    gate_EKF: jax.Array,
    up_EKF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    row_weights_R: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """weight * silu(x gate_e) * (x up_e) for rows sorted by expert: the first half of SwiGLU (arXiv 2002.05202, eq. 6).

    Rows, groups and padding as in `grouped_matmul`: rows past `group_sizes_E.sum()` give exactly zero and no gradient,
    whatever they hold. The activation is computed in at least float32. Differentiable once, in reverse mode, in all
    operands but the sizes; inside `jax.shard_map` operands may vary over different mesh axes.

    Args:
      x_RK: [R, K] bfloat16, float32 or float64.
      gate_EKF, up_EKF: [E, K, F], same dtype.
      group_sizes_E: [E] integers >= 0.
      row_weights_R: [R], of any floating dtype, a factor of each row (the router's weight of that choice); None: one.
      implementation: the backend; None picks one and logs it once. "mosaic_gpu" is one kernel, the others are two
        grouped matmuls and a fused activation.

    Returns:
      hidden_RF: [R, F], same dtype as `x_RK`.

    Raises:
      GroupedMatmulError: shapes or dtypes that do not fit together, or a backend that cannot take them.
    """
    if gate_EKF.shape != up_EKF.shape or gate_EKF.dtype != up_EKF.dtype:
        raise GroupedMatmulError(
            f"gate_EKF is {gate_EKF.dtype}{gate_EKF.shape} and up_EKF is {up_EKF.dtype}{up_EKF.shape}: make them alike"
        )
    if row_weights_R is not None and row_weights_R.shape != x_RK.shape[:1]:
        raise GroupedMatmulError(f"row_weights_R has shape {row_weights_R.shape}: give one per row, {x_RK.shape[:1]}")
    backend = choose_implementation(x_RK, gate_EKF, group_sizes_E, implementation=implementation)
    operands = [x_RK, gate_EKF, up_EKF, *([] if row_weights_R is None else [row_weights_R])]
    axes = varying_axes(*operands, group_sizes_E)
    x_RK, gate_EKF, up_EKF, *weights = (cast_to_varying(operand, axes) for operand in operands)
    group_sizes_E = cast_to_varying(group_sizes_E.astype(jnp.int32), axes)
    with jax.named_scope("grouped_swiglu"):
        live_R = _live_rows(x_RK, group_sizes_E)
        weights_R = jnp.where(live_R, weights[0], jnp.zeros_like(weights[0])) if weights else None
        if backend == "reference":
            gate_RF, up_RF = (reference.matmul(x_RK, w_EKF, group_sizes_E) for w_EKF in (gate_EKF, up_EKF))
            return _activate(gate_RF, up_RF, weights_R)
        return _with_own_gradient(x_RK, gate_EKF, up_EKF, group_sizes_E, weights_R, backend)


def _live_rows(x_RK: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    return jnp.arange(x_RK.shape[0], dtype=jnp.int32) < group_sizes_E.sum(dtype=jnp.int32)


def _run(
    x_RK: jax.Array,
    gate_EKF: jax.Array,
    up_EKF: jax.Array,
    group_sizes_E: jax.Array,
    weights_R: jax.Array | None,
    backend: str,
    *,
    save_inputs: bool,
) -> tuple[jax.Array, ...]:
    """(hidden_RF,), and with `save_inputs` also what the activation was given: gate_RF, up_RF."""
    if backend == "mosaic_gpu":
        fused = load_backend("grouped_swiglu", backend)
        return fused.swiglu(x_RK, gate_EKF, up_EKF, group_sizes_E, weights_R, save_inputs=save_inputs)
    matmul = load_backend("grouped_matmul", backend).matmul
    gate_RF, up_RF = matmul(x_RK, gate_EKF, group_sizes_E), matmul(x_RK, up_EKF, group_sizes_E)
    return _activate(gate_RF, up_RF, weights_R), gate_RF, up_RF


def _activate(gate_RF: jax.Array, up_RF: jax.Array, weights_R: jax.Array | None) -> jax.Array:
    """weight * silu(gate) * up, computed in at least float32 and rounded once."""
    wide = jnp.float64 if gate_RF.dtype == jnp.float64 else jnp.float32
    hidden_RF = jax.nn.silu(gate_RF.astype(wide)) * up_RF.astype(wide)
    if weights_R is not None:
        hidden_RF = hidden_RF * weights_R.astype(wide)[:, None]
    return hidden_RF.astype(gate_RF.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _with_own_gradient(
    x_RK: jax.Array,
    gate_EKF: jax.Array,
    up_EKF: jax.Array,
    group_sizes_E: jax.Array,
    weights_R: jax.Array | None,
    backend: str,
) -> jax.Array:
    return _run(x_RK, gate_EKF, up_EKF, group_sizes_E, weights_R, backend, save_inputs=False)[0]


_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array]


def _forward(
    x_RK: jax.Array,
    gate_EKF: jax.Array,
    up_EKF: jax.Array,
    group_sizes_E: jax.Array,
    weights_R: jax.Array | None,
    backend: str,
) -> tuple[jax.Array, _Residuals]:
    hidden_RF, gate_RF, up_RF = _run(x_RK, gate_EKF, up_EKF, group_sizes_E, weights_R, backend, save_inputs=True)
    gate_RF, up_RF = checkpoint_name((gate_RF, up_RF), PREACTIVATIONS)
    return hidden_RF, (x_RK, gate_EKF, up_EKF, group_sizes_E, weights_R, gate_RF, up_RF)


def _backward(
    backend: str, residuals: _Residuals, grad_RF: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, jax.Array | None]:
    x_RK, gate_EKF, up_EKF, group_sizes_E, weights_R, gate_RF, up_RF = residuals
    # A padding row's gradient may be NaN. The matmuls below leave such rows out, the sum over a row does not.
    grad_RF = jnp.where(_live_rows(x_RK, group_sizes_E)[:, None], grad_RF, jnp.zeros_like(grad_RF))
    _, transpose = jax.vjp(_activate, gate_RF, up_RF, weights_R)
    d_gate_RF, d_up_RF, d_weights_R = transpose(grad_RF)
    module = load_backend("grouped_matmul", backend)
    dx_RK = module.matmul(d_gate_RF, gate_EKF, group_sizes_E, transpose_rhs=True) + module.matmul(
        d_up_RF, up_EKF, group_sizes_E, transpose_rhs=True
    )
    d_gate_EKF = module.weight_gradient(x_RK, d_gate_RF, group_sizes_E)
    d_up_EKF = module.weight_gradient(x_RK, d_up_RF, group_sizes_E)
    return dx_RK, d_gate_EKF, d_up_EKF, None, d_weights_R


_with_own_gradient.defvjp(_forward, _backward)
