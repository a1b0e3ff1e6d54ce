"""FoE logits against an independent NumPy forward pass over the exported tensors (tests/foe_oracle.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from foe_oracle import Oracle
from oracle_equality import check_logits
from random_models import random_model

from foejax.config import ModelConfig
from foejax.interop import export_model
from sharding import Layout

MODEL = ModelConfig(
    vocab_size=48,
    hidden_size=24,
    num_layers=3,
    num_query_heads=16,
    num_kv_heads=8,
    head_dim=6,
    num_experts=16,
    experts_per_token=8,
    expert_hidden_size=12,
    num_groups=4,
    max_seq_len=32,
    rope_base=10000.0,
    norm_eps=1e-3,
    dtype="float32",
)


@pytest.mark.parametrize(
    ("options", "selection_bias", "devices"),
    [
        ({}, False, 1),
        ({"rope_scaling_factor": 4.0}, True, 4),
        ({"merge_scale": "rsqrt", "embedding_scale": 0.25, "router_scope": "group"}, False, 8),
        ({"merge_scale": "sum", "embedding_scale": 2.0, "router_score": "sigmoid"}, True, 2),
        ({"num_groups": 8, "num_layers": 2}, False, 4),
        ({"num_groups": 1, "num_layers": 2, "router_score": "sigmoid"}, True, 1),
        ({"num_groups": 2, "num_layers": 2, "router_score": "topk_softmax", "expert_activation": "gelu"}, True, 2),
    ],
    ids=["paper", "bias-and-rope-scaling", "rsqrt-group-scope", "sum-sigmoid", "top-1", "one-group", "topk-gelu"],
)
def test_logits_are_those_of_the_equations(
    options: dict[str, Any], selection_bias: bool, devices: int, tmp_path: Path
) -> None:
    """Two packed documents, exported from one device and read onto a mesh."""
    config = ModelConfig.model_validate(MODEL.model_dump() | options)
    exported = random_model(config, seed=5, selection_bias=selection_bias)
    folder = export_model(exported, tmp_path / "foe", model_type="foe")
    layout = Layout.create("foe", num_groups=config.num_groups, num_devices=devices)
    check_logits(folder, layout, Oracle(folder))
