"""The engine on real programs: what requests get does not depend on what shares their batch, cache or devices."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax._src import monitoring
from tiny import config_for, layout_for, tiny_config

from foejax.api import LoadedModel
from foejax.config import RunConfig, load_config
from foejax.models import LanguageModel
from foejax.serving.engine import PromptError
from foejax.serving.engine_config import EngineConfig
from foejax.serving.llm import LLM, Completion
from foejax.serving.sampling_params import SamplingParams, SamplingParamsError
from foejax.serving.sequence import FinishReason
from sharding import Layout, LayoutKind
from sharding.races import find_races

CONTEXT = 40
BINDINGS: dict[str, tuple[LayoutKind, dict[str, int]]] = {
    "foe on one device": ("foe", {"num_devices": 1}),
    "foe on 8 devices": ("foe", {"group": 8, "data": 1}),
    "moe ep on 8 devices": ("ep", {"expert": 8, "data": 1}),
}
MORE_BINDINGS: dict[str, tuple[LayoutKind, dict[str, int]]] = {
    "foe, two devices a group": ("foe", {"group": 2, "expert": 2, "data": 1}),
    "moe tp on 4 devices": ("tp", {"group": 4, "data": 1}),
    "moe tp_ep on 2 x 4 devices": ("tp_ep", {"group": 4, "data": 2}),
    "heads hp on 2 x 4 devices": ("hp", {"group": 4, "data": 2}),
}
EVERY_BINDING = [*BINDINGS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_BINDINGS)]
ENGINES = {
    "roomy": EngineConfig(max_sequences=8, context=CONTEXT, block_size=4, prefill_tokens=64, decode_steps=4),
    # Blocks for a sequence and a half, no prefixes, prompts in chunks: everything is computed again and again.
    "cramped": EngineConfig(
        max_sequences=8, context=CONTEXT, block_size=4, prefill_tokens=16, decode_steps=2, reuse_prefixes=False
    ),
}


@functools.cache
def make_model(binding: str) -> LanguageModel:
    kind, sizes = (BINDINGS | MORE_BINDINGS)[binding]
    config = config_for(kind, num_layers=2)
    layout = layout_for(kind, config, shard_params=False, **sizes)
    return LanguageModel.create(config, layout, jax.random.key(0))


@functools.cache
def make_llm(binding: str, engine: str) -> LLM:
    config = replace(ENGINES[engine], score_prompts=engine == "roomy")
    if engine == "cramped":
        shards = make_model(binding).layout.num_token_shards
        sequences = max(config.max_sequences, 3 * shards)
        config = replace(config, max_sequences=sequences, cache_tokens=60 * shards)
    loaded = LoadedModel(make_model(binding), None, run_config(), Path("nowhere"))
    return LLM(loaded, config, progress=False)


@functools.cache
def run_config() -> RunConfig:
    return load_config("foe_tiny")


def random_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Half of them begin like others."""
    random = np.random.default_rng(seed)
    start = random.integers(0, 64, 20).tolist()
    prompts = []
    for _ in range(count):
        kept = int(random.integers(0, 20)) if random.random() < 0.5 else 0
        prompts.append(start[:kept] + random.integers(0, 64, random.integers(1, 12)).tolist())
    return prompts


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.continuations[0].tokens for completion in completions]


def model_logprobs(model: LanguageModel, tokens: list[int]) -> np.ndarray:
    """Log-probabilities [T, V] of the token after each one."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    positions = np.arange(64, dtype=np.int32)[None]
    batch = {"tokens": padded, "positions": positions, "segment_ids": (positions < len(tokens)).astype(np.int32)}
    return np.asarray(jax.nn.log_softmax(_logits_of(model)(batch), axis=-1))[: len(tokens)]


@functools.cache
def _logits_of(model: LanguageModel) -> Any:
    return jax.jit(model.logits)


def margin_after(model: LanguageModel, tokens: list[int]) -> float:
    """Gap between the two best log-probabilities of the next token."""
    best = np.sort(model_logprobs(model, tokens)[-1])
    return float(best[-1] - best[-2])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("binding", EVERY_BINDING)
def test_200_requests_in_any_order_get_what_each_alone_would(binding: str, engine: str) -> None:
    """Greedy, against the plain decoding loop with a dense cache."""
    model, llm = make_model(binding), make_llm(binding, engine)
    random, prompts = np.random.default_rng(1), random_prompts(200)
    lengths = random.integers(1, 9, 200).tolist()
    expected = model.generate(prompts, 8)
    collected: dict[str, list[int]] = {str(index): [] for index in range(200)}
    arrivals = iter(random.permutation(200).tolist())
    preemptions = 0
    pending = next(arrivals, None)
    while pending is not None or llm.engine.num_unfinished:
        while pending is not None and (random.random() < 0.95 or not llm.engine.num_unfinished):
            params = SamplingParams(max_tokens=lengths[pending], temperature=0)
            llm.engine.add(str(pending), prompts[pending], params)
            pending = next(arrivals, None)
        for piece in llm.engine.step():
            collected[piece.request_id].extend(piece.tokens)
        preemptions += sum(sequence.num_preemptions for sequence in llm.engine.scheduler.waiting)
    different = [i for i in range(200) if collected[str(i)] != expected[i][: lengths[i]]]
    assert len(different) <= 1
    for index in different:
        got, wanted = collected[str(index)], expected[index]
        same = next(place for place, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b)
        assert margin_after(model, prompts[index] + wanted[:same]) < 1e-4
    assert (preemptions > 0) == (engine == "cramped")
    for pool in llm.engine.scheduler.pools:
        assert pool.num_free == pool.num_blocks


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Names of what XLA compiles meanwhile."""
    seen: list[str] = []

    def record(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    monitoring.register_event_duration_secs_listener(record)
    yield seen
    monitoring.unregister_event_duration_listener(record)


def test_nothing_is_compiled_after_the_start(compilations: list[str]) -> None:
    llm = make_llm("foe on one device", "roomy")
    jax.jit(lambda x: x + len(compilations))(1.5)
    assert compilations, "the listener hears nothing"
    compilations.clear()
    mixed = [
        SamplingParams(max_tokens=9, temperature=0),
        SamplingParams(max_tokens=20, top_k=5, top_p=0.9, seed=1, n=2),
        SamplingParams(max_tokens=3, min_p=0.2, repetition_penalty=1.3, logprobs=3),
    ]
    llm.generate(random_prompts(12, seed=3), mixed * 4)
    llm.generate([[1] * 30], SamplingParams(logprobs=0, temperature=0.5))
    assert not compilations


def test_draws_depend_on_the_seed_alone() -> None:
    llm = make_llm("foe on one device", "roomy")
    prompts = random_prompts(9, seed=4)
    params = [
        SamplingParams(max_tokens=10, seed=seed, top_k=30 * (seed % 2), min_p=0.01 * (seed % 3), repetition_penalty=1.1)
        for seed in range(9)
    ]
    together = tokens_of(llm.generate(prompts, params))
    alone = [tokens_of(llm.generate([prompt], own))[0] for prompt, own in zip(prompts, params, strict=True)]
    assert together == alone
    assert together == tokens_of(make_llm("foe on one device", "cramped").generate(prompts, params))
    others = [SamplingParams(max_tokens=10, seed=seed) for seed in range(20, 29)]
    assert tokens_of(llm.generate(prompts, others)) != together


def test_continuations_of_a_prompt_are_those_of_its_seeds() -> None:
    llm = make_llm("foe on one device", "roomy")
    prompt = random_prompts(1, seed=5)[0]
    several = llm.generate([prompt], SamplingParams(max_tokens=8, seed=7, n=3))[0]
    for index, continuation in enumerate(several.continuations):
        alone = llm.generate([prompt], SamplingParams(max_tokens=8, seed=7 + index))
        assert continuation.tokens == tokens_of(alone)[0]
    assert len({tuple(continuation.tokens) for continuation in several.continuations}) == 3


def test_log_probabilities_are_the_models() -> None:
    """Before temperature and penalties, and the same whichever program computed them."""
    llm, model = make_llm("foe on one device", "roomy"), make_model("foe on one device")
    prompt = random_prompts(1, seed=6)[0]
    params = SamplingParams(max_tokens=6, temperature=2.0, seed=3, logprobs=4, repetition_penalty=1.5)
    continuation = llm.generate([prompt], params)[0].continuations[0]
    logprobs = model_logprobs(model, prompt + continuation.tokens)
    assert continuation.logprobs is not None and len(continuation.logprobs) == 6
    for index, found in enumerate(continuation.logprobs):
        own = logprobs[len(prompt) + index - 1]
        np.testing.assert_allclose(found.logprob, own[continuation.tokens[index]], atol=1e-4)
        assert list(found.top_tokens) == np.argsort(-own)[:4].tolist()
        np.testing.assert_allclose(found.top_logprobs, np.sort(own)[::-1][:4], atol=1e-4)


@pytest.mark.parametrize("binding", EVERY_BINDING)
def test_log_probabilities_of_prompts_are_the_models(binding: str) -> None:
    prompts = random_prompts(10, seed=9)
    params = [SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=index % 3) for index in range(10)]
    for index, completion in enumerate(make_llm(binding, "roomy").generate(prompts, params)):
        logprobs = model_logprobs(make_model(binding), prompts[index])
        assert len(completion.prompt_logprobs) == len(prompts[index]) - 1
        for place, found in enumerate(completion.prompt_logprobs):
            np.testing.assert_allclose(found.logprob, logprobs[place, prompts[index][place + 1]], atol=1e-4)
            assert list(found.top_tokens) == np.argsort(-logprobs[place])[: index % 3].tolist()
        assert len(completion.continuations[0].tokens) == 2
    engine = make_llm(binding, "roomy").engine
    engine.add("unwanted", prompts[0], SamplingParams(prompt_logprobs=1, n=2))
    engine.abort("unwanted")
    assert [piece.finish_reason for piece in engine.step()] == [FinishReason.ABORT] * 2 and not engine.num_unfinished
    with pytest.raises(SamplingParamsError, match="prompt_logprobs=1 needs an engine that scores prompts: set score"):
        make_llm(binding, "cramped").generate(prompts, SamplingParams(prompt_logprobs=1))


def test_a_penalty_keeps_tokens_from_coming_back() -> None:
    llm = make_llm("foe on one device", "roomy")
    prompt = list(range(20))
    tokens = tokens_of(llm.generate([prompt], SamplingParams(max_tokens=15, temperature=0, repetition_penalty=100.0)))[
        0
    ]
    assert len({*prompt, *tokens}) == 35


def test_endings() -> None:
    llm = make_llm("foe on one device", "roomy")
    prompt = random_prompts(1, seed=8)[0]
    free = llm.generate([prompt], SamplingParams(max_tokens=10, temperature=0))[0].continuations[0]
    assert free.finish_reason == FinishReason.LENGTH
    stop = free.tokens[4]
    stopped = llm.generate([prompt], SamplingParams(max_tokens=10, temperature=0, stop_token_ids=(stop,)))[0]
    assert stopped.continuations[0].tokens == free.tokens[: free.tokens.index(stop) + 1]
    assert stopped.continuations[0].finish_reason == FinishReason.STOP
    full = llm.generate([prompt], SamplingParams(max_tokens=None, temperature=0))[0].continuations[0]
    assert len(prompt) + len(full.tokens) == CONTEXT and full.finish_reason == FinishReason.LENGTH
    llm.engine.add("late", prompt, SamplingParams(temperature=0), deadline=0.0)
    (piece,) = llm.engine.step()
    assert piece.finish_reason == FinishReason.DEADLINE
    llm.engine.add("unwanted", prompt, SamplingParams(max_tokens=None, n=2))
    llm.engine.step()
    llm.engine.abort("unwanted")
    llm.engine.abort("never heard of")
    assert [piece.finish_reason for piece in llm.engine.step()] == [FinishReason.ABORT] * 2
    assert llm.engine.num_unfinished == 0


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt has no tokens"),
        ([1] * CONTEXT, {}, "the prompt has 40 tokens and the context is 40: shorten it to at most 39"),
        ([1, 64], {}, "token 64 is outside the vocabulary: choose ids from 0 to 63"),
        ([1], {"stop": ("x",)}, "stop=.* needs a tokenizer: use stop_token_ids"),
        ("text", {}, "the model has no tokenizer: give prompts as token ids"),
    ],
)
def test_bad_prompts_are_refused_and_leave_nothing_behind(prompt: Any, params: dict[str, Any], message: str) -> None:
    llm = make_llm("foe on one device", "roomy")
    with pytest.raises(ValueError, match=message) as error:
        llm.generate([[1, 2], prompt], SamplingParams(**params))
    assert isinstance(error.value, PromptError) or not message.startswith(("the prompt", "token"))
    assert llm.engine.num_unfinished == 0
    for pool in llm.engine.scheduler.pools:
        assert pool.num_free == pool.num_blocks


@pytest.mark.parametrize("binding", EVERY_BINDING)
def test_collectives_of_its_programs_do_not_race(binding: str) -> None:
    llm = make_llm(binding, "roomy")
    assert len(llm.runner._programs) == llm.runner.num_programs - 1 >= 3  # the other one loads slots
    for program in [*llm.runner._programs.values(), llm.scorer._program]:
        assert not find_races(program.as_text())


@pytest.mark.parametrize(
    ("tokens", "context", "shapes"),
    [
        (2048, 4096, {(1, 128), (4, 128), (16, 128), (64, 32)}),
        (300, 4096, {(1, 100), (3, 100), (9, 32)}),
        (16, 4096, {(1, 16)}),
        (2048, 64, {(1, 64), (2, 64), (8, 64), (16, 32)}),  # 8 sequences have no more than 512 tokens
    ],
)
def test_prompts_are_computed_in_a_few_shapes_of_rows(tokens: int, context: int, shapes: set[tuple[int, int]]) -> None:
    engine = EngineConfig(max_sequences=8, context=context, prefill_tokens=tokens)
    model = tiny_config(max_seq_len=context)
    assert set(engine.limits(model, Layout.single_device()).prefill_shapes) == shapes
