"""Head Parallel in compiled programs: two exchanges of sub-tokens a layer, whose bytes know nothing of the routing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

import pytest

from foejax.analysis.comms import DECODE_SEQUENCES, lower_forward, lower_train_step
from foejax.analysis.cost_model.cluster import read_cluster
from foejax.analysis.cost_model.training import predict_training_step
from foejax.analysis.expected_collectives import expected_collectives
from foejax.config import RunConfig, load_config
from foejax.decoding import lower_decode_step
from foejax.models import LanguageModel
from foejax.training.run import make_layout
from sharding import Layout, hlo
from sharding.audit import Collective, audit, summarize
from sharding.formulas import hp_forward
from sharding.forward_pass import compare_with_audit
from sharding.races import find_races

LAYERS, ROWS, LENGTH, LATENT = 2, 16, 32, 8 * 16
PER_HEAD = (1, 2, 4, 8)
MODEL: dict[str, Any] = {
    "model.num_layers": LAYERS,
    "model.hidden_size": 64,
    "model.vocab_size": 512,
    "model.num_query_heads": 4,
    "model.num_kv_heads": 4,
    "model.num_groups": 1,
    "model.router_scope": "group",
    "model.dtype": "bfloat16",
    "data.tokenizer_vocab_size": 256,
    "data.batch_size": ROWS,
    "data.sequence_length": LENGTH,
    "training.load_balance_coef": 0.0,
    "training.z_loss_coef": 0.0,
    "mesh.layout": "hp",
    "mesh.devices": 8,
}


class Case(NamedTuple):
    """A model and mesh: two heads on each of four devices, or each of four heads, as published, on two."""

    per_head: int = 2
    data: int = 2
    expert: int = 1
    remat: str = "none"

    @property
    def config(self) -> RunConfig:
        heads = 4 if self.expert > 1 else 8
        changes = {
            "model.num_ffn_heads": heads,
            "model.ffn_head_dim": LATENT // heads,
            "model.num_experts": 16 * heads,
            "model.experts_per_token": self.per_head * heads,
            "model.expert_activation": "gelu" if self.expert > 1 else "swiglu",
            "model.router_score": "topk_softmax" if self.expert > 1 else "softmax",
            "mesh.data": self.data,
            "mesh.group": 4,
            "mesh.expert": self.expert,
            "training.remat": self.remat,
        }
        return load_config("foe_tiny", MODEL | changes)


class Program(NamedTuple):
    text: str
    collectives: list[Collective]


Kind = Literal["forward", "decode_step", "train_step"]


@cache
def compiled(kind: Kind, case: Case) -> Program:
    layout = make_layout(case.config.model, case.config.mesh)
    if kind == "train_step":
        lowered = lower_train_step(case.config, layout)
    else:
        model = LanguageModel.abstract(case.config.model, dataclasses.replace(layout, shard_params=False))
        lowered = (
            lower_forward(model, (ROWS, LENGTH))
            if kind == "forward"
            else lower_decode_step(model, DECODE_SEQUENCES * layout.num_token_shards, slots=LENGTH)
        )
    program = lowered.compile()
    return Program(program.as_text() or "", audit(lowered, layout.mesh, compiled=program))


SLOW = pytest.mark.slow
SPREAD, REMAT = Case(data=1, expert=2), Case(8, remat="full")
PROGRAMS: list[tuple[Kind, Case]] = [
    *(("forward", Case(per_head)) for per_head in PER_HEAD),
    ("decode_step", Case()),
    ("train_step", REMAT),
    ("train_step", Case()),
    ("forward", SPREAD),
    ("decode_step", SPREAD),
    ("train_step", SPREAD),
]


@pytest.mark.parametrize("per_head", PER_HEAD)
def test_a_layer_exchanges_sub_tokens_once_before_it_routes_and_once_after(per_head: int) -> None:
    text, collectives = compiled("forward", Case(per_head))
    assert sorted((found.op, found.axes, found.count) for found in collectives) == [
        ("all-gather", ("group",), 1),
        ("all-to-all", ("group",), LAYERS),
        ("all-to-all", ("group",), LAYERS),
    ]
    body, (first, second) = exchanges_of_the_loop(text)
    before, after = computed_from(body, first), computed_from(body, second)
    assert not any("_topk" in instruction.op_name for instruction in before)
    assert any("_topk" in instruction.op_name for instruction in after)
    assert [instruction.opcode for instruction in after].count("all-to-all") == 1


def exchanges_of_the_loop(text: str) -> tuple[Mapping[str, hlo.Instruction], list[str]]:
    """The computation that holds the all-to-alls, and their names in its order."""
    module = hlo.parse_module(text)
    (body,) = (
        computation
        for computation in module.computations.values()
        if any(instruction.opcode == "all-to-all" for instruction in computation.values())
    )
    return body, [name for name, instruction in body.items() if instruction.opcode == "all-to-all"]


def computed_from(computation: Mapping[str, hlo.Instruction], name: str) -> list[hlo.Instruction]:
    """All instructions of the computation that one needs."""
    needed: dict[str, hlo.Instruction] = {}
    waiting = list(computation[name].operands)
    while waiting:
        operand = waiting.pop()
        if operand in computation and operand not in needed:
            needed[operand] = computation[operand]
            waiting += computation[operand].operands
    return list(needed.values())


@pytest.mark.parametrize("per_head", PER_HEAD)
def test_the_bytes_are_those_of_the_formula_however_many_experts_are_chosen(per_head: int) -> None:
    tokens, devices = ROWS * LENGTH // 8, 4
    (formula,) = hp_forward(LAYERS, tokens, LATENT, devices)
    assert formula["total_wire_bytes"] == LAYERS * tokens * 2 * (2 * LATENT * 3 // 4)
    exchanges = [found for found in compiled("forward", Case(per_head)).collectives if found.op == "all-to-all"]
    assert sum(found.total_wire_bytes for found in exchanges) == formula["total_wire_bytes"]
    for found in exchanges:
        # One block for each device, all alike and of static shape: nobody sends or gets more than another.
        assert found.group_size == len(found.shapes) == devices and len(set(found.shapes)) == 1
        assert found.payload_bytes == formula["payload_bytes"] == 2 * found.elements


@pytest.mark.parametrize("case", [REMAT, pytest.param(Case(), marks=SLOW)], ids=str)
def test_a_training_step_exchanges_twice_what_the_forward_pass_does(case: Case) -> None:
    """Rematerialised layers do not exchange again; all else that devices of `group` share are sums of gradients."""
    found = [entry for entry in compiled("train_step", case).collectives if "group" in entry.axes]
    exchanges = [entry for entry in found if entry.op == "all-to-all"]
    forward = [entry for entry in compiled("forward", Case(case.per_head)).collectives if entry.op == "all-to-all"]
    assert {entry.payload_bytes for entry in exchanges} == {entry.payload_bytes for entry in forward}
    sent = [sum(entry.total_wire_bytes for entry in entries) for entries in (exchanges, forward)]
    assert sent[0] == 2 * sent[1]
    others = {entry.op: entry.dtype for entry in found if entry.op != "all-to-all"}
    assert others == {"all-gather": "pred", "all-reduce": "f32"}


def test_gradients_are_summed_over_the_devices_that_hold_the_parameters_alike() -> None:
    """Those of attention, sub-token projections, embedding and head; routers and experts have met every token."""
    layout = make_layout(REMAT.config.model, REMAT.config.mesh)
    predicted = predict_training_step(REMAT.config, layout, read_cluster("8xH100"))
    stated = [
        (item.bytes, count)
        for items, count in ((predicted.layer, LAYERS), (predicted.once, 1))
        for item in items
        if item.detail == "all-reduce over group of 4"
    ]
    found = [
        (entry.payload_bytes, entry.count)
        for entry in compiled("train_step", REMAT).collectives
        if entry.axes == ("group",) and entry.op == "all-reduce" and entry.payload_bytes > 1024
    ]
    for (size, count), (predicted_size, predicted_count) in zip(sorted(found), sorted(stated), strict=True):
        assert count == predicted_count
        assert predicted_size <= size < 1.01 * predicted_size, "XLA may put a small sum into a large one"


@pytest.mark.parametrize(
    ("kind", "case"), [(kind, case) for kind, case in PROGRAMS if kind != "train_step"], ids=lambda value: str(value)
)
def test_programs_send_what_the_formulas_say(kind: Kind, case: Case) -> None:
    layout = make_layout(case.config.model, case.config.mesh)
    tokens, logits_rows = ROWS * LENGTH // 8, None
    if kind == "decode_step":
        tokens = logits_rows = DECODE_SEQUENCES
    expected = expected_collectives(case.config.model, layout, tokens, logits_rows=logits_rows)
    rows = compare_with_audit(expected, summarize(compiled(kind, case).collectives))
    assert rows and not [row for row in rows if row["count"] != row["expected_count"]]
    if case.expert > 1:
        inner = [row for row in rows if row["axes"] == ["expert"] and row["dtype"] == "bf16"]
        # 16 experts of a head on two devices: sub-tokens of the four devices that exchanged heads.
        assert sum(row["expected_count"] for row in inner if row["branch"] in (0, None)) == 2 * LAYERS
        assert max(row["payload_bytes"] for row in inner) == 2 * 2 * (4 * tokens) * (LATENT // 4)


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        pytest.param(kind, case, marks=[SLOW] * (kind == "train_step" and case != REMAT), id=f"{kind}-{case}")
        for kind, case in PROGRAMS
    ],
)
def test_programs_have_no_race(kind: Kind, case: Case) -> None:
    assert not find_races(compiled(kind, case).text)


def test_data_parallelism_of_the_same_model_sends_nothing() -> None:
    config = Case().config
    assert expected_collectives(config.model, Layout.single_device("fsdp"), 64) == []
