"""Meshes and layouts: sizes, specs and what is refused."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import PartitionSpec
from tiny import HEADS, tiny_config

from foejax.models import LanguageModel
from sharding import Layout, MeshSizes, make_mesh, plan_mesh


@pytest.mark.parametrize(
    ("kind", "devices", "given", "expected"),
    [
        ("foe", 8, {"num_groups": 8}, (1, 8, 1)),
        ("foe", 8, {"num_groups": 4}, (2, 4, 1)),
        ("foe", 4, {"num_groups": 8}, (1, 4, 1)),
        ("foe", 8, {"num_groups": 8, "data": 4}, (4, 2, 1)),
        ("foe", 1, {"num_groups": 8}, (1, 1, 1)),
        ("foe", 8, {"num_groups": 4, "num_experts": 32, "expert": 2}, (1, 4, 2)),
        ("foe", 8, {"num_groups": 2, "num_experts": 32, "expert": 2}, (2, 2, 2)),
        ("foe", 4, {"num_groups": 8, "num_experts": 32, "expert": 2, "data": 2}, (2, 1, 2)),
        ("fsdp", 8, {}, (8, 1, 1)),
        ("ep", 8, {"num_experts": 32}, (1, 1, 8)),
        ("ep", 8, {"num_experts": 4}, (2, 1, 4)),
        ("ep", 8, {"num_experts": 32, "data": 2}, (2, 1, 4)),
        ("tp", 8, {"num_experts": 32, "num_kv_heads": 8}, (1, 8, 1)),
        ("tp", 8, {"num_experts": 32, "num_kv_heads": 4}, (2, 4, 1)),
        ("tp_ep", 8, {"num_experts": 32, "num_kv_heads": 8, "group": 2}, (4, 2, 1)),
        ("hp", 8, {"num_ffn_heads": 8}, (1, 8, 1)),
        ("hp", 8, {"num_ffn_heads": 16}, (1, 8, 1)),
        ("hp", 8, {"num_ffn_heads": 4, "num_experts": 64, "group": 4, "expert": 2}, (1, 4, 2)),
        ("hp", 1, {"num_ffn_heads": 8}, (1, 1, 1)),
    ],
)
def test_sizes_are_derived(kind: str, devices: int, given: dict[str, int], expected: tuple[int, ...]) -> None:
    assert plan_mesh(kind, devices, **given) == MeshSizes(*expected)


@pytest.mark.parametrize(
    ("kind", "devices", "given", "words"),
    [
        ("foe", 6, {"num_groups": 4}, ["num_groups=4", "6 devices", "mesh.group"]),
        ("foe", 8, {"num_groups": 4, "group": 8}, ["mesh.group=8", "num_groups=4"]),
        ("foe", 8, {"num_groups": 8, "group": 4, "data": 4}, ["16 devices", "8 are to be used"]),
        ("foe", 8, {"num_groups": 4, "num_experts": 36, "expert": 3}, ["is 6 devices", "8 are to be used"]),
        (
            "foe",
            8,
            {"num_groups": 2, "num_experts": 6, "expert": 2},
            ["mesh.expert=2", "num_experts / num_groups", "=3"],
        ),
        ("fsdp", 8, {"group": 2}, ["mesh.group=2", "fsdp"]),
        ("ep", 8, {"num_experts": 32, "group": 2}, ["mesh.group=2", "ep"]),
        ("tp", 8, {"num_experts": 32, "num_kv_heads": 8, "expert": 2}, ["mesh.expert=2", "mesh.layout=tp"]),
        ("tp", 8, {"num_experts": 32, "num_kv_heads": 4, "group": 8}, ["mesh.group=8", "num_kv_heads=4"]),
        ("tp_ep", 8, {"num_experts": 12, "num_kv_heads": 8, "group": 8}, ["mesh.group=8", "num_experts=12"]),
        ("tp_ep", 8, {"num_experts": 9, "num_kv_heads": 9}, ["gcd(num_kv_heads, num_experts)=9", "8 devices"]),
        ("ep", 8, {"num_experts": 6, "expert": 4}, ["mesh.expert=4", "num_experts=6"]),
        ("hp", 8, {"num_ffn_heads": 4, "data": 1}, ["mesh.data=1", "8 devices", "num_ffn_heads=4"]),
        ("hp", 8, {"num_ffn_heads": 12}, ["num_ffn_heads=12", "8 devices"]),
        ("hp", 8, {"num_ffn_heads": 6, "group": 8}, ["mesh.group=8", "num_ffn_heads=6"]),
        ("hp", 8, {"num_ffn_heads": 8, "group": 4, "expert": 2}, ["mesh.expert=2", "mesh.group=4", "mesh.group=8"]),
        ("hp", 8, {"num_ffn_heads": 4, "num_experts": 12, "expert": 2}, ["mesh.expert=2", "experts of a head", "=3"]),
    ],
)
def test_impossible_meshes_name_field_and_way_out(
    kind: str, devices: int, given: dict[str, int], words: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        plan_mesh(kind, devices, **given)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_mesh_larger_than_the_machine_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 16 devices and there are 8"):
        make_mesh(MeshSizes(2, 8, 1))


def test_devices_are_laid_out_with_experts_innermost() -> None:
    mesh = make_mesh(MeshSizes(2, 2, 2))
    ids = [[[device.id for device in row] for row in plane] for plane in mesh.devices]
    assert ids == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_specs_follow_the_layout() -> None:
    foe = Layout.create("foe", num_groups=4, num_devices=8)
    assert foe.spec(("group", "embed", None)) == PartitionSpec("group", "data", None)
    assert foe.spec(("embed", "vocab")) == PartitionSpec("data", "group")
    ep = Layout.create("ep", num_experts=32, num_devices=8)
    assert ep.spec(("group", "experts", "embed", None)) == PartitionSpec(None, "expert", None, None)
    with pytest.raises(ValueError, match="map twice"):
        foe.spec(("group", "vocab"))
    tp = Layout.create("tp", num_experts=32, num_kv_heads=8, num_devices=8)
    assert tp.spec(("group", "embed", "heads", None)) == PartitionSpec(None, None, "group", None)
    assert tp.spec(("group", "experts", "embed", None)) == PartitionSpec(None, "group", None, None)
    wide = Layout.create("foe", num_groups=4, num_experts=32, num_devices=8, expert=2)
    assert wide.spec(("group", "experts", "embed", None)) == PartitionSpec("group", "expert", None, None)


@pytest.mark.parametrize(
    ("changes", "layout", "words"),
    [
        ({"vocab_size": 60}, {"kind": "foe", "num_groups": 8, "num_devices": 8}, ["vocab_size=60", "mesh.group=8"]),
        ({"hidden_size": 36}, {"kind": "foe", "num_groups": 1, "num_devices": 8}, ["hidden_size=36", "mesh.data=8"]),
        ({"vocab_size": 60}, {"kind": "tp", "num_kv_heads": 8, "num_experts": 32}, ["vocab_size=60", "mesh.group=8"]),
        ({"num_kv_heads": 4}, {"kind": "tp", "num_kv_heads": 8, "num_experts": 32}, ["num_kv_heads=4", "mesh.group=8"]),
        ({"num_groups": 8}, {"kind": "tp_ep", "num_kv_heads": 8, "num_experts": 32}, ["num_groups=8", "layout=tp_ep"]),
        (
            {"num_experts": 8},
            {"kind": "foe", "num_groups": 8, "group": 4, "expert": 2},
            ["num_groups=1", "mesh.expert=2"],
        ),
        ({}, {"kind": "hp", "num_ffn_heads": 8}, ["num_ffn_heads=0", "mesh.layout=hp"]),
        (HEADS, {"kind": "ep", "num_experts": 64}, ["num_ffn_heads=8", "mesh.layout=ep", "hp"]),
        (HEADS | {"num_ffn_heads": 4}, {"kind": "hp", "num_ffn_heads": 8}, ["num_ffn_heads=4", "mesh.group=8"]),
        (
            HEADS,
            {"kind": "hp", "num_ffn_heads": 2, "num_experts": 16, "group": 2, "expert": 2, "data": 1},
            ["mesh.expert=2", "mesh.group=2", "mesh.group=8"],
        ),
        (HEADS | {"ffn_head_dim": 9}, {"kind": "hp", "num_ffn_heads": 8, "data": 2}, ["ffn_head_dim=9", "mesh.data=2"]),
        (HEADS | {"hidden_size": 33}, {"kind": "hp", "num_ffn_heads": 8, "data": 2}, ["hidden_size=33", "mesh.data=2"]),
    ],
)
def test_models_that_do_not_fit_a_layout_are_refused(changes: dict, layout: dict, words: list[str]) -> None:
    config = tiny_config(**({"num_groups": layout.get("num_groups", 1)} | changes))
    with pytest.raises(ValueError) as error:
        LanguageModel.abstract(config, Layout.create(**layout))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_parameters_are_born_sharded() -> None:
    model = LanguageModel.create(
        tiny_config(num_layers=1), Layout.create("foe", num_groups=8, num_devices=8), jax.random.key(0)
    )
    gate = model.transformer.layers.experts.gate_SEDF[...]
    assert gate.shape == (1, 8, 4, 32, 16)
    assert {shard.data.shape for shard in gate.addressable_shards} == {(1, 1, 4, 32, 16)}
