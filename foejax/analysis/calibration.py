"""The cost model on two simulated hosts: a few rates fitted at some speeds of the wire and tried on the others.

The simulated devices of a host share its cores, and every collective goes over TCP, inside a host too (Gloo). So what
all devices compute and copy adds up. A step takes

    computing = FLOPs of a device's program * (s/FLOP, of this kind of program) + (s/step)
    copying   = bytes that a device sends * (s/byte)
    wire      = for each kind of collective: seconds of its bytes between hosts at the wire's rate * (its factor)
    seconds   = computing + collectives * (s/collective) + copying + wire - overlap * min(copying, wire)

with weights that are not negative and one overlap between 0 and 1. A factor is 1 for a kind of collective that keeps
the wire full in both directions and 2 for one that sends and receives in turn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from foejax.analysis.cost_model.traffic import traffic_of
from sharding import Layout
from sharding.formulas import ring_egress
from sharding.mesh import MeshSizes

NUM_HOSTS = 2
COPYING, WIRE = "bytes sent", "wire: "
WIRE_KINDS = {
    "all-reduce": "all-reduces",
    "all-gather": "gathers and scatters",
    "reduce-scatter": "gathers and scatters",
    "all-to-all": "all-to-alls",
}
"""Kind of each operation, with a factor on the wire of its own."""
_OVERLAPS = [index / 20 for index in range(21)]


@dataclass(frozen=True)
class Measurement:
    """One program at one rate.

    Attributes:
      name: of the layout.
      rate: bits/s of the wire, each way; infinity where it was not limited.
      seconds: median of a step.
      terms: amounts that the weights multiply.
    """

    name: str
    program: str
    rate: float
    seconds: float
    terms: dict[str, float]


@dataclass(frozen=True)
class Calibration:
    """What was fitted.

    Attributes:
      weights: of every term, not negative.
      overlap: share of the shorter of copying and wire that runs behind the longer.
      measurements: how many it was fitted to.
    """

    weights: dict[str, float]
    overlap: float
    measurements: int

    @property
    def num_parameters(self) -> int:
        """Weights and the overlap."""
        return len(self.weights) + 1

    def predict(self, measurement: Measurement) -> float:
        """Seconds of its step."""
        copying, wire, others = self._shares(measurement)
        return others + copying + wire - self.overlap * min(copying, wire)

    def error(self, measurement: Measurement) -> float:
        """Relative: prediction over measurement, less 1."""
        return self.predict(measurement) / measurement.seconds - 1

    def copies_longer(self, measurement: Measurement) -> bool:
        """Whether copying takes longer than the wire."""
        copying, wire, _ = self._shares(measurement)
        return copying > wire

    def _shares(self, measurement: Measurement) -> tuple[float, float, float]:
        """Seconds of copying, of the wire, and of all else."""
        seconds = {name: self.weights.get(name, 0.0) * value for name, value in measurement.terms.items()}
        wire = sum(value for name, value in seconds.items() if name.startswith(WIRE))
        return seconds[COPYING], wire, sum(seconds.values()) - seconds[COPYING] - wire


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
    terms = {f"flops: {run['program']}": float(run["flops"]), "step": 1.0, "collectives": 0.0, COPYING: 0.0}
    for row in run["collectives"]:
        traffic = traffic_of(row, layout, hosts)
        kind = WIRE + WIRE_KINDS[row["op"]]
        terms["collectives"] += row["count"]
        terms[COPYING] += row["count"] * ring_egress(row["op"], row["payload_bytes"], traffic.devices)
        terms[kind] = terms.get(kind, 0.0) + row["count"] * 8 * traffic.network_bytes / rate
    return Measurement(run["name"], run["program"], rate, float(run["seconds"]), terms)


def fit(measurements: Sequence[Measurement]) -> Calibration:
    """Weights and an overlap that make the sum of squared relative errors smallest.

    Given an overlap, and for every measurement which of copying and wire takes longer, the rest is linear: both are
    searched.

    Raises:
      ValueError: fewer measurements than parameters.
    """
    names = sorted({name for measurement in measurements for name in measurement.terms})
    if len(measurements) <= len(names):
        raise ValueError(
            f"{len(measurements)} measurements do not fix an overlap and {len(names)} weights ({', '.join(names)}): "
            "measure more layouts, programs or rates"
        )
    found = [_fit_with_overlap(measurements, names, overlap) for overlap in _OVERLAPS]
    return min(found, key=lambda calibration: sum(calibration.error(run) ** 2 for run in measurements))


def _fit_with_overlap(measurements: Sequence[Measurement], names: Sequence[str], overlap: float) -> Calibration:
    copies_longer = [math.isinf(measurement.rate) for measurement in measurements]
    calibration = Calibration({}, overlap, len(measurements))
    for _ in range(20):
        table = np.array(
            [
                [_share(name, longer, overlap) * run.terms.get(name, 0.0) / run.seconds for name in names]
                for run, longer in zip(measurements, copies_longer, strict=True)
            ]
        )
        scale = np.maximum(np.abs(table).max(axis=0), 1e-300)
        weights = nnls(table / scale, np.ones(len(measurements)))[0] / scale
        calibration = Calibration(dict(zip(names, weights.tolist(), strict=True)), overlap, len(measurements))
        before, copies_longer = copies_longer, [calibration.copies_longer(run) for run in measurements]
        if copies_longer == before:
            break
    return calibration


def _share(name: str, copies_longer: bool, overlap: float) -> float:
    """Of a term that is not hidden behind a longer one."""
    is_shorter = not copies_longer if name == COPYING else name.startswith(WIRE) and copies_longer
    return 1 - overlap if is_shorter else 1.0


def at_rates(measurements: Iterable[Measurement], rates_mbit: Sequence[float]) -> list[Measurement]:
    """Those at one of the rates."""
    wanted = {rate * 1e6 for rate in rates_mbit}
    return [measurement for measurement in measurements if measurement.rate in wanted]


def median_error(calibration: Calibration, measurements: Iterable[Measurement]) -> float:
    """Median of the relative errors' sizes; NaN of none."""
    errors = [abs(calibration.error(measurement)) for measurement in measurements]
    return float(np.median(errors)) if errors else math.nan
