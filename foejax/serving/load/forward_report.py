"""What a race of forward passes found: ratios, and on a GPU milliseconds; as markdown, JSON and curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from foejax.serving.load.forward import ForwardShape
from foejax.serving.load.report import table

Cells = Sequence[tuple[ForwardShape, dict[str, float]]]


@dataclass(frozen=True)
class ForwardReport:
    """The two sweeps of a race.

    Attributes:
      baseline: contender over which the others' times are divided: as in the paper, above 1 where it is the faster one.
      by_tokens: one sequence, ever longer.
      by_length: the same number of tokens in ever longer sequences.
      left_out: layouts that do not fit, with the reason.
    """

    baseline: str
    by_tokens: Cells
    by_length: Cells
    facts: dict[str, Any]
    left_out: dict[str, str]

    def write(self, out: Path) -> None:
        """report.md, results.json and forward.png into a folder, made if it is not there."""
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.md").write_text(self.markdown(), encoding="utf-8")
        found = {
            "facts": self.facts,
            "baseline": self.baseline,
            "unit": "seconds" if self.facts["on_gpu"] else "times of the baseline",
            "by_tokens": self._plain(self.by_tokens),
            "by_length": self._plain(self.by_length),
            "left_out": self.left_out,
        }
        (out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        self.plot(out / "forward.png")

    def markdown(self) -> str:
        """The report."""
        on_gpu = self.facts["on_gpu"]
        tokens = self.by_length[0][0].tokens if self.by_length else 0
        sections = [
            "# Forward latency",
            "\n".join(f"- {name}: {value}" for name, value in self.facts.items() if name != "on_gpu"),
            f"Time of a whole-model forward pass over that of {self.baseline}; above 1 where {self.baseline} is faster."
            + (" In brackets milliseconds." if on_gpu else " Without a GPU times themselves say nothing."),
            "## Tokens of one sequence",
            "One sequence is one device's where a layout splits the batch: the other devices then compute padding.",
            self._table(self.by_tokens),
        ]
        if self.by_length:
            sections += [
                f"## Sequence length at {tokens:,} tokens",
                "All that is linear in tokens stays the same from line to line; attention grows with the length.",
                self._table(self.by_length),
            ]
        if self.left_out:
            sections += ["## Left out", table(["layout", "reason"], [list(item) for item in self.left_out.items()])]
        return "\n\n".join([*sections, "![forward](forward.png)"]) + "\n"

    def plot(self, path: Path) -> None:
        """Ratios over tokens and over sequence lengths."""
        figure = Figure(figsize=(12, 4.5), layout="constrained")
        sweeps = [(self.by_tokens, "tokens of one sequence"), (self.by_length, "length of the sequences")]
        for axes, (cells, label) in zip(figure.subplots(1, 2), sweeps, strict=True):
            lengths = [shape.length for shape, _ in cells]
            for name in cells[0][1] if cells else ():
                axes.plot(lengths, [seconds[name] / seconds[self.baseline] for _, seconds in cells], "o-", label=name)
            axes.set_xscale("log", base=2)
            axes.set_xlabel(label)
            axes.set_ylabel(f"time over that of {self.baseline}")
            axes.grid(alpha=0.3, which="both")
            axes.legend()
        figure.savefig(path, dpi=110)

    def _table(self, cells: Cells) -> str:
        names = list(cells[0][1])
        rows = []
        for shape, seconds in cells:
            ratios = [seconds[name] / seconds[self.baseline] for name in names]
            absolute = [f" ({seconds[name] * 1e3:.3g})" if self.facts["on_gpu"] else "" for name in names]
            figures = [f"{ratio:.2f}{more}" for ratio, more in zip(ratios, absolute, strict=True)]
            rows.append([f"{shape.sequences:,} x {shape.length:,}", *figures])
        return table(["sequences x tokens", *names], rows)

    def _plain(self, cells: Cells) -> list[dict[str, Any]]:
        on_gpu = self.facts["on_gpu"]
        return [
            {
                "sequences": shape.sequences,
                "length": shape.length,
                "times": {name: value if on_gpu else value / seconds[self.baseline] for name, value in seconds.items()},
            }
            for shape, seconds in cells
        ]
