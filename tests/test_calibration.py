"""Known weights make up measurements; the fit finds them again from two rates and predicts the others."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from foejax.analysis.calibration import Measurement, at_rates, fit, measurement_of, median_error, read_measurements
from tests.two_host_runs import WEIGHTS, make_runs


def measurements(noise: float = 0.0, overlap: float = 0.0) -> list[Measurement]:
    return [measurement_of(run) for run in make_runs(noise, overlap)]


@pytest.mark.parametrize("overlap", [0.0, 0.6])
def test_a_fit_to_two_rates_finds_the_weights(overlap: float) -> None:
    runs = measurements(overlap=overlap)
    found = fit(at_rates(runs, (100, 1000)))
    assert (found.measurements, found.num_parameters, found.overlap) == (24, 9, overlap)
    for name, weight in WEIGHTS.items():
        assert found.weights[name] == pytest.approx(weight, rel=1e-4), name
    assert median_error(found, runs) < 1e-6


def test_it_predicts_other_rates_from_noisy_measurements() -> None:
    noisy = measurements(noise=0.05)
    found = fit(at_rates(noisy, (100, 1000)))
    others = [measurement for measurement in noisy if measurement.rate not in (100e6, 1000e6)]
    assert len(others) == 48
    assert median_error(found, others) < 0.1
    assert all(weight >= 0 for weight in found.weights.values())


def test_weights_are_never_negative() -> None:
    """A term that lies beside another and would help with a negative weight gets none."""
    rows = [(1.0, 1.0), (2.0, 4.0), (3.0, 6.0), (4.0, 8.5)]
    runs = [
        Measurement("a", "forward", math.inf, seconds, {"flops": flops, "step": 1.0, "bytes sent": 0.0})
        for flops, seconds in rows
    ]
    found = fit(runs)
    assert found.weights["step"] == 0.0 and found.weights["flops"] > 1.0


def test_the_wire_takes_nothing_where_it_is_not_limited() -> None:
    run = make_runs()[0]
    limited, free = (measurement_of(run | {"rate_mbit": rate}) for rate in (100, None))
    assert limited.terms["wire: all-reduces"] > 0 and free.terms["wire: all-reduces"] == 0
    bytes_across = sum(row["count"] * 2 * 7 / 8 * row["payload_bytes"] for row in run["collectives"][:1])
    assert limited.terms["wire: all-reduces"] >= bytes_across * 8 / 100e6


def test_files_of_measurements_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "two_hosts.json"
    path.write_text(json.dumps({"runs": make_runs()[:3]}))
    assert [measurement.rate for measurement in read_measurements(path)] == [50e6, 100e6, 200e6]
    path.write_text('{"runs": [{"name": "foe"}]}')
    with pytest.raises(ValueError, match="holds no runs of two hosts .*experiments.two_hosts"):
        read_measurements(path)


def test_too_few_measurements_are_refused() -> None:
    with pytest.raises(ValueError, match="2 measurements do not fix"):
        fit(measurements()[:2])
