"""Decoding: token by token equals all at once, on one device and on the mesh, whatever shares the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import config_for, layout_for, plain_batch, relative_error, tiny_config, tiny_model

from foejax.decoding import Sampling, decode_step, prefill
from foejax.decoding.sampling import RowSampling, sample
from sharding import LayoutKind

LENGTHS = np.array([3, 4, 5, 6, 7, 8, 2, 1], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 64, (8, 12)).astype(np.int32)
LAYOUTS: dict[str, tuple[LayoutKind, dict[str, int]]] = {
    "foe on one device": ("foe", {"num_devices": 1}),
    "foe on eight": ("foe", {"num_devices": 8}),
    "foe, two data shards": ("foe", {"data": 2, "group": 4}),
    "foe, two devices a group": ("foe", {"group": 4, "expert": 2, "data": 1}),
    "moe on one device": ("fsdp", {"num_devices": 1}),
    "moe ep": ("ep", {"num_devices": 8}),
    "moe tp": ("tp", {"data": 2, "group": 4}),
    "moe tp_ep": ("tp_ep", {"data": 2, "group": 4}),
    "moe fsdp": ("fsdp", {"num_devices": 8}),
    "heads on one device": ("hp", {"num_devices": 1}),
    "heads, two data shards": ("hp", {"data": 2, "group": 4}),
}


SLOW = {"foe, two data shards", "moe tp", "moe fsdp", "heads on one device"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LAYOUTS])
def test_decoding_gives_the_prefill_logits_and_one_text_everywhere(name: str) -> None:
    kind, sizes = LAYOUTS[name]
    config = config_for(kind, num_layers=2)
    model = tiny_model(config).with_layout(layout_for(kind, config, **sizes))
    everything = np.asarray(jax.jit(lambda: model.logits(plain_batch(TOKENS)))()).reshape(8, 12, -1)
    cache, logits = prefill(model, jnp.asarray(TOKENS[:, :8]), jnp.asarray(LENGTHS), slots=16)
    rows, positions = np.arange(8), LENGTHS.copy()
    assert relative_error(logits, everything[rows, LENGTHS - 1]) <= 1e-4
    for _ in range(4):
        cache, logits = decode_step(model, cache, jnp.asarray(TOKENS[rows, positions]), jnp.asarray(positions))
        assert relative_error(logits, everything[rows, positions]) <= 1e-4
        positions += 1

    prompts = [TOKENS[row, : LENGTHS[row]].tolist() for row in range(5)]
    greedy = model.generate(prompts, 10)
    assert greedy == one_device_text(config, prompts)
    assert [len(new) for new in greedy] == [10] * 5


def one_device_text(config, prompts):  # type: ignore[no-untyped-def]
    """Greedy continuation by the forward pass alone: no cache, no loop on the device."""
    model = tiny_model(config)
    forward = jax.jit(lambda batch: model.logits(batch))
    texts = [list(prompt) for prompt in prompts]
    for _ in range(10):
        padded = np.zeros((len(texts), 24), np.int32)
        for row, text in enumerate(texts):
            padded[row, : len(text)] = text
        logits = np.asarray(forward(plain_batch(padded))).reshape(len(texts), 24, -1)
        for row, text in enumerate(texts):
            text.append(int(logits[row, len(text) - 1].argmax()))
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def test_a_row_does_not_depend_on_its_neighbours_and_stops_at_its_token() -> None:
    model = tiny_model(tiny_config(num_layers=2))
    prompts = [[1, 2, 3], [4, 5, 6, 7], [8]]
    options = {"temperature": 1.0, "top_k": 30, "top_p": 0.95, "key": jax.random.key(3)}
    together = model.generate(prompts, 12, **options)
    assert model.generate(prompts[:1], 12, **options) == together[:1]
    assert model.generate(prompts, 12, **options | {"key": jax.random.key(4)}) != together
    stop = together[1][5]
    stopped = model.generate(prompts, 12, **options, stop_tokens=[stop])
    for new, all_new in zip(stopped, together, strict=True):
        assert new == (all_new[: all_new.index(stop) + 1] if stop in all_new else all_new)


def test_generation_ends_where_the_context_is_full() -> None:
    model = tiny_model(tiny_config(num_layers=2))
    assert len(model.generate([[1] * 60], 12)[0]) == 4


@pytest.mark.parametrize(
    ("prompts", "new", "words"),
    [
        ([], 4, "at least one prompt"),
        ([[]], 4, "prompt 0 has no tokens"),
        ([[1], [1] * 64], 4, "prompt 1 has 64 tokens and the model's context is max_seq_len=64"),
        ([[64]], 4, "outside the vocabulary of 64"),
        ([[1]], 0, "max_new_tokens=0"),
    ],
)
def test_bad_prompts_are_refused(prompts: list[list[int]], new: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_model(tiny_config(num_layers=2)).generate(prompts, new)


def drawn_tokens(probabilities: list[float], rows: int = 400, **options: float) -> list[list[int]]:
    """Which tokens rows of equal logits draw; two kinds of rows take turns where an option has two values."""
    kinds = max(len(np.atleast_1d(value)) for value in options.values())
    fields = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    sampling = RowSampling(
        **{
            name: jnp.resize(jnp.asarray(value, "int32" if name == "top_k" else "float32"), rows)
            for name, value in fields.items()
        }
    )
    logits = jnp.log(jnp.asarray([probabilities] * rows))
    tokens = np.asarray(jax.jit(sample)(logits, jax.random.split(jax.random.key(0), rows), sampling))
    return [sorted(set(tokens[kind::kinds].tolist())) for kind in range(kinds)]


def test_sampling_keeps_to_its_candidates() -> None:
    likely = [0.5, 0.3, 0.15, 0.05]
    assert drawn_tokens(likely, temperature=0.0) == [[0]]
    assert drawn_tokens(likely, temperature=1.0) == [[0, 1, 2, 3]]
    assert drawn_tokens(likely, top_k=2) == [[0, 1]]
    assert drawn_tokens(likely, top_p=0.79) == [[0, 1]]
    assert drawn_tokens(likely, top_p=0.81) == [[0, 1, 2]]
    assert drawn_tokens(likely, min_p=0.29) == [[0, 1, 2]]
    assert drawn_tokens(likely, min_p=0.31) == [[0, 1]]
    assert drawn_tokens(likely, top_k=3, top_p=0.83) == [[0, 1]], "0.8 of the three is 0.84 of them"
    for bad in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Sampling(**bad)


def test_every_row_samples_in_its_own_way() -> None:
    likely = [0.5, 0.3, 0.15, 0.05]
    assert drawn_tokens(likely, temperature=[0.0, 1.0]) == [[0], [0, 1, 2, 3]]
    assert drawn_tokens(likely, top_k=[2, 0]) == [[0, 1], [0, 1, 2, 3]]
    assert drawn_tokens(likely, top_p=[0.81, 0.4]) == [[0, 1, 2], [0]]
    assert drawn_tokens(likely, min_p=[0.0, 0.9]) == [[0, 1, 2, 3], [0]]
