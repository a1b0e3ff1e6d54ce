"""The torch contenders of the kernel bench against its float64 references, on a CPU."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest

from experiments.kernel_bench.combine import COMBINE
from experiments.kernel_bench.correctness import check
from experiments.kernel_bench.expert_mlp import EXPERT_MLP
from experiments.kernel_bench.grouped_matmul import GROUPED_MATMUL
from experiments.kernel_bench.grouped_swiglu import GROUPED_SWIGLU
from experiments.kernel_bench.operations import Contender, Operation
from experiments.kernel_bench.parts import races_of
from experiments.kernel_bench.races import Settings, run_race
from experiments.kernel_bench.routing_topk import ROUTING_TOPK

pytestmark = pytest.mark.parity

DRY_RUN = Settings(on_gpu=False, tiny=True, clock="wall clock", cupti=False, turns=2, l2_bytes=0, workers=1)
OPERATIONS = (GROUPED_MATMUL, EXPERT_MLP, GROUPED_SWIGLU, ROUTING_TOPK, COMBINE)


def with_torch_only(operation: Operation) -> tuple[Operation, Contender]:
    [peer] = [each for each in operation.contenders(False) if each.framework == "torch"]
    assert peer.missing is None
    return dataclasses.replace(operation, contenders=lambda on_gpu: (peer,)), peer


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_torch_is_right_in_small_cases(operation: Operation) -> None:
    alone, peer = with_torch_only(operation)
    found = check(alone, DRY_RUN, {}, lambda name, step: contextlib.nullcontext())
    assert not found["wrong"]
    cases = {(case.name, case.step) for case in operation.exact_cases(True) if not case.ours_only}
    assert {(each["case"], each["step"]) for each in found["checks"]} == {
        case for case in cases if case[1] in peer.steps
    }


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_torch_is_right_on_the_operands_of_races(operation: Operation) -> None:
    alone, peer = with_torch_only(operation)
    ran = set()
    for race in races_of(operation, next(iter(operation.parts)), tiny=True):
        record = run_race(alone, race, (peer,), {}, DRY_RUN, {}, lambda name, step: contextlib.nullcontext())
        assert not record["wrong"]
        ran |= {record["step"]} if record["cells"] else set()
    assert ran == set(peer.steps)
