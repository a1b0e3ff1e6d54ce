"""What the demo writes and prints: summary.json, loss.png and one table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from foejax.training.run_folder import read_metrics

ALLOWED_DIFFERENCE = 0.03
"""How far the two validation losses may lie apart, relative to the MoE's, to be called equal."""
SMOOTHED_SHARE = 0.02
"""Width of the running mean of the plotted training loss, as a share of the run."""
NAMES = {"foe": "Federation of Experts", "moe": "mixture of experts"}
SHORT_NAMES = {"foe": "FoE", "moe": "MoE"}


def summarise(
    models: Mapping[str, dict[str, Any]], bigram: Mapping[str, float], run: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole summary: each model under its name, the baseline, and how they compare.

    Args:
      models: `foe` and `moe`, each with validation_loss and validation_bits_per_byte.
      bigram: loss and bits_per_byte.
      run: facts that both models share.
    """
    foe, moe = models["foe"]["validation_loss"], models["moe"]["validation_loss"]
    difference = (foe - moe) / moe
    below = {name: model["validation_bits_per_byte"] < bigram["bits_per_byte"] for name, model in models.items()}
    return {
        **run,
        **models,
        "bigram": dict(bigram),
        "below_bigram": below,
        "both_below_bigram": all(below.values()),
        "validation_loss_difference": difference,
        "within_3_percent": abs(difference) <= ALLOWED_DIFFERENCE,
        "verdict": verdict(difference, below),
    }


def verdict(difference: float, below_bigram: Mapping[str, bool]) -> str:
    """The comparison in two plain sentences.

    Args:
      difference: (FoE - MoE) / MoE of the validation losses.
    """
    side = "above" if difference > 0 else "below"
    if abs(difference) <= ALLOWED_DIFFERENCE:
        compared = f"FoE's validation loss is {abs(difference):.1%} {side} the MoE's: within 3%."
    else:
        compared = (
            f"FoE's validation loss is {abs(difference):.1%} {side} the MoE's, more than 3%: "
            "at this size and number of steps the two architectures do not learn equally fast."
        )
    failing = [NAMES[name] for name, is_below in below_bigram.items() if not is_below]
    if not failing:
        return f"{compared} Both are below the bigram baseline."
    return f"{compared} Not below the bigram baseline: {' and '.join(failing)}; train for more steps."


def write_summary(summary: Mapping[str, Any], path: Path) -> None:
    """Write summary.json."""
    path.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of each value and up to `width - 1` before it, the same length."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - width, 0)
    return (sums[stop] - sums[start]) / (stop - start)


def plot_losses(run_dirs: Mapping[str, Path], bigram_loss: float, path: Path) -> None:
    """Training loss (running mean) and validation loss of every run over its steps, with the bigram as a line."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, (name, run_dir) in enumerate(run_dirs.items()):
        lines = read_metrics(run_dir)
        steps, losses = _series(lines, "loss")
        width = max(1, round(len(steps) * SMOOTHED_SHARE))
        color = f"C{index}"
        axes.plot(steps, running_mean(losses, width), color=color, alpha=0.5, label=f"{NAMES[name]}, training")
        axes.plot(*_series(lines, "val_loss"), color=color, marker="o", label=f"{NAMES[name]}, validation")
    axes.axhline(bigram_loss, color="grey", linestyle="--", label="interpolated bigram, validation")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.set_title("Same parameters, tokens and seed")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def print_table(summary: Mapping[str, Any]) -> None:
    """One table with a column a model, then the verdict and a sample of each."""
    console = Console(soft_wrap=True)
    title = (
        f"{summary['steps']} steps of {summary['tokens_per_step']:,} tokens on {summary['devices']} simulated devices"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for name in NAMES:
        table.add_column(SHORT_NAMES[name], justify="right")
    table.add_column("bigram", justify="right")
    baseline = summary["bigram"]
    rows = [
        ("parameters", lambda model: f"{model['parameters']:,}", ""),
        ("active per token", lambda model: f"{model['active_parameters']:,}", ""),
        ("layout", lambda model: _layout_text(model), ""),
        ("train loss (nats per token)", lambda model: f"{model['train_loss']:.4f}", ""),
        ("validation loss", lambda model: f"{model['validation_loss']:.4f}", f"{baseline['loss']:.4f}"),
        (
            "validation bits per byte",
            lambda model: f"{model['validation_bits_per_byte']:.4f}",
            f"{baseline['bits_per_byte']:.4f}",
        ),
        ("tokens/s", lambda model: f"{model['tokens_per_second']:,.0f}", ""),
        ("collectives, forward", lambda model: _collectives_text(model, "forward"), ""),
        ("collectives, training step", lambda model: _collectives_text(model, "train_step"), ""),
    ]
    for label, cell, bigram_cell in rows:
        table.add_row(label, *(cell(summary[name]) for name in NAMES), bigram_cell)
    console.print(table)
    for name in NAMES:
        console.print(f"\n{NAMES[name]} writes:", style="bold")
        console.print(summary[name]["sample"], markup=False, highlight=False)
    console.print(f"\n{summary['verdict']} ({summary['seconds']:.0f} s)")


def _layout_text(model: Mapping[str, Any]) -> str:
    axes = ", ".join(f"{axis}={size}" for axis, size in model["mesh"].items() if size > 1)
    return f"{model['layout']} ({axes or 'one device'})"


def _collectives_text(model: Mapping[str, Any], program: str) -> str:
    counts = model["collectives_per_step"][program]["counts"]
    return "\n".join(f"{count} {op}" for op, count in sorted(counts.items())) or "none"


def _series(lines: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(line["step"], line[name]) for line in lines if name in line]
    return np.array([step for step, _ in points]), np.array([value for _, value in points])
