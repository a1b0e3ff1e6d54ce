"""The models that are compared, matched in total and active parameters."""

from __future__ import annotations

from typing import Any

from foejax.config import RunConfig, load_config

CONFIGS = {"moe": "moe_tiny", "foe": "foe_tiny", "mhlmoe": "mhlmoe_tiny", "mhlmoe_fine": "mhlmoe_tiny_fine"}
NAMES = {
    "moe": "MoE",
    "foe": "FoE",
    "mhlmoe": "Multi-Head LatentMoE",
    "mhlmoe_fine": "Multi-Head LatentMoE, doubled granularity",
}
QUICK = {
    "model.num_layers": 1,
    "model.num_experts": 8,
    "model.expert_hidden_size": 8,
    "data.batch_size": 8,
    "data.sequence_length": 32,
}
"""Overrides with which everything can be tried in little time; what is then found means nothing."""


def model_config(model: str, overrides: dict[str, Any], *, quick: bool = False) -> RunConfig:
    """The run config of one of CONFIGS; `quick` models are not matched.

    Raises:
      ConfigError: an override that does not fit.
    """
    small: dict[str, Any] = {}
    if quick:
        heads = load_config(CONFIGS[model]).model.num_ffn_heads or 1
        experts, chosen = (8, 8) if heads == 1 else (4 * heads, 2 * heads)
        small = QUICK | {"model.num_experts": experts, "model.experts_per_token": chosen}
    return load_config(CONFIGS[model], small | overrides)
