"""One group is OLMoE: our logits against those of transformers, golden and live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from random_models import random_model
from safetensors.numpy import load_file

from foejax.config import ModelConfig
from foejax.data import Tokenizer
from foejax.data.tokenizer import train_bpe
from foejax.interop import export_model, import_model
from foejax.models import LanguageModel
from sharding import Layout

GOLDEN = Path(__file__).parent / "golden" / "olmoe_tiny"
TOLERANCE = 1e-5
"""Largest |difference| over largest |logit|; float32 on both sides gives about 1e-6."""


def logits_of(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of rows that hold one document each."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = {"tokens": tokens, "positions": positions, "segment_ids": np.ones_like(tokens)}
    return np.asarray(jax.jit(model.logits)(batch)).reshape(*tokens.shape, -1)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("kind", ["fsdp", "ep"])
def test_golden_logits(kind: Any) -> None:
    """A model saved by transformers, read onto 1 device and onto 4 that share the experts."""
    layout = Layout.create(kind, num_experts=8, num_devices=4 if kind == "ep" else 1)
    expected = np.load(GOLDEN / "expected.npz")
    assert np.std(expected["logits"]) > 0.3, "the golden model says next to nothing"
    model = import_model(GOLDEN, layout)
    assert relative_error(logits_of(model, expected["tokens"]), expected["logits"]) < TOLERANCE


def test_golden_folder_survives_import_and_export(tmp_path: Path) -> None:
    model = import_model(GOLDEN, Layout.single_device("fsdp"))
    written = load_file(export_model(model, tmp_path / "out") / "model.safetensors")
    original = load_file(GOLDEN / "model.safetensors")
    assert written.keys() == original.keys()
    for name, value in original.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("options", "seed"),
    [
        ({}, 11),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 500000.0, "factor": 4.0}}, 12),
        ({"num_key_value_heads": 4, "num_experts_per_tok": 8}, 13),
    ],
    ids=["gqa", "linear-rope", "all-experts"],
)
def test_live_logits_of_a_transformers_model(options: dict[str, Any], seed: int, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from golden.make_olmoe_golden import random_olmoe, random_tokens, torch_logits

    reference, tokens = random_olmoe(seed, **options), random_tokens(seed)
    reference.save_pretrained(tmp_path / "olmoe")
    model = import_model(tmp_path / "olmoe", Layout.single_device("fsdp"))
    assert relative_error(logits_of(model, tokens), torch_logits(reference, tokens)) < TOLERANCE


@pytest.mark.parity
def test_live_transformers_loads_our_export(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from golden.make_olmoe_golden import torch_logits

    config = ModelConfig(
        vocab_size=300,
        hidden_size=48,
        num_layers=3,
        num_query_heads=6,
        num_kv_heads=2,
        head_dim=8,
        num_experts=6,
        experts_per_token=3,
        expert_hidden_size=20,
        max_seq_len=64,
        rope_base=20000.0,
        rope_scaling_factor=2.0,
        norm_eps=1e-3,
        dtype="float32",
    )
    model = random_model(config, seed=3)
    tokenizer: Tokenizer = train_bpe(["the quick brown fox jumps over the lazy dog " * 5], 290)
    folder = export_model(model, tmp_path / "moe", tokenizer=tokenizer, max_shard_bytes=60_000)

    reference, report = transformers.OlmoeForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert reference.config.eos_token_id == tokenizer.eos_id
    tokens = np.random.default_rng(4).integers(0, config.vocab_size, (2, 20)).astype(np.int32)
    assert relative_error(logits_of(model, tokens), torch_logits(reference.eval(), tokens)) < TOLERANCE

    text = "the fox <|endoftext|> and 17 dogs"
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token_id == tokenizer.eos_id
    assert theirs("the fox and 17 dogs")["input_ids"] == tokenizer.encode("the fox and 17 dogs")
    assert theirs.decode(tokenizer.encode(text)) == text
