"""Keys and values in blocks that sequences hold by number, and attention over them.

Shape letters: N tokens of a step, R rows (sequences) and T tokens of each in a section of the step, B blocks of a
sequence, X blocks of all layers, C tokens of a block, S groups on this device, Q query heads and G key/value heads of a
group, K head size.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels import paged_attention


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
            out_RTSQK = paged_attention(
                q_RTSQK,
                self.k_XSGCK,
                self.v_XSGCK,
                section.table_RB,
                section.positions_RT,
                first_block=layer * self.num_blocks,
            )
            parts.append(out_RTSQK.reshape(size, *q_NSQK.shape[1:]))
        return jnp.concatenate(parts)


def _blocks_at(section: Section, size: int) -> jax.Array:
    """Block of every token [R, T]."""
    index_RT = jnp.clip(section.positions_RT // size, 0, section.table_RB.shape[1] - 1)
    return jnp.take_along_axis(section.table_RB, index_RT, axis=1)
