"""The two plots of the account of communication."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure

from experiments.communication.calibrated import Calibrated
from experiments.two_hosts.report import rate_text, state_limits
from foejax.analysis.plan import ONE_PROMPT, PAPER_ENGINE, Plan, find


def plot_predictions(calibrated: Calibrated, path: Path) -> None:
    """Predicted against measured seconds of every run, full where nothing was fitted."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    for index, (rate, runs) in enumerate(calibrated.by_rate()):
        fitted = runs[0] in calibrated.fitted
        label = rate_text(None if math.isinf(rate) else rate / 1e6) + (" (fitted)" if fitted else "")
        measured = [run.seconds for run in runs]
        predicted = [calibrated.calibration.predict(run) for run in runs]
        fill = "none" if fitted else f"C{index}"
        axes.scatter(measured, predicted, label=label, s=28, facecolors=fill, edgecolors=f"C{index}")
    ends = [run.seconds for run in (*calibrated.fitted, *calibrated.tried)]
    line = [min(ends), max(ends)]
    axes.plot(line, line, color="gray", linewidth=1)
    axes.fill_between(line, [0.85 * x for x in line], [1.15 * x for x in line], color="gray", alpha=0.15)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("measured seconds of a step")
    axes.set_ylabel("predicted (band: 15%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    state_limits(figure)
    figure.savefig(path, dpi=120)


def plot_forward(plan: Plan, path: Path) -> None:
    """Forward passes over tokens: as given, and with the paper's engine beside the paper's figures."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    candidates = [steps.candidate for steps in plan.steps]
    names = [found.name for kind in ("ep", "tp_ep", "foe") if (found := find(candidates, kind)) is not None]
    titles = [title for title in (ONE_PROMPT, PAPER_ENGINE) if title in plan.forward]
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    for axes, title in zip(panels, titles, strict=True):
        rows = plan.forward[title]
        tokens = [row.tokens for row in rows]
        for name in names:
            axes.plot(tokens, [row.seconds[name] for row in rows], label=f"{name}, predicted")
        measured = [row.measured for row in rows if row.measured is not None]
        if title == PAPER_ENGINE and len(measured) == len(rows):
            axes.plot(tokens, [moe for moe, _ in measured], "ko", label="paper: MoE")
            axes.plot(tokens, [foe for _, foe in measured], "k^", label="paper: FoE")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("prompt tokens")
        axes.set_ylabel("seconds")
        axes.set_title(f"{plan.cluster.name}, {title}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
