"""OLMoE-shaped random weights as a Hugging Face folder, the same for every contender."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax

from foejax.config import ModelConfig
from foejax.devices import avoid_broken_reductions
from foejax.interop import export_model
from foejax.models import LanguageModel
from sharding import Layout


def olmoe_shape(*, layers: int, width: int, experts: int, top_k: int, head_dim: int, vocab: int) -> ModelConfig:
    """OLMoE's proportions (arXiv 2409.02060): as many heads as fill the width, experts half as wide as the model."""
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_layers=layers,
        num_query_heads=width // head_dim,
        num_kv_heads=width // head_dim,
        head_dim=head_dim,
        num_experts=experts,
        experts_per_token=top_k,
        expert_hidden_size=width // 2,
        num_groups=1,
        max_seq_len=4096,
        rope_base=10_000.0,
        dtype="bfloat16",
    )


def export_once(config: ModelConfig, folder: Path) -> Path:
    """The folder of that model with weights in bfloat16, made where it is not there yet."""
    name = f"olmoe-{config.num_layers}x{config.hidden_size}-{config.num_experts}of{config.expert_hidden_size}"
    target = folder / f"{name}-top{config.experts_per_token}-head{config.head_dim}-vocab{config.vocab_size}"
    if not (target / "config.json").is_file():
        model = LanguageModel.create(config, Layout.single_device(), jax.random.key(0))
        export_model(model, target, model_type="olmoe", dtype="bfloat16")
    return target


if __name__ == "__main__":
    avoid_broken_reductions()
    print(export_once(olmoe_shape(**json.loads(sys.argv[2])), Path(sys.argv[1])))
