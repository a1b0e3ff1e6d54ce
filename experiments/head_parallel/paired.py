"""Runs with the same seeds compared in pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

Run = Mapping[str, Any]


class Interval(NamedTuple):
    """A mean and its 95% interval by the t distribution; without ends where there is one value alone."""

    mean: float
    low: float
    high: float

    @property
    def side(self) -> int:
        """1 above zero, -1 below it, 0 where the interval holds zero."""
        return int(self.low > 0) - int(self.high < 0)


def interval(values: Sequence[float]) -> Interval:
    """Of the mean of independent values."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean, -math.inf, math.inf)
    half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return Interval(mean, mean - half, mean + half)


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Interval:
    """First minus second, seed by seed, over the seeds of both."""
    return interval([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])


def best_rates(runs: Sequence[Run], sweep_seed: int) -> dict[str, float]:
    """Of every model the learning rate with the lowest validation loss in the sweep."""
    best: dict[str, Run] = {}
    for run in runs:
        if run["seed"] == sweep_seed and (
            run["model"] not in best or run["validation_loss"] < best[run["model"]]["validation_loss"]
        ):
            best[run["model"]] = run
    return {model: run["rate"] for model, run in best.items()}


def losses_by_seed(runs: Sequence[Run], sweep_seed: int) -> dict[str, dict[int, float]]:
    """Validation losses at the best rate, of the seeds that did not choose it."""
    best = best_rates(runs, sweep_seed)
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        if run["seed"] != sweep_seed and run["rate"] == best.get(run["model"]):
            found.setdefault(run["model"], {})[run["seed"]] = run["validation_loss"]
    return found
