"""Blocks of the key/value cache: who holds which, and which hold a prefix that another sequence can use.

Plain Python: a block is a number here, and what it holds lies on the device.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

BlockKey = bytes
"""Digest of a block's tokens and of all tokens before them."""


def chain_key(parent: BlockKey, tokens: Sequence[int]) -> BlockKey:
    """Key of a full block that follows the block of key `parent` (empty for the first one)."""
    return hashlib.blake2b(parent + np.asarray(tokens, "<u4").tobytes(), digest_size=16).digest()


@dataclass
class _Block:
    holders: int = 0
    key: BlockKey | None = None


class BlockPool:
    """A fixed number of blocks with reference counts.

    A block without holders keeps what it holds, and its key, until it is handed out again, least recently released
    first; a sequence with the same prefix takes it up again.
    """

    def __init__(self, num_blocks: int, block_size: int, *, reuse_prefixes: bool = True) -> None:
        self.block_size = block_size
        self.reuse_prefixes = reuse_prefixes
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._by_key: dict[BlockKey, int] = {}

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def find_prefix(self, tokens: Sequence[int]) -> list[int]:
        """The longest run of known blocks that starts `tokens`, short of the last token: its logits are always needed.

        They are not held by that; see `hold`.
        """
        found: list[int] = []
        if not self.reuse_prefixes:
            return found
        key = b""
        for start in range(0, len(tokens) - self.block_size, self.block_size):
            key = chain_key(key, tokens[start : start + self.block_size])
            block = self._by_key.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a holder to each block, which has holders already or is free with a prefix in it."""
        for block in blocks:
            self._blocks[block].holders += 1
            self._free.pop(block, None)

    def take(self, count: int) -> list[int] | None:
        """`count` blocks with one holder and nothing in them, or None (and no change) where there are fewer."""
        if count > len(self._free):
            return None
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._forget(block)
            self._blocks[block].holders = 1
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Take a holder from each block of a sequence, given in order: the end of a prefix is handed out first."""
        for block in reversed(blocks):
            record = self._blocks[block]
            if record.holders < 1:
                raise AssertionError(f"block {block} is released and has no holder")
            record.holders -= 1
            if record.holders == 0:
                self._free[block] = None

    def publish(self, block: int, key: BlockKey) -> None:
        """Let others find a full block, all of whose tokens are computed; the first block of a key stays."""
        if self.reuse_prefixes and self._blocks[block].key is None and key not in self._by_key:
            self._blocks[block].key = key
            self._by_key[key] = block

    def _forget(self, block: int) -> None:
        key = self._blocks[block].key
        if key is not None:
            del self._by_key[key]
            self._blocks[block].key = None
