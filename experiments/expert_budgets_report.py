"""What experiments.expert_budgets writes: results.json, report.md, budgets.png."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_PANELS = (
    ("perplexity_over_base", "perplexity above that without a budget (%)", 100.0),
    ("distinct", "distinct experts read a layer", 1.0),
    ("kept_mass", "kept gate weight (%)", 100.0),
)
_MARKERS, _LINES = "os^D", ("-", "--", ":", "-.")
_METHOD = (
    "Column t of a batch of B rows of held-out text is one decoding step of B tokens; budgets are chosen for each step "
    "and layer from its tokens alone. The first quarter of every row is the prompt: no budget, not scored. The text is "
    "given, not the model's own. `±` is a standard error over rows of the difference on the same tokens. Means over "
    "steps and layers; the fullest device is that of 8 which hold equal runs of the experts (for 8 groups: a group)."
)


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Write the three files; `results` is the content of results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    (folder / "results.json").write_text(text, encoding="utf-8")
    (folder / "report.md").write_text(markdown(results), encoding="utf-8")
    plot(results["curves"], folder / "budgets.png")


def markdown(results: Mapping[str, Any]) -> str:
    """A table for every number of tokens a step."""
    lines = ["# Expert budgets", "", f"`{results['command']}`; {results['rows']} rows.", "", _METHOD]
    for tokens, curves in _by_tokens(results["curves"]).items():
        lines += ["", f"## {tokens} tokens a step", ""]
        lines += [
            "| model | policy | budget | perplexity above base | nats above base | distinct experts | fullest device "
            "| kept weight |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for curve in curves:
            lines += [_row(curve, point) for point in curve["points"]]
        randomly = {(c["model"], c["num_experts"], c["experts_per_token"]): c for c in curves}
        lines += [""]
        lines += [
            f"{name}: choosing {k} of {experts} at random, {tokens} tokens would read "
            f"{curve['expected_distinct_at_random']:.1f}."
            for (name, experts, k), curve in randomly.items()
        ]
    return "\n".join(lines) + "\n"


def _row(curve: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    budget = "all" if point["budget"] == curve["num_experts"] else point["budget"]
    return (
        f"| {curve['model']} | {curve['label']} | {budget} | {point['perplexity_over_base']:+.2%} "
        f"| {point['nats_over_base']:+.4f} ± {point['standard_error']:.4f} | {point['distinct']:.1f} "
        f"| {point['most_on_a_device']:.2f} | {point['kept_mass']:.1%} |"
    )


def _by_tokens(curves: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    found: dict[int, list[Mapping[str, Any]]] = {}
    for curve in curves:
        found.setdefault(curve["tokens_per_step"], []).append(curve)
    return found


def plot(curves: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A row of panels for every number of tokens a step; dashed: tokens that choose at random."""
    rows = _by_tokens(curves)
    models = list(dict.fromkeys(curve["model"] for curve in curves))
    labels = list(dict.fromkeys(curve["label"] for curve in curves))
    figure = Figure(figsize=(15, 4.2 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(_PANELS), squeeze=False)
    for axes_row, (tokens, own) in zip(grid, rows.items(), strict=True):
        for axes, (field, title, scale) in zip(axes_row, _PANELS, strict=True):
            for curve in own:
                color, label = f"C{models.index(curve['model'])}", labels.index(curve["label"])
                style = {"color": color, "marker": _MARKERS[label], "linestyle": _LINES[label]}
                budgets = [point["budget"] for point in curve["points"]]
                values = [scale * point[field] for point in curve["points"]]
                axes.plot(budgets, values, label=f"{curve['model']}, {curve['label']}", alpha=0.8, **style)
            if field == "distinct":
                for expected in {curve["expected_distinct_at_random"] for curve in own}:
                    axes.axhline(expected, color="grey", linestyle="--", label="choosing at random, no budget")
            axes.set_xlabel("budget: experts of a layer, over all groups")
            axes.set_ylabel(title)
            axes.set_title(f"{tokens} tokens a step")
            axes.grid(alpha=0.3)
        axes_row[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
