"""The thread that owns an engine: what its streams give, what it refuses, and how it ends."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from server_fakes import LIMITS, FakeServer, expected_tokens, started, wait_until

from foejax.serving.engine import PromptError
from foejax.serving.engine_thread import Draining, EngineFailed, EngineStopped, PieceStream, QueueFull
from foejax.serving.sampling_params import SamplingParams
from foejax.serving.sequence import FinishReason
from foejax.serving.statistics import Histogram

LONG = [1, 2, 3, 4, 9]
"""A prompt after which the fake model goes on for more than 60 tokens."""


def run(test: Callable[[FakeServer], Awaitable[Any]], **options: Any) -> FakeServer:
    """Run a coroutine with a started thread; nothing may be left of it."""

    async def with_limit(fake: FakeServer) -> None:
        await asyncio.wait_for(test(fake), 60)

    with started(**options) as fake:
        asyncio.run(with_limit(fake))
    return fake


def greedy(max_tokens: int | None = 8, **fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, **fields)


async def tokens_of(stream: PieceStream) -> dict[tuple[str, int], list[int]]:
    """Tokens by request and continuation."""
    found: dict[tuple[str, int], list[int]] = {}
    async for piece in stream:
        found.setdefault((piece.request_id, piece.index), []).extend(piece.tokens)
    return found


async def first_of(stream: PieceStream, count: int) -> None:
    """Take some pieces and go away."""
    for _ in range(count):
        await anext(stream)
    stream.close()


def random_prompts(count: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(10, 250, random.integers(1, 20)).tolist() for _ in range(count)]


def long_prompts(count: int) -> list[list[int]]:
    """Prompts that the fake model continues for at least 60 tokens."""
    candidates = ([*LONG, number % 250, number // 250] for number in range(100_000))
    return list(itertools.islice((prompt for prompt in candidates if len(expected_tokens(prompt, 60)) == 60), count))


def test_every_tenth_request_is_aborted_and_the_others_are_exact() -> None:
    async def test(fake: FakeServer) -> None:
        prompts, abandoned = random_prompts(100), long_prompts(10)
        streams = []
        for index, prompt in enumerate(prompts):
            abort = index % 10 == 0
            stream = fake.thread.submit([abandoned[index // 10] if abort else prompt], greedy(60 if abort else 10))
            streams.append(first_of(stream, 3) if abort else tokens_of(stream))
        found = await asyncio.gather(*streams)
        for index, (prompt, tokens) in enumerate(zip(prompts, found, strict=True)):
            if index % 10:
                assert list(tokens.values()) == [expected_tokens(prompt, 10)]
        while not fake.thread.is_idle:
            await asyncio.sleep(0.005)

    fake = run(test, pause=0.0005)
    finished = fake.thread.statistics.finished
    assert finished[FinishReason.ABORT] == 10 and finished.total() == 100
    assert fake.num_held_blocks == 0 and fake.thread.num_running == fake.thread.num_waiting == 0
    assert not fake.thread._streams and not fake.thread._requests


def test_one_stream_of_several_prompts_and_continuations() -> None:
    async def test(fake: FakeServer) -> None:
        prompts = random_prompts(5)
        stream = fake.thread.submit(prompts, greedy(n=3))
        found = await tokens_of(stream)
        for request_id, prompt in zip(stream.request_ids, prompts, strict=True):
            assert [found[request_id, index] for index in range(3)] == [expected_tokens(prompt, 8)] * 3
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    run(test)


def test_a_stream_that_is_closed_unread_ends_its_requests() -> None:
    async def test(fake: FakeServer) -> None:
        fake.runner.open.clear()
        stream = fake.thread.submit(long_prompts(6), greedy(60, n=2))
        stream.close()
        stream.close()
        fake.runner.open.set()
        while not fake.thread.is_idle:
            await asyncio.sleep(0.005)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    fake = run(test)
    assert fake.num_held_blocks == 0 and fake.thread.statistics.finished == {FinishReason.ABORT: 12}


def test_an_idle_thread_sleeps_and_wakes_at_once() -> None:
    async def test(fake: FakeServer) -> None:
        await tokens_of(fake.thread.submit([LONG], greedy(2)))
        used, steps = time.process_time(), fake.runner.num_steps
        await asyncio.sleep(0.5)
        assert fake.runner.num_steps == steps
        assert time.process_time() - used < 0.1
        waits = []
        for _ in range(20):
            start = time.perf_counter()
            await anext(fake.thread.submit([LONG], greedy(1)))
            waits.append(time.perf_counter() - start)
        assert sorted(waits)[10] < 0.02

    run(test)


def test_the_queue_is_bounded() -> None:
    async def test(fake: FakeServer) -> None:
        fake.runner.open.clear()
        streams = [fake.thread.submit([prompt], greedy()) for prompt in random_prompts(6)]
        with pytest.raises(QueueFull, match="6 continuations run or wait and 7 may"):
            fake.thread.submit([LONG], greedy(n=2))
        streams.append(fake.thread.submit([LONG], greedy()))
        wait_until(lambda: fake.thread.num_running > 0)
        assert fake.thread.num_running + fake.thread.num_waiting == 7
        with pytest.raises(ValueError, match="8 continuations in one request are too many: ask for at most 7"):
            fake.thread.submit([LONG] * 4, greedy(n=2))
        with pytest.raises(PromptError, match="the prompt has no tokens"):
            fake.thread.submit([LONG, []], greedy())
        fake.runner.open.set()
        await asyncio.gather(*map(tokens_of, streams))
        await tokens_of(fake.thread.submit([LONG] * 7, greedy()))

    assert run(test, max_waiting=3).thread.statistics.finished.total() == 14


def test_draining_finishes_what_runs_and_takes_nothing_new() -> None:
    async def test(fake: FakeServer) -> None:
        running = asyncio.ensure_future(tokens_of(fake.thread.submit([LONG], greedy(40))))
        fake.thread.drain()
        with pytest.raises(Draining):
            fake.thread.submit([LONG], greedy())
        assert list((await running).values()) == [expected_tokens(LONG, 40)]
        assert fake.thread.is_idle

    run(test, pause=0.002)


def test_an_engine_that_raises_tells_everybody() -> None:
    async def test(fake: FakeServer) -> None:
        fake.runner.open.clear()
        streams = [fake.thread.submit([prompt], greedy(60)) for prompt in random_prompts(9)]
        waiting = asyncio.gather(*map(tokens_of, streams), return_exceptions=True)
        fake.runner.failure = FloatingPointError("the devices are gone")
        fake.runner.open.set()
        outcomes = await waiting
        assert all(isinstance(outcome, EngineFailed) for outcome in outcomes)
        with pytest.raises(EngineFailed, match="FloatingPointError"):
            fake.thread.submit([LONG], greedy())
        streams[0].close()
        assert fake.thread.failure is fake.runner.failure

    run(test)


def test_stopping_ends_what_runs() -> None:
    async def test(fake: FakeServer) -> None:
        stream = fake.thread.submit([LONG], greedy(60))
        await anext(stream)
        fake.thread.stop(10)
        with pytest.raises(EngineStopped):
            await tokens_of(stream)
        with pytest.raises(EngineStopped):
            fake.thread.submit([LONG], greedy())

    run(test, pause=0.01)


def test_a_request_ends_at_its_deadline_with_what_it_has() -> None:
    async def test(fake: FakeServer) -> None:
        pieces = [piece async for piece in fake.thread.submit([LONG], greedy(60), timeout=0.2)]
        tokens = [token for piece in pieces for token in piece.tokens]
        assert 0 < len(tokens) < 60 and tokens == expected_tokens(LONG, 60)[: len(tokens)]
        assert pieces[-1].finish_reason == FinishReason.DEADLINE

    run(test, pause=0.03)


def test_a_closed_event_loop_does_not_stop_the_thread() -> None:
    with started(pause=0.005) as fake:

        async def leave() -> None:
            fake.thread.submit([LONG], greedy(20))

        asyncio.run(leave())
        wait_until(lambda: fake.thread.is_idle)

        async def ask() -> None:
            assert list((await tokens_of(fake.thread.submit([LONG], greedy()))).values()) == [expected_tokens(LONG, 8)]

        asyncio.run(ask())


def test_times_and_counts_of_requests() -> None:
    async def test(fake: FakeServer) -> None:
        await tokens_of(fake.thread.submit([LONG], greedy(9)))
        between = fake.thread.statistics.time_between_tokens
        assert sum(between.counts) == 8 and 0.04 <= between.total < 8 * 0.02, "four tokens share a step's 20 ms"
        await tokens_of(fake.thread.submit([[*LONG, 1], LONG], greedy(4, n=2)))
        await first_of(fake.thread.submit([LONG], greedy(60)), 2)
        while not fake.thread.is_idle:
            await asyncio.sleep(0.005)

    fake = run(test, pause=0.02, limits=replace(LIMITS, decode_steps=(1, 4)))
    statistics, scheduler = fake.thread.statistics, fake.thread.engine.scheduler
    assert statistics.finished[FinishReason.LENGTH] == 5 and statistics.finished[FinishReason.ABORT] == 1
    assert statistics.generated_tokens >= 9 + 4 * 4 + 2
    first, between, whole = statistics.time_to_first_token, statistics.time_between_tokens, statistics.request_time
    assert (sum(first.counts), sum(whole.counts)) == (4, 3)
    assert sum(between.counts) == statistics.generated_tokens - 6
    assert 0.02 <= first.total / 4 < 2
    assert whole.total >= 3 * 0.06
    assert scheduler.num_prompt_tokens == 5 + 2 * 6 + 2 * 5 + 5
    assert scheduler.num_prefix_tokens == 5 * 4, "the first block, of all but the first"
    assert scheduler.num_preemptions == 0 and scheduler.held_share == 0


def test_preempted_sequences_count() -> None:
    async def test(fake: FakeServer) -> None:
        prompts = long_prompts(4)
        found = await tokens_of(fake.thread.submit(prompts, greedy(40)))
        assert list(found.values()) == [expected_tokens(prompt, 40) for prompt in prompts]

    fake = run(test, limits=replace(LIMITS, num_blocks=26))
    assert fake.thread.engine.scheduler.num_preemptions > 0
    assert fake.thread.engine.scheduler.num_prompt_tokens == 4 * 7


@pytest.mark.parametrize(
    ("values", "counts"), [([0.5], [1, 0, 0]), ([1, 1.5, 2], [1, 2, 0]), ([2.1, 100], [0, 0, 2]), ([], [0, 0, 0])]
)
def test_histograms_count_up_to_and_with_each_bound(values: Sequence[float], counts: list[int]) -> None:
    histogram = Histogram((1, 2))
    for value in values:
        histogram.observe(value, 1)
    assert histogram.counts == counts and histogram.total == sum(values)
