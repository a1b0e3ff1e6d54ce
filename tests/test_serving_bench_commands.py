"""`foejax bench` and the forward passes that it races; the pieces of the race between engines."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_serving_bench import run_of
from tiny import tiny_config, tiny_model

from experiments.bench_serving import main as bench_serving
from experiments.serving_bench.line_protocol import ContenderFailed
from experiments.serving_bench.race import Contender, Workload, find_best_setting, race
from experiments.serving_bench.step_profile import part_of_scope, parts_of_program
from foejax.cli import main
from foejax.interop import export_model
from foejax.models import LanguageModel
from foejax.serving.load.forward import ForwardPass, ForwardShape, shapes_by_length, shapes_by_tokens
from foejax.serving.load.latency import RequestRecord
from foejax.serving.load.trace import Trace
from sharding import Layout

# Forward passes.


def test_shapes_of_the_sweeps() -> None:
    assert [shape.tokens for shape in shapes_by_tokens(1000)] == [1, 2, 8, 128, 512, 1000]
    assert len(shapes_by_tokens(24_576)) == 13
    pairs = [(shape.sequences, shape.length) for shape in shapes_by_length(1024)]
    assert pairs == [(8, 128), (4, 256), (2, 512), (1, 1024)]
    assert shapes_by_length(100) == [ForwardShape(1, 100)]


@pytest.mark.parametrize(("kind", "groups"), [("foe", 8), ("ep", 1), ("tp_ep", 1)])
def test_a_pass_computes_the_models_logits(kind: Any, groups: int) -> None:
    """Three sequences on four devices: a row is padding where the batch is split."""
    config = tiny_config(num_groups=groups, num_layers=1)
    layout = Layout.create(kind, num_groups=groups, num_experts=32, num_kv_heads=8, num_devices=4, shard_params=False)
    model = LanguageModel.create(config, layout, jax.random.key(0)).for_inference()
    run = ForwardPass(model, ForwardShape(3, 20))
    run()
    logits = np.asarray(run())
    tokens, positions = (np.asarray(array) for array in run._inputs[:2])
    real = positions[:, 0] == 0
    assert real.sum() == 3 and len(real) == (4 if kind == "ep" else 3)
    batch = {"tokens": tokens, "positions": np.maximum(positions, 0), "segment_ids": np.where(positions < 0, 0, 1)}
    expected = np.asarray(jax.jit(model.logits)(batch)).reshape(len(real), 20, -1)[:, -1]
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-4)


# Commands.


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An MoE and an FoE model without a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for name, groups in (("moe", 1), ("foe", 8)):
        export_model(tiny_model(tiny_config(num_groups=groups, num_layers=1)), root / name, model_type="foe")
    return str(root / "moe"), str(root / "foe")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that `--devices` writes are put back."""
    for name in ("XLA_FLAGS", "JAX_PLATFORMS"):
        monkeypatch.setenv(name, os.environ[name])


SIZES = ["--max-sequences", "1", "--prefill-tokens", "16", "--decode-steps", "1", "--context", "32"]


def test_bench_serve_measures_an_engine_in_process(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], loose_promotion: None
) -> None:
    sizes = ["--requests", "6", "--interarrival", "0.01", "0", "--prompt-tokens", "3:9", "--output-tokens", "4"]
    command = ["bench", "serve", folders[1], "--out", str(tmp_path / "out"), "--devices", "1"]
    assert main([*command, *sizes, *SIZES]) == 0
    assert "| 0.01 | foe |" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(run["interarrival"], run["completed"], run["failed"], run["short"]) for run in found["runs"]] == [
        (0.01, 6, 0, 0),
        (0, 6, 0, 0),
    ]
    trace = Trace.read(tmp_path / "out" / "trace-0.01.jsonl")
    records = found["runs"][0]["records"]
    assert [(request.arrival, len(request.prompt)) for request in trace.requests] == [
        (record["arrival"], record["prompt_tokens"]) for record in records
    ]


def test_bench_serve_gives_every_model_the_identical_trace(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run_model(options: Any, index: int, traces: list[Trace]) -> list[list[RequestRecord]]:
        seen.append((options.folders[index], traces))
        return [list(run_of("any", trace.interarrival, 1.0 - index / 2).records) for trace in traces]

    monkeypatch.setattr("foejax.commands.bench._run_model", run_model)
    command = ["bench", "serve", *folders, "--interarrival", "0.5", "0.75", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert [folder for folder, _ in seen] == list(folders) and seen[0][1] == seen[1][1]
    prompts = [request.prompt for trace in seen[0][1] for request in trace.requests]
    assert max(max(prompt) for prompt in prompts) == 63 and {len(prompt) for prompt in prompts} == {256}
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    runs = [(run["interarrival"], run["engine"]) for run in found["runs"]]
    assert runs == [(0.5, "moe"), (0.5, "foe"), (0.75, "moe"), (0.75, "foe")]
    assert "|  | x | 2.00 2.00 2.00 | 2.00 2.00 2.00 |" in (tmp_path / "out" / "report.md").read_text()


def test_bench_forward_races_every_layout(
    folders: tuple[str, str],
    tmp_path: Path,
    loose_promotion: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With stand-ins for the passes, each of its own pace; the fastest of the turns counts."""
    order: list[str] = []

    class FakePass:
        def __init__(self, model: LanguageModel, shape: ForwardShape) -> None:
            layout = model.layout
            self.name = "foe" if model.config.num_groups > 1 else layout.kind
            assert (layout.mesh.size, layout.shard_params) == (2, False)

        def __call__(self) -> np.ndarray:
            order.append(self.name)
            is_warm = order.count(self.name) % 3 != 1
            time.sleep({"foe": 0.02, "fsdp": 0.1}.get(self.name, 0.06) if is_warm else 0.0)
            return np.zeros(1)

    monkeypatch.setattr("foejax.serving.load.forward.ForwardPass", FakePass)
    sizes = ["--max-tokens", "1", "--turns", "2", "--devices", "2", "--out", str(tmp_path)]
    assert main(["bench", "forward", *folders, *sizes]) == 0
    assert order[:15] == ["ep", "tp_ep", "tp", "fsdp", "foe"] * 3
    row = re.search(
        r"\| moe ep \| moe tp_ep \| moe tp \| moe data \| foe \|\n.*\n"
        r"\| 1 x 1 \| ([\d.]+) \| [\d.]+ \| [\d.]+ \| ([\d.]+) \| 1.00 \|",
        (tmp_path / "report.md").read_text(),
    )
    assert row and 1.5 < float(row[1]) < float(row[2]) < 8
    assert "1 x 1 tokens: moe ep" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name either one or several model folders, or --url URL --model NAME"),
        (["DIR", "--url", "http://x", "--model", "m"], "name either one or several model folders"),
        (["--url", "http://x"], "name either one or several model folders"),
        (["nowhere"], "nowhere does not exist"),
        (["DIR", "--prompt-tokens", "9:5"], "length '9:5': write N, LOW:HIGH or lognormal:MEAN:SIGMA"),
        (["DIR", "--prompts", "nowhere.jsonl"], "No such file or directory: 'nowhere.jsonl'"),
        (["DIR", "--trace", "PROMPTS"], "is not a trace"),
        (["DIR", "--prompts", "PROMPTS", *SIZES], "has no tokenizer and the prompts are texts"),
        (["DIR", "--interarrival", "1", "1"], "hold one twice"),
        (["DIR", "--interarrival", "-1"], "-1 is no time in seconds"),
        (["DIR", "--requests", "0"], "0 is not positive"),
        (["--url", "no scheme", "--model", "m"], "does not answer"),
    ],
)
def test_bad_arguments_are_told_in_one_line(
    arguments: list[str],
    message: str,
    folders: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    loose_promotion: None,
) -> None:
    (tmp_path / "prompts.jsonl").write_text('"To be"\n', encoding="utf-8")
    places = {"DIR": folders[0], "PROMPTS": str(tmp_path / "prompts.jsonl")}
    words = [places.get(word, word) for word in arguments]
    assert main(["bench", "serve", *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("foejax: error: ") and message in error


# The race between engines.


class FakeProcess:
    """A contender whose settings take these seconds for the prompts and for each token; None fails."""

    def __init__(self, seconds: dict[str, tuple[float, float] | None], log: list[str]) -> None:
        self.seconds, self.log, self.setting = seconds, log, ""

    def ask(self, command: str, arguments: dict[str, Any] | None = None, *, timeout: float = 0.0) -> Any:
        if command in ("facts", "settings"):
            return {} if command == "facts" else [{"kind": kind} for kind in self.seconds]
        assert arguments is not None
        if command == "prepare":
            self.setting = arguments["setting"]["kind"]
            if self.seconds[self.setting] is None:
                raise ContenderFailed("prepare: no memory")
            return None
        prompts, token = self.seconds[self.setting] or (0.0, 0.0)
        count = arguments["output_tokens"]
        self.log.append(f"{self.setting} {count} {arguments['prompts'][0][0]}")
        seconds = prompts + token * (count - 1)
        return {"seconds": seconds, "cpu_seconds": seconds, "output_tokens": 2 * count, "fewest": count}


def test_the_fastest_setting_races_in_alternating_order() -> None:
    log: list[str] = []
    ours = Contender("ours", FakeProcess({"only": (1.0, 0.1)}, log))  # type: ignore[arg-type]
    peer = FakeProcess({"slow": (0.0, 1.0), "big": None, "quick prompts": (1.0, 0.5), "quick": (4.0, 0.2)}, log)
    theirs = Contender("theirs", peer)  # type: ignore[arg-type]
    workload = Workload(requests=2, prompt_tokens=3, output_tokens=101, vocab_size=1000)
    for contender in (ours, theirs):
        find_best_setting(contender, workload, 11, 60.0, lambda line: None)
    assert theirs.setting == {"kind": "quick"}
    rates = [trial["tokens_per_second"] for trial in theirs.trials]
    assert rates == [pytest.approx(2.02), None, pytest.approx(202 / 51), pytest.approx(202 / 24)]
    assert theirs.trials[1]["reason"] == "prepare: no memory"
    log.clear()
    race([ours, theirs], workload, 3, lambda: 0.5, lambda line: None)
    turns = [line.split() for line in log]
    assert [turn[0] for turn in turns] == ["only", "quick", "only", "quick", "quick", "only", "only", "quick"]
    prompts = [turn[2] for turn in turns]
    assert prompts[2] == prompts[3] and prompts[4] == prompts[5] and len(set(prompts)) == 4
    assert [run["seconds"] for run in theirs.runs] == [pytest.approx(24.0)] * 3


def test_a_contender_that_stops_early_is_no_winner() -> None:
    class EarlyEnd(FakeProcess):
        def ask(self, command: str, arguments: dict[str, Any] | None = None, *, timeout: float = 0.0) -> Any:
            return (
                super().ask(command, arguments) | {"fewest": 1} if command == "run" else super().ask(command, arguments)
            )

    early = Contender("early", EarlyEnd({"only": (1.0, 0.1)}, []))  # type: ignore[arg-type]
    workload = Workload(requests=2, prompt_tokens=3, output_tokens=5, vocab_size=10)
    find_best_setting(early, workload, 3, 60.0, lambda line: None)
    with pytest.raises(ContenderFailed, match="early gave a request 1 tokens only"):
        race([early], workload, 1, lambda: 0.0, lambda line: None)


def test_a_race_needs_the_peers_python(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench_serving(["--peer", "vllm", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "bench_serving: --peer vllm needs --peer-python: the Python that has it\n"


PROGRAM = """\
HloModule jit_run

%fused_computation.1 (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %dot.1 = f32[2]{0} dot(%p, %p), metadata={op_name="jit(run)/while/body/attention/dot_general"}
}

%body (q: f32[2]) -> f32[2] {
  %unnamed.1 = f32[2]{0} fusion(%q), kind=kLoop, calls=%fused_computation.1, metadata={stack_frame_id=3}
  %weights.1 = f32[2]{0} fusion(%q), kind=kLoop
  %projected.1 = f32[2]{0} dot(%q, %weights.1)
  %heads.1 = f32[2]{0} copy(%projected.1), metadata={op_name="jit(run)/while/body/attention/paged_attention/x"}
  ROOT %copy.1 = f32[2]{0} copy(%heads.1), metadata={op_name="jit(run)/while/body/experts/combine/add"}
}
"""


def test_operations_are_told_apart_by_their_scopes() -> None:
    found = parts_of_program(PROGRAM)
    assert found["dot.1"] == found["unnamed.1"] == "projections, rotary embedding, cache write, merge"
    assert found["weights.1"] == found["projected.1"] == found["heads.1"] == "attention over blocks"
    assert found["copy.1"] == "routing, row plan, combine"
    for scope, part in (
        ("jit(run)/while/body/experts/grouped_swiglu/while/body/dot_general", "expert matmuls"),
        ("jit(run)/while/body/attention/paged_attention/jit(attention)/ffi_call", "attention over blocks"),
        ("jit(run)/while/body/merge/add", "projections, rotary embedding, cache write, merge"),
        ("jit(run)/while/body/head/jit(matmul)/ffi_call", "head"),
        ("jit(run)/sort", "sampling, embedding and the rest"),
    ):
        assert part_of_scope(scope) == part
