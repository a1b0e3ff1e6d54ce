"""The load bench: traces, figures computed by hand, both runners on stand-ins, reports and commands."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from serving_fakes import VOCABULARY, FakeDevices

from foejax.serving.engine import Engine
from foejax.serving.load.forward import ForwardShape
from foejax.serving.load.forward_report import ForwardReport
from foejax.serving.load.in_process import run_in_process
from foejax.serving.load.latency import Limits, RequestRecord, Spread, Summary, summarise
from foejax.serving.load.report import LoadRun, load_markdown, write_load_report
from foejax.serving.load.trace import Lengths, LoadError, Trace, TracedRequest, make_trace, read_prompts
from foejax.serving.runner import StepResult
from foejax.serving.scheduler import Scheduler, SchedulerLimits
from foejax.serving.step_plan import StepPlan

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
