"""The parts of a run: which there are, in which order, and what each leaves in the folder."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.kernel_bench import ceilings, correctness, report, roofline
from experiments.kernel_bench.folder import Folder
from experiments.kernel_bench.operations import BenchError, Operation, Race
from experiments.kernel_bench.races import Settings, run_race

CEILINGS = "ceilings"
CUPTI = "cupti"


class OutOfTime(Exception):
    """The next piece of work would probably end after the time that was given."""


class Budget:
    """How much time is left, judged by the longest piece of work so far."""

    def __init__(self, minutes: float, first_piece_seconds: float) -> None:
        self._end = time.monotonic() + 60 * minutes
        self._longest = first_piece_seconds

    @contextlib.contextmanager
    def piece(self) -> Iterator[None]:
        """Around one piece of work; raises OutOfTime before it if it may not fit."""
        started = time.monotonic()
        if started + self._longest > self._end:
            raise OutOfTime
        yield
        self._longest = max(self._longest, time.monotonic() - started)


class Bench:
    """The parts, each run once per folder."""

    def __init__(self, operations: Sequence[Operation], folder: Folder, settings: Settings, budget: Budget) -> None:
        self._operations = {operation.name: operation for operation in operations}
        usable = settings.cupti and not any(record["contender"] == CUPTI for record in folder.crashed())
        self._settings = dataclasses.replace(settings, cupti=usable)
        self._folder, self._budget = folder, budget

    def run(self, parts: Sequence[str]) -> None:
        """Runs what is missing of these parts; raises OutOfTime when the time is up."""
        for part in parts:
            if self._folder.is_done(part):
                continue
            if part == CEILINGS:
                self._measure_ceilings()
            elif part.endswith("/correctness"):
                self._check_results(part)
            else:
                self._race(part)
            print(f"done: {part}", flush=True)

    def _measure_ceilings(self) -> None:
        with self._budget.piece():
            measure_ceilings(self._folder, self._settings)

    def _check_results(self, part: str) -> None:
        operation = self._operations[part.partition("/")[0]]
        with self._budget.piece():
            found = correctness.check(
                operation, self._settings, self._crashed(part), functools.partial(self._folder.running, part)
            )
            self._folder.write(part, found, complete=True)

    def _race(self, part: str) -> None:
        name, _, short = part.partition("/")
        operation = self._operations[name]
        races = races_of(operation, short, self._settings.tiny)
        done = (self._folder.read(part) or {"races": []})["races"]
        contenders = operation.contenders(self._settings.on_gpu)
        for race in races:
            if any((record["shape"], record["step"]) == (race.shape, race.step) for record in done):
                continue
            with self._budget.piece():
                record = run_race(
                    operation,
                    race,
                    contenders,
                    known_ceilings(self._folder),
                    self._settings,
                    self._excluded(operation, part),
                    functools.partial(self._folder.running, part),
                )
            done = [*done, record]
            self._folder.write(part, {"races": done}, complete=len(done) == len(races))
            cells = report.judged(record, known_ceilings(self._folder))
            print(report.headline({**record, "cells": cells}, dry_run=self._settings.tiny), flush=True)

    def _excluded(self, operation: Operation, part: str) -> dict[tuple[str, str], str]:
        checks = f"{operation.name}/correctness"
        wrong = (self._folder.read(checks) or {"wrong": []})["wrong"]
        failed = {(record["contender"], record["step"]): f"wrong at {record['case']}" for record in wrong}
        return failed | self._crashed(part) | self._crashed(checks)

    def _crashed(self, part: str) -> dict[tuple[str, str], str]:
        reason = "an earlier call ended while it ran; delete crashed.json to try it again"
        return {
            (record["contender"], record["step"]): reason
            for record in self._folder.crashed()
            if record["part"] == part
        }  # fmt: skip


def measure_ceilings(folder: Folder, settings: Settings) -> None:
    """Runs the part that every rate is a share of."""
    with folder.running(CEILINGS, CUPTI, "clock") if settings.cupti else contextlib.nullcontext():
        found = ceilings.measure(settings)
    if settings.tiny:  # a CPU's rates are nobody's ceilings
        found = {"not_run": found["not_run"], "ways": [*found["matmul_by_way"], *found["copy_by_way"]]}
    folder.write(CEILINGS, found, complete=True)


def races_of(operation: Operation, part: str, tiny: bool) -> list[Race]:
    """The part's races; shrunk for a dry run, where shapes that have become equal run once."""
    if not tiny:
        return list(operation.parts[part])
    shrunk: dict[Any, Race] = {}
    for race in map(operation.shrink, operation.parts[part]):
        shrunk.setdefault((race.step, race.dims), race)
    return list(shrunk.values())


def part_names(operations: Sequence[Operation]) -> list[str]:
    """All parts in the order in which they run: ceilings, every operation's most telling part, every second part, ...

    Before its first part an operation's results are checked.
    """
    names = [CEILINGS]
    for index in range(max(len(operation.parts) for operation in operations)):
        for operation in operations:
            names += [f"{operation.name}/correctness"] if index == 0 else []
            names += [f"{operation.name}/{part}" for part in list(operation.parts)[index : index + 1]]
    return names


def choose_parts(wanted: Sequence[str] | None, operations: Sequence[Operation], dry_run: bool) -> list[str]:
    """The parts asked for, after the correctness of their operation and the ceilings.

    Args:
      wanted: names of parts or operations; None for all, in a dry run for the first of each operation.

    Raises:
      BenchError: a name that is neither.
    """
    names = part_names(operations)
    if wanted is None:
        few = {f"{operation.name}/{next(iter(operation.parts))}" for operation in operations}
        return [name for name in names if not dry_run or name in few or _comes_first(name)]
    known = [*(operation.name for operation in operations), *names]
    for name in wanted:
        if name not in known:
            raise BenchError(f"--parts={name}: choose from {', '.join(known)}")
    chosen = {name for name in names for want in wanted if name == want or name.startswith(f"{want}/")}
    owners = {name.partition("/")[0] for name in chosen}
    return [
        name for name in names if name in chosen or _comes_first(name) and name.partition("/")[0] in owners | {CEILINGS}
    ]


def _comes_first(name: str) -> bool:
    return name == CEILINGS or name.endswith("/correctness")


def known_ceilings(folder: Folder) -> Mapping[str, Any]:
    """The ceilings part, empty before it has run and in a dry run."""
    found = folder.read(CEILINGS) or {}
    return found if "matmul_flops" in found else {}


def write_reports(
    folder: Folder, operations: Sequence[Operation], facts: Mapping[str, Any], parts: Sequence[str]
) -> list[str]:
    """Writes results.json, report.md and roofline.png from the parts in the folder; returns ours that are wrong."""
    records = {name: record for name in part_names(operations) if (record := folder.read(name)) is not None}
    checks = [record for name, record in records.items() if name.endswith("/correctness")]
    races = [race for record in records.values() for race in record.get("races", [])]
    unfinished = [name for name in parts if not folder.is_done(name)]
    found = report.results(facts, folder.read(CEILINGS) or {}, checks, races, unfinished)
    (folder.path / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (folder.path / "report.md").write_text(report.markdown(found), encoding="utf-8")
    roofline.plot(found, folder.path / "roofline.png")
    wrong = [record for check in checks for record in check["wrong"]]
    wrong += [record for race in races for record in race["wrong"]]
    return sorted({record["contender"] for record in wrong if record["kind"] == "ours"})
