"""Servers over an engine whose model is a fake one, for tests of everything above the engine."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import openai
from serving_fakes import END, FakeDevices, continuation
from tiny import tiny_config

from foejax.data import Tokenizer
from foejax.data.tokenizer import train_bpe
from foejax.interop import export_model
from foejax.models import LanguageModel
from foejax.serving.engine import Engine
from foejax.serving.engine_thread import EngineThread
from foejax.serving.expert_budget import ExpertReads
from foejax.serving.runner import StepResult
from foejax.serving.scheduler import Scheduler, SchedulerLimits
from foejax.serving.server.app import ServedModel, make_app
from foejax.serving.server.chat_template import ChatTemplate
from foejax.serving.server.process import Server, bind, url_of
from foejax.serving.step_plan import StepPlan
from foejax.serving.token_logprobs import TokenLogprobs
from sharding import Layout

CONTEXT = 96
NAME = "fake"
LONG = "Once upon a time"
"""A prompt after which the fake model goes on for more than 50 tokens."""
TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
EXPERT_READS = ExpertReads(np.array([[[[4, 2, 1, 1], [0, 0, 0, 0]]]]), np.ones((1, 1, 2)))
"""Of two layers, one of which nobody uses: the busiest of four experts has twice the mean."""
LIMITS = SchedulerLimits(
    num_shards=1,
    max_sequences=4,
    num_blocks=120,
    block_size=4,
    prefill_shapes=((4, 8), (1, 32)),
    decode_steps=(1, 2),
)


@functools.cache
def byte_tokenizer() -> Tokenizer:
    """<|endoftext|> and the 256 bytes; the fake model's tokens are the letters from ! to Q."""
    return train_bpe(["nothing to merge"], 257)


def expected_tokens(prompt: Sequence[int], max_tokens: int) -> list[int]:
    """What the fake model says after a prompt."""
    return continuation(prompt, max_tokens)


def expected_text(prompt: Sequence[int], max_tokens: int) -> str:
    tokens = continuation(prompt, max_tokens)
    return byte_tokenizer().decode(tokens[:-1] if tokens[-1] == END else tokens)


def encode(text: str) -> list[int]:
    """As the server encodes the prompt of a completion."""
    return byte_tokenizer().encode(text, start_of_document=True)


class FakeRunner:
    """Carries plans out on fake devices.

    Attributes:
      pause: seconds that each step takes.
      open: steps wait while this is not set.
      failure: raised by the next step.
      num_steps: so far.
    """

    def __init__(self, limits: SchedulerLimits, pause: float = 0.0) -> None:
        self._devices = FakeDevices(limits.block_size)
        self.pause = pause
        self.open = threading.Event()
        self.open.set()
        self.failure: Exception | None = None
        self.num_steps = 0

    @contextlib.contextmanager
    def held_up(self) -> Iterator[None]:
        """No step ends inside, unless `open` is set."""
        self.open.clear()
        try:
            yield
        finally:
            self.open.set()

    def run(self, plan: StepPlan) -> StepResult:
        self.open.wait()
        if self.failure is not None:
            raise self.failure
        self.num_steps += 1
        time.sleep(self.pause)
        tokens = self._devices.run(plan)
        if not plan.logprobs:
            return StepResult(tokens, None, EXPERT_READS)
        decode = [[[fake_logprobs(token) for token in row] for row in rows] for rows in tokens.decode]
        prefill = [[fake_logprobs(token) for token in rows] for rows in tokens.prefill]
        return StepResult(tokens, (decode, prefill), EXPERT_READS)


class FakeScorer:
    """Finds every token of a prompt as likely as `fake_logprobs` says."""

    def score(self, prompts: Sequence[Sequence[int]]) -> list[list[TokenLogprobs]]:
        return [[fake_logprobs(token) for token in prompt[1:]] for prompt in prompts]


def fake_logprobs(token: int) -> TokenLogprobs:
    """The token itself is the likeliest."""
    return TokenLogprobs(-0.5, tuple((token + i) % 257 for i in range(20)), tuple(-0.5 - i for i in range(20)))


@dataclass
class FakeServer:
    """A model and what is under it."""

    runner: FakeRunner
    thread: EngineThread
    model: ServedModel
    url: str = ""
    server: Server | None = None
    ended: list[bool] = field(default_factory=list)

    @property
    def num_held_blocks(self) -> int:
        return sum(pool.num_blocks - pool.num_free for pool in self.thread.engine.scheduler.pools)


def make_fake(
    *,
    limits: SchedulerLimits = LIMITS,
    pause: float = 0.0,
    max_waiting: int = 256,
    tokenizer: bool = True,
    template: str | None = TEMPLATE,
    request_timeout: float | None = None,
    scores_prompts: bool = True,
) -> FakeServer:
    runner, own = FakeRunner(limits, pause), byte_tokenizer() if tokenizer else None
    engine = Engine(
        runner,
        Scheduler(limits),
        context=CONTEXT,
        vocab_size=257,
        eos_id=END,
        decode=own.decode if own else None,
        scorer=FakeScorer() if scores_prompts else None,
    )
    thread = EngineThread(engine, max_waiting=max_waiting)
    special = {"eos_token": "<|endoftext|>"}
    chat = ChatTemplate(template, own, special=special) if own and template else None
    return FakeServer(runner, thread, ServedModel(NAME, thread, own, chat, request_timeout))


@contextlib.contextmanager
def started(**options: Any) -> Iterator[FakeServer]:
    """A fake whose engine thread runs, without sockets."""
    fake = make_fake(**options)
    fake.thread.start()
    try:
        yield fake
    finally:
        fake.runner.open.set()
        fake.thread.stop(10)


@contextlib.contextmanager
def serving(
    *, drain_timeout: float = 10.0, ends_too: Callable[[], bool] = lambda: False, **options: Any
) -> Iterator[FakeServer]:
    """A fake behind a real socket, in a thread."""
    with serving_model(make_fake(**options), drain_timeout, ends_too) as fake:
        yield fake


@contextlib.contextmanager
def serving_model(
    fake: FakeServer, drain_timeout: float = 10.0, ends_too: Callable[[], bool] = lambda: False
) -> Iterator[FakeServer]:
    ready, bound = threading.Event(), bind("127.0.0.1", 0)
    fake.url = url_of(bound)
    app = make_app(fake.model)
    fake.server = Server(app, fake.thread, drain_timeout=drain_timeout, on_ready=ready.set, ends_too=ends_too)
    running = threading.Thread(target=lambda: fake.ended.append(fake.server.serve_at(bound)), daemon=True)
    running.start()
    assert ready.wait(20)
    try:
        yield fake
    finally:
        fake.runner.open.set()
        fake.server.should_exit = True
        running.join(20)
        assert not running.is_alive()


def client_of(server: FakeServer) -> openai.OpenAI:
    """OpenAI's client, which tries nothing twice."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def scrape(server: FakeServer) -> dict[str, float]:
    """All figures of /metrics."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Fail where the condition does not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


def export_byte_model(folder: Path) -> Path:
    """An exported model of one layer that knows bytes."""
    config = tiny_config(num_layers=1, num_groups=2, vocab_size=264, num_experts=8, experts_per_token=4)
    model = LanguageModel.create(config, Layout.single_device(), jax.random.key(0))
    return export_model(model, folder, tokenizer=byte_tokenizer())
