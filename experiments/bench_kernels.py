"""Races the kernels of pallas_kernels against their peers on a GPU: one command, within minutes, part by part.

Usage:
    python -m experiments.bench_kernels --out FOLDER                       # what fits into 8 minutes; again to go on
    python -m experiments.bench_kernels --out FOLDER --parts expert_mlp grouped_swiglu   # of these operations only
    python -m experiments.bench_kernels --out FOLDER --parts grouped_matmul/acceptance_gpu --minutes 4
    python -m experiments.bench_kernels --out FOLDER --tune                # sweep tiles instead, rewrite their table
    python -m experiments.bench_kernels --out FOLDER --dry-run             # the same code on CPU, in a minute
    python -m experiments.bench_kernels --list                             # the parts

The operations: grouped_matmul and its gradients, expert_mlp (a layer's whole expert MLP while decoding, weights in 16
and 8 bits), grouped_swiglu, routing_topk, projected_topk and combine. First the ceilings are measured (a large matmul,
a large copy). Then each operation's most telling part runs, then each one's second, and so on. Before an operation's
first part every contender's results are checked on the device (random data, result buffers full of NaN); who is wrong
is reported and not timed. In a race all contenders take turns, on operands that sweep past the L2 cache, with uniform
and with skewed group sizes. `kernel_bench/programs.py` says how device time is read.

FOLDER receives a JSON file per part as soon as it is done, results.json, report.md, which opens with the targets and
whether they are met, and roofline.png; a second call does only what is missing. Results worth keeping are committed
under experiments/results.

Peers race when they can be imported: torch, tokamax (with what it imports), JAX's own example kernels. The report names
who did not run and why. A contender that ends the process is left out by the next call.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax

from experiments.kernel_bench import machine
from experiments.kernel_bench.combine import COMBINE
from experiments.kernel_bench.expert_mlp import EXPERT_MLP
from experiments.kernel_bench.folder import Folder
from experiments.kernel_bench.grouped_matmul import GROUPED_MATMUL
from experiments.kernel_bench.grouped_swiglu import GROUPED_SWIGLU
from experiments.kernel_bench.operations import BenchError, DeviceLost, Operation
from experiments.kernel_bench.parts import Bench, Budget, OutOfTime, choose_parts, part_names, write_reports
from experiments.kernel_bench.programs import JaxClock
from experiments.kernel_bench.projected_topk import PROJECTED_TOPK
from experiments.kernel_bench.races import Settings
from experiments.kernel_bench.routing_topk import ROUTING_TOPK
from experiments.kernel_bench.tune import tune_parts

OPERATIONS: tuple[Operation, ...] = (
    GROUPED_MATMUL, EXPERT_MLP, GROUPED_SWIGLU, ROUTING_TOPK, PROJECTED_TOPK, COMBINE
)  # fmt: skip
"""The most important first."""

_TURNS, _DRY_RUN_TURNS = 5, 2
_FIRST_RACE_SECONDS, _FIRST_SWEEP_SECONDS = 25.0, 120.0  # guesses, until one has been run


def main(argv: Sequence[str] | None = None, operations: Sequence[Operation] = OPERATIONS) -> int:
    """Returns 0; 1 if a backend of ours is wrong; 2 after an error, which is one line on stderr."""
    given = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser().parse_args(given)
    try:
        if arguments.list:
            print(*part_names(operations), sep="\n")
            return 0
        return _run(arguments, operations, shlex.join(["python", "-m", "experiments.bench_kernels", *given]))
    except (BenchError, DeviceLost) as error:
        print(f"bench_kernels: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results, made if it is not there")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these parts or operations; see --list")
    parser.add_argument("--minutes", type=float, default=8.0, help="start nothing that would probably end later")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on CPU, to see that the bench works")
    parser.add_argument("--tune", action="store_true", help="sweep the tiles of the Hopper kernels instead of racing")
    parser.add_argument("--timer", choices=get_args(JaxClock), default="stream", help="clock of the JAX programs")
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    return parser


def _run(arguments: argparse.Namespace, operations: Sequence[Operation], command: str) -> int:
    if arguments.out is None:
        raise BenchError("--out is missing: name a folder for the results")
    if arguments.minutes <= 0:
        raise BenchError(f"--minutes={arguments.minutes}: give more than 0")
    if arguments.tune and arguments.dry_run:
        raise BenchError("--tune with --dry-run: tiles can be tuned on a GPU only; leave one of the two out")
    parts = choose_parts(arguments.parts, operations, arguments.dry_run)
    settings = _settings(arguments)
    facts = machine.facts(command, arguments.dry_run)
    if arguments.tune:
        return _tune(arguments.out, operations, parts, facts, settings, Budget(arguments.minutes, _FIRST_SWEEP_SECONDS))
    budget = Budget(arguments.minutes, 0.0 if arguments.dry_run else _FIRST_RACE_SECONDS)
    folder = Folder(arguments.out, facts)
    if arguments.dry_run:
        print("DRY RUN on a CPU with tiny shapes: the ratios are of wall-clock times and say nothing about any GPU")
    try:
        with contextlib.suppress(OutOfTime):
            Bench(operations, folder, settings, budget).run(parts)
    finally:
        wrong = write_reports(folder, operations, facts, parts)
    left = [part for part in parts if not folder.is_done(part)]
    if left:
        print(f"out of time; the same command goes on with: {', '.join(left)}")
    print(f"report: {arguments.out / 'report.md'}")
    for name in wrong:
        print(f"WRONG RESULTS: {name}")
    return 1 if wrong else 0


def _settings(arguments: argparse.Namespace) -> Settings:
    workers = max(1, min(8, (os.cpu_count() or 1) // 2))
    if arguments.dry_run:
        jax.config.update("jax_platforms", "cpu")
        return Settings(
            on_gpu=False, tiny=True, clock="wall clock", cupti=False, turns=_DRY_RUN_TURNS, l2_bytes=0, workers=workers
        )
    if importlib.util.find_spec("torch") is not None:
        # Before JAX starts: what it does not take is left for torch.
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.7")
    try:
        backend = jax.default_backend()
    except RuntimeError as error:
        raise BenchError(f"JAX finds no device ({error}): run on a machine with a GPU, or add --dry-run") from error
    if backend != "gpu":
        raise BenchError(f"JAX runs on {backend} here: run on a machine with a GPU, or add --dry-run")
    return Settings(
        on_gpu=True,
        tiny=False,
        clock=arguments.timer,
        cupti=True,
        turns=_TURNS,
        l2_bytes=machine.l2_bytes(),
        workers=workers,
    )


def _tune(
    out: Path,
    operations: Sequence[Operation],
    parts: Sequence[str],
    facts: Mapping[str, Any],
    settings: Settings,
    budget: Budget,
) -> int:
    # Sweeping changes the tables: parts of the sweep agree in all else.
    folder = Folder(out / "tune", {key: value for key, value in facts.items() if key != "tables"})
    try:
        tune_parts(operations, parts, folder, settings, budget)
    except OutOfTime:
        print("out of time; the same command goes on with what is left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
