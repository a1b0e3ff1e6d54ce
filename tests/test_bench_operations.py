"""What each operation brings to the kernel bench: its dry run, its work, and checks that find one wrong element."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench_kernels import OPERATIONS, main
from experiments.kernel_bench import parts
from experiments.kernel_bench.combine import COMBINE
from experiments.kernel_bench.correctness import check, compare
from experiments.kernel_bench.expert_mlp import EXPERT_MLP
from experiments.kernel_bench.grouped_matmul import GROUPED_MATMUL
from experiments.kernel_bench.grouped_swiglu import GROUPED_SWIGLU
from experiments.kernel_bench.operations import Contender, Operation, Race, Results
from experiments.kernel_bench.projected_topk import PROJECTED_TOPK
from experiments.kernel_bench.races import Settings
from experiments.kernel_bench.routing_topk import ROUTING_TOPK
from pallas_kernels.combine.shapes import CombineShape
from pallas_kernels.grouped_matmul.shapes import DecodeShape, ExpertMlpShape, GroupedMatmulShape
from pallas_kernels.projected_topk.shapes import ProjectedShape
from pallas_kernels.quantized import QuantizedWeights
from pallas_kernels.routing_topk.shapes import RoutingShape

pytestmark = pytest.mark.xdist_group("bench_operations")  # the dry run is made once

DRY_RUN = Settings(on_gpu=False, tiny=True, clock="wall clock", cupti=False, turns=2, l2_bytes=0, workers=1)
ADDED = (EXPERT_MLP, GROUPED_SWIGLU, ROUTING_TOPK, PROJECTED_TOPK, COMBINE)


def first_races(operation: Operation) -> dict[str, Race]:
    """A tiny race of each step."""
    races: dict[str, Race] = {}
    for part in operation.parts:
        for race in parts.races_of(operation, part, tiny=True):
            races.setdefault(race.step, race)
    return races


def contender(operation: Operation, name: str) -> Contender:
    return next(each for each in operation.contenders(False) if each.name == name)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "results"
    chosen = [f"{operation.name}/{next(iter(operation.parts))}" for operation in ADDED]
    assert main(["--out", str(out), "--dry-run", "--parts", *chosen]) == 0
    return out


def test_dry_run_races_every_step_of_every_operation(dry_run: Path) -> None:
    found = json.loads((dry_run / "results.json").read_text())
    ran: dict[tuple[str, str], set[str]] = {}
    for race in found["races"]:
        assert not race["wrong"] and min(cell["time"] for cell in race["cells"]) == 1.0
        names = {cell["contender"] for cell in race["cells"]}
        ran.setdefault((race["operation"], race["step"]), set()).update(names)
    assert ran.keys() == {(operation.name, step) for operation in ADDED for step in first_races(operation)}
    expected = {
        "expert_mlp": {"xla", "xla, weights copied"},
        "grouped_swiglu": {"xla", "xla, unfused", "jax.lax.ragged_dot twice"},
        "routing_topk": {"xla", "jax.lax.top_k"},
        "projected_topk": {"xla", "jnp.einsum and jax.lax.top_k"},
        "combine": {"xla", "jnp gather and einsum"},
    }
    for (operation, _), names in ran.items():
        assert expected[operation] <= names


def test_dry_run_names_who_is_absent(dry_run: Path) -> None:
    text = (dry_run / "report.md").read_text()
    absent = text.split("## Not run")[1]
    for name in ("mosaic_gpu", "triton", "mosaic_gpu, unfused", "triton, unfused"):
        assert re.search(rf"^\\| {re.escape(name)} \\| needs an NVIDIA GPU \\|", absent, re.MULTILINE)
    assert "Nobody is wrong." in text and text.count("| not measured | not measured |") > 10
    for name in ("torch._grouped_mm", "torch._grouped_mm twice", "torch.topk", "torch index_select"):
        assert f"| {name} |" in text  # among those who ran if torch is here


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_race_can_be_traced_at_its_full_size(operation: Operation) -> None:
    present = [each for each in operation.contenders(False) if each.framework == "jax"]
    for race in (race for races in operation.parts.values() for race in races):
        [operands] = jax.eval_shape(lambda race=race: operation.operand_sets(race, race.sizes[0], 1, 1))
        taking_part = [each for each in present if each.excuse(race) is None]
        assert taking_part
        for each in taking_part:
            results = jax.tree.leaves(jax.eval_shape(each.steps[race.step], *operands))
            assert [(result.shape, result.dtype) for result in results] == [
                (result.shape, result.dtype) for result in operation.output(race.step, race.dims)
            ]


def test_first_parts_of_all_operations_run_before_second_ones() -> None:
    names = parts.part_names(OPERATIONS)
    assert names[:5] == [
        "ceilings", "grouped_matmul/correctness", "grouped_matmul/acceptance_gpu", "expert_mlp/correctness",
        "expert_mlp/olmoe_1b_7b",
    ]  # fmt: skip
    firsts = [names.index(f"{operation.name}/{next(iter(operation.parts))}") for operation in OPERATIONS]
    seconds = [names.index(f"{operation.name}/{list(operation.parts)[1]}") for operation in OPERATIONS]
    assert firsts == sorted(firsts) and seconds == sorted(seconds) and max(firsts) < min(seconds)
    assert len(names) == len(set(names)) == 1 + sum(1 + len(operation.parts) for operation in OPERATIONS)
    assert parts.choose_parts(["combine"], OPERATIONS, False) == [
        "ceilings", "combine/correctness", "combine/moe", "combine/foe",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("operation", "step"), [(operation, step) for operation in ADDED for step in first_races(operation)],
    ids=lambda value: getattr(value, "name", value),
)  # fmt: skip
def test_the_check_of_timed_results_finds_one_wrong_element(operation: Operation, step: str) -> None:
    race = first_races(operation)[step]
    [operands] = operation.operand_sets(race, race.sizes[0], 1, 1)
    computed = jax.jit(contender(operation, "xla").steps[step])(*operands)
    results: Results = tuple(jax.tree.leaves(computed))
    assert operation.fault(race, operands, results) is None
    rng = np.random.default_rng(0)
    for index, result in enumerate(results):
        element = tuple(int(rng.integers(size)) for size in result.shape)
        large = 1 if jnp.issubdtype(result.dtype, jnp.integer) else 4 * float(np.std(np.asarray(result, np.float32)))
        broken = result.at[element].add(jnp.asarray(large, result.dtype))
        assert operation.fault(race, operands, (*results[:index], broken, *results[index + 1 :])) is not None
        if jnp.issubdtype(result.dtype, jnp.floating):
            unwritten = result.at[element].set(jnp.nan)
            assert operation.fault(race, operands, (*results[:index], unwritten, *results[index + 1 :])) is not None
    assert "result is" in str(operation.fault(race, operands, (results[0][:, :1], *results[1:])))


@pytest.mark.parametrize("operation", ADDED, ids=lambda operation: operation.name)
def test_small_cases_find_one_wrong_element(operation: Operation) -> None:
    cases = operation.exact_cases(True)
    rng = np.random.default_rng(0)
    for case in cases:
        good = [np.nan_to_num(expected) for expected in case.expected]
        assert compare([tuple(good)], case, ours=True)[1] is None
        index = int(rng.integers(len(good)))
        broken = [array.copy() for array in good]
        element = tuple(int(rng.integers(size)) for size in broken[index].shape)
        broken[index][element] += 1 + np.abs(broken[index]).max()
        assert compare([tuple(broken)], case, ours=True)[1] is not None
    ours_only = {case.name for case in cases if case.ours_only}
    assert ours_only or operation is EXPERT_MLP  # decoding has no padding to promise anything about


def test_a_wrong_second_result_is_reported() -> None:
    good = contender(COMBINE, "xla").steps["backward"]

    def faulty(*operands: jax.Array) -> tuple[jax.Array, jax.Array]:
        drows_RD, dweights_Nk = good(*operands)
        return drows_RD, dweights_Nk.at[3, 1].multiply(-1)

    operation = dataclasses.replace(
        COMBINE, contenders=lambda on_gpu: (Contender("xla", "ours", {"backward": faulty}),)
    )
    found = check(operation, DRY_RUN, {}, lambda name, step: contextlib.nullcontext())
    assert found["wrong"] and all("result 1: off by" in record["fault"] for record in found["wrong"])


def test_selected_results_are_compared_exactly() -> None:
    case = next(case for case in ROUTING_TOPK.exact_cases(True) if case.step == "forward")
    values_Nk, indices_Nk = case.expected
    swapped = indices_Nk.copy()
    swapped[0, :2] = swapped[0, 1::-1]
    fault = compare([(values_Nk, swapped)], case, ours=True)[1]
    assert fault == f"result 1: 2 of {swapped.size} elements are not exactly right"
    nudged = values_Nk * (1 + 1e-6)
    assert "not exactly right" in str(compare([(nudged, indices_Nk)], case, ours=True)[1])


def test_decode_counts_each_chosen_expert_once() -> None:
    dims = ExpertMlpShape(tokens=3, top_k=2, experts=5, model_size=16, expert_hidden=32)
    indices_Nk = jnp.asarray([[0, 4], [4, 0], [2, 4]])
    for step, one_expert in (("bfloat16", 2 * 3 * 16 * 32), ("int8", 3 * 16 * 32 + 4 * (2 * 32 + 16))):
        race = Race("tiny", step, dims, ("uniform",), "weight_bytes")
        work = EXPERT_MLP.work(race, [(None, indices_Nk)])
        assert work.weight_bytes == 3 * one_expert and work.flops == 2 * 3 * 16 * 32 * 6
        assert work.bytes == work.weight_bytes + 2 * 3 * 16 * 2
        assert EXPERT_MLP.weight_bytes(race) == 5 * one_expert


def test_quantised_operands_are_weights_in_8_bits() -> None:
    for step, race in first_races(EXPERT_MLP).items():
        [(x_ND, indices_Nk, router_Nk, *weights)] = EXPERT_MLP.operand_sets(race, "zipf", 1, 1)
        tokens, top_k, experts, width, hidden = race.dims
        assert x_ND.shape == (tokens, width) and indices_Nk.shape == router_Nk.shape == (tokens, top_k)
        assert all(len(set(row)) == top_k for row in np.asarray(indices_Nk).tolist())
        assert [w.shape for w in weights] == [(experts, width, hidden)] * 2 + [(experts, hidden, width)]
        for w in weights:
            assert isinstance(w, QuantizedWeights) == (step != "bfloat16")
            assert str(w.values_ENK.dtype if isinstance(w, QuantizedWeights) else w.dtype) == step


def test_work_of_what_moves_data() -> None:
    race = Race("tiny", "forward", RoutingShape(10, 64, 8), ("normal",), "bytes")
    assert ROUTING_TOPK.work(race, []).bytes == 10 * (64 + 16) * 4
    race = Race("tiny", "forward", CombineShape(tokens=10, top_k=2, width=64), ("permuted",), "bytes")
    assert COMBINE.work(race, [])[:2] == (2 * 20 * 64, (20 + 10) * 64 * 2 + 20 * 8)
    backward = COMBINE.work(dataclasses.replace(race, step="backward"), [])
    assert backward[:2] == (4 * 20 * 64, (2 * 20 + 10) * 64 * 2 + 20 * 16)


def test_work_of_routers_is_a_product_and_its_gradient_that_of_the_choices() -> None:
    race = Race("tiny", "forward", ProjectedShape(3, 10, 16, 64, 4), ("normal",))
    tokens_and_weights = 3 * 16 * (10 * 2 + 64 * 4)
    assert PROJECTED_TOPK.work(race, [])[:2] == (2 * 30 * 16 * 64, tokens_and_weights + 3 * 64 * 4 + 30 * 4 * 8)
    backward = PROJECTED_TOPK.work(dataclasses.replace(race, step="backward"), [])
    assert backward[:2] == (4 * 30 * 16 * 4, 2 * tokens_and_weights + 30 * 4 * 8)


def test_training_is_three_times_the_products_of_inference() -> None:
    race = Race("tiny", "forward", GroupedMatmulShape(64, 4, 16, 32), ("uniform",))
    sets: Any = [(None, None, None, np.array([60, 0, 4, 0]))]
    forward = GROUPED_SWIGLU.work(race, sets)
    training = GROUPED_SWIGLU.work(dataclasses.replace(race, step="forward+backward"), sets)
    assert forward == (4 * 64 * 16 * 32, 2 * (64 * 48 + 2 * 2 * 16 * 32), 2 * 2 * 2 * 16 * 32)
    assert training.flops == 3 * forward.flops and training.bytes > 2 * forward.bytes


def test_decoding_products_are_drawn_and_checked() -> None:
    race = Race("tiny", "forward", DecodeShape(3, 2, 4, 16, 32), ("uniform", "zipf"), "weight_bytes")
    [operands] = GROUPED_MATMUL.operand_sets(race, "zipf", 1, 1)
    assert int(operands[2].sum()) == len(operands[0]) == 6 and int(operands[2].max()) <= 3
    result = jax.jit(contender(GROUPED_MATMUL, "xla").steps["forward"])(*operands)
    assert GROUPED_MATMUL.fault(race, operands, (result,)) is None
    assert GROUPED_MATMUL.fault(race, operands, (result.at[5, 7].add(jnp.bfloat16(4)),)) is not None


def test_copying_all_chosen_weights_is_refused_where_they_are_many() -> None:
    peer = contender(EXPERT_MLP, "xla, weights copied")
    races = {race.shape: race for races in EXPERT_MLP.parts.values() for race in races}
    assert peer.excuse(races["olmoe_1b_7b/decode_8"]) is None
    assert peer.excuse(races["deepseek_v3/decode_128"]) == "would copy 90 GB of weights"
