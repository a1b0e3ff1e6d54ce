"""Paged attention in plain XLA.

It goes through the blocks of all sequences at once, a few at each turn, and keeps a running softmax (arXiv 2205.14135,
algorithm 1). The number of turns is data: one compiled program serves short and long sequences, and no copy of a
sequence's cache is made.

Shape letters: R rows (sequences), T tokens of each, B blocks of a sequence, X blocks of the cache, C tokens of a block,
S groups, Q query heads and G key/value heads of a group, K head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.backends import device_kind
from pallas_kernels.varying import cast_to_varying, varying_axes


def tokens_per_turn() -> int:
    """Tokens of each sequence that attention reads at a turn: on a GPU many, since a turn is several launches."""
    return 32 if device_kind() == "cpu" else 512


def attention(
    q_RTSQK: jax.Array,
    k_XSGCK: jax.Array,
    v_XSGCK: jax.Array,
    table_RB: jax.Array,
    positions_RT: jax.Array,
    first_block: jax.Array,
) -> jax.Array:
    """[R, T, S, Q, K]; contract as in `api.paged_attention`."""
    rows, length, groups, queries, head = q_RTSQK.shape
    kv_heads, size = k_XSGCK.shape[2:4]
    wide = jnp.dtype(jnp.float64 if q_RTSQK.dtype == jnp.float64 else jnp.float32)
    blocks = max(tokens_per_turn() // size, 1)
    table_RB = _pad_to_multiple(table_RB, blocks)
    q_RTSGQK = q_RTSQK.reshape(rows, length, groups, kv_heads, queries // kv_heads, head)
    offsets_C = jnp.arange(blocks * size, dtype=jnp.int32).reshape(blocks, size)

    def turn(index: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        peak, total, sums = carry
        block_RB = lax.dynamic_slice_in_dim(table_RB, index * blocks, blocks, axis=1) + first_block
        logits = jnp.einsum(
            "rtsgqk,rbsgck->rsgqtbc", q_RTSGQK, k_XSGCK[block_RB], preferred_element_type=wide
        ) * jnp.asarray(head**-0.5, wide)
        seen = (index * blocks * size + offsets_C)[None, None] <= positions_RT[:, :, None, None]
        seen = seen[:, None, None, None]
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=(-2, -1), where=seen, initial=_LOWEST))
        weights = jnp.where(seen, jnp.exp(logits - new_peak[..., None, None]), 0)
        kept = jnp.exp(peak - new_peak)
        values = jnp.einsum(
            "rsgqtbc,rbsgck->rsgqtk",
            weights.astype(v_XSGCK.dtype),
            v_XSGCK[block_RB],
            preferred_element_type=wide,
        )
        return new_peak, total * kept + weights.sum((-2, -1)), sums * kept[..., None] + values

    shape = (rows, groups, kv_heads, queries // kv_heads, length)
    start = (jnp.full(shape, _LOWEST, wide), jnp.zeros(shape, wide), jnp.zeros((*shape, head), wide))
    axes = varying_axes(q_RTSQK, k_XSGCK, positions_RT, table_RB, first_block)
    turns = (jnp.max(positions_RT) + blocks * size) // (blocks * size)
    _, total, sums = lax.fori_loop(0, turns, turn, jax.tree.map(lambda x: cast_to_varying(x, axes), start))
    out = jnp.where(total[..., None] > 0, sums / jnp.where(total > 0, total, 1)[..., None], 0)
    return out.transpose(0, 4, 1, 2, 3, 5).reshape(q_RTSQK.shape).astype(q_RTSQK.dtype)


_LOWEST = -1e30
"""Finite, so that the difference of two is a number."""


def _pad_to_multiple(table_RB: jax.Array, blocks: int) -> jax.Array:
    return jnp.pad(table_RB, ((0, 0), (0, -table_RB.shape[1] % blocks)))
