"""FoE, MoE and Multi-Head LatentMoE on two hosts with a slow link between them: time and bytes of a step by rate.

Usage:
    python -m experiments.two_hosts --out FOLDER                # needs root, ip and tc; 10 minutes on two cores
    python -m experiments.two_hosts --out FOLDER --quick        # the same code in a few minutes; its times are noise
    python -m experiments.two_hosts --out FOLDER --render       # tables and plots anew from FOLDER/two_hosts.json

The hosts are two network namespaces of this machine, joined by a veth whose rate `tc` limits, with a process of four
simulated devices in each. They, the veth and the processes are gone when the command ends, however it ends. FOLDER
receives two_hosts.json, two_hosts.md and a plot for every program. See docs/two_hosts.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.serving_bench.line_protocol import ContenderFailed
from experiments.two_hosts import report
from experiments.two_hosts.cases import CASES, QUICK, Case, Sizes
from experiments.two_hosts.link import MTU, TwoHosts
from foejax.cli import report_errors

RATES = (100.0, 200.0, 500.0, 1000.0, None)
QUICK_RATES = (100.0, None)
REPEATS, QUICK_REPEATS = 4, 2
RESULT = "two_hosts.json"


def main(argv: Sequence[str]) -> int:
    """Measure, or read what was measured, and write the report."""
    options = _parser().parse_args(argv)
    if options.render:
        results = json.loads((options.out / RESULT).read_text(encoding="utf-8"))
    else:
        results = _measure(options)
    report.write(results, options.out)
    print((options.out / "two_hosts.md").read_text(encoding="utf-8"))
    return 0


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that goes into the JSON file, which is written after every case."""
    from experiments.two_hosts.cases import parameter_counts
    from experiments.two_hosts.measure import measure_case

    sizes, rates = (QUICK, QUICK_RATES) if options.quick else (Sizes(), RATES)
    repeats = QUICK_REPEATS if options.quick else REPEATS
    results: dict[str, Any] = {
        "environment": environment(),
        "command": _command(options),
        "model": sizes.model(),
        "head_model": sizes.head_model(),
        "parameters": parameter_counts(sizes),
        "sizes": asdict(sizes),
        "runs": [],
    }
    with TwoHosts() as hosts:
        options.out.mkdir(parents=True, exist_ok=True)
        for case in options.cases or CASES:
            try:
                results["runs"] += list(measure_case(hosts, case, sizes, rates, repeats))
            except ContenderFailed as error:
                raise ValueError(str(error)) from error
            (options.out / RESULT).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _command(options: argparse.Namespace) -> str:
    """The command line, without the folder's place on this machine."""
    chosen = [word for case in options.cases or () for word in ("--case", case.name)]
    quick = ["--quick"] if options.quick else []
    return shlex.join(["python", "-m", "experiments.two_hosts", "--out", "FOLDER", *quick, *chosen])


def environment() -> dict[str, Any]:
    """What a result must name."""
    return {
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "mtu": MTU,
        "notes": list(report.LIMITS),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.two_hosts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rates, two repetitions")
    parser.add_argument("--render", action="store_true", help="measure nothing; write the report of what was measured")
    parser.add_argument(
        "--case", dest="cases", type=_case, action="append", metavar="NAME", help='only this layout, "foe group=8" say'
    )
    return parser


def _case(name: str) -> Case:
    for case in CASES:
        if case.name == name:
            return case
    raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(case.name for case in CASES)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as Ctrl-C: what was made is cleaned up
    raise SystemExit(report_errors(lambda: main(sys.argv[1:])))
