"""The cost model against figures worked out by hand, and against the counts that it is built on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tiny import tiny_config, with_heads

from foejax.analysis.accounting import flops_per_token
from foejax.analysis.cost_model.cluster import Cluster, read_cluster
from foejax.analysis.cost_model.predict import collective_rows, predict_step
from foejax.analysis.cost_model.step import Row, Step, decode_step, forward_step, prefill_step
from foejax.analysis.cost_model.traffic import seconds, traffic_of
from foejax.analysis.cost_model.training import predict_training_step
from foejax.analysis.cost_model.work import head_part, layer_parts, weight_bytes
from foejax.analysis.expected_collectives import expected_collectives
from foejax.config import ConfigError, ModelConfig, load_config
from sharding import Layout
from sharding.mesh import LayoutKind, MeshSizes

FOE = load_config("foe_7b").model
MOE = load_config("moe_7b").model
HEADS = with_heads(MOE, 8)
IDEAL = {
    **dict.fromkeys(("matmul_fraction", "attention_fraction", "memory_fraction"), 1.0),
    **dict.fromkeys(("link_fraction", "network_fraction"), 1.0),
    **dict.fromkeys(("collective_latency", "link_latency", "network_latency", "layer_floor"), 0.0),
}
LAYOUTS: dict[str, tuple[ModelConfig, LayoutKind, MeshSizes]] = {
    "foe": (FOE, "foe", MeshSizes(1, 8, 1)),
    "foe with data": (FOE, "foe", MeshSizes(2, 4, 1)),
    "foe, groups of two devices": (FOE, "foe", MeshSizes(1, 4, 2)),
    "ep": (MOE, "ep", MeshSizes(1, 1, 8)),
    "ep with data": (MOE, "ep", MeshSizes(2, 1, 4)),
    "tp": (MOE, "tp", MeshSizes(1, 8, 1)),
    "tp_ep": (MOE, "tp_ep", MeshSizes(1, 8, 1)),
    "data alone": (MOE, "fsdp", MeshSizes(8, 1, 1)),
    "hp": (HEADS, "hp", MeshSizes(1, 8, 1)),
    "hp with data": (HEADS, "hp", MeshSizes(2, 4, 1)),
    "hp, heads of two devices": (with_heads(MOE, 4), "hp", MeshSizes(1, 4, 2)),
    "heads, data alone": (HEADS, "fsdp", MeshSizes(8, 1, 1)),
}


def ideal(text: str, **changes: object) -> Cluster:
    return read_cluster(text, IDEAL | changes)


def test_clusters_are_read_from_names_and_files(tmp_path: Path) -> None:
    cluster = read_cluster("2x8xH100")
    assert (cluster.hosts, cluster.devices_per_host, cluster.devices, cluster.name) == (2, 8, 16, "2x8xH100")
    assert read_cluster("8xh200").accelerator.memory_bandwidth == 4.8e12
    assert cluster.host_names() == ["host0"] * 8 + ["host1"] * 8
    path = tmp_path / "mine.yaml"
    path.write_text("devices_per_host: 4\naccelerator: A100\nlink_fraction: 0.9\n")
    mine = read_cluster(str(path), {"link_fraction": 0.8})
    assert (mine.devices, mine.accelerator.name, mine.link_fraction) == (4, "A100", 0.8)


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("8xH900", {}, "H900 is not known: choose one of A100, H100, H200"),
        ("eight", {}, "write for example 2x8xH100"),
        ("0x8xH100", {}, "hosts=0"),
        ("8xH100", {"link_fraction": 0.0}, "link_fraction: 0 is no share"),
        ("8xH100", {"link_fractoin": 0.5}, "did you mean link_fraction"),
        ("nowhere.yaml", {}, "nowhere.yaml cannot be read"),
    ],
)
def test_clusters_that_cannot_be_are_refused_in_one_sentence(
    text: str, changes: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_cluster(text, changes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_devices_together_do_the_work_of_the_model(name: str) -> None:
    """Sixteen sequences: every part but FoE's and tp's replicated router adds up to the FLOPs of all tokens."""
    model, kind, sizes = LAYOUTS[name]
    layout = Layout.abstract(kind, sizes)
    step = forward_step(16, 256, layout.num_token_shards)
    parts = {part.name: part.flops for part in layer_parts(model, layout, step)}
    flops, tokens = flops_per_token(model, 256), 16 * 256
    for part in ("projections", "attention", "experts"):
        assert 8 * model.num_layers * parts[part] == pytest.approx(getattr(flops, part) * tokens)
    assert 8 * model.num_layers * parts.get("sub-tokens", 0.0) == flops.sub_tokens * tokens
    routed_by = 1 if kind in ("tp_ep", "hp") else sizes.group
    assert 8 * model.num_layers * parts["router"] == pytest.approx(flops.router * tokens * routed_by)
    assert 8 * head_part(model, layout, step).flops == pytest.approx(flops.head * tokens)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_stated_collective_is_in_a_step(name: str) -> None:
    model, kind, sizes = LAYOUTS[name]
    layout = Layout.abstract(kind, sizes)
    step = decode_step(64, 500, layout.num_token_shards)
    per_layer, once = collective_rows(model, layout, step)
    stated = expected_collectives(model, layout, step.device_tokens, logits_rows=step.logits_rows)
    first = [row for row in stated if row.get("branch", 0) == 0]
    assert sum(row["payload_bytes"] * row["count"] for row in first) == sum(
        model.num_layers * sum(row["payload_bytes"] for row in per_layer)
        + sum(row["payload_bytes"] * row["count"] for row in rows)
        for rows in [once]
    )


def test_an_ideal_machine_takes_what_the_arithmetic_says() -> None:
    layout = Layout.abstract("foe", MeshSizes(1, 8, 1))
    predicted = predict_step(FOE, layout, prefill_step(8192, 1), ideal("8xH100"))
    items = {item.name: item for item in predicted.layer}
    merge = items["merge of the groups"]
    assert merge.seconds == pytest.approx(2 * 7 / 8 * 8192 * 2048 * 2 / 450e9)
    assert (merge.bound, merge.bytes) == ("link", 8192 * 2048 * 2)
    attention = 4 * 2 * 128 * (8192 * 8193 / 2) / 989e12
    assert items["attention"].seconds == pytest.approx(attention)
    assert items["experts"].seconds == pytest.approx(6 * 2048 * 1024 * 8192 / 989e12)
    assert predicted.seconds == pytest.approx(
        16 * sum(item.seconds for item in predicted.layer) + sum(item.seconds for item in predicted.once)
    )


def test_decoding_reads_the_touched_experts_and_the_context() -> None:
    layout = Layout.abstract("foe", MeshSizes(1, 8, 1))
    one = {part.name: part for part in layer_parts(FOE, layout, decode_step(1, 1000, 1))}
    expert = 3 * 2048 * 1024 * 2
    assert one["experts"].bytes == pytest.approx(expert + 2 * (4 * 2048 + 2 * 1024))
    many = {part.name: part for part in layer_parts(FOE, layout, decode_step(256, 1000, 1))}
    assert many["experts"].bytes == pytest.approx(8 * expert + 256 * 2 * (4 * 2048 + 2 * 1024), rel=1e-6)
    assert one["attention"].bytes == 2 * 128 * (2 * 1001 + 2 * 2)


@pytest.mark.parametrize(("op", "gigabits_taken"), [("all-reduce", 112), ("all-to-all", 128)])
def test_two_hosts_share_what_leaves_them(op: str, gigabits_taken: int) -> None:
    """64 MB on each of 2 x 4 devices over 1 Gbit/s a host: the figures of tests/test_crossing.py."""
    device = {"name": "toy", "matmul_flops": 1e12, "float32_flops": 1e12, "memory_bandwidth": 1e12, "memory": 1e9}
    links = {"link_bandwidth": 1e12, "network_bandwidth": 1e9 / 8 / 4}
    cluster = Cluster(hosts=2, devices_per_host=4, accelerator=device | links, **IDEAL)  # type: ignore[arg-type]
    layout = Layout.abstract("ep", MeshSizes(1, 1, 8))
    row = {"op": op, "axes": ["expert"], "count": 1, "payload_bytes": 64_000_000}
    took, fabric = seconds(traffic_of(row, layout, cluster.host_names()), cluster)
    assert (took, fabric) == (pytest.approx(gigabits_taken * 8e-3), "network")


def test_a_hierarchical_all_reduce_takes_fewer_steps_between_hosts() -> None:
    layout = Layout.abstract("foe", MeshSizes(1, 8, 2))
    row = {"op": "all-reduce", "axes": ["group"], "count": 1, "payload_bytes": 1000}
    latency = {"network_latency": 5e-6, "link_latency": 1e-6}
    times = []
    for kind in ("ring", "hierarchical"):
        cluster = ideal("2x8xH100", all_reduce=kind, **latency)
        times.append(seconds(traffic_of(row, layout, cluster.host_names()), cluster)[0])
    assert times == [pytest.approx(14 * 5e-6, rel=1e-3), pytest.approx(6 * 1e-6 + 2 * 5e-6, rel=1e-2)]


def test_imbalance_slows_layouts_whose_devices_share_experts() -> None:
    cluster = read_cluster("8xH100")
    shared = {"ep", "tp", "tp_ep", "hp, heads of two devices"}
    for name in ("foe", *sorted(shared), "data alone", "hp", "heads, data alone"):
        model, kind, sizes = LAYOUTS[name]
        layout = Layout.abstract(kind, sizes)
        step = forward_step(16, 512, layout.num_token_shards)
        even, uneven = (predict_step(model, layout, step, cluster, imbalance=value).seconds for value in (1.0, 1.64))
        assert (uneven > even) == (name in shared)


def test_an_exchange_sends_buffers_or_what_is_needed_or_a_copy_for_every_expert() -> None:
    layout = Layout.abstract("ep", MeshSizes(1, 1, 8))
    step = forward_step(8, 1024, 8)
    sent = {}
    for exchange in ("buffers", "needed", "copies"):
        per_layer, _ = collective_rows(MOE, layout, step, exchange=exchange)  # type: ignore[arg-type]
        sent[exchange] = next(row["payload_bytes"] for row in per_layer if row["what"] == "tokens to their experts")
    missed = math.comb(56, 8) / math.comb(64, 8)
    token = 2 * 2048
    assert sent == {
        "buffers": 8 * math.ceil(1.25 * 1024 * (1 - missed)) * token,
        "needed": round(8 * (1 - missed) * 1024 * token),
        "copies": 8 * 1024 * token,
    }


def test_an_exchange_inside_heads_sends_the_sub_tokens_that_came_together() -> None:
    """A prompt of one device is a quarter of what the buffers of four that exchanged heads are for."""
    model, kind, sizes = LAYOUTS["hp, heads of two devices"]
    layout = Layout.abstract(kind, sizes)
    sent = []
    for step in (prefill_step(1024, 8), prefill_step(8 * 1024, 8, length=1024)):
        per_layer, _ = collective_rows(model, layout, step, exchange="copies")
        sent.append(next(row["payload_bytes"] for row in per_layer if row["what"] == "tokens to their experts"))
        heads = [row["payload_bytes"] for row in per_layer if row["axes"] == ["group"]]
        assert heads == [1024 * 2048 * 2] * 2
    assert sent == [1024 * 8 * 512 * 2, 4 * 1024 * 8 * 512 * 2]
    # The device with four times the mean of eight gets half of the full exchange, more than one that sends a quarter.
    uneven, _ = collective_rows(model, layout, prefill_step(1024, 8), exchange="copies", imbalance=4.0)
    assert next(row["payload_bytes"] for row in uneven if row["what"] == "tokens to their experts") == sent[1] // 2


def test_one_long_prompt_is_one_shards_work() -> None:
    step = prefill_step(1000, 4)
    assert step.shards == ((Row(1000, 0),), (), (), ()) and step.device_tokens == 1000
    assert prefill_step(1000, 2, length=300).shards == (
        (Row(300, 0), Row(300, 0)),
        (Row(300, 0), Row(100, 0)),
    )
    with pytest.raises(ValueError, match="at least one token"):
        prefill_step(0, 1)


def test_floor_and_overlap() -> None:
    layout, step = Layout.abstract("foe", MeshSizes(1, 8, 1)), prefill_step(4096, 1)
    plain = predict_step(FOE, layout, step, read_cluster("8xH100"))
    hidden = predict_step(FOE, layout, step, read_cluster("8xH100", {"overlap": 1.0}))
    shorter = plain.communication_seconds - sum(item.seconds for item in plain.once if item.communicates)
    assert plain.seconds - hidden.seconds == pytest.approx(shorter)
    held = predict_step(FOE, layout, step, read_cluster("8xH100", {"layer_floor": 1.0}))
    assert held.layer_seconds == 1.0


def test_a_step_must_fit_the_layout_and_the_cluster() -> None:
    layout = Layout.abstract("ep", MeshSizes(1, 1, 8))
    with pytest.raises(ValueError, match="mesh of 8 devices on a cluster of 16"):
        predict_step(MOE, layout, prefill_step(8, 8), read_cluster("2x8xH100"))
    with pytest.raises(ValueError, match="2 token shards on a layout of 8"):
        predict_step(MOE, layout, prefill_step(8, 2), read_cluster("8xH100"))
    with pytest.raises(ValueError, match="imbalance=0.5"):
        predict_step(MOE, layout, prefill_step(8, 8), read_cluster("8xH100"), imbalance=0.5)
    with pytest.raises(ValueError, match="mesh.expert=16 would cross hosts"):
        read_cluster("2x8xH100").check_mesh("foe", MeshSizes(1, 1, 16))


def test_training_computes_three_times_the_forward_pass() -> None:
    config = load_config("foe_7b", {"training.remat": "none"})
    layout = Layout.abstract("foe", MeshSizes(1, 8, 1))
    cluster = ideal("8xH100")
    step = forward_step(8, 2048, 1)
    forward = predict_step(config.model, layout, step, cluster)
    training = predict_training_step(config, layout, cluster)
    computing = [sum(item.flops for item in prediction.layer) for prediction in (forward, training)]
    assert computing[1] == pytest.approx(3 * computing[0])
    assert training.layers == 6 * config.model.num_layers
    again = predict_training_step(load_config("foe_7b"), layout, cluster)
    assert sum(item.flops for item in again.layer) == pytest.approx(4 * computing[0])


def test_weights_of_a_device() -> None:
    """Every parameter but the norms, on one device."""
    model = tiny_config(num_groups=1)
    attention = 32 * 8 * (2 * 16 + 2 * 8)
    experts = 32 * 3 * 32 * 16
    expected = 4 * (3 * (attention + experts + 32 * 32) + 2 * 64 * 32)
    assert weight_bytes(model, Layout.abstract("fsdp", MeshSizes(1, 1, 1))) == expected
    assert Step(((Row(3, 4),), ())).most_keys == 7
    heads = with_heads(model, 8)
    shared = 4 * (3 * (attention + 2 * 32 * 32) + 2 * 64 * 32)
    owned = 4 * 3 * (32 * 2 * 32 * 16 + 32 * 32)
    assert weight_bytes(heads, Layout.abstract("hp", MeshSizes(1, 4, 1))) == shared + owned / 4
