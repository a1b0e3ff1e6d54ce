"""A stand-in for the devices of the serving engine, which notices when a block does not hold what it should."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from foejax.serving.scheduler import StepTokens
from foejax.serving.step_plan import Row, StepPlan

VOCABULARY = 50
END = 7
"""A token that ends sequences, about one in fifty."""


def next_token(tokens: Sequence[int]) -> int:
    """The fake model: any function of all tokens before."""
    return zlib.crc32(bytes(token % 256 for token in tokens)) % VOCABULARY


def continuation(prompt: Sequence[int], max_tokens: int) -> list[int]:
    """What a request alone would get."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == END:
            break
    return tokens[len(prompt) :]


class FakeDevices:
    """Runs plans: keeps every slot's tokens, writes them to blocks and predicts from what the blocks hold."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[tuple[int, int], list[int]] = {}
        self.cache: dict[tuple[int, int, int], int] = {}

    def run(self, plan: StepPlan) -> StepTokens:
        for load in plan.loads:
            self.slots[load.shard, load.slot] = list(load.tokens)
        decode: list[list[list[int]]] = [[[] for _ in rows] for rows in plan.decode]
        for step in range(plan.decode_steps):
            for shard, rows in enumerate(plan.decode):
                for index, row in enumerate(rows):
                    if step < row.length:
                        decode[shard][index].append(self._compute(shard, row, row.start + step, 1))
        prefill = [
            [self._compute(shard, row, row.start, row.length) for row in rows]
            for shard, rows in enumerate(plan.prefill)
        ]
        return StepTokens(decode, prefill)

    def _compute(self, shard: int, row: Row, start: int, length: int) -> int:
        tokens = self.slots[shard, row.slot]
        for position in range(start, start + length):
            block, offset = row.blocks[position // self.block_size], position % self.block_size
            self.cache[shard, block, offset] = tokens[position]
        end = start + length
        read = [
            self.cache[shard, row.blocks[position // self.block_size], position % self.block_size]
            for position in range(end)
        ]
        assert read == tokens[:end], "a block holds another sequence's tokens"
        token = next_token(read)
        if row.samples:
            assert len(tokens) == end
            tokens.append(token)
        return token
