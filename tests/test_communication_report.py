"""The account of communication is written from made-up measurements; its sentences follow their figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.communication.calibrated import calibrate
from experiments.communication.measured import measured_findings, measured_section
from experiments.communication_report import main
from tests.two_host_runs import make_runs

ENVIRONMENT = {"python": "3", "jax": "0", "cpu": "one", "cores": 2, "mtu": 9000, "notes": ["No delay."]}
BALANCE = [
    {"run": "foe", "layout": "foe", "mesh": "group=8 x expert=2", "expert_axis": 2, "row_discrepancy": 1.35},
    {"run": "moe", "layout": "ep", "mesh": "expert=8", "expert_axis": 8, "row_discrepancy": 1.42},
]


def results(**changes: float) -> dict[str, Any]:
    return {"environment": ENVIRONMENT, "command": "python -m experiments.two_hosts", "runs": make_runs(**changes)}


@pytest.fixture
def two_hosts(tmp_path: Path) -> Path:
    path = tmp_path / "two_hosts.json"
    path.write_text(json.dumps(results(noise=0.05)))
    return path


def test_the_report_has_its_sections_and_files(two_hosts: Path, tmp_path: Path) -> None:
    balance = tmp_path / "load_balance.json"
    balance.write_text(json.dumps({"rows": BALANCE}))
    arguments = ["--two-hosts", str(two_hosts), "--load-balance", str(balance), "--out", str(tmp_path / "out")]
    main([*arguments, "--requests", "0"])
    text = (tmp_path / "out" / "communication.md").read_text()
    for part in ("# In short", "## Where FoE does not win", "# Calibration on two hosts", "# Predicted: 2x8xH100"):
        assert part in text
    assert "sends a token once to each device sends fewer than FoE on 2, 4, 8, 16 devices (0.66 of them on 8)" in text
    assert "most over median rows 1.35 (foe, group=8 x expert=2) against 1.42" in text
    found = json.loads((tmp_path / "out" / "communication.json").read_text())
    assert found["calibration"]["median_error"] < 0.15 and len(found["calibration"]["runs"]) == 72
    assert (tmp_path / "out" / "communication_calibration.png").stat().st_size > 1000
    assert (tmp_path / "out" / "communication_forward.png").stat().st_size > 1000


def test_the_verdict_on_the_error_follows_the_error(two_hosts: Path, tmp_path: Path) -> None:
    assert ": within the 15% asked for" in calibrate(two_hosts, (100.0, 1000.0)).section()
    wild = tmp_path / "wild.json"
    wild.write_text(json.dumps(results(noise=0.6)))
    calibrated = calibrate(wild, (100.0, 1000.0))
    assert calibrated.error > 0.15 and ": not within the 15% asked for" in calibrated.section()


def with_heads(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs, and those of `tp` again as if they were Head Parallel's, at half their seconds."""
    heads = [run | {"name": "hp group=8", "kind": "hp"} for run in runs if run["kind"] == "tp"]
    return [*runs, *(run | {"seconds": run["seconds"] / 2} for run in heads)]


def test_nothing_is_fitted_to_head_parallel(two_hosts: Path, tmp_path: Path) -> None:
    without = calibrate(two_hosts, (100.0, 1000.0))
    found = json.loads(two_hosts.read_text())
    path = tmp_path / "with_heads.json"
    path.write_text(json.dumps(found | {"runs": with_heads(found["runs"])}))
    calibrated = calibrate(path, (100.0, 1000.0))
    assert calibrated.calibration == without.calibration and calibrated.error == without.error
    assert [(rate, len(runs)) for rate, runs in calibrated.by_rate()] == [
        (rate, len(runs)) for rate, runs in without.by_rate()
    ]
    assert "Left out of the fit, of the table and of the plot: `hp group=8`" in calibrated.section()
    assert "Left out" not in without.section()
    values = calibrated.as_dict()
    assert len(values["runs"]) == 72 + 12 and 0.8 < values["median_error_left_out"] < 1.2


def test_findings_hold_head_parallel_apart() -> None:
    runs = results()["runs"]
    findings, without = measured_findings(with_heads(runs)), measured_findings(runs)
    assert findings[: len(without)] == without
    assert [text[:80] for text, _ in findings[len(without) :]] == [
        "Forward pass at 50 Mbit/s: the best Multi-Head LatentMoE layout, hp group=8, tak",
        "Decoding step at 50 Mbit/s: the best Multi-Head LatentMoE layout, hp group=8, ta",
    ]


def test_findings_name_the_fastest_layouts_at_the_slowest_rate() -> None:
    runs = results()["runs"]
    findings = measured_findings(runs)
    assert "FoE's step is the shorter one in" in findings[0][0]
    assert findings[1][0].startswith("Forward pass at 50 Mbit/s: the best MoE layout, ep MeshSizes(data=2")
    for factor, foe_wins in ((100, True), (0.01, False)):
        changed = [run | {"seconds": run["seconds"] * (1 if run["kind"] == "foe" else factor)} for run in runs]
        assert measured_findings(changed)[1][1] == foe_wins


def test_the_fastest_of_a_column_is_bold() -> None:
    table = measured_section(results())
    assert table.count("**") == 2 * 2 * 6
    assert "- No delay." in table
