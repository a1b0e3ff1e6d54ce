"""Known weights make up measurements; the fit finds them again from two rates and predicts the others."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foejax.analysis.calibration import Measurement, at_rates, fit, measurement_of, median_error, read_measurements
from foejax.analysis.cost_model.step import forward_step
from foejax.analysis.cost_model.work import layer_parts
from foejax.analysis.expected_collectives import expected_collectives
from foejax.config import load_config
from sharding import Layout
from sharding.mesh import LayoutKind, MeshSizes

WEIGHTS = {
    "flops": 3e-11,
    "step": 0.004,
    "collectives": 0.002,
    "bytes sent": 2e-9,
    "wire: all-reduces": 1.1,
    "wire: gathers and scatters": 1.3,
    "wire: all-to-alls": 1.9,
}
RATES = (50, 100, 200, 500, 1000, None)
LAYOUTS: list[tuple[str, LayoutKind, MeshSizes]] = [
    ("foe_tiny", "foe", MeshSizes(1, 8, 1)),
    ("foe_tiny", "foe", MeshSizes(2, 4, 1)),
    ("moe_tiny", "ep", MeshSizes(1, 1, 8)),
    ("moe_tiny", "ep", MeshSizes(2, 1, 4)),
    ("moe_tiny", "tp", MeshSizes(1, 8, 1)),
    ("moe_tiny", "tp_ep", MeshSizes(1, 8, 1)),
]


def make_runs(noise: float = 0.0) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    runs = []
    for config, kind, sizes in LAYOUTS:
        model, layout = load_config(config).model, Layout.abstract(kind, sizes)
        for length in (64, 256):
            step = forward_step(16, length, layout.num_token_shards)
            rows = expected_collectives(model, layout, step.device_tokens)
            rows = [row for row in rows if row.get("branch", 0) == 0]
            flops = model.num_layers * sum(part.flops for part in layer_parts(model, layout, step))
            run = {"name": f"{kind} {sizes}", "kind": kind, "mesh": sizes._asdict(), "program": f"forward {length}"}
            run |= {"flops": flops, "collectives": rows, "seconds": 1.0}
            for rate in RATES:
                terms = measurement_of(run | {"rate_mbit": rate}).terms
                exact = sum(WEIGHTS[name] * value for name, value in terms.items())
                runs.append(run | {"rate_mbit": rate, "seconds": exact * (1 + noise * random.standard_normal())})
    return runs


def measurements(noise: float = 0.0) -> list[Measurement]:
    return [measurement_of(run) for run in make_runs(noise)]


def test_a_fit_to_two_rates_finds_the_weights() -> None:
    found = fit(at_rates(measurements(), (100, 1000)))
    assert found.measurements == 24
    for name, weight in WEIGHTS.items():
        assert found.weights[name] == pytest.approx(weight, rel=1e-6), name
    assert median_error(found, measurements()) < 1e-6


def test_it_predicts_other_rates_from_noisy_measurements() -> None:
    noisy = measurements(noise=0.05)
    found = fit(at_rates(noisy, (100, 1000)))
    others = [measurement for measurement in noisy if measurement.rate not in (100e6, 1000e6)]
    assert len(others) == 48
    assert median_error(found, others) < 0.1
    assert all(weight >= 0 for weight in found.weights.values())


def test_weights_are_never_negative() -> None:
    """A term that lies beside another and would help with a negative weight gets none."""
    rows = [({"flops": 1.0, "step": 1.0}, 1.0), ({"flops": 2.0, "step": 1.0}, 4.0), ({"flops": 3.0, "step": 1.0}, 6.0)]
    found = fit([Measurement("a", "forward", math.inf, seconds, terms) for terms, seconds in rows])
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
