"""The auditor of compiled collectives: HLO syntaxes, loops and branches, dtypes as written, and the formulas."""

from __future__ import annotations

import dataclasses
import itertools
import json
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding import audit as auditor
from sharding import formulas, hlo, stablehlo

AXES = ("data", "group", "expert")
TOKENS, WIDTH, OUTER, INNER = 16, 32, 3, 2
LAYERS = OUTER * INNER


def make_mesh(data: int, group: int, expert: int) -> Mesh:
    return jax.make_mesh((data, group, expert), AXES, axis_types=(AxisType.Auto,) * 3)


def varying(x: jax.Array, *axes: str) -> jax.Array:
    return jax.lax.pcast(x, axes, to="varying")


# --- groups of devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}, dimensions={0}", ((0, 1), (2, 3))),
        ("{{0, 4}, {1, 5}}", ((0, 4), (1, 5))),
        ("{}, to_apply=%add", ()),
        ("[2,4]<=[8], dimensions={0}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("[4,2]<=[2,2,2]T(0,2,1), x", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['data'=2,'group'=2,'expert'=2] {'group'}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=4] {'a','b'}, use", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['x'=2,'y'=2], device_ids=(0,2,1,3) {'y'}", ((0, 2), (1, 3))),
    ],
)
def test_every_syntax_of_replica_groups_is_read(text: str, groups: hlo.Groups) -> None:
    assert hlo.parse_replica_groups(f", channel_id=1, replica_groups={text}") == groups


def test_an_unknown_syntax_of_replica_groups_is_refused() -> None:
    with pytest.raises(hlo.HloError, match="no syntax"):
        hlo.parse_replica_groups("replica_groups=<<0,1>>")


@pytest.mark.parametrize(
    ("line", "groups"),
    [
        # ids are device positions
        ("all-reduce(%x), channel_id=1, replica_groups={{0,2},{1,3}}, use_global_device_ids=true", ((0, 2), (1, 3))),
        ("all-reduce(%x), channel_id=1, replica_groups={}, use_global_device_ids=true", ((0, 1, 2, 3),)),
        # ids are replicas; a channel joins all partitions of a replica, no channel keeps partitions apart
        ("all-reduce(%x), channel_id=1, replica_groups={{0},{1}}", ((0, 1), (2, 3))),
        ("all-reduce(%x), replica_groups={{0,1}}", ((0, 2), (1, 3))),
        ("all-reduce(%x), replica_groups={}", ((0, 2), (1, 3))),
        # ids are partitions
        ("all-to-all(%x), channel_id=1, replica_groups={{0,1}}", ((0, 1),)),
        ("collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,1}}", ((0, 1),)),
        ("collective-permute(%x), channel_id=1, source_target_pairs={}", ()),
    ],
)
def test_channels_decide_what_the_ids_mean(line: str, groups: hlo.Groups) -> None:
    instruction = hlo.parse_instruction(f"  %op = f32[4]{{0}} {line}")
    assert instruction is not None
    assert hlo.device_groups(instruction, num_partitions=2, num_replicas=2) == groups


@pytest.mark.parametrize(
    ("sizes", "groups", "axes"),
    [
        ((2, 2, 2), ((0, 4), (1, 5), (2, 6), (3, 7)), ("data",)),
        ((2, 2, 2), ((2, 0), (1, 3), (4, 6), (5, 7)), ("group",)),
        ((2, 2, 2), ((0, 1, 2, 3), (4, 5, 6, 7)), ("group", "expert")),
        ((2, 2, 2), ((0, 1, 4, 5), (2, 3, 6, 7)), ("data", "expert")),
        ((1, 8, 1), (tuple(range(8)),), ("group",)),
        ((1, 4, 2), (tuple(range(8)),), ("group", "expert")),
        ((1, 8, 1), ((0, 1), (2, 3), (4, 5), (6, 7)), ("?",)),
        ((2, 2, 2), ((0, 7), (1, 6), (2, 5), (3, 4)), ("?",)),
    ],
)
def test_groups_name_the_mesh_axes_they_span(sizes: tuple[int, int, int], groups: hlo.Groups, axes: tuple) -> None:
    assert auditor.axes_of_groups(groups, make_mesh(*sizes)) == axes


def test_pairs_name_the_axes_that_some_device_moves_along() -> None:
    mesh = make_mesh(2, 2, 2)
    assert auditor.axes_of_pairs(((0, 1), (1, 0), (6, 7)), mesh) == ("expert",)
    assert auditor.axes_of_pairs(((0, 2), (1, 2)), mesh) == ("group", "expert")


# --- programs as GPUs compile them -----------------------------------------------------------------------------------

GPU_PROGRAM = textwrap.dedent(
    """\
    HloModule jit_f, is_scheduled=true, entry_computation_layout={(bf16[8,16]{1,0})->bf16[8,16]{1,0}}, num_partitions=8

    %add (a: bf16[], b: bf16[]) -> bf16[] {
      %a = bf16[] parameter(0)
      %b = bf16[] parameter(1)
      ROOT %sum = bf16[] add(%a, %b)
    }

    %async_computation (param.9: bf16[8,16]) -> bf16[2,16] {
      %param.9 = bf16[8,16]{1,0} parameter(0)
      ROOT %rs = bf16[2,16]{1,0} reduce-scatter(%param.9), channel_id=4, replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true, dimensions={0}, to_apply=%add, metadata={op_name="jit(f)/last merge (mean)/reduce_scatter"}
    }

    %body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
      %p = (s32[], bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
      %i = s32[] get-tuple-element(%p), index=0
      %x = bf16[8,16]{1,0} get-tuple-element(%p), index=1
      %ar-start = (bf16[8,16]{1,0}, bf16[8,16]{1,0}, u32[], u32[]) all-reduce-start(%x), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true, to_apply=%add, backend_config={"collective_backend_config":{"is_sync":false}}
      %ar-done = bf16[8,16]{1,0} all-reduce-done(%ar-start)
      ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%i, %ar-done)
    }

    %cond (p.1: (s32[], bf16[8,16])) -> pred[] {
      %p.1 = (s32[], bf16[8,16]{1,0}) parameter(0)
      ROOT %lt = pred[] constant(true)
    }

    %yes (q: bf16[8,16]) -> bf16[8,16] {
      %q = bf16[8,16]{1,0} parameter(0)
      ROOT %a2a = bf16[8,16]{1,0} all-to-all(%q), channel_id=7, replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
    }

    %no (q.1: bf16[8,16]) -> bf16[8,16] {
      %q.1 = bf16[8,16]{1,0} parameter(0)
      ROOT %alone = bf16[8,16]{1,0} all-reduce(%q.1), channel_id=8, replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, use_global_device_ids=true, to_apply=%add
    }

    %inner (r: bf16[8,16]) -> bf16[8,16] {
      %r = bf16[8,16]{1,0} parameter(0)
      ROOT %pick = bf16[8,16]{1,0} conditional(%flag, %r, %r), true_computation=%yes, false_computation=%no
    }

    ENTRY %main (x.1: bf16[8,16], w.1: f32[4], flag: pred[]) -> bf16[8,16] {
      %x.1 = bf16[8,16]{1,0} parameter(0)
      %w.1 = f32[4]{0} parameter(1)
      %zero = s32[] constant(0)
      %init = (s32[], bf16[8,16]{1,0}) tuple(%zero, %x.1)
      %ag-start = ((bf16[8,16]{1,0}, f32[4]{0}), (bf16[32,16]{1,0}, /*index=3*/f32[16]{0})) all-gather-start(%x.1, /*index=1*/%w.1), channel_id=2, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}, use_global_device_ids=true
      %ag-done = (bf16[32,16]{1,0}, f32[16]{0}) all-gather-done(%ag-start)
      %loop = (s32[], bf16[8,16]{1,0}) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
      %loop2 = (s32[], bf16[8,16]{1,0}) while(%loop), condition=%cond, body=%body
      %y = bf16[8,16]{1,0} get-tuple-element(%loop2), index=1
      %rs-start = ((bf16[8,16]{1,0}), bf16[2,16]{1,0}) async-start(%y), calls=%async_computation
      %rs-update = ((bf16[8,16]{1,0}), bf16[2,16]{1,0}) async-update(%rs-start), calls=%async_computation
      %rs-done = bf16[2,16]{1,0} async-done(%rs-update), calls=%async_computation
      %token = token[] after-all()
      %send = (bf16[2,16]{1,0}, u32[], token[]) send(%rs-done, %token), channel_id=9, frontend_attributes={_xla_send_recv_source_target_pairs={{0,1},{1,0}}}
      ROOT %out = bf16[8,16]{1,0} call(%y), to_apply=%inner
    }
    """  # noqa: E501
)


def test_a_gpu_program_is_read() -> None:
    found = auditor.audit_text(GPU_PROGRAM, make_mesh(1, 4, 2))
    shown = [(c.op, c.axes, c.count, c.payload_bytes, c.wire_bytes, c.dtype) for c in found]
    gathered = 8 * 16 * 2 + 4 * 4
    assert shown == [
        ("all-gather", ("group",), 1, gathered, 3 * gathered, "bf16+f32"),
        ("all-reduce", ("group",), 5, 256, 384, "bf16"),
        ("all-reduce", ("group",), 1, 256, 384, "bf16"),
        ("reduce-scatter", ("group",), 1, 256, 192, "bf16"),
        ("collective-permute", ("expert",), 1, 64, 64, "bf16"),
        ("all-to-all", ("expert",), 1, 256, 128, "bf16"),
    ]
    assert [c.in_loop_of_unknown_length for c in found] == [False, False, True, False, False, False]
    assert found[3].op_name == "jit(f)/last merge (mean)/reduce_scatter"
    assert found[-1].branches == ("pick:1",), "branch 1 of a predicate is true"
    assert found[1].total_wire_bytes == 5 * 384 and found[1].total_payload_bytes == 5 * 256


NESTED_LOOPS = textwrap.dedent(
    """\
    HloModule nested, num_partitions=8

    %cond (c: f32[4]) -> pred[] {
      %c = f32[4]{0} parameter(0)
      ROOT %norm = f32[4]{0} all-reduce(%c), channel_id=1, replica_groups=[1,8]<=[8], use_global_device_ids=true
    }

    %inner (b: f32[4]) -> f32[4] {
      %b = f32[4]{0} parameter(0)
      ROOT %turn = f32[4]{0} collective-permute(%b), channel_id=2, source_target_pairs={{0,1},{1,0}}
    }

    %outer (a: f32[4]) -> f32[4] {
      %a = f32[4]{0} parameter(0)
      ROOT %known = f32[4]{0} while(%a), condition=%cond, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
    }

    ENTRY %main (x: f32[4]) -> f32[4] {
      %x = f32[4]{0} parameter(0)
      ROOT %loop = f32[4]{0} while(%x), condition=%cond, body=%outer
    }
    """
)


@pytest.mark.parametrize(("outer_trips", "unknown"), [(None, True), (5, False)])
def test_loops_multiply_and_their_conditions_run_once_more(outer_trips: int | None, unknown: bool) -> None:
    text, times = NESTED_LOOPS, outer_trips or 1
    if outer_trips:
        known = f'body=%outer, backend_config={{"known_trip_count":{{"n":"{outer_trips}"}}}}'
        text = text.replace("body=%outer", known)
    found = auditor.audit_text(text, make_mesh(1, 4, 2))
    assert {c.in_loop_of_unknown_length for c in found} == {unknown}
    conditions = [c.count for c in found if c.op == "all-reduce"]
    assert conditions == [times + 1 if outer_trips else 1, 4 * times]
    assert [c.count for c in found if c.op == "collective-permute"] == [3 * times]


def test_names_without_percent_signs_are_read() -> None:
    found = auditor.audit_text(GPU_PROGRAM.replace("%", ""), make_mesh(1, 4, 2))
    assert found == auditor.audit_text(GPU_PROGRAM, make_mesh(1, 4, 2))


def test_a_mesh_of_another_size_is_refused() -> None:
    mesh = jax.make_mesh((1, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:4])
    with pytest.raises(ValueError, match="runs on 8 devices and the mesh .* has 4"):
        auditor.audit_text(GPU_PROGRAM, mesh)


def test_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(hlo.HloError, match="ENTRY"):
        auditor.audit_text("module @jit_f {}\n", make_mesh(1, 4, 2))


@pytest.mark.parametrize(
    ("dtype", "bits"), [("pred", 8), ("bf16", 16), ("f8e4m3fn", 8), ("s4", 4), ("c64", 64), ("token", 0)]
)
def test_dtype_sizes(dtype: str, bits: int) -> None:
    assert hlo.dtype_bits(dtype) == bits


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
    compared = formulas.compare_with_audit(formulas.foe_forward(LAYERS, TOKENS, WIDTH, 8), auditor.summarize(found))
    assert [r["count"] for r in compared] == [r["expected_count"] for r in compared] == [LAYERS, 1]
    assert [r["wire_bytes"] for r in compared] == [r["expected_wire_bytes"] for r in compared]
    assert compared[0]["wire_bytes"] == LAYERS * 2 * 7 / 8 * TOKENS * WIDTH * 2


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


def test_written_collectives_without_names_are_still_found() -> None:
    text = """\
    %1 = "stablehlo.all_reduce"(%0) <{replica_groups = dense<[[0, 1]]> : tensor<1x2xi64>}> ({
    ^bb0(%a: tensor<bf16>, %b: tensor<bf16>):
      stablehlo.return %a : tensor<bf16>
    }) : (tensor<4x8xbf16>) -> tensor<4x8xbf16>
    %2 = "stablehlo.all_gather"(%1) <{all_gather_dim = 0 : i64}> : (tensor<ui8>) -> tensor<2xui8>
    %3 = stablehlo.custom_call @ragged_all_to_all(%1, %2) {api = 4 : i32} : (tensor<8xf8E4M3FN>, tensor<2xi64>) -> ()
    """
    written = stablehlo.parse_collectives(text)
    assert [(w.op, w.elements, w.dtype) for w in written] == [
        ("all-reduce", 32, "bf16"),
        ("all-gather", 1, "u8"),
        ("ragged-all-to-all", 8, "f8e4m3fn"),
    ]
    matcher = stablehlo.DtypeMatcher(written)
    assert matcher.dtype("all-reduce", 32, "f32", "jit(f)/psum") == "bf16"
    assert matcher.dtype("reduce-scatter", 32, "f32", "") == "bf16", "all-reduce and slice made into one"
    assert matcher.dtype("all-gather", 1, "f32", "") is None, "integers do not become floats"
    assert matcher.dtype("all-reduce", 33, "f32", "") is None


def test_the_scope_decides_between_dtypes_then_what_xla_says_then_the_order() -> None:
    written = [
        stablehlo.Written("all-reduce", 8, "bf16", "while/body/merge/psum"),
        stablehlo.Written("all-reduce", 8, "f32", "while/body/router/psum"),
        stablehlo.Written("all-reduce", 8, "f32", "psum"),
    ]
    matcher = stablehlo.DtypeMatcher(written)
    assert matcher.dtype("all-reduce", 8, "f32", "jit(f)/while/body/router/psum") == "f32"
    assert matcher.dtype("all-reduce", 8, "f32", "jit(f)/while/body/merge/psum") == "bf16"
    assert matcher.dtype("all-reduce", 8, "f32", "jit(f)/while/body/router/psum", promoted=True) == "bf16"
    assert matcher.dtype("all-reduce", 8, "f32", "jit(f)/while/body/merge/psum", promoted=False) == "f32"
    nameless = stablehlo.DtypeMatcher(dataclasses.replace(entry, op_name="") for entry in written[:2])
    assert [nameless.dtype("all-reduce", 8, "f32", "") for _ in range(3)] == ["bf16", "f32", "bf16"]


def test_the_same_width_counts_only_where_nothing_fits_better() -> None:
    weights, indices = (stablehlo.Written("all-to-all", 8, dtype, "all_to_all") for dtype in ("f32", "s32"))
    matcher = stablehlo.DtypeMatcher([weights, indices])
    assert [matcher.dtype("all-to-all", 8, dtype, "f/all_to_all") for dtype in ("s32", "f32")] == ["s32", "f32"]
    moved = stablehlo.DtypeMatcher([stablehlo.Written("all-gather", 8, "bf16", "")])
    assert moved.dtype("all-gather", 8, "u16", "") == "bf16"


def test_combined_parts_do_not_add_up_to_a_token_sized_collective() -> None:
    ar = auditor.audit_text(GPU_PROGRAM, make_mesh(1, 4, 2))[1]
    combined = dataclasses.replace(ar, shapes=((8, 8), (8, 8)))
    assert auditor.is_token_sized(ar, 8, 16) and not auditor.is_token_sized(combined, 8, 16)
    assert auditor.is_token_sized(dataclasses.replace(combined, op="all-to-all"), 8, 16)
    assert auditor.is_token_sized(dataclasses.replace(ar, op="all-gather", shapes=((2, 16),)), 8, 16)


# --- rows and formulas -----------------------------------------------------------------------------------------------


def test_rows_are_the_documented_json_and_equal_collectives_are_merged() -> None:
    rows = auditor.summarize(auditor.audit_text(GPU_PROGRAM.replace("while(%loop)", "copy(%loop)"), make_mesh(1, 4, 2)))
    assert json.loads(json.dumps(rows)) == rows
    keys = ["op", "axes", "count", "payload_bytes", "wire_bytes", "dtype", "compiled_dtype"]
    assert all(list(r)[:7] == keys for r in rows) and [list(r)[7:] for r in rows] == [[], [], ["branch"], [], []]
    twice = auditor.audit_text(GPU_PROGRAM, make_mesh(1, 4, 2))[1:2] * 2
    assert [r["count"] for r in auditor.summarize(twice)] == [10]


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
    assert sent["moe ep, de-duplicated"] / sent["moe ep"] == pytest.approx(5.44 / 8, abs=1e-3)

    fewer = formulas.communication_table(**setting, num_groups=2, experts_per_token=8)
    assert fewer[0]["payload_elements"] == 2 * 1024 * 2048, "four replicas share the tokens"
    alone = formulas.communication_table(**setting | {"num_devices": 1}, num_groups=8, experts_per_token=8)
    assert {entry["count"] for entry in alone} == {entry["total_wire_bytes"] for entry in alone} == {0}
    with pytest.raises(ValueError, match="num_groups=3 and num_devices=8"):
        formulas.communication_table(**setting, num_groups=3, experts_per_token=9)
