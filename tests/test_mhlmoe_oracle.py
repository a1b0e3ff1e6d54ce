"""Logits of Multi-Head LatentMoE against an independent NumPy forward pass (tests/mhlmoe_oracle.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mhlmoe_oracle import Oracle
from oracle_equality import check_logits
from random_models import random_model

from foejax.config import ModelConfig
from foejax.interop import export_model
from sharding import Layout

MODEL = ModelConfig(
    vocab_size=48,
    hidden_size=24,
    num_layers=2,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=6,
    num_experts=16,
    experts_per_token=8,
    expert_hidden_size=12,
    expert_activation="gelu",
    num_ffn_heads=4,
    router_score="topk_softmax",
    max_seq_len=32,
    rope_base=10000.0,
    norm_eps=1e-3,
    dtype="float32",
)


@pytest.mark.parametrize(
    ("options", "selection_bias", "axes"),
    [
        ({}, False, {"num_devices": 1}),
        ({"rope_scaling_factor": 4.0, "embedding_scale": 0.5}, True, {"num_devices": 4}),
        (
            {"expert_activation": "swiglu", "router_score": "softmax", "router_scope": "group", "ffn_head_dim": 10},
            True,
            {"data": 2, "group": 4},
        ),
        (
            {"num_ffn_heads": 2, "ffn_head_dim": 8, "router_score": "sigmoid", "head_dim": 8},
            True,
            {"group": 2, "expert": 2, "num_devices": 4},
        ),
    ],
    ids=["published", "bias-head-parallel", "swiglu-wide-heads", "shared-heads"],
)
def test_logits_are_those_of_the_equations(
    options: dict[str, Any], selection_bias: bool, axes: dict[str, int], tmp_path: Path
) -> None:
    """Exported from one device and read onto a mesh of heads."""
    config = ModelConfig.model_validate(MODEL.model_dump() | options)
    folder = export_model(random_model(config, seed=5, selection_bias=selection_bias), tmp_path / "out")
    layout = Layout.create("hp", num_ffn_heads=config.num_ffn_heads, num_experts=config.num_experts, **axes)
    check_logits(folder, layout, Oracle(folder))
