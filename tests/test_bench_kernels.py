"""The kernel bench on CPU: its dry run from end to end, and the parts that need no device."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench_kernels import main
from experiments.kernel_bench import group_sizes, parts, report
from experiments.kernel_bench.correctness import compare
from experiments.kernel_bench.folder import Folder
from experiments.kernel_bench.grouped_matmul import GROUPED_MATMUL, operand_sets
from experiments.kernel_bench.grouped_swiglu import GROUPED_SWIGLU
from experiments.kernel_bench.hopper_tiles import MatmulTiles, SwigluTiles
from experiments.kernel_bench.operations import BenchError, Contender, DeviceLost, ExactCase, Operation, Race
from experiments.kernel_bench.programs import Clock, JaxProgram, Sample, abstract, chained
from experiments.kernel_bench.races import Settings, plan_calls
from experiments.kernel_bench.targets import TARGETS
from experiments.kernel_bench.timing import take_turns
from experiments.kernel_bench.tune import save_table, sweep, tune_parts
from pallas_kernels import grouped_matmul, hopper_tiles
from pallas_kernels.grouped_matmul.shapes import DECODE_SHAPES, SHAPES, GroupedMatmulShape

pytestmark = pytest.mark.xdist_group("bench_kernels")  # the dry run is made once

DRY_RUN = Settings(on_gpu=False, tiny=True, clock="wall clock", cupti=False, turns=2, l2_bytes=0, workers=1)
TINY = Race("tiny", "forward", GroupedMatmulShape(64, 4, 16, 32), ("uniform", "zipf"))
PEER = next(each for each in GROUPED_MATMUL.contenders(False) if each.name == "jax.lax.ragged_dot")


def small_operation(*contenders: Contender) -> Operation:
    """The grouped matmul with one race and only these contenders."""
    return dataclasses.replace(GROUPED_MATMUL, parts={"tiny": (TINY,)}, contenders=lambda on_gpu: contenders)


def ours(step: Callable[..., Any], name: str = "xla") -> Contender:
    return Contender(name, "ours", {"forward": step})


def correct(x_RK: jax.Array, w_EKN: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    return grouped_matmul(x_RK, w_EKN, group_sizes_E, implementation="xla")


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "results"
    assert main(["--out", str(out), "--dry-run", "--parts", "grouped_matmul/acceptance_gpu"]) == 0
    return out


def test_dry_run_reports_ratios_absent_peers_and_no_absolute_figure(dry_run: Path) -> None:
    text = (dry_run / "report.md").read_text()
    assert report.DRY_RUN_WARNING in text and "Nobody is wrong." in text
    for step in ("forward", "dgrad", "wgrad"):
        for sizes in ("uniform", "zipf", "half_empty"):
            row = rf"\| acceptance_gpu/up \| {step} \| {sizes} \| xla \| \d+\.\d\dx \| [^|]+ \| \d+%"
            assert re.search(row, text)
    before, targets, after = re.split("## Targets|## Contenders", text)
    assert not re.search(r"\d\s*(TFLOP|GB/s|TB/s|us|ms|s)\b", before + after)
    assert targets.count("| not measured | not measured |") == len(TARGETS)
    absent = text.split("## Not run")[1]
    for name in ("mosaic_gpu", "triton", "tokamax mosaic", "tokamax triton"):
        assert re.search(rf"^\| {re.escape(name)} \| (needs an NVIDIA GPU|\w+Error: .+) \|", absent, re.MULTILINE)
    assert (dry_run / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_dry_run_json_is_labelled_and_holds_relative_times_only(dry_run: Path) -> None:
    for path in dry_run.glob("*.json"):
        record = json.loads(path.read_text())
        assert record.get("dry_run", record["machine"]["dry_run"]) is True
    found = json.loads((dry_run / "results.json").read_text())
    assert found["time_unit"] == "the fastest time of the race" and "dry run" in found["note"]
    assert not found["ceilings"].keys() & {"matmul_flops", "copy_bytes"}
    for race in found["races"]:
        assert min(cell["time"] for cell in race["cells"]) == 1.0
        assert {cell["clock"] for cell in race["cells"]} == {"wall clock"}
        assert not any("share_of_matmul" in cell for cell in race["cells"])


def test_second_call_does_no_work(dry_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in dry_run.glob("part-*.json")}
    assert len(before) == 3

    for module, name in ((parts, "run_race"), (parts.correctness, "check"), (parts.ceilings, "measure")):
        monkeypatch.setattr(module, name, None)
    assert main(["--out", str(dry_run), "--dry-run", "--parts", "grouped_matmul/acceptance_gpu"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in dry_run.glob("part-*.json")} == before


def test_a_backend_wrong_in_small_cases_is_reported_and_not_timed(tmp_path: Path, capsys: Any) -> None:
    def off_by_one_element(x_RK: jax.Array, w_EKN: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
        return correct(x_RK, w_EKN, group_sizes_E).at[40, 3].add(jnp.bfloat16(2))

    operation = small_operation(ours(correct), ours(off_by_one_element, "faulty"), PEER)
    assert main(["--out", str(tmp_path), "--dry-run"], [operation]) == 1
    assert "WRONG RESULTS: faulty" in capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())
    assert {cell["contender"] for cell in found["races"][0]["cells"]} == {"xla", "jax.lax.ragged_dot"}
    assert "**faulty** grouped_matmul forward, uneven: off by" in (tmp_path / "report.md").read_text()


def test_a_backend_wrong_at_the_timed_shape_alone_is_not_timed(tmp_path: Path) -> None:
    def wrong_at_64_rows(x_RK: jax.Array, w_EKN: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
        y_RN = correct(x_RK, w_EKN, group_sizes_E)
        return y_RN.at[63, 31].add(jnp.bfloat16(4)) if len(y_RN) == 64 else y_RN

    operation = small_operation(ours(wrong_at_64_rows, "faulty"), PEER)
    assert main(["--out", str(tmp_path), "--dry-run"], [operation]) == 1
    race = json.loads((tmp_path / "results.json").read_text())["races"][0]
    assert {cell["contender"] for cell in race["cells"]} == {"jax.lax.ragged_dot"}
    assert [(each["contender"], each["sizes"]) for each in race["wrong"]] == [("faulty", "uniform"), ("faulty", "zipf")]


def test_a_contender_that_raises_is_listed_with_its_reason(tmp_path: Path) -> None:
    def refuse(*operands: jax.Array) -> jax.Array:
        raise RuntimeError("only on Tuesdays\nand more lines")

    operation = small_operation(ours(correct), Contender("moody", "peer", {"forward": refuse}))
    assert main(["--out", str(tmp_path), "--dry-run"], [operation]) == 0
    assert "| moody | RuntimeError: only on Tuesdays |" in (tmp_path / "report.md").read_text()


def test_out_of_time_starts_nothing_and_says_what_is_left(tmp_path: Path, capsys: Any) -> None:
    assert main(["--out", str(tmp_path), "--dry-run", "--minutes", "1e-9"], [small_operation(ours(correct))]) == 0
    left = "ceilings, grouped_matmul/correctness, grouped_matmul/tiny"
    assert left in capsys.readouterr().out and left in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.glob("part-*"))


def test_what_took_the_device_down_is_not_run_again(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_at_64_rows(x_RK: jax.Array, w_EKN: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
        def fail(rows: np.ndarray) -> np.ndarray:
            if len(rows) == 64:
                raise RuntimeError("illegal address")
            return rows

        y_RN = correct(x_RK, w_EKN, group_sizes_E)
        return jax.pure_callback(fail, jax.ShapeDtypeStruct(y_RN.shape, y_RN.dtype), y_RN)

    def lost(name: str, reason: str) -> None:
        raise DeviceLost(f"{name} took the device down")

    operation = small_operation(ours(fail_at_64_rows), PEER)
    with monkeypatch.context() as patched:
        patched.setattr("experiments.kernel_bench.races.raise_if_lost", lost)
        assert main(["--out", str(tmp_path), "--dry-run"], [operation]) == 2
    assert capsys.readouterr().err == "bench_kernels: xla took the device down\n"
    assert "Not measured yet" in (tmp_path / "report.md").read_text()
    assert main(["--out", str(tmp_path), "--dry-run"], [operation]) == 0
    race = json.loads((tmp_path / "results.json").read_text())["races"][0]
    assert {cell["contender"] for cell in race["cells"]} == {"jax.lax.ragged_dot"}
    assert "an earlier call ended while it ran" in race["not_run"][0]["reason"]
    assert not (tmp_path / "running.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out is missing: name a folder"),
        (["--out", "{}"], "JAX runs on cpu here: run on a machine with a GPU, or add --dry-run"),
        (
            ["--out", "{}", "--dry-run", "--parts", "attention"],
            "--parts=attention: choose from grouped_matmul, expert_mlp, ",
        ),
        (["--out", "{}", "--dry-run", "--minutes", "0"], "--minutes=0.0: give more than 0"),
        (["--out", "{}", "--dry-run", "--tune"], "--tune with --dry-run: tiles can be tuned on a GPU only"),
    ],
)
def test_errors_of_use_are_one_line(arguments: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    assert main([argument.format(tmp_path / "out") for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bench_kernels: {message}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_does_not_mix_two_machines(tmp_path: Path) -> None:
    facts = {"dry_run": False, "device": "NVIDIA H200", "versions": {}, "sources": "abc", "tables": "def"}
    Folder(tmp_path, facts).write("grouped_matmul/olmoe", {"races": []}, complete=True)
    assert Folder(tmp_path, facts).is_done("grouped_matmul/olmoe")
    with pytest.raises(BenchError, match="was measured with device=NVIDIA H200, now it is NVIDIA H100; give another"):
        Folder(tmp_path, {**facts, "device": "NVIDIA H100"})


@pytest.mark.parametrize(("rows", "experts"), [(65536, 64), (1000, 7), (5, 8), (4096, 1)])
def test_sizes_sum_to_the_rows(rows: int, experts: int) -> None:
    rng = np.random.default_rng(0)
    zipf, half = group_sizes.zipf(rows, experts, rng), group_sizes.half_empty(rows, experts, rng)
    for sizes in (zipf, half, group_sizes.uniform(rows, experts)):
        assert sizes.shape == (experts,) and sizes.dtype == np.int32 and sizes.sum() == rows and sizes.min() >= 0
    assert np.ptp(group_sizes.uniform(rows, experts)) <= 1
    assert np.count_nonzero(half) <= (experts + 1) // 2
    ranked = np.sort(zipf)[::-1]
    if rows == 65536:  # 1, 1/2, 1/3, ... of the largest
        np.testing.assert_allclose(ranked * np.arange(1, 65), ranked[0], rtol=0.04)


@pytest.mark.parametrize("skewed", [False, True])
def test_routed_tokens_choose_different_experts(skewed: bool) -> None:
    rng = np.random.default_rng(0)
    sizes = np.array([group_sizes.routed(32, 8, 64, rng, skewed=skewed) for _ in range(50)])
    assert np.all(sizes.sum(1) == 256) and sizes.max() <= 32
    assert (np.median(sizes.max(1)) > 20) == skewed


def test_shapes_of_deepseek_and_of_decoding() -> None:
    assert SHAPES["deepseek_v3/up"] == (8 * 4096, 256, 7168, 2048)
    assert SHAPES["acceptance_gpu/up"][:2] == (65536, 64)
    assert SHAPES["foe_7b_stacked/up"] == (8 * SHAPES["foe_7b/up"].rows, 64, 2048, 1024)
    shape = DECODE_SHAPES["olmoe_1b_7b/decode_32/down"]
    assert shape == (32, 8, 64, 1024, 2048) and shape.rows == 256


@pytest.mark.parametrize("step", ["forward", "dgrad", "wgrad"])
@pytest.mark.parametrize("kind", ["uniform", "zipf", "half_empty"])
def test_projection_finds_one_wrong_element(step: str, kind: str) -> None:
    race = dataclasses.replace(TINY, step=step)
    [operands] = operand_sets(race, kind, 1, 1)
    result = jax.jit(PEER.steps[step])(*operands)

    def fault(result: jax.Array) -> str | None:
        return GROUPED_MATMUL.fault(race, operands, (result,))

    assert fault(result) is None
    element = tuple(np.argwhere(np.asarray(result) != 0)[17])
    scale = float(np.std(np.asarray(result, np.float32)))
    assert "1 rows" in str(fault(result.at[element].add(jnp.bfloat16(scale))))
    assert fault(result.at[element].set(jnp.nan)) is not None
    assert "result is float32" in str(fault(result.astype(jnp.float32)))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda good: [good], None),
        (lambda good: [np.where(good == 3, np.nan, good)], "1 of 6 elements are NaN"),
        (lambda good: [good * 1.05], "times what rounding allows"),
        (lambda good: [good + np.array([[0, 0, 0], [0, 0, 1e-6]])], "not exactly zero"),
        (lambda good: [good, good + np.array([[0, 0, 1e-6], [0, 0, 0]])], "different bits"),
        (lambda good: [good[:1]], "shape"),
    ],
)
def test_exact_comparison(change: Callable[[np.ndarray], list[np.ndarray]], fault: str | None) -> None:
    expected = np.array([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
    case = ExactCase("case", "forward", None, (), (expected,), (expected == 0,), ours_only=True)
    found = compare([(result,) for result in change(expected)], case, ours=True)[1]
    assert found is None if fault is None else fault in str(found)


def test_exact_cases_hold_padding_and_empty_experts() -> None:
    padded = next(case for case in GROUPED_MATMUL.exact_cases(True) if (case.name, case.step) == ("padded", "wgrad"))
    x_RK, dy_RN, sizes_E = padded.operands
    in_use = int(sizes_E.sum())
    assert padded.ours_only and in_use < 1000 and jnp.isnan(x_RK[in_use:]).all() and jnp.isnan(dy_RN[in_use:]).all()
    [expected], [zero] = padded.expected, padded.zero
    assert not np.isnan(expected).any() and zero[2].all() and not zero[0].any()


def test_no_call_of_a_program_is_merged_or_dropped() -> None:
    shared = jnp.ones((8, 8))
    sets = [(jnp.ones((4, 8)), shared)] * 5
    text = jax.jit(chained(lambda x, w: x @ w)).lower(abstract(sets)).compile().as_text()
    assert text is not None
    assert len(re.findall(r"= \S+ (?:dot|custom-call|fusion|call)\(", text.split("ENTRY")[1])) == 5


class Simulated:
    """A device that runs one program after the other, and a host with a clock: seconds to enqueue, to run, to wait."""

    def __init__(self, enqueue: float, run: float, wait: float) -> None:
        self.now = self.done = 0.0
        self._enqueue, self._run, self._wait = enqueue, run, wait

    def __call__(self, sets: Sequence[Any]) -> list[Any]:
        self.now += self._enqueue
        self.done = max(self.now, self.done) + self._run
        return [self]

    def block_until_ready(self) -> None:
        self.now = max(self.now, self.done) + self._wait


def sample_of(device: Simulated, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Sample:
    monkeypatch.setattr(time, "perf_counter", lambda: device.now)
    return JaxProgram(device, [()] * 4, clock, cupti=False).sample()


def test_stream_clock_reads_the_device_not_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, host_bound = sample_of(Simulated(enqueue=1e-4, run=8e-3, wait=5e-3), "stream", monkeypatch)
    assert seconds == pytest.approx(2e-3) and not host_bound
    assert sample_of(Simulated(enqueue=8e-3, run=1e-4, wait=1e-5), "stream", monkeypatch).host_bound
    assert sample_of(Simulated(1e-4, 8e-3, 0), "wall clock", monkeypatch).seconds == pytest.approx(8.1e-3 / 4)


def test_calls_sweep_the_cache_and_outlast_a_start() -> None:
    work = GROUPED_MATMUL.work(TINY, operand_sets(TINY, "uniform", 1, 1))
    assert work == (2 * 64 * 16 * 32, 2 * (64 * (16 + 32) + 4 * 16 * 32), 2 * 4 * 16 * 32)
    assert plan_calls(GROUPED_MATMUL, TINY, {}, 0) == (2, 1)
    calls, copies = plan_calls(GROUPED_MATMUL, TINY, {}, 4096)
    assert calls * work.bytes >= 16 * 4096 > (calls - 1) * work.bytes and copies == calls
    slow = {"matmul_flops": work.flops / 1e-4, "copy_bytes": 1e30}
    assert plan_calls(GROUPED_MATMUL, TINY, slow, 0) == (10, 1)


def scripted(*seconds: float, host_bound: bool = False) -> Any:
    """A program whose samples are given."""
    samples = iter([Sample(each, host_bound) for each in seconds])
    return SimpleNamespace(clock="stream", sample=samples.__next__, kernel_seconds=lambda: 0.5)


def test_turns_give_median_and_spread_without_the_first() -> None:
    programs = {
        "steady": scripted(9.0, 1.0, 2.0, 3.0),
        "starved": scripted(9.0, 2.0, 2.0, 2.0, host_bound=True),
        "ends": scripted(9.0),
        "unreadable": scripted(9.0, -1.0, -1.0, -1.0),
    }
    failed: dict[str, str] = {}
    measured = take_turns(programs, 3, failed.__setitem__)
    assert measured["steady"][1:] == (2.0, 0.5, 3, False, None)
    assert measured["starved"].host_bound and measured["starved"].kernel_seconds == 0.5
    assert measured.keys() == {"steady", "starved"}
    assert failed["ends"].startswith("StopIteration") and "too fast for the clock" in failed["unreadable"]


def test_sweep_takes_the_fastest_that_runs() -> None:
    def measure(config: tuple[int, ...]) -> float:
        if config == (1,):
            raise RuntimeError("spills\nmuch text")
        return [0.0, 0.0, 3.0, float("nan"), 2.0][config[0]]

    candidates: list[tuple[int, ...]] = [(1,), (2,), (3,), (4,)]
    found = sweep(candidates, measure)
    assert found.best == (4,) and dict(found.seconds) == {(2,): 3.0, (4,): 2.0}
    assert found.failed[(1,)] == "RuntimeError: spills" and "nan" in found.failed[(3,)]
    with pytest.raises(BenchError, match="no candidate tile runs, the first one because: RuntimeError: spills"):
        sweep([(1,)], measure)


def test_tuning_rewrites_the_table_and_goes_on_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "tiles.json"
    save_table(table, {"forward 64": (1, 1), "kept": (2, 2)})
    tiles = SimpleNamespace(
        path=table,
        candidates=lambda race: [(8, 1), (16, 1)],
        step=lambda race, chosen: correct if chosen == (8, 1) else lambda *operands: -correct(*operands),
        key=lambda race: f"{race.step} {race.dims.rows}",
    )
    operation = dataclasses.replace(small_operation(), tiles=lambda: tiles)
    folder = Folder(tmp_path / "out", {"dry_run": True})
    for _ in range(2):
        tune_parts([operation], ["grouped_matmul/tiny"], folder, DRY_RUN, parts.Budget(1, 0))
        monkeypatch.setattr("experiments.kernel_bench.tune.tune_race", None)  # the second call must not need it
    assert json.loads(table.read_text()) == {"forward 64": [8, 1], "kept": [2, 2]}
    assert json.loads((tmp_path / "out" / "tiles.json").read_text()) == {"forward 64": [8, 1]}
    record = folder.read("grouped_matmul/tiny")
    assert record is not None and "wrong" in record["sweeps"]["forward 64"]["failed"]["[16, 1]"]


def test_tuned_tiles_are_found_by_the_hopper_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    races = [*GROUPED_MATMUL.parts["acceptance_gpu"][:3], GROUPED_SWIGLU.parts["acceptance_gpu"][0]]
    assert [race.step for race in races] == ["forward", "dgrad", "wgrad", "forward"]
    tables = [MatmulTiles()] * 3 + [SwigluTiles()]
    chosen = {
        own.key(race): hopper_tiles.CANDIDATES[i] for i, (own, race) in enumerate(zip(tables, races, strict=True))
    }
    for own, race in zip(tables, races, strict=True):
        assert own.path.exists() and callable(own.step(race, own.candidates(race)[0]))
    monkeypatch.setattr(hopper_tiles, "_table", lambda: chosen)
    rows, experts, width, hidden = SHAPES["acceptance_gpu/up"]
    assert list(chosen.values()) == [
        hopper_tiles.matmul_tiles(rows, experts, width, hidden),
        hopper_tiles.matmul_tiles(rows, experts, hidden, width, transpose_rhs=True),
        hopper_tiles.weight_gradient_tiles(width, hidden),
        hopper_tiles.swiglu_tiles(rows, experts, width, hidden),
    ]
