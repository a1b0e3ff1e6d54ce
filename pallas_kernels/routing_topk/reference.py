"""The oracle: an expert's rank is the number of experts before it. Memory grows as N * E * E, so it is for tests.

Shape letters: N tokens, E experts, k choices, G blocks of tokens with a bias each.
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
    """Values, indices, validity [N, k] and margin [N] of `routing_topk`; JAX differentiates it."""
    tokens, experts = scores_NE.shape
    selection_NE = jax.lax.stop_gradient(scores_NE).astype(np.promote_types(scores_NE.dtype, np.float32))
    if bias_GE is not None:
        bias_NE = jnp.repeat(jax.lax.stop_gradient(bias_GE), tokens // bias_GE.shape[0], axis=0)
        selection_NE = selection_NE + bias_NE.astype(selection_NE.dtype)
    selection_NE = jnp.where(jnp.isnan(selection_NE), -jnp.inf, selection_NE)
    own_NE1, other_N1E = selection_NE[:, :, None], selection_NE[:, None, :]
    lower_1EE = jnp.tril(jnp.ones((experts, experts), bool), -1)[None]
    rank_NE = ((other_N1E > own_NE1) | (other_N1E == own_NE1) & lower_1EE).sum(-1)
    is_choice_NkE = rank_NE[:, None, :] == jnp.arange(k)[None, :, None]
    indices_Nk = jnp.argmax(is_choice_NkE, axis=-1).astype(jnp.int32)
    valid_Nk = jnp.take_along_axis(selection_NE, indices_Nk, axis=1) > -jnp.inf
    values_Nk = jnp.take_along_axis(scores_NE, indices_Nk, axis=1)
    last_N = jnp.where(is_choice_NkE[:, -1], selection_NE, 0).sum(-1)
    best_left_N = jnp.max(jnp.where(rank_NE >= k, selection_NE, -jnp.inf), axis=-1)
    gap_N = jnp.where(last_N == best_left_N, 0, last_N - best_left_N)
    margin_N = jnp.where(best_left_N > -jnp.inf, gap_N, jnp.inf)
    return jnp.where(valid_Nk, values_Nk, 0), indices_Nk, valid_Nk, margin_N
