"""Step times relative to FoE's, on one and on eight simulated devices; contenders take turns in one process."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.head_parallel.models import model_config
from experiments.head_parallel.results import open_part, write_part
from experiments.timed_programs import PROGRAMS, Program, TimedProgram, make_program
from foejax.training.run import make_layout

DEVICES = (1, 8)
BASELINE = "foe"


@dataclass(frozen=True)
class Settings:
    """How much is run.

    Attributes:
      turns: steps of each contender, after one more.
      sequences: that decode a token in one step, over all devices.
      context: cache slots of each; a step attends to all of them.
    """

    turns: int = 15
    sequences: int = 512
    context: int = 64
    quick: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)


QUICK = Settings(turns=2, sequences=16, context=8, quick=True)


@dataclass(frozen=True)
class Contender:
    """A model on a layout; `axis` is the mesh axis of all devices."""

    name: str
    model: str
    layout: str
    axis: str


CONTENDERS = (
    Contender("foe", "foe", "foe", "group"),
    Contender("ep", "moe", "ep", "expert"),
    Contender("hp", "mhlmoe", "hp", "group"),
    Contender("fsdp", "mhlmoe", "fsdp", "data"),
)

Step = Callable[[], Any]
"""Runs one step to its end."""


def measure(out: Path, settings: Settings, facts: Mapping[str, Any], devices: tuple[int, ...] = DEVICES) -> None:
    """Race every program that `speed.json` does not hold yet."""
    found = open_part(out, "speed", settings.as_dict(), facts)
    for count in devices:
        # On one device hp and fsdp are the same program.
        contenders = CONTENDERS if count > 1 else CONTENDERS[:3]
        for program in PROGRAMS:
            if any(run["devices"] == count and run["program"] == program for run in found["runs"]):
                continue
            programs = {each.name: _prepare(program, each, count, settings) for each in contenders}
            ratios = race({name: made.step for name, made in programs.items()}, settings.turns)
            found["runs"].append({"devices": count, "program": program, "ratios": ratios})
            write_part(out, "speed", found)
            shown = ", ".join(f"{name} {np.median(values):.2f}" for name, values in ratios.items())
            print(f"{program} on {count}: {shown}", flush=True)


def race(steps: Mapping[str, Step], turns: int) -> dict[str, list[float]]:
    """Seconds of each contender over the baseline's in the same turn, turn by turn."""
    for step in steps.values():
        step()
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        seconds = {}
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name] = time.perf_counter() - started
        for name in steps:
            ratios[name].append(seconds[name] / seconds[BASELINE])
    return ratios


def _prepare(program: Program, contender: Contender, devices: int, settings: Settings) -> TimedProgram:
    """A compiled program with its arguments, in float32: bfloat16 is emulated on a CPU."""
    mesh = {"mesh.layout": contender.layout, f"mesh.{contender.axis}": devices, "mesh.devices": devices}
    config = model_config(contender.model, {"model.dtype": "float32", **mesh}, quick=settings.quick)
    layout = make_layout(config.model, config.mesh)
    return make_program(program, config, layout, sequences=settings.sequences, context=settings.context)
