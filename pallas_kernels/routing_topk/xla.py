"""Routing top-k in plain XLA: `jax.lax.top_k`, and comparisons with all experts where others would gather or scatter.

Shape letters: N tokens, E experts, k choices, G blocks of P tokens with a bias each.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def refusal(shape: tuple[int, ...], k: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Takes everything."""
    return None


def choose(
    scores_NE: jax.Array, bias_GE: jax.Array | None, k: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Values, indices, validity [N, k] and margin [N]; contract as in `api.routing_topk`, without a gradient."""
    tokens, experts = scores_NE.shape
    selection_NE = scores_NE.astype(np.promote_types(scores_NE.dtype, np.float32))
    if bias_GE is not None:
        bias_GE = bias_GE.astype(selection_NE.dtype)
        selection_GPE = selection_NE.reshape(bias_GE.shape[0], -1, experts) + bias_GE[:, None, :]
        selection_NE = selection_GPE.reshape(tokens, experts)
    # XLA sorts NaN above inf and -0 below +0.
    selection_NE = jnp.where(jnp.isnan(selection_NE), -jnp.inf, selection_NE)
    selection_NE = jnp.where(selection_NE == 0, 0, selection_NE)
    best_Nk, indices_Nk = jax.lax.top_k(selection_NE, k)
    valid_Nk = best_Nk > -jnp.inf
    values_Nk = jnp.where(valid_Nk, jnp.take_along_axis(scores_NE, indices_Nk, axis=1), 0)
    expert_11E = jnp.arange(experts, dtype=jnp.int32)[None, None, :]
    is_choice_NE = (indices_Nk[:, :, None] == expert_11E).any(axis=1)
    left_N = jnp.max(jnp.where(is_choice_NE, -jnp.inf, selection_NE), axis=1)
    # The last of a row, as a minimum: to a slice of the choices XLA would add its own and sort instead of a top-k.
    last_N = best_Nk.min(axis=1)
    gap_N = jnp.where(last_N == left_N, 0, last_N - left_N)
    return values_Nk, indices_Nk, valid_Nk, jnp.where(left_N > -jnp.inf, gap_N, jnp.inf)


def spread(dvalues_Nk: jax.Array, indices_Nk: jax.Array, num_experts: int) -> jax.Array:
    """dscores_NE: each value's gradient at its expert, zero elsewhere; an index out of range means none."""
    expert_1E = jnp.arange(num_experts, dtype=jnp.int32)[None, :]
    dscores_NE = jnp.zeros((indices_Nk.shape[0], num_experts), dvalues_Nk.dtype)
    # One selection after the other, which are one loop when compiled; a sum over the choices can become an [N, k, E].
    for choice in range(indices_Nk.shape[1]):
        is_choice_NE = indices_Nk[:, choice, None] == expert_1E
        dscores_NE = jnp.where(is_choice_NE, dvalues_Nk[:, choice, None], dscores_NE)
    return dscores_NE
