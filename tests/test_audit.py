"""The auditor on programs compiled here for eight devices, and the formulas its figures are held against."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding import audit as auditor
from sharding import formulas, forward_pass

AXES = ("data", "group", "expert")
TOKENS, WIDTH, OUTER, INNER = 16, 32, 3, 2
LAYERS = OUTER * INNER


def make_mesh(data: int, group: int, expert: int) -> Mesh:
    return jax.make_mesh((data, group, expert), AXES, axis_types=(AxisType.Auto,) * 3)


def varying(x: jax.Array, *axes: str) -> jax.Array:
    return jax.lax.pcast(x, axes, to="varying")


# --- programs compiled here ------------------------------------------------------------------------------------------


def toy_forward(mesh: Mesh):
    """A loss over two nested scans of rematerialised layers, with a collective of every kind on its own axis."""
    ring = [(i, (i + 1) % mesh.shape["expert"]) for i in range(mesh.shape["expert"])]

    def layer(x_TD: jax.Array, w_DD: jax.Array) -> tuple[jax.Array, jax.Array]:
        with jax.named_scope("attention"):
            y_TD = jnp.tanh(x_TD @ jax.lax.all_gather(w_DD, "data", axis=0, tiled=True))
        with jax.named_scope("merge"):
            y_TD = varying(jax.lax.psum(y_TD, "group"), "group")
        y_TD = jax.lax.all_to_all(y_TD, "expert", split_axis=0, concat_axis=0, tiled=True)
        y_TD = jax.lax.ppermute(y_TD, "expert", ring)
        largest = jnp.abs(jax.lax.stop_gradient(y_TD).astype(jnp.float32)).max()
        return x_TD + y_TD, jax.lax.pmax(largest, AXES)

    def body(x_TD: jax.Array, w_OIDD: jax.Array) -> jax.Array:
        def outer(x_TD: jax.Array, w_IDD: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jax.lax.scan(jax.checkpoint(layer), x_TD, w_IDD)

        x_TD, largest = jax.lax.scan(outer, varying(x_TD, "group"), w_OIDD)
        x_TD = jax.lax.psum_scatter(x_TD, "group", scatter_dimension=0, tiled=True)
        return jax.lax.psum((x_TD.astype(jnp.float32) ** 2).sum(), AXES) + largest.sum()

    return jax.shard_map(body, mesh=mesh, in_specs=(P(("data", "expert")), P(None, None, "data")), out_specs=P())


def toy_arguments(mesh: Mesh, dtype) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    tokens = TOKENS * mesh.shape["data"] * mesh.shape["expert"]
    return (
        jax.ShapeDtypeStruct((tokens, WIDTH), dtype),
        jax.ShapeDtypeStruct((OUTER, INNER, WIDTH, WIDTH), dtype),
    )


def rows_of(function, mesh: Mesh, *arguments) -> list[dict]:
    return auditor.summarize(auditor.audit(jax.jit(function).lower(*arguments), mesh))


def row(op: str, axes: list[str], count: int, elements: int, factor: float, dtype: str, compiled: str | None = None):
    """An expected row; `factor` is wire bytes over payload bytes."""
    payload = elements * {"bf16": 2, "f32": 4}[dtype]
    return {
        "op": op,
        "axes": axes,
        "count": count,
        "payload_bytes": payload,
        "wire_bytes": round(factor * payload),
        "dtype": dtype,
        "compiled_dtype": compiled or dtype,
    }


@pytest.mark.parametrize(("dtype", "written"), [(jnp.bfloat16, "bf16"), (jnp.float32, "f32")])
def test_nested_loops_are_multiplied_out_and_dtypes_are_as_written(dtype, written: str) -> None:
    mesh = make_mesh(2, 2, 2)
    tokens, shard = TOKENS * WIDTH, WIDTH * WIDTH // 2
    # the CPU backend has no bf16 collectives
    assert rows_of(toy_forward(mesh), mesh, *toy_arguments(mesh, dtype)) == [
        row("all-gather", ["data"], LAYERS, shard, 1, written, "f32"),
        row("all-reduce", ["data", "group", "expert"], LAYERS + 1, 1, 7 / 4, "f32"),
        row("all-reduce", ["group"], LAYERS, tokens, 1, written, "f32"),
        row("all-to-all", ["expert"], LAYERS, tokens, 1 / 2, written, "f32"),
        row("collective-permute", ["expert"], LAYERS, tokens, 1, written, "f32"),
        row("reduce-scatter", ["group"], 1, tokens, 1 / 2, written, "f32"),
    ]


def test_the_gradient_of_a_rematerialised_program() -> None:
    mesh = make_mesh(2, 2, 2)
    gradient = jax.grad(toy_forward(mesh), argnums=(0, 1))
    found = auditor.audit(jax.jit(gradient).lower(*toy_arguments(mesh, jnp.bfloat16)), mesh)
    counts = {(c["op"], *c["axes"]): c["count"] for c in auditor.summarize(found)}
    assert counts == {
        ("all-gather", "data"): 2 * LAYERS,  # forward and recomputed
        ("all-gather", "group"): 1,  # transpose of the reduce-scatter
        ("all-reduce", "group"): 2 * LAYERS + 1,  # forward, transposes of the casts to varying
        ("all-reduce", "group", "expert"): LAYERS,  # weights are the same on both axes
        ("all-to-all", "expert"): 2 * LAYERS,
        ("collective-permute", "expert"): 2 * LAYERS,
        ("reduce-scatter", "data"): LAYERS,  # transpose of the all-gather
        ("reduce-scatter", "group"): 1,
    }
    assert {c.dtype for c in found} == {"bf16"} and all(c.written for c in found)
    assert any("rematted_computation/attention" in c.op_name for c in found)


def test_axes_of_size_one_leave_no_collective_and_token_sized_ones_are_told_apart() -> None:
    mesh = make_mesh(1, 8, 1)
    found = auditor.audit(jax.jit(toy_forward(mesh)).lower(*toy_arguments(mesh, jnp.bfloat16)), mesh)
    assert {c.axes for c in found} == {("group",)}
    large = [c for c in found if auditor.is_token_sized(c, TOKENS, WIDTH)]
    assert {(c.op, c.count) for c in large} == {("all-reduce", LAYERS), ("reduce-scatter", 1)}
    assert {c.elements for c in found if c not in large} == {1}
    sizes = forward_pass.Sizes(LAYERS, TOKENS, WIDTH, "bf16")
    expected = forward_pass.foe_rows(sizes, 8, last="reduce-scatter", last_tokens=TOKENS)
    compared = forward_pass.compare_with_audit(expected, auditor.summarize(found))
    assert [r["count"] for r in compared] == [LAYERS, 1, LAYERS + 1]
    assert [r["expected_count"] for r in compared] == [LAYERS, 1, 0], "no formula knows the scalars"
    assert compared[0]["wire_bytes"] == 2 * 7 / 8 * TOKENS * WIDTH * 2


def test_loops_of_unknown_length_branches_and_combined_reductions() -> None:
    mesh = make_mesh(1, 4, 2)

    def swap_and_sum(x_TD: jax.Array) -> jax.Array:
        return jax.lax.psum(jax.lax.ppermute(x_TD, "expert", [(0, 1), (1, 0)]), "expert")

    def step(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_TD, index = carry
        narrow_TD = varying(jax.lax.psum(x_TD, "group"), "group")
        wide_TD = varying(jax.lax.psum((2 * x_TD).astype(jnp.float32), "group"), "group")
        both_TD = narrow_TD + wide_TD.astype(x_TD.dtype)
        chosen_TD = jax.lax.cond(index % 2 == 1, swap_and_sum, lambda x: jax.lax.psum(2 * x, "expert"), x_TD)
        return both_TD + varying(chosen_TD, "expert"), index + 1

    def body(x_TD: jax.Array, limit: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda carry: carry[1] < limit, step, (varying(x_TD, "group"), jnp.int32(0)))[0]

    program = jax.shard_map(body, mesh=mesh, in_specs=(P("expert"), P()), out_specs=P(("group", "expert")))
    x = jax.ShapeDtypeStruct((2 * TOKENS, WIDTH), jnp.bfloat16)
    found = auditor.audit(jax.jit(program).lower(x, jax.ShapeDtypeStruct((), jnp.int32)), mesh)
    assert all(c.in_loop_of_unknown_length and c.count == 1 for c in found)

    over_group = [c for c in found if c.axes == ("group",)]
    assert sum(c.payload_bytes for c in over_group) == TOKENS * WIDTH * (2 + 4)
    assert {dtype for c in over_group for dtype in c.dtype.split("+")} == {"bf16", "f32"}

    branches: dict[str, list[str]] = {}
    for c in found:
        if c.branches:
            branches.setdefault(c.branches[-1].rpartition(":")[2], []).append(c.op)
    assert branches == {"0": ["all-reduce"], "1": ["collective-permute", "all-reduce"]}

    rows = auditor.summarize(found)
    assert all(r["per_iteration"] for r in rows) and sum("branch" in r for r in rows) == 3
    assert "count per iteration" in auditor.format_table(rows)


def test_equal_sizes_in_different_dtypes_are_matched_by_scope() -> None:
    mesh = make_mesh(1, 1, 8)

    def body(x_TD: jax.Array) -> jax.Array:
        with jax.named_scope("values"):
            values_TD = jax.lax.all_gather(x_TD, "expert", axis=0, tiled=True).astype(jnp.float32)
        with jax.named_scope("scores"):
            scores_TD = jax.lax.all_gather(jnp.exp(x_TD.astype(jnp.float32)), "expert", axis=0, tiled=True)
        return (values_TD * scores_TD).sum(0)[None]

    program = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("expert"), out_specs=P("expert")))
    lowered = program.lower(jax.ShapeDtypeStruct((64, WIDTH), jnp.bfloat16))
    compiled = lowered.compile()
    found = auditor.audit(lowered, mesh, compiled=compiled)
    assert {c.op_name.split("/")[-2]: c.dtype for c in found} == {"values": "bf16", "scores": "f32"}
    assert {c.compiled_dtype for c in auditor.audit_text(compiled.as_text(), mesh)} == {"f32"}


def test_uneven_groups_and_collectives_nobody_wrote() -> None:
    mesh = make_mesh(1, 8, 1)
    halves = [[0, 1, 2, 3], [4, 5, 6, 7]]
    in_halves = jax.shard_map(
        lambda x: jax.lax.psum(x, "group", axis_index_groups=halves),
        mesh=mesh,
        in_specs=P("group"),
        out_specs=P("group"),
        check_vma=False,
    )
    x = jax.ShapeDtypeStruct((64, WIDTH), jnp.bfloat16)
    (half,) = auditor.audit(jax.jit(in_halves).lower(x), mesh)
    assert (half.axes, half.group_size, half.dtype) == (auditor.UNKNOWN_AXES, 4, "bf16")

    total = jax.jit(lambda x: x.astype(jnp.float32).sum(), in_shardings=NamedSharding(mesh, P("group")))
    (inserted,) = auditor.audit(total.lower(x), mesh)
    assert (inserted.op, inserted.axes, inserted.written) == ("all-reduce", ("group",), False)


# --- rows and formulas -----------------------------------------------------------------------------------------------


def test_the_table_adds_up() -> None:
    rows = [row("all-reduce", ["group"], 5, 1024, 7 / 4, "bf16", "f32")]
    lines = auditor.format_table(rows).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "all-reduce", "group", "5", "2.0 KiB", "3.5 KiB", "17.5 KiB", "bf16", "f32",
    ]  # fmt: skip
    assert lines[-1].split("|")[6].strip() == "17.5 KiB" and len({len(line) for line in lines}) == 1
    assert auditor.format_table([]).splitlines()[-1].split("|")[1].strip() == "total"


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_an_all_reduce_costs_a_reduce_scatter_and_an_all_gather(devices: int) -> None:
    whole = 24.0
    parts = formulas.ring_egress("reduce-scatter", whole, devices) + formulas.ring_egress(
        "all-gather", whole / devices, devices
    )
    assert formulas.ring_egress("all-reduce", whole, devices) == pytest.approx(parts)


def test_egress_of_unknown_ops_and_empty_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="op='gossip' is not a collective"):
        formulas.ring_egress("gossip", 1, 2)
    with pytest.raises(ValueError, match="group_size=0"):
        formulas.ring_egress("all-reduce", 1, 0)
    assert formulas.ring_egress("collective-permute", 8, 1) == 0


@pytest.mark.parametrize(("experts", "chosen", "devices"), [(8, 2, 4), (6, 3, 2), (8, 1, 8), (9, 9, 3)])
def test_expected_destinations_by_enumeration(experts: int, chosen: int, devices: int) -> None:
    block = experts // devices
    choices = list(itertools.combinations(range(experts), chosen))
    counted = np.mean([len({expert // block for expert in choice}) for choice in choices])
    assert formulas.expected_destinations(experts, chosen, devices) == pytest.approx(counted)


def test_experts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="num_experts=10 .* num_devices=4"):
        formulas.expected_destinations(10, 2, 4)
    with pytest.raises(ValueError, match="experts_per_token=9"):
        formulas.expected_destinations(8, 9, 4)


def test_per_device_terms_of_the_paper_setting() -> None:
    """k = G = H = 8: FoE and an expert-parallel MoE send the same bytes; de-duplication makes the MoE send fewer."""
    setting = {"num_layers": 16, "tokens_per_device": 1024, "width": 2048, "num_devices": 8, "num_experts": 64}
    table = formulas.communication_table(**setting, num_groups=8, experts_per_token=8)
    sent: dict[str, int] = {}
    for entry in table:
        sent[entry["layout"]] = sent.get(entry["layout"], 0) + entry["total_wire_bytes"]
    token_bytes = 1024 * 2048 * 2
    last_merge = 7 / 8 * 8 * token_bytes
    assert sent["foe"] - last_merge == sent["moe ep"] == 16 * 2 * 8 * 7 / 8 * token_bytes
    assert sent["moe tp"] == 2 * sent["moe ep"]
    assert sent["moe tp_ep"] == pytest.approx(sent["moe tp"] / 2 + sent["moe ep, de-duplicated"])
    assert sent["moe ep, de-duplicated"] / sent["moe ep"] == pytest.approx(5.44 / 8, abs=1e-3)

    assert sent["mhlmoe hp"] == sent["moe ep"] / 8, "whatever k is"

    fewer = formulas.communication_table(**setting, num_groups=2, experts_per_token=8)
    assert fewer[0]["payload_elements"] == 2 * 1024 * 2048, "four replicas share the tokens"
    alone = formulas.communication_table(**setting | {"num_devices": 1}, num_groups=8, experts_per_token=8)
    assert {entry["count"] for entry in alone} == {entry["total_wire_bytes"] for entry in alone} == {0}
    with pytest.raises(ValueError, match="num_groups=3 and num_devices=8"):
        formulas.communication_table(**setting, num_groups=3, experts_per_token=9)
