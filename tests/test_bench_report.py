"""The kernel bench's report of a GPU and its verdicts on the targets, from figures made up here."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.kernel_bench import report
from experiments.kernel_bench.targets import TARGETS, best_of_ours, judge_targets


def cell(contender: str, kind: str, sizes: str, seconds: float) -> dict[str, Any]:
    return {
        "contender": contender, "kind": kind, "sizes": sizes, "clock": "stream", "time": seconds, "spread": 0.01,
        "samples": 7, "host_bound": False, "kernel_time": None, "flops": 6e9, "bytes": 3e6, "weight_bytes": 1e6,
    }  # fmt: skip


def test_report_of_a_gpu_names_peer_rates_and_shares() -> None:
    cells = [
        cell("mosaic_gpu", "ours", "uniform", 10e-6),
        cell("torch._grouped_mm", "peer", "uniform", 12e-6),
        cell("jax.lax.ragged_dot", "peer", "uniform", 90e-6),
        cell("even groups, cuBLAS", "bound", "uniform", 9e-6),
        cell("mosaic_gpu", "ours", "zipf", 12.5e-6),
    ]
    race = {"operation": "o", "shape": "s", "step": "forward", "sizes": ["uniform", "zipf"], "judged_by": "flops",
            "dims": {"rows": 64}, "calls": 2, "weight_copies": 1, "cached": False,
            "cells": cells, "not_run": [], "wrong": []}  # fmt: skip
    ceilings = {"matmul_flops": 800e12, "copy_bytes": 4e12, "matmul_by_way": {"torch.matmul": 800e12},
                "copy_by_way": {"jax copy": 4e12}, "clocks": {"jax copy": 0.987}, "not_run": {}}  # fmt: skip
    machine = {"dry_run": False, "device": "NVIDIA H200", "gpu": "driver 1", "python": "3.12", "versions": {},
               "commit": "c", "sources": "s", "tables": "t", "command": "x", "xla_flags": ""}  # fmt: skip
    found = report.results(machine, ceilings, [], [race], [])
    first, *_, skewed = found["races"][0]["cells"]
    assert first["best_peer"] == "torch._grouped_mm" and first["times_best_peer"] == pytest.approx(1.2)
    assert first["share_of_bound"] == pytest.approx(0.9) and first["share_of_matmul"] == pytest.approx(0.75)
    assert first["share_of_copy"] == pytest.approx(0.075) and first["share_of_roof"] == pytest.approx(0.75)
    assert skewed["vs_uniform"] == pytest.approx(0.8) and skewed["times_best_peer"] is None
    text = report.markdown(found)
    row = (
        "| o | s | forward | uniform | mosaic_gpu | 1.20x | torch._grouped_mm | 90% | 1.00x | 600 TFLOP/s | 75% | 8% |"
    )
    assert row in text and "DRY RUN" not in text and "0.987" in text and "above the roof" not in text
    assert "L2 cache" not in text
    cached = report.results(machine, ceilings, [], [race | {"cached": True}], [])
    assert "2 calls a program, all of whose operands fit into the L2 cache" in report.markdown(cached)
    line = "o s forward: uniform mosaic_gpu 600 TFLOP/s, 1.20x torch._grouped_mm; zipf mosaic_gpu 480 TFLOP/s"
    assert report.headline(found["races"][0], dry_run=False) == line


def race(step: str, shape: str, *cells: dict[str, Any], operation: str = "grouped_matmul") -> dict[str, Any]:
    judged = {"operation": operation, "shape": shape, "step": step, "sizes": ["uniform", "zipf"], "judged_by": "flops",
              "cells": list(cells)}  # fmt: skip
    return {**judged, "cells": report.judged(judged, {})}


def verdicts(*races: dict[str, Any]) -> dict[str, tuple[str, str, str]]:
    return {each["target"]: (each["wanted"], each["measured"], each["met"]) for each in judge_targets(races)}


def test_targets_name_races_that_the_bench_has() -> None:
    from experiments.bench_kernels import OPERATIONS

    known = {
        (operation.name, race.step, race.shape)
        for operation in OPERATIONS
        for races in operation.parts.values()
        for race in races
    }
    for target in TARGETS:
        operation, step, shapes = target.races
        assert shapes and {(operation, step, shape) for shape in shapes} <= known


def test_a_target_is_met_when_the_worst_of_all_its_races_meets_it() -> None:
    fast, slow = cell("xla", "ours", "uniform", 9.9e-6), cell("xla", "ours", "uniform", 10.1e-6)
    name, wanted = "forward at 64 experts, 65,536 rows", "at least 600 TFLOP/s"
    assert verdicts()[name] == (wanted, "not measured", "not measured")
    found = verdicts(race("forward", "acceptance_gpu/up", fast))
    assert found[name] == (wanted, "606.1 TFLOP/s in 1 of 2 races", "not measured")
    found = verdicts(race("forward", "acceptance_gpu/up", fast), race("forward", "acceptance_gpu/down", fast))
    assert found[name] == (wanted, "606.1 TFLOP/s", "yes")
    found = verdicts(race("forward", "acceptance_gpu/up", fast), race("forward", "acceptance_gpu/down", slow))
    assert found[name] == (wanted, "594.1 TFLOP/s", "no")
    assert verdicts(race("forward", "acceptance_gpu/up", slow))[name][2] == "no"


def test_targets_read_the_best_of_ours_against_peer_bound_and_uniform_sizes() -> None:
    cells = [
        cell("mosaic_gpu", "ours", "uniform", 10e-6),
        cell("triton", "ours", "uniform", 30e-6),
        cell("torch._grouped_mm", "peer", "uniform", 11.5e-6),
        cell("jax.lax.ragged_dot", "peer", "uniform", 90e-6),
        cell("even groups, cuBLAS", "bound", "uniform", 8e-6),
        cell("mosaic_gpu", "ours", "zipf", 40e-6),
        cell("triton", "ours", "zipf", 10.5e-6),
    ]
    assert best_of_ours({"cells": cells})["zipf"]["contender"] == "triton"
    found = verdicts(*(race("dgrad", shape, *cells) for shape in ("acceptance_gpu/up", "acceptance_gpu/down")))
    assert found["dgrad there, over the best peer"] == ("at least 1.1x", "1.15x", "yes")
    assert found["dgrad there, of the even-group bound"] == ("at least 85%", "80%", "no")
    assert found["dgrad with Zipf-skewed sizes, of its speed with uniform ones"] == ("at least 90%", "95.24%", "yes")


def test_decode_targets_count_weight_bytes_and_microseconds() -> None:
    decoding = cell("triton", "ours", "uniform", 65e-6) | {"weight_bytes": 3.8e12 * 65e-6}
    found = verdicts(
        *(race("bfloat16", f"olmoe_1b_7b/decode_{tokens}", decoding, operation="expert_mlp") for tokens in (1, 32, 128))
    )
    name = "expert MLP of olmoe_1b_7b at 32 and 128 tokens, bfloat16 weights touched"
    assert found[name] == ("at least 3.7 TB/s", "3.8 TB/s", "yes")
    assert found["expert MLP of OLMoE's shape at 1 token"] == ("at most 60 us", "65 us", "no")
    quick = race("bfloat16", "olmoe_1b_7b/decode_1", decoding | {"time": 59e-6}, operation="expert_mlp")
    assert verdicts(quick)["expert MLP of OLMoE's shape at 1 token"] == ("at most 60 us", "59 us", "yes")
