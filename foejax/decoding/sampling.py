"""Choosing the next token from logits.

Shape letters: B sequences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct


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


@struct.dataclass
class RowSampling:
    """How each row draws; every field is [B], of which a row with temperature 0 reads the first alone.

    Attributes:
      temperature, top_k, top_p: as in `Sampling`.
      min_p: leave out tokens less likely than this share of the likeliest one's probability; 0 is none.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array

    @classmethod
    def alike(cls, sampling: Sampling, rows: int, dtype: jax.typing.DTypeLike) -> RowSampling:
        """The same for all rows; `dtype` is that of the logits."""
        full = partial(jnp.full, (rows,))
        return cls(
            full(sampling.temperature, dtype),
            full(sampling.top_k, jnp.int32),
            full(sampling.top_p, dtype),
            full(0.0, dtype),
        )


def sample(logits_BV: jax.Array, keys_B: jax.Array, rows: RowSampling) -> jax.Array:
    """Next tokens [B], int32; each row draws with its own key, so that it does not depend on its neighbours."""
    greedy_B = likeliest(logits_BV)
    draws_B = rows.temperature > 0

    def draw() -> jax.Array:
        scaled_BV = logits_BV / jnp.where(draws_B, rows.temperature, 1)[:, None]
        peak_B1 = scaled_BV.max(axis=-1, keepdims=True)
        least_B1 = peak_B1 + jnp.log(rows.min_p)[:, None]
        narrowed = draws_B & ((rows.top_k > 0) | (rows.top_p < 1))
        least_B1 = jax.lax.cond(
            jnp.any(narrowed), lambda: jnp.maximum(least_B1, _least_candidate(scaled_BV, rows)), lambda: least_B1
        )
        candidates_BV = jnp.where(scaled_BV < least_B1, -jnp.inf, scaled_BV)
        return jax.vmap(jax.random.categorical)(keys_B, candidates_BV).astype(jnp.int32)

    return jnp.where(draws_B, jax.lax.cond(jnp.any(draws_B), draw, lambda: greedy_B), greedy_B)


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """The first of the largest logits [B], int32: what argmax is, whose reduction of pairs is slow on CPU."""
    size = logits_BV.shape[-1]
    peak_B1 = logits_BV.max(axis=-1, keepdims=True)
    place_BV = jnp.where(logits_BV == peak_B1, jnp.arange(size, dtype=jnp.int32)[None], size - 1)
    return place_BV.min(axis=-1)


def _least_candidate(logits_BV: jax.Array, rows: RowSampling) -> jax.Array:
    """Smallest logit [B, 1] among the top k, and among the smallest set of those whose probability reaches top_p."""
    descending_BV = -jnp.sort(-logits_BV, axis=-1)
    rank_V = jnp.arange(logits_BV.shape[-1], dtype=jnp.int32)
    top_k_B = jnp.where(rows.top_k > 0, rows.top_k, logits_BV.shape[-1])
    top_BV = jnp.where(rank_V[None] < top_k_B[:, None], descending_BV, -jnp.inf)
    probability_BV = jax.nn.softmax(top_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    kept_BV = (before_BV < rows.top_p[:, None]) & (probability_BV > 0)
    return jnp.min(jnp.where(kept_BV, top_BV, jnp.inf), axis=-1, keepdims=True)
