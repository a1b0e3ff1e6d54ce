"""The public projected top-k: checks its arguments, picks a backend and ties it to its gradient.

It is `routing_topk` of logits that are formed on the way and thrown away: no array holds them all (the IO-aware routing
of Multi-Head LatentMoE, arXiv 2602.04870).

Shape letters: S stacks (heads), each with a router of its own, N tokens, K features, E experts of a stack, k choices.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.backends import load_backend, pick_backend, require_backend
from pallas_kernels.projected_topk import reference
from pallas_kernels.varying import cast_to_varying, varying_axes

Implementation = Literal[
    "triton",  # one kernel that streams over tiles of experts; CUDA GPUs with jax-triton, float32
    "xla",  # a matmul and a top-k for one block of tokens after the other; runs on every device
    "reference",  # all logits, then the reference of `routing_topk`, differentiated by JAX; the oracle of the tests
]

_PREFERRED: dict[str, tuple[Implementation, ...]] = {"hopper": ("triton",), "cuda": ("triton",)}


class ProjectedTopkError(ValueError):
    """Arguments that do not fit together; the message names the argument, its value and the way out."""


class ProjectedTopk(NamedTuple):
    """The experts chosen for each token in each stack, best first; `RoutingTopk` with an axis of stacks.

    Attributes:
      values_SNk: the logits of the chosen experts, without the bias, in the weights' dtype; 0 where not valid.
      indices_SNk: int32, the chosen experts.
      valid_SNk: bool, False where fewer than k experts have a logit plus bias above -inf.
      margin_SN: gap between the last chosen logit plus bias and the best one left out, in the weights' dtype; inf where
        none above -inf is left out, 0 at a tie. No gradient flows through it.
    """

    values_SNk: jax.Array
    indices_SNk: jax.Array
    valid_SNk: jax.Array
    margin_SN: jax.Array


def projected_topk(
    x_SNK: jax.Array,
    w_SKE: jax.Array,
    k: int,
    *,
    selection_bias_SE: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> ProjectedTopk:
    """Chooses in each stack the k experts with the highest logit plus bias of every token and returns their logits.

    The logits are x w, multiplied and summed in the weights' dtype (float32 is IEEE float32, not TF32). What is chosen
    from them is what `pallas_kernels.routing_topk` would choose: ties go to the lower expert index, NaN counts as -inf,
    and the bias decides which experts are chosen and in which order, and nothing else.

    The gradient of a value goes to its token's x and to its expert's column of w, through no other logit: a column that
    nobody chose gets exactly zero. A choice that is not valid, the bias and the margin send none. Differentiable once,
    in reverse mode. Inside `jax.shard_map` the operands may vary over different mesh axes; the results vary over all of
    them.

    Args:
      x_SNK: [S, N, K] bfloat16, float32 or float64.
      w_SKE: [S, K, E] float32 or float64, not narrower than x.
      k: choices of a token in each stack, from 1 to E.
      selection_bias_SE: [S, E] in the weights' dtype. -inf takes an expert out.
      implementation: the backend; None picks one for the device and shapes and logs the choice once.

    Raises:
      ProjectedTopkError: shapes, dtypes or k that do not fit together, an unknown implementation, or one that cannot
        take these operands.
    """
    _check_arguments(x_SNK, w_SKE, k, selection_bias_SE)
    name = _choose_implementation(x_SNK, w_SKE, k, implementation)
    # Casting here, outside the custom gradient, leaves it to JAX to sum a replicated operand's gradient over the mesh.
    axes = varying_axes(*(array for array in (x_SNK, w_SKE, selection_bias_SE) if array is not None))
    x_SNK, w_SKE = cast_to_varying(x_SNK, axes), cast_to_varying(w_SKE, axes)
    bias_SE = None if selection_bias_SE is None else cast_to_varying(selection_bias_SE, axes)
    with jax.named_scope("projected_topk"):
        if name == "reference":
            return ProjectedTopk(*reference.choose(x_SNK, w_SKE, bias_SE, k))
        return ProjectedTopk(*_with_own_gradient(x_SNK, w_SKE, bias_SE, k, name))


def _check_arguments(x_SNK: jax.Array, w_SKE: jax.Array, k: int, bias_SE: jax.Array | None) -> None:
    if x_SNK.ndim != 3:
        raise ProjectedTopkError(f"x_SNK has shape {x_SNK.shape}: give it the axes [S, N, K]")
    stacks, _, features = x_SNK.shape
    if w_SKE.ndim != 3 or w_SKE.shape[:2] != (stacks, features):
        raise ProjectedTopkError(f"w_SKE has shape {w_SKE.shape}: give it [S, K, E] with S={stacks} and K={features}")
    if w_SKE.dtype not in (jnp.float32, jnp.float64):
        raise ProjectedTopkError(f"w_SKE has dtype {w_SKE.dtype}: use float32 or float64")
    if x_SNK.dtype not in (jnp.bfloat16, jnp.float32, w_SKE.dtype):
        raise ProjectedTopkError(
            f"x_SNK has dtype {x_SNK.dtype} and w_SKE {w_SKE.dtype}: use bfloat16, float32 or that of w_SKE"
        )
    experts = w_SKE.shape[2]
    if not 1 <= k <= experts:
        raise ProjectedTopkError(f"k={k} experts of {experts} in w_SKE of shape {w_SKE.shape}: choose 1 to E")
    if bias_SE is None:
        return
    if bias_SE.shape != (stacks, experts):
        raise ProjectedTopkError(
            f"selection_bias_SE has shape {bias_SE.shape}: give it [S, E] with S={stacks} and E={experts}"
        )
    if bias_SE.dtype != w_SKE.dtype:
        raise ProjectedTopkError(f"w_SKE is {w_SKE.dtype} and selection_bias_SE {bias_SE.dtype}: cast one of them")


def _choose_implementation(x_SNK: jax.Array, w_SKE: jax.Array, k: int, implementation: str | None) -> str:
    def refuse(backend: ModuleType) -> str | None:
        return backend.refusal(k, w_SKE.dtype)

    if implementation is not None:
        return require_backend("projected_topk", implementation, get_args(Implementation), refuse, ProjectedTopkError)
    operands = f"{x_SNK.dtype} x {x_SNK.shape} and {w_SKE.dtype} w {w_SKE.shape} with k={k}"
    return pick_backend("projected_topk", _PREFERRED, refuse, operands)


_Chosen = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
_Residuals = tuple[jax.Array, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _with_own_gradient(x_SNK: jax.Array, w_SKE: jax.Array, bias_SE: jax.Array | None, k: int, backend: str) -> _Chosen:
    return load_backend("projected_topk", backend).choose(x_SNK, w_SKE, bias_SE, k)


def _forward(
    x_SNK: jax.Array, w_SKE: jax.Array, bias_SE: jax.Array | None, k: int, backend: str
) -> tuple[_Chosen, _Residuals]:
    chosen = load_backend("projected_topk", backend).choose(x_SNK, w_SKE, bias_SE, k)
    _, indices_SNk, valid_SNk, _ = chosen
    return chosen, (x_SNK, w_SKE, jnp.where(valid_SNk, indices_SNk, w_SKE.shape[2]))


def _backward(k: int, backend: str, residuals: _Residuals, cotangents: _Chosen) -> tuple[jax.Array, jax.Array, None]:
    return *load_backend("projected_topk", backend).gradients(*residuals, cotangents[0]), None


_with_own_gradient.defvjp(_forward, _backward)
