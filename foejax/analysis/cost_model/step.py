"""What a step computes: rows of tokens on each part of the devices that holds sequences of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Row(NamedTuple):
    """Consecutive tokens of one sequence: how many are computed, and how many came before them."""

    new: int
    context: int

    @property
    def pairs(self) -> float:
        """Query-key pairs of causal attention."""
        return self.new * (self.context + (self.new + 1) / 2)


@dataclass(frozen=True)
class Step:
    """One launch.

    Attributes:
      shards: rows of every token shard of the layout, in its order (`data`, then `expert`, in hp then `group`).
      logits_rows: tokens of each shard whose logits are computed; None is all of them, as `LanguageModel.logits` does.
      padded_tokens: tokens on every device with the padding of static shapes; 0 is what the fullest shard has.
    """

    shards: tuple[tuple[Row, ...], ...]
    logits_rows: int | None = None
    padded_tokens: int = 0

    @property
    def tokens_by_shard(self) -> list[int]:
        """Tokens without padding."""
        return [sum(row.new for row in rows) for rows in self.shards]

    @property
    def tokens(self) -> int:
        """Tokens of all shards, without padding."""
        return sum(self.tokens_by_shard)

    def most_tokens(self, together: int) -> int:
        """Tokens without padding of so many shards after each other, of those that have most."""
        counts = self.tokens_by_shard
        return max(sum(counts[start : start + together]) for start in range(0, len(counts), together))

    @property
    def device_tokens(self) -> int:
        """Tokens on one device, padding included: programs have one shape, so all devices carry as many."""
        return max(self.padded_tokens, max(self.tokens_by_shard))

    @property
    def most_pairs(self) -> float:
        """Query-key pairs of the shard with most of them."""
        return max(sum(row.pairs for row in rows) for rows in self.shards)

    @property
    def most_keys(self) -> int:
        """Keys that the shard with most of them reads, each once a row."""
        return max(sum(row.new + row.context for row in rows) for rows in self.shards)


def prefill_step(tokens: int, shards: int, *, length: int = 0) -> Step:
    """Prompts of `length` tokens, `tokens` in all, dealt out over the shards; the last token of each gets logits.

    Args:
      length: of a prompt, the last one shorter; 0 is a single prompt, which one shard computes whole.

    Raises:
      ValueError: fewer than one token.
    """
    if tokens < 1 or length < 0:
        raise ValueError(f"tokens={tokens}, length={length}: a step has at least one token")
    length = length or tokens
    rows = [Row(min(length, tokens - start), 0) for start in range(0, tokens, length)]
    return Step(_deal(rows, shards), logits_rows=-(-len(rows) // shards))


def forward_step(sequences: int, length: int, shards: int) -> Step:
    """Logits of every token of whole sequences, as in evaluation and the forward pass of training."""
    return Step(_deal([Row(length, 0)] * sequences, shards))


def decode_step(sequences: int, context: int, shards: int) -> Step:
    """One new token for each of the sequences, which have `context` tokens already."""
    rows = _deal([Row(1, context)] * sequences, shards)
    return Step(rows, logits_rows=max(len(part) for part in rows))


def _deal(rows: Sequence[Row], shards: int) -> tuple[tuple[Row, ...], ...]:
    def part(index: int) -> Iterable[Row]:
        return rows[index::shards]

    return tuple(tuple(part(index)) for index in range(shards))
