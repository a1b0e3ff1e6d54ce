"""roofline.png: every cell's share of the measured matmul ceiling over its FLOP per byte."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

_MARKERS = {"ours": "o", "peer": "x", "bound": "^"}


def plot(found: Mapping[str, Any], path: Path) -> None:
    """Draw the cells with the race's first sizes, and the roof that the two ceilings make.

    A dry run has no ceilings: its points are speeds relative to the fastest contender of their race, without a roof.
    """
    cells = [
        cell
        for race in found["races"]
        for cell in race["cells"]
        if cell["sizes"] == race["sizes"][0]
    ]  # fmt: skip
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(cell["contender"] for cell in cells))
    for index, name in enumerate(names):
        own = [cell for cell in cells if cell["contender"] == name]
        intensity = [cell["flops"] / cell["bytes"] for cell in own]
        height = [1 / cell["time"] if found["dry_run"] else cell["share_of_matmul"] for cell in own]
        axes.plot(intensity, height, _MARKERS[own[0]["kind"]], color=f"C{index % 10}", label=name, alpha=0.8)
    if cells:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte of operands and result")
    if found["dry_run"]:
        axes.set_ylabel("speed over the fastest of the race")
        axes.set_title("DRY RUN on a CPU: says nothing about any GPU")
    elif found["ceilings"]:
        ceilings = found["ceilings"]
        ridge = ceilings["matmul_flops"] / ceilings["copy_bytes"]
        roof = np.geomspace(*_limits(cells, ridge), 100)
        axes.plot(roof, np.minimum(1, roof / ridge), color="black")
        axes.set_ylabel("share of the measured matmul rate")
        axes.set_title(
            f"{found['machine']['device']}: roof of {ceilings['matmul_flops'] / 1e12:.0f} TFLOP/s (bf16 matmul) and "
            f"{ceilings['copy_bytes'] / 1e12:.2f} TB/s (copy), both measured"
        )
    axes.grid(alpha=0.3, which="both")
    handles, labels = axes.get_legend_handles_labels()
    handles += [Line2D([], [], color="grey", marker=marker, linestyle="") for marker in _MARKERS.values()]
    axes.legend(handles, [*labels, *_MARKERS], fontsize="small")
    figure.savefig(path, dpi=120)


def _limits(cells: list[Mapping[str, Any]], ridge: float) -> tuple[float, float]:
    intensities = [cell["flops"] / cell["bytes"] for cell in cells] + [ridge]
    return min(intensities) / 2, max(intensities) * 2
