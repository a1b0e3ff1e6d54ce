"""Choosing the next token from logits.

Shape letters: B sequences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; static under jit.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: draw among the k most likely tokens; 0 means all.
      top_p: draw among the smallest set of most likely tokens whose probability reaches p (Holtzman et al., 2020).

    Raises:
      ValueError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is negative: choose 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} is negative: choose 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} does not lie in (0, 1]: choose 1 for all tokens")


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Next tokens [B], int32; each row draws with its own key, so that it does not depend on its neighbours."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        kth_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        logits_BV = _keep_nucleus(logits_BV, sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def _keep_nucleus(logits_BV: jax.Array, top_p: float) -> jax.Array:
    descending_BV = -jnp.sort(-logits_BV, axis=-1)
    probability_BV = jax.nn.softmax(descending_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    least_B1 = jnp.min(jnp.where(before_BV < top_p, descending_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
