"""The plots of the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

from experiments.head_parallel.models import NAMES
from experiments.head_parallel.paired import best_rates

Run = Mapping[str, Any]
Found = Mapping[str, Any]

PROGRAMS = {"forward": "forward pass", "train_step": "training step", "decode_step": "decoding step"}
LAYOUTS = {"foe": "FoE", "ep": "MoE, ep", "hp": "Multi-Head LatentMoE, hp", "fsdp": "Multi-Head LatentMoE, fsdp"}
SMOOTHED_STEPS = 10
"""Width of the running mean of the plotted training loss."""


def plot_bytes(found: Found, path: Path) -> None:
    """Bytes per token against experts per token, for each compiled program."""
    runs = found["runs"]
    programs = [program for program in ("forward", "train_step") if program in runs[0]]
    figure = Figure(figsize=(5.5 * len(programs), 5.0), layout="constrained")
    panels = figure.subplots(1, len(programs), squeeze=False)[0]
    for axes, program in zip(panels, programs, strict=True):
        _bytes_panel(axes, runs, program)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)


def _bytes_panel(axes: Any, runs: Sequence[Run], program: str) -> None:
    ep, hp, foe = ([run for run in runs if run["kind"] == kind] for kind in ("ep", "hp", "foe"))

    def draw(own: Sequence[Run], name: str, style: str, label: str) -> None:
        axes.plot([run["k"] for run in own], [run[program][name] / 1024 for run in own], style, label=label)

    draw(ep, "copy_per_expert_bytes_per_token", "C0:", "ep, a copy per expert (formula)")
    draw(ep, "bytes_per_token_at_most", "C0--v", "ep, largest buffers")
    draw(ep, "bytes_per_token", "C0-o", "ep, smallest buffers")
    draw(ep, "needed_bytes_per_token", "C0-.", "ep, what uniform routing needs (formula)")
    draw(foe, "bytes_per_token", "C1s", "FoE")
    draw(hp, "bytes_per_token", "C2-D", "hp, k experts of every head")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FormatStrFormatter("%g"))
    axes.set_xticks(sorted({run["k"] for run in runs}))
    axes.set_xlabel("experts per token, k")
    axes.set_ylabel("sent per token, all devices together (KiB)")
    axes.set_title(PROGRAMS[program].capitalize())
    axes.grid(alpha=0.3)


def plot_losses(found: Found, sweep_seed: int, path: Path) -> None:
    """Training loss over steps, mean and range of the seeds at each model's best rate; validation loss as points."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, best = figure.subplots(), best_rates(found["runs"], sweep_seed)
    lowest, highest = np.inf, -np.inf
    for index, model in enumerate(name for name in NAMES if name in best):
        own = [
            run
            for run in found["runs"]
            if run["model"] == model and run["rate"] == best[model] and run["seed"] != sweep_seed
        ]
        if not own:
            continue
        curves = np.stack([_running_mean(run["train_losses"]) for run in own])
        steps = np.arange(1, curves.shape[1] + 1)
        axes.plot(steps, curves.mean(axis=0), color=f"C{index}", label=f"{NAMES[model]}, rate {best[model]:g}")
        axes.fill_between(steps, curves.min(axis=0), curves.max(axis=0), color=f"C{index}", alpha=0.15)
        evaluated = np.array([run["validation_curve"] for run in own]).mean(axis=0)
        axes.plot(evaluated[:, 0], evaluated[:, 1], "o", color=f"C{index}", markeredgecolor="black")
        later = curves[:, curves.shape[1] // 8 :]
        lowest, highest = min(lowest, later.min(), evaluated[:, 1].min()), max(highest, later.max())
    axes.set_ylim(lowest - 0.05, highest + 0.05)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.set_title(f"Training loss ({SMOOTHED_STEPS}-step mean; band: all seeds) and validation loss (points: mean)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _running_mean(losses: Sequence[float]) -> np.ndarray:
    """Mean of each value and up to SMOOTHED_STEPS - 1 before it, the same length."""
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    stop = np.arange(1, len(losses) + 1)
    start = np.maximum(stop - SMOOTHED_STEPS, 0)
    return (sums[stop] - sums[start]) / (stop - start)


def plot_speed(found: Found, path: Path) -> None:
    """Step times over FoE's: medians of the turns as bars, quartiles as lines; the last panel has all contenders."""
    counts = sorted({run["devices"] for run in found["runs"]})
    figure = Figure(figsize=(5.5 * len(counts), 4.5), layout="constrained")
    panels = figure.subplots(1, len(counts), squeeze=False, sharey=True)[0]
    for axes, count in zip(panels, counts, strict=True):
        runs = [run for run in found["runs"] if run["devices"] == count]
        names = list(runs[0]["ratios"])
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            low, middle, high = np.percentile([run["ratios"][name] for run in runs], (25, 50, 75), axis=1)
            places = np.arange(len(runs)) + (index - (len(names) - 1) / 2) * width
            axes.bar(places, middle, width, yerr=(middle - low, high - middle), capsize=2, label=LAYOUTS[name])
        axes.set_xticks(range(len(runs)), [PROGRAMS[run["program"]] for run in runs])
        axes.set_ylabel("step time over FoE's")
        axes.set_title(f"{count} simulated device{'s' if count > 1 else ''}")
        axes.grid(alpha=0.3, axis="y")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=120)


def plot_load(found: Found, path: Path) -> None:
    """Busiest expert over the mean, step by step, for every rate of the bias rule."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    runs = sorted(found["runs"], key=lambda run: run["rate"])
    for run in runs:
        label = f"bias rule, rate {run['rate']:g}" if run["rate"] else "without the bias rule"
        axes.plot(range(1, len(run["steps"]) + 1), run["steps"], "-" if run["rate"] else "--", label=label)
    axes.axhline(runs[0]["most"], color="grey", linewidth=1, linestyle=":", label="all tokens with the same experts")
    axes.axhline(1.0, color="grey", linewidth=1, label="uniform")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("tokens of the busiest expert over the mean")
    axes.set_title("Load over all experts of all heads, mean of the layers")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
