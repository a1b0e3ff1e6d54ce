"""Traces: which request comes when, so that several engines can meet the very same ones."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Prompt = str | tuple[int, ...]
"""A text, or token ids."""


class LoadError(ValueError):
    """A trace, a model or a server that cannot be measured."""


@dataclass(frozen=True)
class TracedRequest:
    """One request of a trace.

    Attributes:
      arrival: seconds after the trace's start.
      prompt: what it asks to continue.
      output_tokens: tokens that it asks for; the end of a text does not end it.
    """

    arrival: float
    prompt: Prompt
    output_tokens: int


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival.

    Attributes:
      interarrival: mean seconds between arrivals that they were drawn with; 0 is all at once.
      seed: of the draws.
    """

    requests: tuple[TracedRequest, ...]
    interarrival: float
    seed: int

    def save(self, path: Path) -> None:
        """Write one JSON object a line, first the trace's own fields."""
        lines = [json.dumps({"interarrival": self.interarrival, "seed": self.seed})]
        lines += [json.dumps(vars(request)) for request in self.requests]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Trace:
        """The trace that `save` wrote.

        Raises:
          LoadError: the file holds something else.
        """
        try:
            first, *rest = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
            requests = [TracedRequest(**{**fields, "prompt": _prompt(fields["prompt"])}) for fields in rest]
            return cls(tuple(requests), float(first["interarrival"]), int(first["seed"]))
        except (ValueError, KeyError, TypeError) as error:
            raise LoadError(
                f"{path} is not a trace ({error}): `foejax bench serve` leaves traces in its --out folder"
            ) from None


@dataclass(frozen=True)
class Lengths:
    """A distribution of numbers of tokens, at least 1.

    Attributes:
      kind: `fixed` (first), `uniform` (first to second, both included) or `lognormal` (mean `first`, standard deviation
        of the logarithm `second`).
    """

    kind: str
    first: float
    second: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """`256`, `100:500` or `lognormal:9000:0.5`.

        Raises:
          LoadError: anything else.
        """
        words = text.split(":")
        kind = {1: "fixed", 2: "uniform", 3: words[0]}.get(len(words), "")
        try:
            numbers = [float(word) for word in words[len(words) == 3 :]]
        except ValueError:
            numbers = []
        ordered = kind != "uniform" or numbers[-1:] >= numbers[:1]
        known = kind in ("fixed", "uniform", "lognormal") and numbers and ordered
        if not known or numbers[0] < 1 or not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise LoadError(f"length {text!r}: write N, LOW:HIGH or lognormal:MEAN:SIGMA, with at least 1 token")
        return cls(kind, *numbers)

    def draw(self, random: np.random.Generator, count: int) -> list[int]:
        """`count` lengths."""
        if self.kind == "fixed":
            return [int(self.first)] * count
        if self.kind == "uniform":
            drawn: list[int] = random.integers(int(self.first), int(self.second) + 1, count).tolist()
            return drawn
        mean = math.log(self.first) - self.second**2 / 2
        return [max(1, round(value)) for value in random.lognormal(mean, self.second, count).tolist()]


def make_trace(
    num_requests: int,
    interarrival: float,
    output: Lengths,
    *,
    seed: int,
    prompt: Lengths | Sequence[Prompt],
    vocab_size: int,
) -> Trace:
    """Draw a trace: a Poisson process of arrivals that starts with a request at 0.

    Arrivals, prompts and output lengths have draws of their own: the same seed with another mean inter-arrival time
    gives the same requests at other times.

    Args:
      interarrival: mean seconds between arrivals.
      prompt: distribution of the lengths of random prompts, or prompts, which are taken in turn.
      vocab_size: random prompts hold ids below it.

    Raises:
      LoadError: no requests, a negative inter-arrival time, or no prompts.
    """
    if num_requests < 1 or not 0 <= interarrival < math.inf:
        raise LoadError(
            f"{num_requests} requests every {interarrival:g} s make no trace: choose at least 1 request, and 0 or more "
            "seconds"
        )
    arrivals, lengths, tokens = (np.random.default_rng([seed, stream]) for stream in range(3))
    gaps = arrivals.exponential(1.0, num_requests) * interarrival
    times = np.concatenate([[0.0], np.cumsum(gaps[1:])]).tolist()
    outputs = output.draw(lengths, num_requests)
    prompts: Sequence[Prompt]
    if isinstance(prompt, Lengths):
        prompts = [
            tuple(tokens.integers(0, vocab_size, length).tolist()) for length in prompt.draw(lengths, num_requests)
        ]
    else:
        prompts = prompt
    if not prompts:
        raise LoadError("there are no prompts: give a file with at least one")
    requests = (TracedRequest(time, prompts[index % len(prompts)], outputs[index]) for index, time in enumerate(times))
    return Trace(tuple(requests), interarrival, seed)


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a JSONL file: each line a text, a list of token ids, or an object with one of them as `prompt`.

    Raises:
      LoadError: a line that is none of these.
      OSError: the file cannot be read.
    """
    found: list[Prompt] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            found.append(_prompt(value["prompt"] if isinstance(value, dict) else value))
        except (ValueError, KeyError) as error:
            raise LoadError(
                f"{path}, line {number}, holds no prompt ({error}): write a text, a list of token ids, or an object "
                "with one of them as `prompt`"
            ) from None
    return found


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(token) is int and token >= 0 for token in value):
        return tuple(value)
    raise ValueError(f"{str(value)[:40]!r} is neither a text nor a list of token ids")
