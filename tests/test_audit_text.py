"""The auditor on text: HLO syntaxes, programs as GPUs compile them, loops and branches, dtypes as written."""

from __future__ import annotations

import dataclasses
import json
import textwrap

import jax
import pytest
from jax.sharding import AxisType, Mesh

from sharding import audit as auditor
from sharding import hlo, stablehlo

AXES = ("data", "group", "expert")


def make_mesh(data: int, group: int, expert: int) -> Mesh:
    return jax.make_mesh((data, group, expert), AXES, axis_types=(AxisType.Auto,) * 3)


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


# --- dtypes as written and rows --------------------------------------------------------------------------------------


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


def test_rows_are_the_documented_json_and_equal_collectives_are_merged() -> None:
    rows = auditor.summarize(auditor.audit_text(GPU_PROGRAM.replace("while(%loop)", "copy(%loop)"), make_mesh(1, 4, 2)))
    assert json.loads(json.dumps(rows)) == rows
    keys = ["op", "axes", "count", "payload_bytes", "wire_bytes", "dtype", "compiled_dtype"]
    assert all(list(r)[:7] == keys for r in rows) and [list(r)[7:] for r in rows] == [[], [], ["branch"], [], []]
    twice = auditor.audit_text(GPU_PROGRAM, make_mesh(1, 4, 2))[1:2] * 2
    assert [r["count"] for r in auditor.summarize(twice)] == [10]
