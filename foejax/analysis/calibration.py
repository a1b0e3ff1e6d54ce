"""The cost model on two simulated hosts: a few rates fitted at some speeds of the wire and tried on the others.

The simulated devices of a host share its cores, and every collective goes over TCP, inside a host too (Gloo). So what
all devices compute and copy adds up, and nothing runs beside anything else. A step's time is a sum with weights that
are not negative:

    flops * (s/FLOP) + 1 * (s/step) + collectives * (s/collective) + bytes sent by a device * (s/byte)
      + for each kind of collective: seconds that its bytes between hosts take at the wire's rate * (its factor)

A factor is 1 for a kind that keeps the wire full in both directions and 2 for one that sends and receives in turn.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foejax.analysis.cost_model.traffic import traffic_of
from sharding import Layout
from sharding.formulas import ring_egress
from sharding.mesh import MeshSizes

NUM_HOSTS = 2
WIRE_KINDS = {
    "all-reduce": "all-reduces",
    "all-gather": "gathers and scatters",
    "reduce-scatter": "gathers and scatters",
    "all-to-all": "all-to-alls",
}
"""Factor of each operation on the wire."""


@dataclass(frozen=True)
class Measurement:
    """One program at one rate.

    Attributes:
      name: of the layout.
      rate: bits/s of the wire, each way; infinity where it was not limited.
      seconds: median of a step.
      terms: what the step's time is a weighted sum of.
    """

    name: str
    program: str
    rate: float
    seconds: float
    terms: dict[str, float]


@dataclass(frozen=True)
class Calibration:
    """Fitted weights.

    Attributes:
      weights: of every term, not negative.
      measurements: how many they were fitted to.
    """

    weights: dict[str, float]
    measurements: int

    def predict(self, measurement: Measurement) -> float:
        """Seconds of its step."""
        return sum(self.weights.get(name, 0.0) * value for name, value in measurement.terms.items())

    def error(self, measurement: Measurement) -> float:
        """Relative: prediction over measurement, less 1."""
        return self.predict(measurement) / measurement.seconds - 1


def read_measurements(path: Path) -> list[Measurement]:
    """The runs of a `two_hosts.json`.

    Raises:
      ValueError: the file holds something else.
    """
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
        return [measurement_of(run) for run in runs]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} holds no runs of two hosts ({type(error).__name__}: {error}): make it with "
            "`python -m experiments.two_hosts`"
        ) from None


def measurement_of(run: dict[str, Any]) -> Measurement:
    """A run with name, kind, mesh, program, rate_mbit (None is unlimited), seconds, flops and collectives."""
    sizes = MeshSizes(*(int(run["mesh"][axis]) for axis in MeshSizes._fields))
    layout = Layout.abstract(run["kind"], sizes)
    devices = layout.mesh.size
    hosts = [f"host{index * NUM_HOSTS // devices}" for index in range(devices)]
    rate = math.inf if run["rate_mbit"] is None else run["rate_mbit"] * 1e6
    terms = {"flops": float(run["flops"]), "step": 1.0, "collectives": 0.0, "bytes sent": 0.0}
    for row in run["collectives"]:
        traffic = traffic_of(row, layout, hosts)
        kind = f"wire: {WIRE_KINDS[row['op']]}"
        terms["collectives"] += row["count"]
        terms["bytes sent"] += row["count"] * ring_egress(row["op"], row["payload_bytes"], traffic.devices)
        terms[kind] = terms.get(kind, 0.0) + row["count"] * 8 * traffic.network_bytes / rate
    return Measurement(run["name"], run["program"], rate, float(run["seconds"]), terms)


def fit(measurements: Sequence[Measurement]) -> Calibration:
    """Weights that are not negative and make the sum of squared relative errors smallest.

    Raises:
      ValueError: fewer measurements than weights.
    """
    names = sorted({name for measurement in measurements for name in measurement.terms})
    if len(measurements) < len(names):
        raise ValueError(
            f"{len(measurements)} measurements do not fix {len(names)} weights ({', '.join(names)}): measure more "
            "layouts, programs or rates"
        )
    table = np.array(
        [[measurement.terms.get(name, 0.0) / measurement.seconds for name in names] for measurement in measurements]
    )
    scale = np.maximum(np.abs(table).max(axis=0), 1e-300)
    weights = _nonnegative_least_squares(table / scale, np.ones(len(measurements))) / scale
    return Calibration(dict(zip(names, weights.tolist(), strict=True)), len(measurements))


def _nonnegative_least_squares(table: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The best of the least-squares solutions over all subsets of the columns that have no negative weight.

    The optimum is one of them; with a handful of columns trying all is quick.
    """
    best, least = np.zeros(table.shape[1]), float(np.sum(target**2))
    for size in range(1, table.shape[1] + 1):
        for columns in itertools.combinations(range(table.shape[1]), size):
            solution, *_ = np.linalg.lstsq(table[:, columns], target, rcond=None)
            residual = float(np.sum((table[:, columns] @ solution - target) ** 2))
            if solution.min() >= 0 and residual < least:
                best, least = np.zeros(table.shape[1]), residual
                best[list(columns)] = solution
    return best


def at_rates(measurements: Iterable[Measurement], rates_mbit: Sequence[float]) -> list[Measurement]:
    """Those at one of the rates."""
    wanted = {rate * 1e6 for rate in rates_mbit}
    return [measurement for measurement in measurements if measurement.rate in wanted]


def median_error(calibration: Calibration, measurements: Iterable[Measurement]) -> float:
    """Median of the relative errors' sizes; NaN of none."""
    errors = [abs(calibration.error(measurement)) for measurement in measurements]
    return float(np.median(errors)) if errors else math.nan
