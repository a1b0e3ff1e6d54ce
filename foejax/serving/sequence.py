"""One continuation of a prompt while the engine works on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from foejax.serving.blocks import BlockKey
from foejax.serving.sampling_params import SamplingParams


class FinishReason(StrEnum):
    """Why a continuation ended."""

    STOP = "stop"  # a stop token, a stop string or the end of the text
    LENGTH = "length"  # max_tokens, or the context is full
    ABORT = "abort"  # the caller took it back
    DEADLINE = "deadline"  # its time ran out


@dataclass(eq=False)
class Sequence:
    """A prompt and what follows it; known by `id`.

    Attributes:
      id: counts sequences in order of arrival; lower ones go first.
      tokens: prompt and output so far.
      prompt_length: how many of them are the prompt.
      last_length: `tokens` never gets longer.
      stop_tokens: any of them ends it.
      seed: of its draws.
      deadline: on the engine's clock, in seconds; None is never.
      parent: the first continuation of the same prompt, whose blocks it shares; None is itself.
      shard, slot: where it runs; -1 while it waits.
      blocks: what it holds, from position 0 on.
      keys: of those blocks that are full and computed.
      num_computed: tokens whose keys and values are in the cache.
      num_cached: tokens that it found there when it last entered.
      num_preemptions: how often it had to give its blocks back.
    """

    id: int
    tokens: list[int]
    prompt_length: int
    last_length: int
    params: SamplingParams
    stop_tokens: frozenset[int]
    seed: int
    deadline: float | None = None
    parent: Sequence | None = None
    shard: int = -1
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    keys: list[BlockKey] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None

    @property
    def num_uncomputed(self) -> int:
        """Tokens that the next steps compute; 1 while decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def num_left(self) -> int:
        """Tokens that it may still grow by."""
        return self.last_length - len(self.tokens)

    def until_its_end(self, new_tokens: list[int]) -> list[int]:
        """Those of the tokens sampled next that it keeps: up to the first that ends it."""
        for count, token in enumerate(new_tokens, 1):
            if token in self.stop_tokens or count == self.num_left:
                return new_tokens[:count]
        return new_tokens
