"""Cross-entropy over a large vocabulary, a chunk of tokens at a time.

Shape letters: M tokens, C tokens of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from foejax.models.layers import high_precision
from foejax.models.transformer import logits_of


def summed_cross_entropy(
    hidden_MD: jax.Array, head_DV: jax.Array, targets_M: jax.Array, weights_M: jax.Array, *, chunk: int = 2048
) -> jax.Array:
    """Weighted sum of the tokens' cross-entropies in nats, in high precision.

    Logits exist for one chunk of tokens at a time, forward and backward.

    Args:
      hidden_MD: normed hidden states.
      head_DV: head over the whole vocabulary.
      targets_M: int32 token ids.
      weights_M: float, 0 where a token does not count.
      chunk: largest number of tokens whose logits are held at once.
    """
    size = min(chunk, hidden_MD.shape[0])
    pad = -hidden_MD.shape[0] % size
    hidden = jnp.pad(hidden_MD, ((0, pad), (0, 0))).reshape(-1, size, hidden_MD.shape[1])
    targets, weights = (jnp.pad(x, (0, pad)).reshape(-1, size) for x in (targets_M, weights_M))

    @jax.checkpoint
    def add_chunk(total: jax.Array, inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden_CD, targets_C, weights_C = inputs
        logits_CV = logits_of(hidden_CD, head_DV)
        target_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=1)[:, 0]
        nats_C = jax.nn.logsumexp(logits_CV, axis=1) - target_C
        return total + jnp.sum(nats_C * weights_C.astype(nats_C.dtype)), None

    dtype = high_precision(hidden_MD.dtype)
    start = jnp.sum(hidden[0, 0] * 0).astype(dtype)
    return jax.lax.scan(add_chunk, start, (hidden, targets, weights))[0]
