"""The compiled forward pass and decoding step of every layout send what the formulas say, to the byte."""

from __future__ import annotations

from typing import Any

import pytest

from foejax.analysis.comms import communication_report, compare_with_formulas
from foejax.config import RunConfig, load_config

MODEL = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.vocab_size": 256,
    "model.num_query_heads": 16,
    "model.num_kv_heads": 8,
    "model.num_experts": 32,
    "model.experts_per_token": 8,
    "data.tokenizer_vocab_size": 256,
    "data.batch_size": 16,
    "data.sequence_length": 32,
    "mesh.devices": 8,
}


def run_config(groups: int, layout: str, **mesh: int) -> RunConfig:
    changes = MODEL | {f"mesh.{axis}": size for axis, size in mesh.items()}
    return load_config("foe_tiny", changes | {"model.num_groups": groups, "mesh.layout": layout})


LAYOUTS: dict[str, tuple[int, str, dict[str, int]]] = {
    "foe": (8, "foe", {"group": 8}),
    "foe, two groups a device": (8, "foe", {"group": 4, "data": 2}),
    "foe, two groups": (2, "foe", {"group": 2, "data": 4}),
    "foe, four groups": (4, "foe", {"group": 4, "data": 2}),
    "foe, groups of two devices": (4, "foe", {"group": 4, "expert": 2}),
    "foe, two groups on two devices": (8, "foe", {"group": 4, "expert": 2}),
    "ep": (1, "ep", {"expert": 4, "data": 2}),
    "tp": (1, "tp", {"group": 4, "data": 2}),
    "tp_ep": (1, "tp_ep", {"group": 8}),
}


SLOW = {"foe, two groups a device", "foe, two groups", "foe, four groups", "foe, groups of two devices"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LAYOUTS])
def test_programs_send_what_the_formulas_say(name: str) -> None:
    groups, kind, mesh = LAYOUTS[name]
    config = run_config(groups, kind, **mesh)
    report = communication_report(config, programs=("forward", "decode_step"))
    compared = compare_with_formulas(config, report)
    for program, rows in compared.items():
        different = [row for row in rows if row["count"] != row["expected_count"]]
        assert rows and not different, (program, different)
    for rows in report.values():
        check_axes(kind, mesh, rows)


def check_axes(kind: str, mesh: dict[str, int], found: list[dict[str, Any]]) -> None:
    """A group's tokens stay with its devices."""
    exchanges = [row for row in found if row["op"] == "all-to-all"]
    wanted = {("group",)} if kind == "tp_ep" else {("expert",)} if mesh.get("expert", 1) > 1 else set()
    assert {tuple(row["axes"]) for row in exchanges} == wanted
