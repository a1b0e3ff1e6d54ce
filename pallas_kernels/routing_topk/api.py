"""The public routing top-k: checks its arguments, picks a backend and ties it to its gradient.

Shape letters: N tokens (rows), E experts, k choices of a token, G blocks of tokens with a bias each.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.backends import load_backend, pick_backend, require_backend
from pallas_kernels.routing_topk import reference
from pallas_kernels.varying import cast_to_varying, varying_axes

Implementation = Literal[
    "triton",  # one kernel that streams over tiles of experts; CUDA GPUs with jax-triton
    "xla",  # `jax.lax.top_k`; runs on every device
    "reference",  # ranks by comparing all pairs of experts, differentiated by JAX; the oracle of the tests
]

_PREFERRED: dict[str, tuple[Implementation, ...]] = {"hopper": ("triton",), "cuda": ("triton",)}


class RoutingTopkError(ValueError):
    """Arguments that do not fit together; the message names the argument, its value and the way out."""


class RoutingTopk(NamedTuple):
    """The experts chosen for each token, best first.

    Attributes:
      values_Nk: the scores of the chosen experts, without the bias, in the scores' dtype; 0 where not valid.
      indices_Nk: int32, the chosen experts.
      valid_Nk: bool, False where fewer than k experts have a selection score above -inf.
      margin_N: gap between the last chosen selection score and the best one left out, in float32 (float64 for float64
        scores); inf where none above -inf is left out, 0 at a tie. No gradient flows through it.
    """

    values_Nk: jax.Array
    indices_Nk: jax.Array
    valid_Nk: jax.Array
    margin_N: jax.Array


def routing_topk(
    scores_NE: jax.Array,
    k: int,
    *,
    selection_bias: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> RoutingTopk:
    """Chooses the k experts with the highest selection score of every token and returns their scores.

    The selection score is the score plus the bias, formed in float32 (float64 for float64 scores); it decides which
    experts are chosen and in which order, and nothing else. The choice is exact, ties go to the lower expert index, and
    -0 and +0 tie. A selection score of NaN counts as -inf: such an expert is chosen only where fewer than k others
    remain, and then it is not valid. The gradient of a value goes to the score that it is and to nothing else; the
    bias gets none. Differentiable once, in reverse mode. Inside `jax.shard_map` scores and bias may vary over different
    mesh axes; the results vary over all of them.

    Args:
      scores_NE: [N, E] bfloat16, float32 or float64. Fold other leading axes, such as groups, into N.
      k: choices of a token, from 1 to E.
      selection_bias: [E], or [G, E] with G dividing N: the first N / G tokens meet the first bias, and so on. The dtype
        of the scores. -inf takes an expert out.
      implementation: the backend; None picks one for the device and shape and logs the choice once.

    Raises:
      RoutingTopkError: shapes, dtypes or k that do not fit together, an unknown implementation, or one that cannot take
        these scores.
    """
    bias_GE = None if selection_bias is None else jnp.atleast_2d(selection_bias)
    _check_arguments(scores_NE, k, bias_GE)
    name = _choose_implementation(scores_NE, k, implementation)
    # Casting here, outside the custom gradient, leaves it to JAX to sum a replicated operand's gradient over the mesh.
    axes = varying_axes(*(array for array in (scores_NE, bias_GE) if array is not None))
    scores_NE = cast_to_varying(scores_NE, axes)
    bias_GE = None if bias_GE is None else cast_to_varying(bias_GE, axes)
    with jax.named_scope("routing_topk"):
        if name == "reference":
            return RoutingTopk(*reference.choose(scores_NE, bias_GE, k))
        return RoutingTopk(*_with_own_gradient(scores_NE, bias_GE, k, scores_NE.shape[1], name))


def _check_arguments(scores_NE: jax.Array, k: int, bias_GE: jax.Array | None) -> None:
    if scores_NE.ndim != 2:
        raise RoutingTopkError(f"scores_NE has shape {scores_NE.shape}: give it the axes [N, E]")
    if scores_NE.dtype not in (jnp.bfloat16, jnp.float32, jnp.float64):
        raise RoutingTopkError(f"scores_NE has dtype {scores_NE.dtype}: use bfloat16, float32 or float64")
    tokens, experts = scores_NE.shape
    if not 1 <= k <= experts:
        raise RoutingTopkError(f"k={k} experts of {experts} in scores_NE of shape {scores_NE.shape}: choose 1 to E")
    if bias_GE is None:
        return
    if bias_GE.dtype != scores_NE.dtype:
        raise RoutingTopkError(f"scores_NE is {scores_NE.dtype} and selection_bias {bias_GE.dtype}: cast one of them")
    if bias_GE.ndim != 2 or bias_GE.shape[1] != experts:
        raise RoutingTopkError(f"selection_bias has shape {bias_GE.shape}: give it [E] or [G, E] with E={experts}")
    if bias_GE.shape[0] == 0 or tokens % bias_GE.shape[0]:
        raise RoutingTopkError(
            f"selection_bias has {bias_GE.shape[0]} rows, which do not divide the {tokens} rows of scores_NE: "
            "give one row per block of equally many tokens"
        )


def _choose_implementation(scores_NE: jax.Array, k: int, implementation: str | None) -> str:
    def refuse(backend: ModuleType) -> str | None:
        return backend.refusal(scores_NE.shape, k, scores_NE.dtype)

    if implementation is not None:
        return require_backend("routing_topk", implementation, get_args(Implementation), refuse, RoutingTopkError)
    operands = f"{scores_NE.dtype} scores {scores_NE.shape} with k={k}"
    return pick_backend("routing_topk", _PREFERRED, refuse, operands)


_Chosen = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _with_own_gradient(
    scores_NE: jax.Array, bias_GE: jax.Array | None, k: int, num_experts: int, backend: str
) -> _Chosen:
    return load_backend("routing_topk", backend).choose(scores_NE, bias_GE, k)


def _forward(
    scores_NE: jax.Array, bias_GE: jax.Array | None, k: int, num_experts: int, backend: str
) -> tuple[_Chosen, jax.Array]:
    chosen = load_backend("routing_topk", backend).choose(scores_NE, bias_GE, k)
    _, indices_Nk, valid_Nk, _ = chosen
    return chosen, jnp.where(valid_Nk, indices_Nk, num_experts)


def _backward(
    k: int, num_experts: int, backend: str, indices_Nk: jax.Array, cotangents: _Chosen
) -> tuple[jax.Array, None]:
    return load_backend("routing_topk", backend).spread(cotangents[0], indices_Nk, num_experts), None


_with_own_gradient.defvjp(_forward, _backward)
