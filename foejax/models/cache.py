"""What attention reads: the sequences at hand, or keys and values of earlier steps.

Attention writes this step's keys and values of a layer and then attends; where they go and what is attended to is the
cache's business, so that training, generation and a serving engine share one attention.

Shape letters: B sequences, T tokens of a sequence in this step, N = B * T tokens, C cache slots, L layers, S groups on
this device, Q query heads, G key/value heads of a group, K head size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from flax import struct

from foejax.models.layers import high_precision


class AttentionCache(Protocol):
    """The two calls attention makes, per layer; an implementation is a pytree carried through the layers."""

    def write(self, layer: jax.Array, k_NSGK: jax.Array, v_NSGK: jax.Array) -> Self:
        """The cache with this step's keys and values of `layer` stored."""

    def attend(self, layer: jax.Array, q_NSQK: jax.Array, k_NSGK: jax.Array, v_NSGK: jax.Array) -> jax.Array:
        """Attention output [N, S, Q, K] of this step's queries, after `write`."""


@struct.dataclass
class PackedSequences:
    """No storage: tokens attend to earlier tokens of their own document in the same row (training, evaluation).

    Flat ragged tokens are one row (B = 1) whose documents are told apart by `segment_ids_BT`; 0 marks padding.
    """

    positions_BT: jax.Array
    segment_ids_BT: jax.Array

    def write(self, layer: jax.Array, k_NSGK: jax.Array, v_NSGK: jax.Array) -> PackedSequences:
        """Nothing is kept."""
        return self

    def attend(self, layer: jax.Array, q_NSQK: jax.Array, k_NSGK: jax.Array, v_NSGK: jax.Array) -> jax.Array:
        """Causal attention inside each document."""
        segments = self.segment_ids_BT
        same = segments[:, :, None] == segments[:, None, :]
        steps = jnp.arange(segments.shape[1], dtype=jnp.int32)
        causal = steps[:, None] >= steps[None, :]
        rows = segments.shape
        return _attend(_rows(q_NSQK, rows), _rows(k_NSGK, rows), _rows(v_NSGK, rows), same & causal[None], q_NSQK)


@struct.dataclass
class DenseCache:
    """Keys and values of B sequences in slots 0..C-1, one slot per position.

    `positions_BT` are the positions of this step's tokens; a prompt's right padding writes slots that no query sees
    before a later token overwrites them.
    """

    k_LBCSGK: jax.Array
    v_LBCSGK: jax.Array
    positions_BT: jax.Array

    @classmethod
    def empty(
        cls,
        *,
        num_layers: int,
        batch: int,
        slots: int,
        groups: int,
        kv_heads: int,
        head_dim: int,
        dtype: jax.typing.DTypeLike,
    ) -> DenseCache:
        """Zeros for `groups` local groups of `kv_heads` heads each."""
        zeros = jnp.zeros((num_layers, batch, slots, groups, kv_heads, head_dim), dtype)
        return cls(zeros, zeros, jnp.zeros((batch, 1), jnp.int32))

    def at(self, positions_BT: jax.Array) -> DenseCache:
        """The cache for a step whose tokens stand at these positions."""
        return replace(self, positions_BT=positions_BT)

    def write(self, layer: jax.Array, k_NSGK: jax.Array, v_NSGK: jax.Array) -> DenseCache:
        """Store each token's keys and values in the slot of its position."""
        rows = jnp.arange(self.positions_BT.shape[0], dtype=jnp.int32)[:, None]
        at = (layer, rows, self.positions_BT)
        return replace(
            self,
            k_LBCSGK=self.k_LBCSGK.at[at].set(_rows(k_NSGK, self.positions_BT.shape)),
            v_LBCSGK=self.v_LBCSGK.at[at].set(_rows(v_NSGK, self.positions_BT.shape)),
        )

    def attend(self, layer: jax.Array, q_NSQK: jax.Array, k_NSGK: jax.Array, v_NSGK: jax.Array) -> jax.Array:
        """Attention to every slot up to the query's own position."""
        slots = jnp.arange(self.k_LBCSGK.shape[2], dtype=jnp.int32)
        seen = slots[None, None, :] <= self.positions_BT[:, :, None]
        return _attend(_rows(q_NSQK, self.positions_BT.shape), self.k_LBCSGK[layer], self.v_LBCSGK[layer], seen, q_NSQK)


def _rows(x_N: jax.Array, rows: tuple[int, ...]) -> jax.Array:
    return x_N.reshape(*rows, *x_N.shape[1:])


def _attend(
    q_BTSQK: jax.Array, k_BCSGK: jax.Array, v_BCSGK: jax.Array, mask_BTC: jax.Array, like_NSQK: jax.Array
) -> jax.Array:
    """Grouped-query attention of every group and key/value head, logits and softmax in high precision.

    `jax.nn.dot_product_attention` takes its softmax in float32 even for float64 inputs and, for bfloat16, does not
    lower under strict dtype promotion.
    """
    wide, size = high_precision(q_BTSQK.dtype), q_BTSQK.shape[-1]
    heads = k_BCSGK.shape[3]
    q = q_BTSQK.reshape(*q_BTSQK.shape[:3], heads, -1, size)
    logits = jnp.einsum("btsgqk,bcsgk->bsgqtc", q, k_BCSGK, preferred_element_type=wide) * size**-0.5
    logits = jnp.where(mask_BTC[:, None, None, None], logits, -jnp.inf)
    probabilities = jax.nn.softmax(logits, axis=-1).astype(v_BCSGK.dtype)
    return jnp.einsum("bsgqtc,bcsgk->btsgqk", probabilities, v_BCSGK).reshape(like_NSQK.shape)
