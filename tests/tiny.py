"""The tiny models and batches that tests share."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from foejax.config import ModelConfig
from foejax.models import LanguageModel
from sharding import Layout, LayoutKind


def tiny_config(**changes: Any) -> ModelConfig:
    """Three layers with grouped-query attention; initial weights large enough that every part matters."""
    values = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_layers": 3,
        "num_query_heads": 16,
        "num_kv_heads": 8,
        "head_dim": 8,
        "num_experts": 32,
        "experts_per_token": 8,
        "expert_hidden_size": 16,
        "num_groups": 8,
        "max_seq_len": 64,
        "rope_base": 10_000.0,
        "init_std": 0.2,
        "dtype": "float32",
    }
    return ModelConfig(**(values | changes))


def config_for(kind: LayoutKind, **changes: Any) -> ModelConfig:
    """`tiny_config` of the architecture that a layout is for: FoE's groups, heads of experts (hp), or one group."""
    if kind == "hp":
        changes = HEADS | changes
    elif kind != "foe":
        changes = {"num_groups": 1} | changes
    return tiny_config(**changes)


HEADS = {
    "num_groups": 1,
    "num_ffn_heads": 8,
    "ffn_head_dim": 8,
    "num_experts": 64,
    "experts_per_token": 16,
    "expert_activation": "gelu",
    "router_score": "topk_softmax",
}
"""Multi-Head LatentMoE as published, its sub-tokens together wider than a token."""


def layout_for(kind: LayoutKind, config: ModelConfig, **sizes: Any) -> Layout:
    """A layout of the model on the devices there are, or those that the sizes multiply to."""
    return Layout.create(
        kind,
        num_groups=config.num_groups,
        num_experts=config.num_experts,
        num_kv_heads=config.num_kv_heads,
        num_ffn_heads=config.num_ffn_heads or 1,
        **sizes,
    )


def with_heads(model: ModelConfig, heads: int, **changes: Any) -> ModelConfig:
    """The Multi-Head LatentMoE each of whose heads has the experts and choices of this model."""
    values = {
        "num_groups": 1,
        "num_ffn_heads": heads,
        "num_experts": heads * model.num_experts,
        "experts_per_token": heads * model.experts_per_token,
        "router_score": "topk_softmax",
        "expert_activation": "gelu",
    }
    return ModelConfig.model_validate(model.model_dump() | values | changes)


def packed_batch(rows: int = 8, length: int = 16, vocab_size: int = 64, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of up to three documents each, the first row with padding at its end."""
    random = np.random.default_rng(seed)
    segments = np.sort(random.integers(1, 4, (rows, length)), axis=1).astype(np.int32)
    segments[0, -3:] = 0
    positions = np.zeros((rows, length), np.int32)
    for step in range(1, length):
        same = segments[:, step] == segments[:, step - 1]
        positions[:, step] = np.where(same, positions[:, step - 1] + 1, 0)
    return {
        "tokens": random.integers(0, vocab_size, (rows, length)).astype(np.int32),
        "targets": random.integers(0, vocab_size, (rows, length)).astype(np.int32),
        "positions": positions,
        "segment_ids": segments,
        "loss_weights": (segments > 0).astype(np.float32),
    }


def plain_batch(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """One document a row, no padding."""
    rows, length = tokens.shape
    return {
        "tokens": tokens.astype(np.int32),
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
        "segment_ids": np.ones((rows, length), np.int32),
    }


@cache
def tiny_model(config: ModelConfig) -> LanguageModel:
    """The model on one device; norm weights are drawn too, so that none of them is a bystander."""
    model = LanguageModel.create(config, Layout.single_device(), jax.random.key(0))
    random = np.random.default_rng(1)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if any("norm" in str(part) for part in path):
            variable.set_value(jnp.asarray(random.uniform(0.5, 1.5, variable.get_value().shape), variable.dtype))
            nnx.update(model, nnx.from_flat_state([(path, variable)]))
    return model


def relative_error(got: Any, expected: Any) -> float:
    """Largest over all leaves of max|a - b| / max|b|."""
    errors = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(np.asarray(b)).max(), 1e-30)),
        got,
        expected,
    )
    return max(jax.tree.leaves(errors))
