"""The public grouped matmul: checks its arguments, picks a backend and ties it to its gradients.

Shape letters: R rows sorted by expert, K contracted features, N output features, E experts.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.backends import load_backend, pick_backend, require_backend
from pallas_kernels.grouped_matmul import reference
from pallas_kernels.quantized import QuantizedWeights, Weights
from pallas_kernels.varying import cast_to_varying, varying_axes

Implementation = Literal[
    "mosaic_gpu",  # Hopper GPUs, bfloat16, features in multiples of 128
    "triton",  # other NVIDIA GPUs, through jax-triton (extra `triton`)
    "cpu",  # bfloat16 and float32, where there is a C++ compiler
    "xla",  # a loop over the row tiles in use; runs on every device
    "reference",  # one gathered weight matrix per row, differentiated by JAX; the oracle of the tests
]
"""A backend is the module of its name in this folder: `matmul`, `weight_gradient` (neither is differentiated:
`_with_own_gradient` says what the gradients are) and, where it cannot take everything, `refusal`."""


_PREFERRED: dict[str, tuple[Implementation, ...]] = {
    "hopper": ("mosaic_gpu", "triton"),
    "cuda": ("triton",),
    "cpu": ("cpu",),
}


class GroupedMatmulError(ValueError):
    """Arguments that do not fit together; the message names the argument, its value and the way out."""


def grouped_matmul(
    x_RK: jax.Array,
    w_EKN: Weights,
    group_sizes_E: jax.Array,
    *,
    transpose_rhs: bool = False,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Multiplies each group of rows by the weights of its own expert.

    The first `group_sizes_E[0]` rows of `x_RK` meet `w_EKN[0]`, the next `group_sizes_E[1]` rows meet `w_EKN[1]`, and
    so on. Rows past `group_sizes_E.sum()` are padding: whatever they hold (NaN included), their output and their
    gradient are exactly zero, and they cost no compute. Sums are formed in float32 (float64 for float64 operands)
    before the result is cast. Experts without rows get a gradient of exactly zero. Differentiable in `x_RK` and
    `w_EKN`, once, in reverse mode. Inside `jax.shard_map` the operands may vary over different mesh axes; the result
    varies over all of them.

    Args:
      x_RK: [R, K] bfloat16, float32 or float64, rows sorted by expert.
      w_EKN: [E, K, N], same dtype as `x_RK`; [E, N, K] with `transpose_rhs`. Or the weights in 8 bits of
        `pallas_kernels.quantized.quantize`: they meet bfloat16 or float32 rows, and have no gradient.
      group_sizes_E: [E] integers >= 0, the number of rows of each expert. A sum above R is cut off at R.
      transpose_rhs: contract with the last axis of the weights, not the middle one; nothing is transposed in memory.
      implementation: the backend; None picks one for the device and shape and logs the choice once.

    Returns:
      y_RN: [R, N], same dtype as `x_RK`.

    Raises:
      GroupedMatmulError: shapes or dtypes that do not fit together, an unknown implementation, or one that cannot take
        these operands. Under `jax.grad`: weights in 8 bits.
    """
    backend = choose_implementation(
        x_RK, w_EKN, group_sizes_E, transpose_rhs=transpose_rhs, implementation=implementation
    )
    w, scales_EN = w_EKN if isinstance(w_EKN, QuantizedWeights) else (w_EKN, None)
    transpose_rhs = transpose_rhs or scales_EN is not None
    # Casting here, outside the custom gradient, leaves it to JAX to sum a replicated operand's gradient over the mesh.
    axes = varying_axes(x_RK, w, group_sizes_E)
    x_RK, w, scales_EN = jax.tree.map(lambda operand: cast_to_varying(operand, axes), (x_RK, w, scales_EN))
    group_sizes_E = cast_to_varying(group_sizes_E.astype(jnp.int32), axes)
    with jax.named_scope("grouped_matmul"):
        if backend == "reference":
            return reference.matmul(x_RK, w, group_sizes_E, transpose_rhs=transpose_rhs, scales_EN=scales_EN)
        return _with_own_gradient(x_RK, w, scales_EN, group_sizes_E, transpose_rhs, backend)


def choose_implementation(
    x_RK: jax.Array | jax.ShapeDtypeStruct,
    w_EKN: Weights,
    group_sizes_E: jax.Array,
    *,
    transpose_rhs: bool = False,
    implementation: Implementation | None = None,
) -> str:
    """The backend that serves these operands: the one asked for, or the best for the device, logged once.

    Raises:
      GroupedMatmulError: as `grouped_matmul`.
    """
    _check_arguments(x_RK, w_EKN, group_sizes_E, transpose_rhs)

    quantized = isinstance(w_EKN, QuantizedWeights)
    stored = w_EKN.values_ENK if isinstance(w_EKN, QuantizedWeights) else w_EKN
    weight_dtype = stored.dtype if quantized else None

    def refuse(backend: ModuleType) -> str | None:
        refusal = getattr(backend, "refusal", None)  # backends without one take everything
        if refusal is None:
            return None
        transposed = transpose_rhs or quantized
        return refusal(x_RK.shape, stored.shape, x_RK.dtype, transpose_rhs=transposed, weight_dtype=weight_dtype)

    if implementation is not None:
        return require_backend("grouped_matmul", implementation, get_args(Implementation), refuse, GroupedMatmulError)
    operands = f"{x_RK.dtype} rows {x_RK.shape} by {stored.dtype} weights {w_EKN.shape}"
    return pick_backend("grouped_matmul", _PREFERRED, refuse, operands)


def _check_arguments(
    x_RK: jax.Array | jax.ShapeDtypeStruct, w_EKN: Weights, group_sizes_E: jax.Array, transpose_rhs: bool
) -> None:
    if isinstance(w_EKN, QuantizedWeights):
        _check_quantized(w_EKN, transpose_rhs)
    for name, array, axes in (
        ("x_RK", x_RK, "R, K"),
        ("w_EKN", w_EKN, "E, K, N"),
        ("group_sizes_E", group_sizes_E, "E"),
    ):
        if len(array.shape) != axes.count(",") + 1:
            raise GroupedMatmulError(f"{name} has shape {array.shape}: give it the axes [{axes}]")
    contracted = w_EKN.shape[2 if transpose_rhs else 1]
    if x_RK.shape[1] != contracted:
        raise GroupedMatmulError(
            f"x_RK has {x_RK.shape[1]} features, but w_EKN of shape {w_EKN.shape} contracts {contracted} with "
            f"transpose_rhs={transpose_rhs}: make them equal, or flip transpose_rhs if the weights are stored [E, N, K]"
        )
    if group_sizes_E.shape[0] != w_EKN.shape[0]:
        raise GroupedMatmulError(
            f"group_sizes_E has {group_sizes_E.shape[0]} entries, but w_EKN has {w_EKN.shape[0]} experts: "
            "give one entry per expert"
        )
    if w_EKN.shape[0] == 0:
        raise GroupedMatmulError(f"w_EKN has shape {w_EKN.shape}: at least one expert is needed")
    if not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
        raise GroupedMatmulError(f"group_sizes_E has dtype {group_sizes_E.dtype}: count rows in int32")
    if not isinstance(w_EKN, QuantizedWeights) and x_RK.dtype != w_EKN.dtype:
        raise GroupedMatmulError(f"x_RK is {x_RK.dtype} and w_EKN is {w_EKN.dtype}: cast one of them")
    if not jnp.issubdtype(x_RK.dtype, jnp.floating):
        raise GroupedMatmulError(f"x_RK and w_EKN have dtype {x_RK.dtype}: use bfloat16, float32 or float64")


def _check_quantized(w: QuantizedWeights, transpose_rhs: bool) -> None:
    if transpose_rhs:
        raise GroupedMatmulError("transpose_rhs=True with weights in 8 bits: their scales fit their own features only")
    if w.values_ENK.ndim != 3 or w.scales_EN.shape != w.values_ENK.shape[:2]:
        raise GroupedMatmulError(
            f"scales_EN has shape {w.scales_EN.shape} and values_ENK {w.values_ENK.shape}: give each output feature "
            "of each expert its scale, as quantize does"
        )


_Residuals = tuple[jax.Array, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _with_own_gradient(
    x_RK: jax.Array,
    w: jax.Array,
    scales_EN: jax.Array | None,
    group_sizes_E: jax.Array,
    transpose_rhs: bool,
    backend: str,
) -> jax.Array:
    matmul = load_backend("grouped_matmul", backend).matmul
    return matmul(x_RK, w, group_sizes_E, transpose_rhs=transpose_rhs, scales_EN=scales_EN)


def _forward(
    x_RK: jax.Array,
    w: jax.Array,
    scales_EN: jax.Array | None,
    group_sizes_E: jax.Array,
    transpose_rhs: bool,
    backend: str,
) -> tuple[jax.Array, _Residuals]:
    refuse_gradient(scales_EN)
    matmul = load_backend("grouped_matmul", backend).matmul
    return matmul(x_RK, w, group_sizes_E, transpose_rhs=transpose_rhs), (x_RK, w, group_sizes_E)


def refuse_gradient(scales: object | None) -> None:
    """Raises GroupedMatmulError if there are scales, that is, weights in 8 bits."""
    if scales is not None:
        raise GroupedMatmulError("weights in 8 bits have no gradient: differentiate with the weights they were made of")


def _backward(
    transpose_rhs: bool, backend: str, residuals: _Residuals, dy_RN: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    x_RK, w, group_sizes_E = residuals
    module = load_backend("grouped_matmul", backend)
    dx_RK = module.matmul(dy_RN, w, group_sizes_E, transpose_rhs=not transpose_rhs)
    left, right = (dy_RN, x_RK) if transpose_rhs else (x_RK, dy_RN)
    return dx_RK, module.weight_gradient(left, right, group_sizes_E), None, None


_with_own_gradient.defvjp(_forward, _backward)
