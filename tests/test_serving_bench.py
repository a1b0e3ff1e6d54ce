"""The load bench: traces, figures computed by hand, both runners on stand-ins, reports and commands."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import uvicorn
from serving_fakes import VOCABULARY, FakeDevices
from tiny import tiny_config, tiny_model

from foejax.cli import main
from foejax.interop import export_model
from foejax.models import LanguageModel
from foejax.serving.engine import Engine
from foejax.serving.load.forward import ForwardPass, ForwardShape, shapes_by_length, shapes_by_tokens
from foejax.serving.load.forward_report import ForwardReport
from foejax.serving.load.in_process import run_in_process
from foejax.serving.load.latency import Limits, RequestRecord, Spread, Summary, summarise
from foejax.serving.load.over_http import Server, run_over_http
from foejax.serving.load.report import LoadRun, load_markdown, write_load_report
from foejax.serving.load.trace import Lengths, LoadError, Trace, TracedRequest, make_trace, read_prompts
from foejax.serving.runner import StepResult
from foejax.serving.scheduler import Scheduler, SchedulerLimits
from foejax.serving.step_plan import StepPlan
from sharding import Layout

FACTS = {"on_gpu": False, "device": "1 x cpu", "command": "foejax bench serve"}


def trace_of(*requests: tuple[float, int, int]) -> Trace:
    """From (arrival, first prompt token, output tokens)."""
    return Trace(tuple(TracedRequest(arrival, (first, 1, 2), count) for arrival, first, count in requests), 0.5, 0)


# Traces.


def test_a_trace_depends_on_its_seed_alone_and_survives_its_file(tmp_path: Path) -> None:
    def make(seed: int, interarrival: float = 0.5) -> Trace:
        lengths = Lengths.parse("5:9"), Lengths.parse("lognormal:20:0.5")
        return make_trace(200, interarrival, lengths[0], seed=seed, prompt=lengths[1], vocab_size=30)

    trace = make(3)
    assert trace == make(3) and trace != make(4)
    trace.save(tmp_path / "trace.jsonl")
    assert Trace.read(tmp_path / "trace.jsonl") == trace
    for request, slower in zip(trace.requests, make(3, 1.0).requests, strict=True):
        assert slower == TracedRequest(2 * request.arrival, request.prompt, request.output_tokens)


def test_arrivals_and_lengths_have_the_distributions_asked_for() -> None:
    count = 20_000
    trace = make_trace(
        count, 0.5, Lengths.parse("5:9"), seed=0, prompt=Lengths.parse("lognormal:20:0.5"), vocab_size=30
    )
    arrivals = np.array([request.arrival for request in trace.requests])
    gaps = np.diff(arrivals)
    assert arrivals[0] == 0 and (gaps >= 0).all()
    np.testing.assert_allclose(gaps.mean(), 0.5, rtol=0.03)
    np.testing.assert_allclose((gaps > 0.5).mean(), math.exp(-1), rtol=0.03)  # exponential: a Poisson process
    outputs = np.array([request.output_tokens for request in trace.requests])
    assert set(outputs) == {5, 6, 7, 8, 9} and abs(outputs.mean() - 7) < 0.05
    prompts = [request.prompt for request in trace.requests]
    assert {token for prompt in prompts for token in prompt} == set(range(30))
    lengths = np.log([len(prompt) for prompt in prompts])
    np.testing.assert_allclose([np.exp(lengths).mean(), lengths.std()], [20, 0.5], rtol=0.03)


def test_prompts_of_a_file_are_taken_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"To be"\n\n[1, 2]\n{"prompt": "or not", "id": 7}\n{"prompt": [3]}\n', encoding="utf-8")
    prompts = read_prompts(path)
    assert prompts == ["To be", (1, 2), "or not", (3,)]
    trace = make_trace(6, 0.0, Lengths.parse("4"), seed=0, prompt=prompts, vocab_size=10)
    assert [request.prompt for request in trace.requests] == [*prompts, "To be", (1, 2)]
    assert all(request.arrival == 0 and request.output_tokens == 4 for request in trace.requests)


@pytest.mark.parametrize("text", ["", "0", "x", "9:5", "5:x", "1:2:3", "lognormal:5", "normal:5:1", "nan", "-3", "inf"])
def test_lengths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(LoadError, match="write N, LOW:HIGH or lognormal:MEAN:SIGMA"):
        Lengths.parse(text)


@pytest.mark.parametrize("line", ["{", '{"text": "a"}', "[]", '""', "[1.5]", "[true]", "[-1]", "7"])
def test_lines_that_are_no_prompts_are_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'"fine"\n{line}\n', encoding="utf-8")
    with pytest.raises(LoadError, match=r"prompts.jsonl, line 2, holds no prompt"):
        read_prompts(path)


# Figures.


def test_figures_of_a_request_by_hand() -> None:
    """Tokens at 3, then two at 5, then three at 5.6, for a request of time 1."""
    record = RequestRecord(1.0, 6, sent=1.25, bursts=[(3.0, 1), (5.0, 2), (5.6, 3)], finished=5.7)
    assert (record.output_tokens, record.ttft, record.e2e) == (6, 2.0, pytest.approx(4.6))
    assert record.tbt == pytest.approx(2.6 / 5)
    assert record.gaps() == pytest.approx([1, 1, 0.2, 0.2, 0.2])
    assert record.stall() == pytest.approx(2.0)
    at_once = RequestRecord(0.0, 3, bursts=[(2.0, 3)], finished=2.0)
    assert (at_once.gaps(), at_once.tbt, at_once.stall()) == ([0.0, 0.0], 0.0, None)
    single = RequestRecord(0.0, 1, bursts=[(2.0, 1)], finished=2.0)
    assert (single.gaps(), single.tbt, single.stall()) == ([], None, None)


def test_figures_of_a_run_by_hand() -> None:
    records = [
        RequestRecord(0.0, 2, sent=0.0, bursts=[(1.0, 1), (2.0, 1)], finished=2.0),
        RequestRecord(1.0, 5, sent=1.5, bursts=[(4.0, 1), (7.0, 3)], finished=7.0),
        RequestRecord(2.0, 1, sent=2.0, bursts=[(5.0, 1)], finished=5.0),
        RequestRecord(3.0, 9, sent=3.0, bursts=[(3.5, 4)], finished=11.0, failure="timed out"),
    ]
    found = summarise(records, Limits(ttft=3.0, tbt=0.9))
    assert (found.requests, found.completed, found.failed, found.short) == (4, 3, 1, 1)
    assert found.failures == {"timed out": 1}
    assert found.ttft == Spread(pytest.approx(7 / 3), 3.0, pytest.approx(3.0))
    assert found.tbt == Spread(1.0, 1.0, 1.0) and found.gap == Spread(1.0, 1.0, 1.0)
    assert found.stall == Spread(2.0, 2.0, pytest.approx(2.98))
    assert found.e2e == Spread(pytest.approx(11 / 3), 3.0, pytest.approx(3 + 0.98 * 3))
    assert found.seconds == 11.0  # the failed request kept the engine busy that long
    assert found.output_tokens_per_second == pytest.approx(7 / 11)
    assert found.requests_per_second == pytest.approx(3 / 11)
    # The first one's tokens are too far apart, the second one's too, the last one failed.
    assert found.good_share == 0.25 and found.goodput == pytest.approx(1 / 11)
    assert found.most_late == 0.5


def test_a_run_without_success_has_no_times() -> None:
    found = summarise([RequestRecord(0.0, 3, sent=0.0, finished=0.5, failure="429: full")] * 2)
    assert math.isnan(found.ttft.mean) and found.output_tokens_per_second == 0 and found.goodput == 0
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert plain["ttft"] == {"mean": None, "p50": None, "p99": None} and plain["failures"] == {"429: full": 2}


# In process.


class SteppingClock:
    """Advances by a second a step, and by what is slept."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class SlowDevices:
    """The fake devices, a second a plan."""

    def __init__(self, clock: SteppingClock) -> None:
        self._clock, self._devices = clock, FakeDevices(4)

    def run(self, plan: StepPlan) -> StepResult:
        self._clock.now += 1.0
        return StepResult(self._devices.run(plan), None)


def make_engine(clock: SteppingClock, decode_steps: tuple[int, ...] = (1,)) -> Engine:
    limits = SchedulerLimits(
        num_shards=1, max_sequences=4, num_blocks=64, block_size=4, prefill_shapes=((2, 8),), decode_steps=decode_steps
    )
    return Engine(SlowDevices(clock), Scheduler(limits), context=40, vocab_size=VOCABULARY, clock=clock)


def test_requests_enter_between_steps_and_are_timed_from_their_arrival() -> None:
    clock = SteppingClock()
    trace = trace_of((0, 5, 3), (0, 6, 3), (2.5, 7, 3), (20, 8, 2))
    records = run_in_process(make_engine(clock), trace, clock=clock, sleep=clock.sleep)
    assert [record.sent for record in records] == [0, 0, 3, 20]
    assert [record.bursts for record in records] == [
        [(1, 1), (2, 1), (3, 1)],
        [(1, 1), (2, 1), (3, 1)],
        [(4, 1), (5, 1), (6, 1)],
        [(21, 1), (22, 1)],
    ]
    assert [record.ttft for record in records] == [1, 1, 1.5, 1]
    assert [record.finished for record in records] == [3, 3, 6, 22]
    assert {record.prompt_tokens for record in records} == {3} and not any(record.failure for record in records)


def test_steps_of_several_tokens_are_bursts() -> None:
    clock = SteppingClock()
    (record,) = run_in_process(make_engine(clock, (1, 4)), trace_of((0, 5, 9)), clock=clock, sleep=clock.sleep)
    assert record.bursts == [(1, 1), (2, 4), (3, 4)] and record.gaps() == [0.25] * 8


def test_refused_and_late_requests_are_failures_and_leave_nothing_behind() -> None:
    clock, engine = SteppingClock(), None
    engine = make_engine(clock)
    trace = trace_of((0, 5, 3), (0, VOCABULARY, 3), (0, 6, 30))
    records = run_in_process(engine, trace, timeout=10, clock=clock, sleep=clock.sleep)
    assert records[0].failure == "" and records[0].output_tokens == 3
    assert records[1].failure.startswith("refused: token 50 is outside the vocabulary")
    assert records[2].failure == "timed out" and 0 < records[2].output_tokens < 30
    assert engine.num_unfinished == 0
    assert summarise(records).completed == 1


# Over HTTP.

Send = Callable[[dict[str, Any]], Awaitable[None]]


class FakeServer:
    """`/v1/completions` whose first prompt token chooses what happens."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.knows_more_than_openai = True

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Send) -> None:
        assert scope["type"] == "http"
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        fields = json.loads(body)
        self.bodies.append(fields)
        if scope["path"] != "/v1/completions" or fields["model"] != "fake":
            await answer(send, 404, {"error": {"message": "the model does not exist"}})
        elif "ignore_eos" in fields and not self.knows_more_than_openai:
            await answer(send, 400, {"error": {"message": "unknown field"}})
        elif not fields.get("stream"):
            await answer(send, 200, {"choices": [{"text": "x"}]})
        elif fields["prompt"][0] == 429:
            await answer(send, 429, {"error": {"message": "the queue is full"}})
        else:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await self._stream(fields, send)
            await send({"type": "http.response.body", "body": b""})

    async def _stream(self, fields: dict[str, Any], send: Send) -> None:
        kind, count = fields["prompt"][0], fields["max_tokens"]
        with_ids = fields.get("return_token_ids", False)
        if kind == 500:
            await event(send, {"error": {"message": "out of memory"}})
            return
        left = count
        while left:
            await asyncio.sleep(1.5 if kind == 3 and left == count else 0.05)
            now = min(left, 2 if left < count else 1)
            left -= now
            ids = {"token_ids": [9] * now} if with_ids else {}
            await event(send, {"choices": [{"text": "ab" * now, "finish_reason": None, **ids}], "usage": None})
            if kind == 502:
                return
        ids = {"token_ids": []} if with_ids else {}
        await event(send, {"choices": [{"text": "", "finish_reason": "length", **ids}], "usage": None})
        await event(send, {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": count}})
        await send({"type": "http.response.body", "body": b": a comment\n\ndata: [DONE]\n\n", "more_body": True})


async def answer(send: Send, status: int, content: dict[str, Any]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


async def event(send: Send, content: dict[str, Any]) -> None:
    data = f"data: {json.dumps(content)}\n\n".encode()
    await send({"type": "http.response.body", "body": data, "more_body": True})


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[FakeServer, str]]:
    """The fake server on a free port, and its address."""
    fake = FakeServer()
    bound = socket.create_server(("127.0.0.1", 0))
    uvicorn_server = uvicorn.Server(uvicorn.Config(fake, lifespan="off", log_level="error"))
    thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [bound]})
    thread.start()
    while not uvicorn_server.started:
        time.sleep(0.01)
    yield fake, f"http://127.0.0.1:{bound.getsockname()[1]}"
    uvicorn_server.should_exit = True
    thread.join()


def test_streams_are_timed_and_failures_told_apart(server: tuple[FakeServer, str]) -> None:
    fake, url = server
    fake.bodies.clear()
    trace = trace_of((0, 1, 5), (0, 429, 5), (0.1, 500, 5), (0.1, 502, 5), (0.2, 3, 5), (0.3, 1, 1))
    records = run_over_http(Server(url, "fake", timeout=1.0), trace)
    assert [record.failure for record in records] == [
        "",
        "429: the queue is full",
        "in the stream: out of memory",
        "the stream broke off",
        "timed out",
        "",
    ]
    for record, request in zip(records, trace.requests, strict=True):
        assert request.arrival <= record.sent < request.arrival + 0.5
    whole = records[0]
    assert [count for _, count in whole.bursts] == [1, 2, 2] and whole.prompt_tokens == 3
    assert 0.05 <= whole.ttft < 0.5 and 0.1 <= whole.e2e - whole.ttft < 1
    assert whole.finished >= whole.e2e
    assert records[4].finished == pytest.approx(1.2, abs=0.5)
    sent = next(body for body in fake.bodies if body["prompt"] == [1, 1, 2] and body.get("stream"))
    assert sent["max_tokens"] == 5 and sent["temperature"] == 0 and sent["ignore_eos"] is True
    found = summarise(records)
    assert (found.completed, found.failed, found.short) == (2, 4, 0)


def test_servers_that_know_openais_fields_alone_are_measured_too(server: tuple[FakeServer, str]) -> None:
    """Their events do not say how many tokens they hold: those of the usage are spread."""
    fake, url = server
    fake.knows_more_than_openai = False
    try:
        (record,) = run_over_http(Server(f"{url}/v1/", "fake"), trace_of((0, 1, 6)))
    finally:
        fake.knows_more_than_openai = True
    assert not record.failure and [count for _, count in record.bursts] == [1, 2, 1, 2]


def test_addresses_that_answer_nothing_are_told_in_one_line(server: tuple[FakeServer, str]) -> None:
    _, url = server
    with pytest.raises(LoadError, match="answers 404: the model does not exist: correct --url, --model"):
        run_over_http(Server(url, "another"), trace_of((0, 1, 1)))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(LoadError, match="does not answer .*: start the server, or correct --url"):
        run_over_http(Server(f"http://127.0.0.1:{port}", "fake"), trace_of((0, 1, 1)))


# Reports.


def run_of(engine: str, scale: float, factor: float) -> LoadRun:
    records = [
        RequestRecord(float(index), 3, sent=float(index), finished=index + 4 * factor)
        for index in range(2)
    ]  # fmt: skip
    for index, record in enumerate(records):
        record.bursts = [(index + 2 * factor, 1), (index + 4 * factor, 2)]
    records.append(RequestRecord(1.0, 3, sent=1.0, finished=1.0, failure="429: a|b"))
    return LoadRun(engine, scale, records, summarise(records))


def test_report_has_the_layout_of_the_papers_tables(tmp_path: Path) -> None:
    runs = [run_of("moe", 0.5, 1.0), run_of("foe", 0.5, 0.5), run_of("moe", 0.75, 1.0), run_of("foe", 0.75, 0.8)]
    text = load_markdown(runs, FACTS, Limits(ttft=1.5))
    assert (
        "\n".join(
            [
                "| inter-arrival | engine | TTFT | TBT | E2E |",
                "| --- | --- | --- | --- | --- |",
                "| 0.5 | moe | 2.000 2.000 2.000 | 1.000 1.000 1.000 | 4.000 4.000 4.000 |",
                "|  | foe | 1.000 1.000 1.000 | 0.500 0.500 0.500 | 2.000 2.000 2.000 |",
                "|  | x | 2.00 2.00 2.00 | 2.00 2.00 2.00 | 2.00 2.00 2.00 |",
                "| 0.75 | moe |",
            ]
        )
        in text
    )
    assert "| 0.5 | foe | 1 | 429: a\\|b |" in text and "TTFT at most 1.5 s" in text
    assert "Measured without a GPU: the ratios mean something" in text
    write_load_report(tmp_path, runs, FACTS, Limits(ttft=1.5))
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["limits"] == {"ttft": 1.5, "tbt": None} and len(found["runs"]) == 4
    assert found["runs"][1]["ttft"]["p99"] == pytest.approx(1.0) and len(found["runs"][0]["records"]) == 3
    assert (tmp_path / "latencies.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(runs[0].summary, Summary)


def test_forward_report_divides_by_the_baseline(tmp_path: Path) -> None:
    cells = [(ForwardShape(1, length), {"foe": 0.5, "moe ep": 0.5 * length}) for length in (1, 3)]
    ForwardReport("foe", cells, cells[:1], FACTS, {"moe data": "does not fit"}).write(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert (
        "| 1 x 3 | 1.00 | 3.00 |" in text and "| moe data | does not fit |" in text and "(" not in text.split("##")[2]
    )
    assert json.loads((tmp_path / "results.json").read_text())["by_tokens"][1]["times"] == {"foe": 1, "moe ep": 3}
    ForwardReport("foe", cells, cells[:1], FACTS | {"on_gpu": True}, {}).write(tmp_path)
    assert "| 1 x 3 | 1.00 (500) | 3.00 (1.5e+03) |" in (tmp_path / "report.md").read_text()


# Forward passes.


def test_shapes_of_the_sweeps() -> None:
    assert [shape.tokens for shape in shapes_by_tokens(1000)] == [1, 2, 8, 128, 512, 1000]
    assert len(shapes_by_tokens(24_576)) == 13
    pairs = [(shape.sequences, shape.length) for shape in shapes_by_length(1024)]
    assert pairs == [(8, 128), (4, 256), (2, 512), (1, 1024)]
    assert shapes_by_length(100) == [ForwardShape(1, 100)]


@pytest.mark.parametrize(("kind", "groups"), [("foe", 8), ("ep", 1)])
def test_a_pass_computes_the_models_logits(kind: Any, groups: int) -> None:
    """Three sequences on four devices: a row is padding where the batch is split."""
    config = tiny_config(num_groups=groups, num_layers=1)
    layout = Layout.create(kind, num_groups=groups, num_experts=32, num_devices=4, shard_params=False)
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


def test_bench_serve_replays_a_trace_on_a_server(
    server: tuple[FakeServer, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = trace_of((0, 1, 3), (0.1, 429, 3))
    trace.save(tmp_path / "trace.jsonl")
    command = ["bench", "serve", "--url", server[1], "--model", "fake", "--trace", str(tmp_path / "trace.jsonl")]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| 1 of 2 | 0 | 1 |" in text and "| 0.5 | fake | 1 | 429: the queue is full |" in text


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
            time.sleep({"foe": 0.02, "ep": 0.06, "fsdp": 0.1}[self.name] if is_warm else 0.0)
            return np.zeros(1)

    monkeypatch.setattr("foejax.serving.load.forward.ForwardPass", FakePass)
    sizes = ["--max-tokens", "1", "--turns", "2", "--devices", "2", "--out", str(tmp_path)]
    assert main(["bench", "forward", *folders, *sizes]) == 0
    assert order[:9] == ["ep", "fsdp", "foe"] * 3
    row = re.search(
        r"\| moe ep \| moe data \| foe \|\n.*\n\| 1 x 1 \| ([\d.]+) \| ([\d.]+) \| 1.00 \|",
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
