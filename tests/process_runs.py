"""Runs of several processes for tests: started, waited for, and read."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from foejax.launch import process_environments
from foejax.training.run_folder import read_metrics

# `foejax train` of the stand-in model, in which one process gets a signal after one step.
TRAIN_STAND_IN = """
import functools, os, sys
from bigram_stand_in import BigramModel
from foejax import cli
from foejax.training import loop, run
step_of_signal, rank, number, *arguments = sys.argv[1:]
def after_step(step):
    if (str(step), os.environ["FOEJAX_PROCESS_ID"]) == (step_of_signal, rank):
        os.kill(os.getpid(), int(number))
run.LanguageModel = BigramModel
loop.train = functools.partial(loop.train, after_step=after_step)
raise SystemExit(cli.main(arguments))
"""


@dataclass(frozen=True)
class Ended:
    """A process that has ended, and when (`time.monotonic`)."""

    code: int
    output: str
    at: float


def child_environment() -> dict[str, str]:
    """Strict promotion and our packages."""
    return dict(os.environ) | {
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }


def run_processes(program: str, arguments: Sequence[str], count: int, devices: int) -> list[Ended]:
    """Run a program in `count` processes of `devices` simulated devices each until all have ended."""
    environments = process_environments(count, devices, child_environment())
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in environments
    ]

    def wait(child: subprocess.Popen[str]) -> Ended:
        try:
            output = child.communicate(timeout=600)[0]
        finally:
            child.kill()
        return Ended(child.returncode, output, time.monotonic())

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(wait, children))


def train_stand_in(config: Path, run_dir: Path, signal_at: tuple[int, int, int] = (0, 0, 0)) -> list[Ended]:
    """Train in two processes of two devices; `signal_at` is (step, rank, signal) for that process to send itself."""
    arguments = [*map(str, signal_at), "train", str(config), "--run-dir", str(run_dir), "--quiet"]
    return run_processes(TRAIN_STAND_IN, arguments, 2, 2)


def launch(*command: str, devices: int = 2) -> subprocess.CompletedProcess[str]:
    """`foejax COMMAND` in two processes by the launcher."""
    launcher = [sys.executable, "-m", "foejax.launch", "--nproc", "2", "--devices-per-process", str(devices), "--"]
    return subprocess.run([*launcher, *command], env=child_environment(), capture_output=True, text=True)


def figures(run_dir: Path) -> list[dict[str, float]]:
    """Every metrics line but for the speed, which differs from run to run."""
    lines = read_metrics(run_dir)
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def losses(run_dir: Path) -> list[float]:
    """Training loss of every step, then the validation losses."""
    lines = read_metrics(run_dir)
    return [line[name] for name in ("loss", "val_loss") for line in lines if name in line]
