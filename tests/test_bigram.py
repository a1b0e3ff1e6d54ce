"""The bigram baseline against distributions that are known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from foejax.config import DataConfig
from foejax.data import open_dataset
from foejax.evaluation.bigram import BigramModel, bigram_baseline

VOCABULARY = 6


def _chain(length: int, transition_VV: np.ndarray, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    tokens = [0]
    for _ in range(length - 1):
        tokens.append(int(generator.choice(len(transition_VV), p=transition_VV[tokens[-1]])))
    return np.array(tokens, np.uint16)


def test_every_context_has_a_whole_distribution_even_an_unseen_one() -> None:
    tokens = np.array([0, 1, 2, 0, 1, 3, 0, 1, 2, 0] * 20, np.uint16)
    model = BigramModel(VOCABULARY)
    model.fit(tokens)
    for context in range(VOCABULARY):
        probabilities = model.probabilities(np.full(VOCABULARY, context), np.arange(VOCABULARY))
        assert probabilities.sum() == pytest.approx(1.0)
        assert (probabilities > 0).all()


def test_loss_of_a_markov_chain_is_its_entropy_rate() -> None:
    transition_VV = np.random.default_rng(1).dirichlet(np.full(VOCABULARY, 0.3), VOCABULARY)
    train, held_out = _chain(40_000, transition_VV, 2).astype(np.int64), _chain(20_000, transition_VV, 3)
    model = BigramModel(VOCABULARY)
    model.fit(train)
    contexts, targets = held_out[:-1], held_out[1:]
    loss = -np.log(model.probabilities(contexts, targets)).mean()
    best = -np.log(transition_VV[contexts, targets]).mean()
    assert best < loss + 1e-12 and loss == pytest.approx(best, abs=0.005)


def test_independent_tokens_rely_on_the_unigram_where_the_context_is_rare() -> None:
    generator = np.random.default_rng(0)
    tokens = np.minimum(generator.geometric(0.05, 3_000), 200)
    model = BigramModel(201)
    model.fit(tokens)
    rare = model.mixture_C3[1:4]
    assert (rare[:, 1] > rare[:, 0]).all()
    np.testing.assert_allclose(model.mixture_C3.sum(axis=1), 1.0)


def test_all_training_tokens_are_counted_after_the_mixture_is_found() -> None:
    model = BigramModel(VOCABULARY)
    model.fit(np.array([0, 1, 2] * 60 + [3, 4] * 8, np.uint16))  # the mixture is found on the 3s and 4s
    assert model.probabilities(np.array([3]), np.array([4]))[0] > 1 / VOCABULARY


def test_baseline_counts_the_weighted_targets_and_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOEJAX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "corpus.jsonl"
    rows = [{"text": "the bells ring over the old town and the wet roofs " * (3 + n)} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = open_dataset(
        DataConfig(
            corpus=str(path), tokenizer_vocab_size=270, sequence_length=16, batch_size=4, validation_fraction=0.2
        )
    )
    result = bigram_baseline(dataset)
    assert 0 < result.nats_per_token < math.log(270)
    assert result.bits_per_byte == pytest.approx(result.nats_per_token / math.log(2) / dataset.bytes_per_token)
    batches = list(dataset.validation_batches())
    for batch in batches:
        batch["targets"] = np.where(batch["positions"] % 2 == 0, 250, batch["targets"])
        batch["loss_weights"] = np.where(batch["positions"] % 2 == 0, 0, batch["loss_weights"]).astype(np.float32)
    model = BigramModel(270)
    model.fit(dataset.train.tokens)
    kept = np.concatenate([batch["loss_weights"].ravel() for batch in batches]) > 0
    contexts, targets = (np.concatenate([b[name].ravel() for b in batches])[kept] for name in ("tokens", "targets"))
    expected = -np.log(model.probabilities(contexts, targets)).mean()
    assert bigram_baseline(dataset, batches).nats_per_token == pytest.approx(expected)
