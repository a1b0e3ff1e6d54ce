"""The cost model fitted at two rates of the wire, and its errors at the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.two_hosts.report import rate_text
from foejax.analysis.calibration import Calibration, Measurement, at_rates, fit, median_error, read_measurements
from foejax.serving.load.report import table

WANTED_ERROR = 0.15
"""Median size of the relative error on rates that nothing was fitted to."""
LEFT_OUT = "hp"
"""Layouts that nothing is fitted to: their experts are matmuls of another size than all others'."""
_UNITS = {
    "flops": (1e9, "ns per FLOP of a device's program"),
    "step": (1e3, "ms a step"),
    "collectives": (1e3, "ms a collective"),
    "bytes sent": (1e9, "ns per byte that a device sends"),
}


@dataclass(frozen=True)
class Calibrated:
    """A fit and what it was tried on.

    Attributes:
      rates: in Mbit/s, those fitted to.
      fitted, tried: measurements at these rates, and at all others.
      left_out: those of LEFT_OUT, at all rates.
    """

    calibration: Calibration
    rates: tuple[float, ...]
    fitted: list[Measurement]
    tried: list[Measurement]
    left_out: list[Measurement]

    @property
    def error(self) -> float:
        """Median size of the relative error of what nothing was fitted to."""
        return median_error(self.calibration, self.tried)

    def by_rate(self) -> list[tuple[float, list[Measurement]]]:
        """All measurements by rate in bits/s, ascending."""
        everything = [*self.fitted, *self.tried]
        rates = sorted({measurement.rate for measurement in everything})
        return [(rate, [found for found in everything if found.rate == rate]) for rate in rates]

    def as_dict(self) -> dict[str, Any]:
        """Weights, and every run's measured and predicted seconds."""
        runs = [
            {name: value for name, value in asdict(measurement).items() if name != "terms"}
            | {
                "rate": None if math.isinf(measurement.rate) else measurement.rate,
                "predicted": self.calibration.predict(measurement),
                "fitted": measurement in self.fitted,
            }
            for measurement in (*self.fitted, *self.tried, *self.left_out)
        ]
        found = {"rates_mbit": self.rates, "weights": self.calibration.weights, "median_error": self.error}
        if self.left_out:
            found["median_error_left_out"] = median_error(self.calibration, self.left_out)
        return found | {"runs": runs}

    def section(self) -> str:
        """Weights, errors by rate, by program, and the worst runs."""
        weights = self.calibration.weights
        listed = [[name, *_weight_text(name, weight)] for name, weight in weights.items()]
        rates = " and ".join(f"{rate:g}" for rate in self.rates)
        fit_error = median_error(self.calibration, self.fitted)
        verdict = "within" if self.error <= WANTED_ERROR else "not within"
        worst = sorted(self.tried, key=lambda run: -abs(self.calibration.error(run)))[:5]
        named = "; ".join(
            f"{run.name}, {run.program}, {_rate(run.rate)}: {self.calibration.error(run):+.0%}" for run in worst
        )
        return "\n\n".join(
            [
                "# Calibration on two hosts",
                f"{self.calibration.num_parameters} parameters ({len(weights)} weights, and the overlap of copying and "
                f"wire) are fitted to {self.calibration.measurements} step times at {rates} Mbit/s and tried on "
                f"{len(self.tried)} at the other rates (`foejax/analysis/calibration.py`). The median error there is "
                f"{self.error:.1%}: {verdict} the {WANTED_ERROR:.0%} asked for. On the rates fitted to it is "
                f"{fit_error:.1%}.",
                table(["term", "weight", "unit"], [*listed, ["overlap", f"{self.calibration.overlap:g}", "share"]]),
                "A wire factor is how many times longer a kind of collective takes on the wire than its bytes at the "
                "wire's rate.",
                _errors_table(self),
                f"Furthest off, at rates not fitted to: {named}.",
                *self._left_out_lines(),
                "![Predicted over measured](communication_calibration.png)",
            ]
        )

    def _left_out_lines(self) -> list[str]:
        if not self.left_out:
            return []
        names = ", ".join(f"`{name}`" for name in dict.fromkeys(run.name for run in self.left_out))
        worst = max(self.left_out, key=lambda run: abs(self.calibration.error(run)))
        furthest = f"{worst.name}, {worst.program}, {_rate(worst.rate)}: {self.calibration.error(worst):+.0%}"
        return [
            f"Left out of the fit, of the table and of the plot: {names}, whose model has experts of another size. The "
            f"same weights predict their {len(self.left_out)} step times with a median error of "
            f"{median_error(self.calibration, self.left_out):.1%} (furthest off: {furthest})."
        ]


def calibrate(path: Path, rates: Sequence[float]) -> Calibrated:
    """Fit to the runs at some rates (Mbit/s), those of LEFT_OUT excepted; the others are for trying.

    Raises:
      ValueError: no such file of runs, or too few runs at these rates.
    """
    everything = read_measurements(path)
    left_out = [run for run in everything if run.name.split()[0] == LEFT_OUT]
    found = [run for run in everything if run not in left_out]
    fitted = at_rates(found, rates)
    return Calibrated(fit(fitted), tuple(rates), fitted, [run for run in found if run not in fitted], left_out)


def _errors_table(calibrated: Calibrated) -> str:
    programs = list(dict.fromkeys(run.program for run in calibrated.tried))
    rows = []
    for rate, runs in calibrated.by_rate():
        cells = [f"{median_error(calibrated.calibration, runs):.1%}"]
        for program in programs:
            own = [run for run in runs if run.program == program]
            cells.append(f"{median_error(calibrated.calibration, own):.1%}" if own else "")
        largest = max(abs(calibrated.calibration.error(run)) for run in runs)
        use = "fitted" if runs[0] in calibrated.fitted else "tried"
        rows.append([_rate(rate), use, str(len(runs)), *cells, f"{largest:.0%}"])
    return table(["rate", "use", "runs", "median error", *programs, "largest"], rows)


def _weight_text(name: str, weight: float) -> tuple[str, str]:
    scale, unit = _UNITS.get(name.partition(":")[0], (1.0, "times"))
    return f"{weight * scale:.3g}", unit


def _rate(rate: float) -> str:
    return rate_text(None if math.isinf(rate) else rate / 1e6)
