"""The account of communication: what two hosts measured, how well the cost model predicts it, and what it says of GPUs.

    python -m experiments.communication_report

Reads `two_hosts.json` (`python -m experiments.two_hosts`) and `load_balance.json` (`python -m
experiments.load_balance`) and predicts the rest. Writes communication.md, communication.json and two plots into --out.
Every sentence that depends on a figure is made from the figure.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from experiments.communication.calibrated import calibrate
from experiments.communication.conclusion import conclusion
from experiments.communication.measured import measured_section
from experiments.communication.plots import plot_forward, plot_predictions
from foejax.analysis.cost_model.cluster import read_cluster
from foejax.analysis.plan import ONE_PROMPT, Plan, Workload, make_plan
from foejax.analysis.plan_report import format_steps, forward_section, serving_section
from foejax.config import load_config

RESULTS = Path(__file__).parent / "results"
CLUSTERS = ("8xH100", "2x8xH100")
CALIBRATION_RATES = (100.0, 1000.0)


def main(argv: Sequence[str] | None = None) -> None:
    """Read, fit, predict, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--two-hosts", type=Path, default=RESULTS / "two_hosts" / "two_hosts.json", metavar="FILE")
    parser.add_argument("--load-balance", type=Path, default=RESULTS / "load_balance" / "load_balance.json")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--requests", type=int, default=50, help="of the simulated load; 0: none; default: 50")
    options = parser.parse_args(argv)
    results = json.loads(options.two_hosts.read_text(encoding="utf-8"))
    calibrated = calibrate(options.two_hosts, CALIBRATION_RATES)
    plans = {
        name: make_plan(load_config("foe_7b"), read_cluster(name), Workload(requests=options.requests))
        for name in CLUSTERS
    }
    balance = json.loads(options.load_balance.read_text(encoding="utf-8"))["rows"]
    sections = [
        "# Communication\n\nMade by `python -m experiments.communication_report`.",
        conclusion(results["runs"], calibrated, plans, balance),
        measured_section(results),
        calibrated.section(),
        *(_plan_section(name, plan) for name, plan in plans.items()),
        _unmeasured(),
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "communication.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    found = {"calibration": calibrated.as_dict(), "plans": {name: plan.as_dict() for name, plan in plans.items()}}
    (options.out / "communication.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot_predictions(calibrated, options.out / "communication_calibration.png")
    plot_forward(plans[CLUSTERS[0]], options.out / "communication_forward.png")
    print(options.out / "communication.md")


def _plan_section(name: str, plan: Plan) -> str:
    """Steps, the paper's tables and serving of one cluster; every layer's parts are in `foejax plan`."""
    parts = [f"# Predicted: {name}\n\n`foejax plan foe_7b --cluster {name}`", format_steps(plan)]
    parts += [forward_section(plan, title) for title in plan.forward]
    parts += [serving_section(plan)] if plan.serving else []
    if name == CLUSTERS[0]:
        parts.insert(2, f"![Forward passes of {ONE_PROMPT}](communication_forward.png)")
    return "\n\n".join(parts)


def _unmeasured() -> str:
    return (
        "# Not measured\n\n"
        "No GPU was at hand: the shares of peaks, the latencies and the floor of a layer on GPUs are assumptions "
        "(`docs/plan.md`), and no prediction for GPUs has been held against a run. The calibration above is of two "
        "simulated hosts whose devices share CPU cores; it says that bytes and counts are accounted for, not how fast "
        "a GPU is. Rings stand for NCCL, which may pick trees or in-switch reductions."
    )


if __name__ == "__main__":
    main()
