"""The oracle: all logits at once, then the reference of `routing_topk`.

Shape letters: S stacks, N tokens, K features, E experts, k choices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.routing_topk import reference


def refusal(k: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Takes everything."""
    return None


def choose(x_SNK: jax.Array, w_SKE: jax.Array, bias_SE: jax.Array | None, k: int) -> tuple[jax.Array, ...]:
    """Values, indices, validity [S, N, k] and margin [S, N] of `projected_topk`; JAX differentiates it."""
    logits_SNE = jnp.einsum("snk,ske->sne", x_SNK.astype(w_SKE.dtype), w_SKE, precision="highest")
    chosen = reference.choose(logits_SNE.reshape(-1, logits_SNE.shape[2]), bias_SE, k)
    return tuple(array.reshape(*logits_SNE.shape[:2], *array.shape[1:]) for array in chosen)
