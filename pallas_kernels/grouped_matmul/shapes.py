"""Named shapes of real models' expert matmuls, shared by benchmarks, tuning and tests.

Each is one device's share of a forward pass over the up (or gate) projection [D, F] and the down projection [F, D].
"""

from __future__ import annotations

from typing import NamedTuple


class GroupedMatmulShape(NamedTuple):
    """R rows in E groups, contracted over K features to N features."""

    rows: int
    experts: int
    contracted: int
    features: int

    @property
    def flops(self) -> int:
        """Useful floating-point operations of one forward product with every row in use."""
        return 2 * self.rows * self.contracted * self.features


class DecodeShape(NamedTuple):
    """One decoding step: each of `tokens` meets `top_k` of E experts, contracted over K features to N features."""

    tokens: int
    top_k: int
    experts: int
    contracted: int
    features: int

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k


class ExpertMlpShape(NamedTuple):
    """One layer's expert MLP while decoding: each of `tokens` meets `top_k` of E experts."""

    tokens: int
    top_k: int
    experts: int
    model_size: int
    expert_hidden: int


class Model(NamedTuple):
    """Expert layer of a real model."""

    experts: int
    top_k: int
    model_size: int
    expert_hidden: int


DECODE_TOKENS = (1, 8, 32, 128)

# OLMoE-1B-7B (arXiv 2409.02060), Mixtral 8x7B (arXiv 2401.04088), Qwen3-30B-A3B (arXiv 2505.09388), DeepSeek-V3's
# routed experts (arXiv 2412.19437).
MODELS: dict[str, Model] = {
    "olmoe_1b_7b": Model(experts=64, top_k=8, model_size=2048, expert_hidden=1024),
    "mixtral_8x7b": Model(experts=8, top_k=2, model_size=4096, expert_hidden=14336),
    "qwen3_30b_a3b": Model(experts=128, top_k=8, model_size=2048, expert_hidden=768),
    "deepseek_v3": Model(experts=256, top_k=8, model_size=7168, expert_hidden=2048),
}


def _up_and_down(
    name: str, *, tokens: int, experts: int, top_k: int, model_size: int, expert_hidden: int
) -> dict[str, GroupedMatmulShape]:
    rows = tokens * top_k
    return {
        f"{name}/up": GroupedMatmulShape(rows, experts, model_size, expert_hidden),
        f"{name}/down": GroupedMatmulShape(rows, experts, expert_hidden, model_size),
    }


def _decode(name: str, model: Model) -> dict[str, DecodeShape]:
    experts, top_k, size, hidden = model
    return {
        f"{name}/decode_{tokens}/{projection}": DecodeShape(tokens, top_k, experts, contracted, features)
        for tokens in DECODE_TOKENS
        for projection, contracted, features in (("up", size, hidden), ("down", hidden, size))
    }


SHAPES: dict[str, GroupedMatmulShape] = {
    # The size at which the CPU path is held against a plain matmul.
    "acceptance": GroupedMatmulShape(4096, 64, 512, 512),
    # The size at which the GPU kernels are: OLMoE's matrices and 8192 tokens.
    **_up_and_down("acceptance_gpu", tokens=8192, **MODELS["olmoe_1b_7b"]._asdict()),
    # Laptop-size models: one FoE group's few experts, and all experts of the matched MoE.
    **_up_and_down("demo_foe", tokens=2048, experts=8, top_k=1, model_size=128, expert_hidden=128),
    **_up_and_down("demo_moe", tokens=2048, experts=32, top_k=4, model_size=128, expert_hidden=128),
    # FoE: Table 8 of the paper; 64 experts in 8 groups, one expert a token in each group, one group per device.
    **_up_and_down("foe_1b", tokens=16 * 2048, experts=8, top_k=1, model_size=768, expert_hidden=384),
    **_up_and_down("foe_7b", tokens=6 * 2048, experts=8, top_k=1, model_size=2048, expert_hidden=1024),
    # The same with all 8 groups on one device, folded into the expert axis.
    **_up_and_down("foe_1b_stacked", tokens=16 * 2048, experts=64, top_k=8, model_size=768, expert_hidden=384),
    **_up_and_down("foe_7b_stacked", tokens=6 * 2048, experts=64, top_k=8, model_size=2048, expert_hidden=1024),
    # Training steps of 4096 tokens.
    **{
        key: shape
        for name, model in MODELS.items()
        for key, shape in _up_and_down(name, tokens=4096, **model._asdict()).items()
    },
}

DECODE_SHAPES: dict[str, DecodeShape] = {
    key: shape for name, model in MODELS.items() for key, shape in _decode(name, model).items()
}

EXPERT_MLP_SHAPES: dict[str, ExpertMlpShape] = {
    f"{name}/decode_{tokens}": ExpertMlpShape(tokens, model.top_k, model.experts, model.model_size, model.expert_hidden)
    for name, model in MODELS.items()
    for tokens in DECODE_TOKENS
}
