"""Runs of several processes for tests: started, waited for, and read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from foejax.devices import simulated_environment
from foejax.launch import process_environments
from foejax.training.run_folder import read_metrics

# Sends a signal to one process after one step of `foejax train`.
TRAIN = """
import functools, os, sys
from foejax import cli
from foejax.training import loop
step_of_signal, rank, number, *arguments = sys.argv[1:]
def after_step(step):
    if (str(step), os.environ["FOEJAX_PROCESS_ID"]) == (step_of_signal, rank):
        os.kill(os.getpid(), int(number))
loop.train = functools.partial(loop.train, after_step=after_step)
raise SystemExit(cli.main(arguments))
"""


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    code: int
    output: str


def child_environment(cache: Path) -> dict[str, str]:
    """Strict promotion, our packages, and compiled programs shared between all processes that are given `cache`."""
    return dict(os.environ) | {
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


def run_processes(program: str, arguments: Sequence[str], count: int, devices: int, cache: Path) -> list[Ended]:
    """Run a program in `count` processes of `devices` simulated devices each until all have ended."""
    simulated = simulated_environment(devices)
    environments = process_environments(count, devices, child_environment(cache))
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env=environment | simulated,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in environments
    ]
    try:
        outputs = [child.communicate(timeout=600)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    return [Ended(child.returncode, output) for child, output in zip(children, outputs, strict=True)]


def train_processes(
    config: Path,
    run_dir: Path,
    cache: Path,
    *,
    count: int = 2,
    devices: int = 2,
    signal_at: tuple[int, int, int] = (0, 0, 0),
) -> list[Ended]:
    """`foejax train` in several processes; `signal_at` is (step, rank, signal) to be sent by that process to itself."""
    arguments = [*map(str, signal_at), "train", str(config), "--run-dir", str(run_dir), "--quiet"]
    return run_processes(TRAIN, arguments, count, devices, cache)


def figures(run_dir: Path) -> list[dict[str, float]]:
    """Every metrics line but for the speed, which differs from run to run."""
    lines = read_metrics(run_dir)
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def losses(run_dir: Path) -> list[float]:
    """Training loss of every step, then the validation losses."""
    lines = read_metrics(run_dir)
    return [line[name] for name in ("loss", "val_loss") for line in lines if name in line]
