"""What one step of the engine computes, as plain data: it can be logged, replayed and sent to other hosts.

Everything a device needs is in the plans so far: the tokens of a sequence travel once, when it enters a slot, and
tokens sampled since are on the device already.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class SlotLoad:
    """A sequence enters a slot: its tokens so far and how it samples.

    Attributes:
      shard: part of the devices that holds it; each has slots and blocks of its own.
      slot: inside the shard.
      tokens: prompt, and after a preemption what was generated.
      temperature, top_k, top_p, min_p, repetition_penalty, seed: see `SamplingParams`.
    """

    shard: int
    slot: int
    tokens: tuple[int, ...]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int


@dataclass(frozen=True)
class Row:
    """Some tokens of one sequence.

    Attributes:
      slot: where the sequence's tokens are.
      start: position of the first token to compute.
      length: how many; in a plan of several decoding steps, how many steps it takes part in.
      blocks: the sequence's blocks from position 0 on, at least up to `start + length`.
      samples: whether the token after the last one is drawn; False inside a prompt.
    """

    slot: int
    start: int
    length: int
    blocks: tuple[int, ...]
    samples: bool


@dataclass(frozen=True)
class StepPlan:
    """One launch on the devices: one or several tokens of many sequences.

    Attributes:
      number: counts plans.
      loads: sequences that enter slots first.
      decode: of every shard, rows that compute one token a step.
      prefill: of every shard, rows of several prompt tokens; those of one sequence follow each other.
      prefill_length: tokens that a prefill row is padded to; 0 where there are none.
      decode_steps: steps in a row that the decode rows take; more than one only without prefill rows.
      logprobs: whether log-probabilities of the sampled tokens and of the likeliest ones are wanted.
    """

    number: int
    loads: tuple[SlotLoad, ...]
    decode: tuple[tuple[Row, ...], ...]
    prefill: tuple[tuple[Row, ...], ...]
    prefill_length: int
    decode_steps: int
    logprobs: bool

    def to_bytes(self) -> bytes:
        """A line of JSON, in which blocks and tokens are counted, and these themselves as int32 behind it."""
        numbers = array("i")

        def count(values: tuple[int, ...]) -> int:
            numbers.extend(values)
            return len(values)

        fields = {name: getattr(self, name) for name in ("number", "prefill_length", "decode_steps", "logprobs")}
        fields["loads"] = [vars(load) | {"tokens": count(load.tokens)} for load in self.loads]
        for section in ("decode", "prefill"):
            fields[section] = [
                [(row.slot, row.start, row.length, count(row.blocks), row.samples) for row in rows]
                for rows in getattr(self, section)
            ]
        return json.dumps(fields, separators=(",", ":")).encode() + b"\n" + numbers.tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The plan that `to_bytes` wrote."""
        line, _, rest = data.partition(b"\n")
        fields, numbers, at = json.loads(line), tuple(array("i", rest)), 0

        def take(count: int) -> tuple[int, ...]:
            nonlocal at
            at += count
            return numbers[at - count : at]

        loads = tuple(SlotLoad(**load | {"tokens": take(load["tokens"])}) for load in fields["loads"])
        sections = {
            section: tuple(
                tuple(Row(slot, start, length, take(blocks), samples) for slot, start, length, blocks, samples in rows)
                for rows in fields[section]
            )
            for section in ("decode", "prefill")
        }
        return cls(**fields | sections | {"loads": loads})
