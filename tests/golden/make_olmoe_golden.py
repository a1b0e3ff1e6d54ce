"""Makes the golden OLMoE model of tests/test_parity_olmoe.py with PyTorch and transformers.

usage: .venv-parity/bin/python tests/golden/make_olmoe_golden.py      (after `make parity`; writes olmoe_tiny/ beside)

The folder holds a tiny model as transformers saves it, with random norms and weights large enough that every part of
it shows in the logits, and expected.npz: token ids, int32 [B, T], and their logits, float32 [B, T, V].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

FOLDER = Path(__file__).parent / "olmoe_tiny"


def random_olmoe(seed: int, **options: Any) -> OlmoeForCausalLM:
    """A tiny OLMoE with grouped-query attention whose every weight is random."""
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "eos_token_id": None,
        "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    model = OlmoeForCausalLM(OlmoeConfig(**settings | options)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                weight.normal_(0.0, 1.0 if "embed" in name else 0.2, generator=generator)
    return model


def random_tokens(seed: int) -> np.ndarray:
    """Token ids, int32 [2, 24]."""
    return np.random.default_rng(seed).integers(0, 64, (2, 24)).astype(np.int32)


def torch_logits(model: OlmoeForCausalLM, tokens: np.ndarray) -> np.ndarray:
    """Logits in float32, [B, T, V]."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def main() -> None:
    """Write the golden folder."""
    model, tokens = random_olmoe(seed=1), random_tokens(seed=2)
    model.save_pretrained(FOLDER)
    (FOLDER / "generation_config.json").unlink()
    np.savez_compressed(FOLDER / "expected.npz", tokens=tokens, logits=torch_logits(model, tokens))


if __name__ == "__main__":
    main()
