"""Contenders take turns, so that all share whatever the machine does meanwhile; the median and its spread are kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from experiments.kernel_bench.operations import first_line
from experiments.kernel_bench.programs import Clock, Program, Sample

_SLOW_SECONDS = 0.3
_SLOW_TURNS = 3


class Measurement(NamedTuple):
    """Seconds of one call.

    Attributes:
      spread: interquartile range over the median.
      host_bound: whether more than half of the samples were.
      kernel_seconds: of a host-bound program, what CUPTI says its kernels took.
    """

    clock: Clock
    median: float
    spread: float
    samples: int
    host_bound: bool
    kernel_seconds: float | None


def take_turns(
    programs: Mapping[str, Program], turns: int, on_error: Callable[[str, str], None]
) -> dict[str, Measurement]:
    """Times every program `turns` times, in an order that moves on by one each turn; a first turn is thrown away.

    A program whose turn takes long gets three, the first one included.

    Args:
      on_error: told the name and the reason of a program that fails; the others go on.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in programs}
    wanted = dict.fromkeys(programs, turns)
    for turn in range(turns + 1):
        names = [name for name in programs if len(samples[name]) < wanted[name]]
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            started = time.perf_counter()
            try:
                sample = programs[name].sample()
            except Exception as error:  # foreign code: whatever it raises is the reason
                on_error(name, first_line(error))
                samples[name], wanted[name] = [], 0
                continue
            slow = time.perf_counter() - started > _SLOW_SECONDS
            if turn > 0 or slow:
                samples[name].append(sample)
            if slow:
                wanted[name] = min(turns, _SLOW_TURNS)
    measured = {}
    for name, taken in samples.items():
        # Where the clock is too coarse the difference of two readings may be negative.
        usable = [sample for sample in taken if sample.seconds > 0]
        if usable:
            measured[name] = summarise(programs[name], usable)
        elif taken:
            on_error(name, "too fast for the clock: no sample is above zero")
    return measured


def summarise(program: Program, samples: list[Sample]) -> Measurement:
    """Median, spread and clock of the samples of one program."""
    seconds = [sample.seconds for sample in samples]
    median = statistics.median(seconds)
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [median] * 3
    host_bound = 2 * sum(sample.host_bound for sample in samples) > len(samples)
    kernel_seconds = None
    if host_bound:
        try:
            kernel_seconds = program.kernel_seconds()
        except Exception:  # CUPTI belongs to one user at a time, and some machines keep it shut
            kernel_seconds = None
    spread = (quartiles[2] - quartiles[0]) / median
    return Measurement(program.clock, median, spread, len(samples), host_bound, kernel_seconds)
