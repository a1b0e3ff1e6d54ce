"""The public combine: checks its arguments, picks a backend and ties it to its gradients.

Shape letters: R rows, D width, N tokens, k choices of a token.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.backends import load_backend, pick_backend, require_backend
from pallas_kernels.combine import reference
from pallas_kernels.varying import cast_to_varying, varying_axes

Implementation = Literal[
    "triton",  # one kernel forward, one for both gradients; CUDA GPUs with jax-triton
    "xla",  # gathers that XLA fuses with the sum; runs on every device
    "reference",  # gather and einsum, differentiated by JAX; the oracle of the tests
]

_PREFERRED: dict[str, tuple[Implementation, ...]] = {"hopper": ("triton",), "cuda": ("triton",)}


class CombineError(ValueError):
    """Arguments that do not fit together; the message names the argument, its value and the way out."""


def combine(
    rows_RD: jax.Array,
    row_Nk: jax.Array,
    weights_Nk: jax.Array,
    choice_R: jax.Array,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Adds up each token's rows: out[n] = sum over j of weights[n, j] * rows[row[n, j]].

    Every token reads its own rows, in the order of its choices, so that a result is the same in every run; nothing is
    scattered and there are no atomics, in the gradients neither. Products and sums are formed in float32 (float64 for
    float64 rows) and rounded once. An index out of range, negative ones included, means that the choice has no row: it
    adds exactly zero whatever its weight holds, and its weight gets a gradient of zero. A row of no choice reaches no
    result and gets a gradient of zero, so that padding may hold anything. Differentiable in `rows_RD` and `weights_Nk`,
    once, in reverse mode. Inside `jax.shard_map` the operands may vary over different mesh axes; the result varies over
    all of them.

    Args:
      rows_RD: [R, D] bfloat16, float32 or float64.
      row_Nk: [N, k] integers, the row of each choice. Those in range are distinct. Fold other leading axes into N.
      weights_Nk: [N, k], the rows' dtype, or float32 for bfloat16 rows.
      choice_R: [R] integers, the inverse of `row_Nk`: the flat index into [N, k] of the choice that each row answers,
        out of range for none. The rows' gradient is gathered by it.
      implementation: the backend; None picks one for the device and shape and logs the choice once.

    Returns:
      out_ND: [N, D], same dtype as `rows_RD`.

    Raises:
      CombineError: shapes or dtypes that do not fit together, an unknown implementation, or one that cannot take these
        operands.
    """
    _check_arguments(rows_RD, row_Nk, weights_Nk, choice_R)
    name = _choose_implementation(rows_RD, row_Nk, implementation)
    # Casting here, outside the custom gradient, leaves it to JAX to sum a replicated operand's gradient over the mesh.
    axes = varying_axes(rows_RD, row_Nk, weights_Nk, choice_R)
    rows_RD, weights_Nk = cast_to_varying(rows_RD, axes), cast_to_varying(weights_Nk, axes)
    row_Nk = cast_to_varying(row_Nk.astype(jnp.int32), axes)
    choice_R = cast_to_varying(choice_R.astype(jnp.int32), axes)
    with jax.named_scope("combine"):
        if name == "reference":
            return reference.weighted_sum(rows_RD, row_Nk, weights_Nk)
        return _with_own_gradients(rows_RD, row_Nk, weights_Nk, choice_R, name)


def _check_arguments(rows_RD: jax.Array, row_Nk: jax.Array, weights_Nk: jax.Array, choice_R: jax.Array) -> None:
    for name, array, axes in (("rows_RD", rows_RD, "R, D"), ("row_Nk", row_Nk, "N, k"), ("choice_R", choice_R, "R")):
        if array.ndim != axes.count(",") + 1:
            raise CombineError(f"{name} has shape {array.shape}: give it the axes [{axes}]")
    if weights_Nk.shape != row_Nk.shape:
        raise CombineError(
            f"weights_Nk has shape {weights_Nk.shape} and row_Nk {row_Nk.shape}: give one weight per choice"
        )
    if row_Nk.shape[1] == 0:
        raise CombineError(f"row_Nk has shape {row_Nk.shape}: at least one choice is needed")
    if choice_R.shape[0] != rows_RD.shape[0]:
        raise CombineError(
            f"choice_R has {choice_R.shape[0]} entries and rows_RD {rows_RD.shape[0]} rows: give one entry per row"
        )
    for name, array in (("row_Nk", row_Nk), ("choice_R", choice_R)):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise CombineError(f"{name} has dtype {array.dtype}: give indices in int32")
    if rows_RD.dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
        raise CombineError(f"rows_RD has dtype {rows_RD.dtype}: use bfloat16, float32 or float64")
    if weights_Nk.dtype not in (rows_RD.dtype, np.promote_types(rows_RD.dtype, np.float32)):
        raise CombineError(
            f"weights_Nk is {weights_Nk.dtype} and rows_RD {rows_RD.dtype}: cast the weights to the rows' dtype, or to "
            "float32 for bfloat16 rows"
        )


def _choose_implementation(rows_RD: jax.Array, row_Nk: jax.Array, implementation: str | None) -> str:
    def refuse(backend: ModuleType) -> str | None:
        return backend.refusal(rows_RD.shape, row_Nk.shape, rows_RD.dtype)

    if implementation is not None:
        return require_backend("combine", implementation, get_args(Implementation), refuse, CombineError)
    operands = f"{rows_RD.dtype} rows {rows_RD.shape} by choices {row_Nk.shape}"
    return pick_backend("combine", _PREFERRED, refuse, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _with_own_gradients(
    rows_RD: jax.Array, row_Nk: jax.Array, weights_Nk: jax.Array, choice_R: jax.Array, backend: str
) -> jax.Array:
    return load_backend("combine", backend).weighted_sum(rows_RD, row_Nk, weights_Nk)


_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _forward(
    rows_RD: jax.Array, row_Nk: jax.Array, weights_Nk: jax.Array, choice_R: jax.Array, backend: str
) -> tuple[jax.Array, _Residuals]:
    out_ND = load_backend("combine", backend).weighted_sum(rows_RD, row_Nk, weights_Nk)
    return out_ND, (rows_RD, row_Nk, weights_Nk, choice_R)


def _backward(backend: str, residuals: _Residuals, dout_ND: jax.Array) -> tuple[jax.Array, None, jax.Array, None]:
    drows_RD, dweights_Nk = load_backend("combine", backend).gradients(dout_ND, *residuals)
    return drows_RD, None, dweights_Nk, None


_with_own_gradients.defvjp(_forward, _backward)
