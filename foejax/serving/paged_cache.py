"""Keys and values in blocks that sequences hold by number, and attention over them.

Attention goes through the blocks of all sequences at once, a few at each turn, and keeps a running softmax
(arXiv 2205.14135, algorithm 1). The number of turns is data: one compiled program serves short and long sequences, and
no copy of a sequence's cache is made.

Shape letters: N tokens of a step, R rows (sequences) and T tokens of each in a section of the step, B blocks of a
sequence, X blocks of all layers, C tokens of a block, S groups on this device, Q query heads and G key/value heads of a
group, K head size.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from foejax.models.layers import high_precision
from pallas_kernels.backends import device_kind
from pallas_kernels.varying import cast_to_varying, varying_axes


@struct.dataclass
class Section:
    """Tokens of a step that form rows of equal length, one sequence a row.

    Attributes:
      positions_RT: int32, position of each token in its sequence; -1 for padding.
      table_RB: int32, the blocks of each sequence in order; entries beyond its positions may hold anything.
    """

    positions_RT: jax.Array
    table_RB: jax.Array


@struct.dataclass
class PagedCache:
    """An `AttentionCache` over blocks; the step's flat tokens are those of its sections, one after the other.

    Attributes:
      k_XSGCK, v_XSGCK: block b of layer l is number l * (X / layers) + b.
      sections: how this step's tokens fall into sequences.
    """

    k_XSGCK: jax.Array
    v_XSGCK: jax.Array
    sections: tuple[Section, ...]
    num_layers: int = struct.field(pytree_node=False)

    @property
    def num_blocks(self) -> int:
        """Blocks of one layer."""
        return self.k_XSGCK.shape[0] // self.num_layers

    def write(self, layer: jax.Array, k_NSGK: jax.Array, v_NSGK: jax.Array) -> PagedCache:
        """Store each token's keys and values at its position; those of padding nowhere."""
        size = self.k_XSGCK.shape[3]
        position_N = jnp.concatenate([section.positions_RT.reshape(-1) for section in self.sections])
        block_N = jnp.concatenate([_blocks_at(section, size).reshape(-1) for section in self.sections])
        nowhere = self.k_XSGCK.shape[0]
        block_N = jnp.where(position_N >= 0, layer * self.num_blocks + block_N, nowhere)
        at = (block_N, slice(None), slice(None), jnp.maximum(position_N, 0) % size)
        return replace(
            self,
            k_XSGCK=self.k_XSGCK.at[at].set(k_NSGK, mode="drop"),
            v_XSGCK=self.v_XSGCK.at[at].set(v_NSGK, mode="drop"),
        )

    def attend(self, layer: jax.Array, q_NSQK: jax.Array, k_NSGK: jax.Array, v_NSGK: jax.Array) -> jax.Array:
        """Attention of every token to its sequence up to itself; zeros for padding."""
        sizes = [section.positions_RT.size for section in self.sections]
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        parts = []
        for section, start, size in zip(self.sections, starts, sizes, strict=True):
            q_RTSQK = q_NSQK[start : start + size].reshape(*section.positions_RT.shape, *q_NSQK.shape[1:])
            out_RTSQK = _attend_blocks(self, section, layer * self.num_blocks, q_RTSQK)
            parts.append(out_RTSQK.reshape(size, *q_NSQK.shape[1:]))
        return jnp.concatenate(parts)


def tokens_per_turn() -> int:
    """Tokens of each sequence that attention reads at a turn: on a GPU many, since a turn is several launches."""
    return 32 if device_kind() == "cpu" else 512


def _blocks_at(section: Section, size: int) -> jax.Array:
    """Block of every token [R, T]."""
    index_RT = jnp.clip(section.positions_RT // size, 0, section.table_RB.shape[1] - 1)
    return jnp.take_along_axis(section.table_RB, index_RT, axis=1)


def _attend_blocks(cache: PagedCache, section: Section, first_block: jax.Array, q_RTSQK: jax.Array) -> jax.Array:
    rows, length, groups, queries, head = q_RTSQK.shape
    kv_heads, size = cache.k_XSGCK.shape[2:4]
    wide = high_precision(q_RTSQK.dtype)
    blocks = max(tokens_per_turn() // size, 1)
    table_RB = _pad_to_multiple(section.table_RB, blocks)
    q_RTSGQK = q_RTSQK.reshape(rows, length, groups, kv_heads, queries // kv_heads, head)
    offsets_C = jnp.arange(blocks * size, dtype=jnp.int32).reshape(blocks, size)

    def turn(index: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        peak, total, sums = carry
        block_RB = lax.dynamic_slice_in_dim(table_RB, index * blocks, blocks, axis=1) + first_block
        logits = jnp.einsum(
            "rtsgqk,rbsgck->rsgqtbc", q_RTSGQK, cache.k_XSGCK[block_RB], preferred_element_type=wide
        ) * jnp.asarray(head**-0.5, wide)
        seen = (index * blocks * size + offsets_C)[None, None] <= section.positions_RT[:, :, None, None]
        seen = seen[:, None, None, None]
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=(-2, -1), where=seen, initial=_LOWEST))
        weights = jnp.where(seen, jnp.exp(logits - new_peak[..., None, None]), 0)
        kept = jnp.exp(peak - new_peak)
        values = jnp.einsum(
            "rsgqtbc,rbsgck->rsgqtk",
            weights.astype(cache.v_XSGCK.dtype),
            cache.v_XSGCK[block_RB],
            preferred_element_type=wide,
        )
        return new_peak, total * kept + weights.sum((-2, -1)), sums * kept[..., None] + values

    shape = (rows, groups, kv_heads, queries // kv_heads, length)
    start = (jnp.full(shape, _LOWEST, wide), jnp.zeros(shape, wide), jnp.zeros((*shape, head), wide))
    axes = varying_axes(q_RTSQK, cache.k_XSGCK, section.positions_RT, table_RB, first_block)
    turns = (jnp.max(section.positions_RT) + blocks * size) // (blocks * size)
    _, total, sums = lax.fori_loop(0, turns, turn, jax.tree.map(lambda x: cast_to_varying(x, axes), start))
    out = jnp.where(total[..., None] > 0, sums / jnp.where(total > 0, total, 1)[..., None], 0)
    return out.transpose(0, 4, 1, 2, 3, 5).reshape(q_RTSQK.shape).astype(q_RTSQK.dtype)


_LOWEST = -1e30
"""Finite, so that the difference of two is a number."""


def _pad_to_multiple(table_RB: jax.Array, blocks: int) -> jax.Array:
    return jnp.pad(table_RB, ((0, 0), (0, -table_RB.shape[1] % blocks)))
