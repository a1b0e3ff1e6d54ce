"""What the model computes with packed text, and what its compiled programs send between devices."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import packed_batch, plain_batch, relative_error, tiny_config, tiny_model

from foejax.models import LanguageModel
from sharding import Layout, LayoutKind
from sharding.audit import Collective, audit, is_token_sized, summarize
from sharding.races import find_races


def test_documents_do_not_see_each_other_and_flat_tokens_are_one_row() -> None:
    model = tiny_model(tiny_config(num_layers=2))
    batch = packed_batch()
    packed = np.asarray(jax.jit(model.logits)(batch)).reshape(8, 16, -1)
    changed = dict(batch, tokens=np.where(batch["segment_ids"] == 1, 63 - batch["tokens"], batch["tokens"]))
    other = np.asarray(jax.jit(model.logits)(changed)).reshape(8, 16, -1)
    first = batch["segment_ids"] == 1
    assert relative_error(other[~first], packed[~first]) == 0
    assert relative_error(other[first], packed[first]) > 0.1

    distinct = batch["segment_ids"] + 10 * np.arange(8, dtype=np.int32)[:, None] * (batch["segment_ids"] > 0)
    flat = {"tokens": batch["tokens"], "positions": batch["positions"], "segment_ids": distinct}
    ragged = jax.jit(model.logits)({name: value.reshape(1, -1) for name, value in flat.items()})
    live = (batch["segment_ids"] > 0).reshape(-1)
    assert relative_error(np.asarray(ragged)[live], packed.reshape(128, -1)[live]) <= 1e-5


def test_rows_that_do_not_fill_the_mesh_are_padded_and_cut() -> None:
    config = tiny_config(num_layers=2)
    tokens = np.random.default_rng(0).integers(0, 64, (3, 5))
    expected = jax.jit(tiny_model(config).logits)(plain_batch(tokens))
    layout = Layout.create("foe", num_groups=8, data=2, group=4)
    got, trace = jax.jit(lambda batch: tiny_model(config).with_layout(layout).logits(batch, record_routing=True))(
        plain_batch(tokens)
    )
    assert relative_error(got, expected) <= 1e-5
    assert trace.experts.shape == (2, 8, 15, 1)


def test_rope_scaling_divides_positions() -> None:
    tokens = np.random.default_rng(0).integers(0, 64, (2, 8))
    batch = plain_batch(tokens)
    plain = tiny_model(tiny_config(num_layers=2))
    scaled = tiny_model(tiny_config(num_layers=2, rope_scaling_factor=2.0))
    stretched = dict(batch, positions=2 * batch["positions"])
    assert relative_error(jax.jit(scaled.logits)(stretched), jax.jit(plain.logits)(batch)) <= 1e-5
    assert relative_error(jax.jit(scaled.logits)(batch), jax.jit(plain.logits)(batch)) > 1e-3


def test_the_form_for_inference_computes_the_same_wherever_its_parts_are() -> None:
    model, batch = tiny_model(tiny_config(num_layers=2)), plain_batch(np.random.default_rng(0).integers(0, 64, (4, 8)))
    expected, routing = jax.jit(partial(model.logits, record_routing=True))(batch)
    split = model.with_layout(Layout.create("foe", num_groups=8, data=2, group=4, shard_params=True)).for_inference()
    got, trace = jax.jit(partial(split.logits, record_routing=True))(batch)
    assert relative_error(got, expected) <= 1e-5
    np.testing.assert_array_equal(trace.experts, routing.experts)
    again = split.for_inference()
    assert jax.tree.structure(nnx.state(again.transformer)) == jax.tree.structure(nnx.state(split.transformer))


def test_the_form_for_inference_copies_no_layers_parameters() -> None:
    config = tiny_config(num_layers=2, num_experts=64, expert_hidden_size=64)
    model, batch = tiny_model(config), plain_batch(np.zeros((1, 2), np.int32))
    experts = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model.transformer.layers.experts))) // 2

    def temporaries(model: LanguageModel) -> int:
        compiled = jax.jit(model.logits).lower(batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(model.for_inference()) < experts / 2 < experts < temporaries(model)


LAYERS, ROWS, LENGTH, WIDTH = 3, 8, 64, 32


@cache
def collectives(layout: Layout, groups: int, program: str, remat: str = "none") -> list[Collective]:
    model = LanguageModel.abstract(
        tiny_config(num_groups=groups, dtype="bfloat16", num_layers=LAYERS, vocab_size=256), layout
    )
    graphdef, params, rest = nnx.split(model, nnx.Param, nnx.Variable)
    batch = {
        name: jax.ShapeDtypeStruct((ROWS, LENGTH), value.dtype, sharding=layout.sharding(layout.batch_spec(None)))
        for name, value in packed_batch().items()
    }

    def forward(params: Any, rest: Any, batch: Any) -> Any:
        return nnx.merge(graphdef, params, rest).logits(batch)

    def train(params: Any, rest: Any, batch: Any) -> Any:
        return jax.grad(lambda p: nnx.merge(graphdef, p, rest).loss(batch, remat=remat)[0])(params)

    function = {"forward": forward, "train": train}[program]
    lowered = jax.jit(function).lower(params, rest, batch)
    compiled = lowered.compile()
    assert not find_races(compiled.as_text() or "")
    return audit(lowered, layout.mesh, compiled=compiled)


def token_sized(found: list[Collective], ops: tuple[str, ...], axes: tuple[str, ...]) -> list[Collective]:
    """Those as large as all tokens of the batch: in `ep` a device's buffers have one slot per token and device."""
    return [c for c in found if c.op in ops and c.axes == axes and is_token_sized(c, ROWS * LENGTH, WIDTH)]


def test_foe_forward_meets_once_a_layer_and_once_at_the_end() -> None:
    found = collectives(Layout.create("foe", num_groups=8, num_devices=8), 8, "forward")
    reductions = token_sized(found, ("all-reduce", "reduce-scatter"), ("group",))
    assert sum(c.count for c in reductions) == LAYERS + 1
    assert {c.dtype for c in reductions} == {"bf16"}
    assert not [c for c in found if c.op == "all-to-all"]
    assert not [c for c in found if c.axes != ("group",)]
    assert all(c.payload_bytes == ROWS * LENGTH * WIDTH * 2 for c in reductions)


@pytest.mark.xdist_group("remat")
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_repeats_no_merge(remat: str) -> None:
    layout = Layout.create("foe", num_groups=8, num_devices=8)
    counts = []
    for policy in ("none", remat):
        found = token_sized(
            collectives(layout, 8, "train", policy), ("all-reduce", "reduce-scatter", "all-gather"), ("group",)
        )
        counts.append(sorted((c.op, c.count) for c in found))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", ["tp_ep", pytest.param("tp", marks=pytest.mark.slow)])
def test_remat_repeats_no_collective_where_heads_are_split(kind: LayoutKind) -> None:
    layout = Layout.create(kind, num_experts=32, num_kv_heads=8, num_devices=8)
    whole, recomputed = (summarize(collectives(layout, 1, "train", remat)) for remat in ("none", "full"))
    assert [(row["op"], row["count"]) for row in whole] == [(row["op"], row["count"]) for row in recomputed]


def test_expert_parallel_forward_has_two_token_sized_exchanges_a_layer() -> None:
    found = collectives(Layout.create("ep", num_experts=32, num_devices=8), 1, "forward")
    exchanges = token_sized(found, ("all-to-all",), ("expert",))
    assert sum(c.count for c in exchanges) == 2 * LAYERS
    assert {c.dtype for c in exchanges} == {"bf16"}
    assert not token_sized(found, ("all-reduce", "reduce-scatter", "all-gather"), ("expert",))
    small = [c for c in found if c.op == "all-to-all" and c not in exchanges]
    assert small, "weights and expert indices travel apart"


def test_a_group_on_two_devices_exchanges_tokens_between_them_alone() -> None:
    found = collectives(Layout.create("foe", num_groups=8, num_experts=32, group=4, expert=2), 8, "train")
    exchanges = [c for c in found if c.op == "all-to-all"]
    assert exchanges and {c.axes for c in exchanges} == {("expert",)}
    assert {c.axes for c in found if c.branches} == {("expert",)}, "where devices may differ only those of a group meet"
    assert any(c.axes == ("group",) and is_token_sized(c, ROWS * LENGTH // 2, WIDTH) for c in found)
