"""Runs one race: builds everybody's program, checks its results on the timed operands, and lets all take turns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.kernel_bench.operations import Contender, Operands, Operation, Race, Watch, Work, first_line
from experiments.kernel_bench.programs import (
    Clock,
    Program,
    build,
    compile_all,
    fill_free_memory_with_poison,
    raise_if_lost,
)
from experiments.kernel_bench.timing import Measurement, take_turns

_ROTATION = 16
"""The calls of a program touch this many times the L2 cache, so that next to nothing of a call is left for the next."""
_PROGRAM_SECONDS = 1e-3
_FEWEST_CALLS, _MOST_CALLS = 2, 32


@dataclass(frozen=True)
class Settings:
    """How to measure on this machine.

    Attributes:
      tiny: a dry run, whose times are kept only as multiples of the race's fastest.
      cupti: whether CUPTI may be asked.
      l2_bytes: size of the L2 cache, 0 in a dry run.
      workers: programs compiled at a time.
    """

    on_gpu: bool
    tiny: bool
    clock: Clock
    cupti: bool
    turns: int
    l2_bytes: int
    workers: int


def run_race(
    operation: Operation,
    race: Race,
    contenders: Sequence[Contender],
    ceilings: Mapping[str, Any],
    settings: Settings,
    excluded: Mapping[tuple[str, str], str],
    watch: Watch,
) -> dict[str, Any]:
    """Times one race under every kind of sizes.

    Args:
      ceilings: with matmul_flops and copy_bytes; empty in a dry run.
      excluded: (contender, step) -> why it is not to be run.
      watch: around the first run of each contender.

    Returns:
      A record for JSON: the race, its cells (one per sizes and contender), who did not run, and who was wrong. cached:
      whether all calls' operands fit into the L2 cache at once.
    """
    not_run: dict[tuple[str, str], str] = {}  # (contender, sizes or "") -> reason
    wrong: dict[tuple[str, str], str] = {}
    present = []
    for contender in contenders:
        reason = excluded.get((contender.name, race.step)) or contender.excuse(race)
        if reason is None:
            present.append(contender)
        else:
            not_run[contender.name, ""] = reason
    calls, copies = plan_calls(operation, race, ceilings, settings.l2_bytes)
    sets = operation.operand_sets(race, race.sizes[0], calls, copies)
    in_jax = [contender for contender in present if contender.framework == "jax"]
    compiled, failed = compile_all(in_jax, race.step, sets, settings.on_gpu, settings.workers)
    not_run |= {(name, ""): reason for name, reason in failed.items()}
    present = [contender for contender in present if contender.name not in failed]

    cells: list[dict[str, Any]] = []
    cached = False
    for kind in race.sizes:
        if kind != race.sizes[0]:
            sets = operation.operand_sets(race, kind, calls, copies)
        here = [contender for contender in present if contender.sizes is None or kind in contender.sizes]
        programs = _checked_programs(operation, race, kind, here, sets, compiled, settings, (not_run, wrong), watch)

        def failed_while_timed(name: str, reason: str, kind: str = kind) -> None:
            not_run[name, kind] = reason
            raise_if_lost(name, reason)

        measured = take_turns(programs, settings.turns, failed_while_timed)
        work = operation.work(race, sets)
        cached = cached or calls * work.bytes < settings.l2_bytes
        cells += [
            _cell(contender, kind, measured[contender.name], work) for contender in here if contender.name in measured
        ]
        del programs, sets  # before the next kind's operands are drawn
    if settings.tiny:
        fastest = min((cell["time"] for cell in cells), default=1.0)
        cells = [{**cell, "time": cell["time"] / fastest} for cell in cells]
    kinds = {contender.name: contender.kind for contender in contenders}
    return {
        "operation": operation.name, "shape": race.shape, "step": race.step, "sizes": race.sizes,
        "judged_by": race.judged_by, "dims": race.dims._asdict(),
        "calls": calls, "weight_copies": copies, "cached": cached, "cells": cells,
        "not_run": [_record(key, reason) for key, reason in not_run.items()],
        "wrong": [{**_record(key, reason), "kind": kinds[key[0]]} for key, reason in wrong.items()],
    }  # fmt: skip


def plan_calls(operation: Operation, race: Race, ceilings: Mapping[str, Any], l2_bytes: int) -> tuple[int, int]:
    """How many calls a program makes and how many copies of the expert weights take turns in them.

    Enough calls to sweep the cache and, at the ceilings, to outlast the starting of a program.
    """
    work = operation.work(race, operation.operand_sets(race, race.sizes[0], 1, 1))
    wanted = l2_bytes * _ROTATION
    calls = math.ceil(wanted / work.bytes)
    if ceilings:
        floor = max(work.flops / ceilings["matmul_flops"], work.bytes / ceilings["copy_bytes"])
        calls = max(calls, math.ceil(_PROGRAM_SECONDS / floor))
    calls = min(max(calls, _FEWEST_CALLS), _MOST_CALLS)
    weights = operation.weight_bytes(race)
    copies = math.ceil(wanted / weights) if weights else 1
    return calls, min(max(copies, 1), calls)


def _checked_programs(
    operation: Operation,
    race: Race,
    kind: str,
    contenders: Sequence[Contender],
    sets: Sequence[Operands],
    compiled: Mapping[str, Any],
    settings: Settings,
    lists: tuple[dict[tuple[str, str], str], dict[tuple[str, str], str]],
    watch: Watch,
) -> dict[str, Program]:
    """The programs that run and are right on these operands; `lists` get who does not run and who is wrong."""
    not_run, wrong = lists
    programs: dict[str, Program] = {}
    for contender in contenders:
        with watch(contender.name, race.step):
            try:
                program = build(contender, race.step, sets, compiled, settings.clock, settings.cupti)
                fill_free_memory_with_poison(operation.output(race.step, race.dims), len(sets))
                results = program.run()
                faults = [operation.fault(race, *pair) for pair in zip(sets, results, strict=True)]
                del results
            except Exception as error:  # contenders are foreign code: whatever they raise is their reason
                not_run[contender.name, kind] = first_line(error)
                raise_if_lost(contender.name, first_line(error))
                continue
        fault = next((fault for fault in faults if fault is not None), None)
        if fault is None:
            programs[contender.name] = program
        else:
            wrong[contender.name, kind] = fault
    return programs


def _cell(contender: Contender, kind: str, measured: Measurement, work: Work) -> dict[str, Any]:
    return {
        "contender": contender.name, "kind": contender.kind, "sizes": kind, "clock": measured.clock,
        "time": measured.median, "spread": measured.spread, "samples": measured.samples,
        "host_bound": measured.host_bound, "kernel_time": measured.kernel_seconds, **work._asdict(),
    }  # fmt: skip


def _record(key: tuple[str, str], reason: str) -> dict[str, str]:
    contender, sizes = key
    return {"contender": contender, "sizes": sizes, "reason": reason}
