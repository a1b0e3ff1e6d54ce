"""Sweeps the tiles of an operation's kernels on this GPU and rewrites their table.

`sweep` and `save_table` know nothing of kernels; an operation's `Tiles` says what a candidate is, how a step runs with
it, and under which key the table holds the choice.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from experiments.kernel_bench.folder import Folder
from experiments.kernel_bench.operations import (
    BenchError,
    Contender,
    DeviceLost,
    Operation,
    Race,
    Tiles,
    Watch,
    first_line,
)
from experiments.kernel_bench.parts import CEILINGS, Budget, known_ceilings, measure_ceilings
from experiments.kernel_bench.programs import JaxProgram, compile_all, raise_if_lost
from experiments.kernel_bench.races import Settings, plan_calls
from experiments.kernel_bench.timing import take_turns

Config = TypeVar("Config", bound=Hashable)
_TURNS = 3
_BATCH = 16


@dataclass(frozen=True)
class Sweep(Generic[Config]):
    """The fastest candidate, the seconds of all that ran, and why the others did not."""

    best: Config
    seconds: Mapping[Config, float]
    failed: Mapping[Config, str]


def sweep(candidates: Iterable[Config], measure: Callable[[Config], float]) -> Sweep[Config]:
    """Measures every candidate; one that raises, or whose time is not a number, is left out.

    Args:
      measure: seconds of one call with this candidate; raises if it does not run or is wrong.

    Raises:
      BenchError: no candidate runs.
    """
    seconds: dict[Config, float] = {}
    failed: dict[Config, str] = {}
    for candidate in candidates:
        try:
            taken = measure(candidate)
        except DeviceLost:
            raise
        except Exception as error:  # whatever compiling or running raises is the reason
            failed[candidate] = first_line(error)
            continue
        if math.isfinite(taken) and taken > 0:
            seconds[candidate] = taken
        else:
            failed[candidate] = f"measured {taken} seconds"
    if not seconds:
        reason = next(iter(failed.values()), "there is no candidate")
        raise BenchError(f"no candidate tile runs, the first one because: {reason}")
    return Sweep(min(seconds, key=seconds.__getitem__), seconds, failed)


def save_table(path: Path, entries: Mapping[str, Sequence[int]]) -> None:
    """Puts the entries into the JSON table at `path`, over those of the same keys; the other keys stay."""
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    table |= {key: list(values) for key, values in entries.items()}
    unfinished = path.with_suffix(".writing")
    unfinished.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def tune_race(
    operation: Operation,
    race: Race,
    tiles: Tiles,
    ceilings: Mapping[str, Any],
    settings: Settings,
    crashed: Collection[str],
    watch: Watch,
) -> Sweep[Any]:
    """Times one step with every candidate, with the race's first sizes, and checks each result.

    Args:
      crashed: candidates, as text, that are not to be run.
      watch: around the first run of each candidate.
    """
    calls, copies = plan_calls(operation, race, ceilings, settings.l2_bytes)
    sets = operation.operand_sets(race, race.sizes[0], calls, copies)
    compiled: dict[Any, Any] = {}
    reasons: dict[Any, str] = {}
    candidates = list(tiles.candidates(race))

    def compile_batch_of(candidate: Any) -> None:
        first = candidates.index(candidate)
        batch = [Contender(str(other), "ours", {race.step: tiles.step(race, other)}) for other in
                 candidates[first : first + _BATCH]]  # fmt: skip
        built, failed = compile_all(batch, race.step, sets, settings.on_gpu, settings.workers)
        compiled.update(built)
        reasons.update(failed)

    def measure(candidate: Any) -> float:
        name = str(candidate)
        if name in crashed:
            raise RuntimeError("an earlier call ended while it ran; delete crashed.json to try it again")
        if name not in compiled and name not in reasons:
            compile_batch_of(candidate)
        if name in reasons:
            raise RuntimeError(reasons[name])
        program = JaxProgram(compiled.pop(name), sets, settings.clock, settings.cupti)
        with watch(name, tiles.key(race)):
            try:
                fault = operation.fault(race, sets[0], program.run()[0])
            except Exception as error:
                raise_if_lost(name, first_line(error))
                fault = first_line(error)
        if fault is not None:
            raise RuntimeError(fault)
        measured = take_turns({name: program}, _TURNS, reasons.__setitem__)
        if name not in measured:
            raise_if_lost(name, reasons[name])
            raise RuntimeError(reasons[name])
        return measured[name].median

    return sweep(candidates, measure)


def tune_parts(
    operations: Sequence[Operation], parts: Sequence[str], folder: Folder, settings: Settings, budget: Budget
) -> None:
    """Sweeps the races of these parts and rewrites the tables after each; sweeps in the folder are not repeated.

    A copy of each table goes into the folder. Decoding has no tiles to choose.

    Raises:
      BenchError: no operation among the parts has tiles, or no candidate runs.
      OutOfTime: the next sweep would probably end too late.
    """
    tunable = {
        f"{operation.name}/{part}": (operation, part)
        for operation in operations
        for part, races in operation.parts.items()
        if operation.tiles is not None and races[0].judged_by == "flops"
    }
    chosen = [tunable[part] for part in parts if part in tunable]
    if not chosen:
        raise BenchError("--tune: none of these parts has tiles to choose")
    if not folder.is_done(CEILINGS):
        measure_ceilings(folder, settings)
    for operation, part in chosen:
        assert operation.tiles is not None
        tiles = operation.tiles()
        name = f"{operation.name}/{part}"
        record = folder.read(name) or {"sweeps": {}}
        sweeps: dict[str, Any] = record["sweeps"]
        _save(tiles, sweeps, folder)
        by_key: dict[str, Race] = {}
        for race in operation.parts[part]:
            by_key.setdefault(tiles.key(race), race)
        for key, race in by_key.items():
            if key in sweeps:
                continue
            with budget.piece():
                crashed = [note["contender"] for note in folder.crashed() if note["step"] == key]
                watch = functools.partial(folder.running, name)
                found = tune_race(operation, race, tiles, known_ceilings(folder), settings, crashed, watch)
            sweeps[key] = {
                "best": list(found.best),
                "seconds": {str(list(tried)): seconds for tried, seconds in found.seconds.items()},
                "failed": {str(list(tried)): reason for tried, reason in found.failed.items()},
            }
            folder.write(name, {"sweeps": sweeps}, complete=len(sweeps) == len(by_key))
            _save(tiles, sweeps, folder)
            print(f"tuned: {key}: {list(found.best)}", flush=True)


def _save(tiles: Tiles, sweeps: Mapping[str, Any], folder: Folder) -> None:
    entries = {key: sweep["best"] for key, sweep in sweeps.items()}
    for path in (tiles.path, folder.path / tiles.path.name):
        save_table(path, entries)
