"""FoE, expert parallelism and Multi-Head LatentMoE with Head Parallel: bytes, loss, step time, load inside heads.

Usage:
    python -m experiments.head_parallel --out experiments/results/head_parallel             # all parts, an hour
    python -m experiments.head_parallel --out FOLDER --part loss [--part load] [--jobs 2]
    python -m experiments.head_parallel --out FOLDER --part report    # tables and plots anew from FOLDER's JSON files
    python -m experiments.head_parallel --out FOLDER --quick          # the same code in minutes; its figures are noise

A part that was stopped goes on where it was: what FOLDER's JSON files hold is not measured again. Training runs go to
--runs. The report is FOLDER.md, with its plots in FOLDER.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.head_parallel.results import PARTS, open_part, write_part
from foejax.cli import report_errors
from foejax.devices import simulate_devices

DEVICES = 8
REPORT = "report"


def main(argv: Sequence[str]) -> int:
    """Run the parts asked for, in order, and write the report."""
    options = _parser().parse_args(argv)
    parts = options.parts or [*PARTS, REPORT]
    if set(parts) - {REPORT}:
        simulate_devices(DEVICES)
    for part in PARTS:
        if part in parts:
            _run(part, options)
    from experiments.head_parallel.report import write_report

    write_report(options.out)
    print(options.out.with_suffix(".md"))
    return 0


def _run(part: str, options: argparse.Namespace) -> None:
    from experiments.head_parallel import load, loss, speed
    from foejax.serving.load.machine import machine_facts

    quick = options.quick
    facts = machine_facts(shlex.join(["python", "-m", "experiments.head_parallel", "--out", "FOLDER", "--part", part]))
    facts |= {"cores": len(os.sched_getaffinity(0))}
    if part == "bytes":
        _measure_bytes(options, facts)
    elif part == "speed":
        speed.measure(options.out, speed.QUICK if quick else speed.Settings(), facts)
    elif part == "load":
        load.measure(options.out, options.runs, load.QUICK if quick else load.Settings(), options.jobs, facts)
    else:
        settings = loss.QUICK if quick else loss.Settings()
        settings = replace(settings, steps=options.steps or settings.steps, rates=options.rates or settings.rates)
        loss.measure(options.out, options.runs, settings, options.jobs, facts)


def _measure_bytes(options: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Compile every case that `bytes.json` does not hold yet."""
    from dataclasses import asdict

    from experiments.head_parallel import wire

    cases, sizes = (wire.QUICK_CASES, wire.QUICK) if options.quick else (wire.CASES, wire.Sizes())
    found = open_part(options.out, "bytes", asdict(sizes), facts)
    done = {(run["kind"], run["k"]) for run in found["runs"]}
    for case in cases:
        if (case.kind, case.k) not in done:
            found["runs"].append(wire.measure(case, sizes))
            write_part(options.out, "bytes", found)
            print(f"{case.kind} k={case.k}: {found['runs'][-1]['forward']['bytes_per_token']:.0f} B", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.head_parallel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--part", dest="parts", action="append", choices=[*PARTS, REPORT], help="default: all of them")
    parser.add_argument("--quick", action="store_true", help="tiny models and few steps")
    parser.add_argument("--runs", type=Path, default=Path("runs/head_parallel"), help="default: runs/head_parallel")
    parser.add_argument("--jobs", type=int, default=2, help="training runs at a time; default: 2")
    parser.add_argument("--steps", type=int, help="of the runs of the loss; default: 200")
    parser.add_argument("--rates", type=_rates, help="learning rates of the sweep, default: 0.002,0.004,0.008,0.016")
    return parser


def _rates(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(","))


if __name__ == "__main__":
    raise SystemExit(report_errors(lambda: main(sys.argv[1:])))
