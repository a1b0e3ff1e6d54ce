"""Log-probabilities of tokens, on the devices and as callers see them.

Shape letters: R rows, V vocabulary, k likeliest tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probability of a token, and the likeliest tokens at its place with theirs, best first."""

    logprob: float
    top_tokens: tuple[int, ...]
    top_logprobs: tuple[float, ...]

    def first(self, count: int) -> TokenLogprobs:
        """With the `count` likeliest alone."""
        return TokenLogprobs(self.logprob, self.top_tokens[:count], self.top_logprobs[:count])


def logprobs_of(logits_RV: jax.Array, tokens_R: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities [R] of `tokens_R`, and the k (at most V) likeliest tokens, int32, with theirs [R, k]."""
    logprobs_RV = jax.nn.log_softmax(logits_RV, axis=-1)
    own_R = jnp.take_along_axis(logprobs_RV, tokens_R[:, None], axis=1)[:, 0]
    top_Rk, top_tokens_Rk = jax.lax.top_k(logprobs_RV, min(k, logits_RV.shape[1]))
    return own_R, top_tokens_Rk.astype(jnp.int32), top_Rk
