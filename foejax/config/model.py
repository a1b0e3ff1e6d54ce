"""The architecture."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from foejax.config.section import NonNegative, Positive, PositiveFloat, Section, require_multiple


class ModelConfig(Section):
    """The architecture. `num_groups=1` is the plain mixture-of-experts transformer (OLMoE-like)."""

    vocab_size: Positive = 50304
    """rows of the embedding and columns of the head"""
    hidden_size: Positive = 768
    """width D of the residual streams"""
    num_layers: Positive = 16
    """number L of blocks"""
    num_query_heads: Positive = 8
    """query heads over all groups"""
    num_kv_heads: Positive = 8
    """key/value heads over all groups"""
    head_dim: Positive = 96
    """size K of one head"""
    num_experts: Positive = 64
    """routed experts E per layer over all groups or heads"""
    experts_per_token: Positive = 8
    """chosen experts k per token over all groups or heads; each takes its equal share among its own"""
    expert_hidden_size: Positive = 384
    """inner width F of one expert"""
    expert_activation: Literal["swiglu", "gelu"] = "swiglu"
    """swiglu: three matrices; gelu: two, with the exact GELU between them"""
    num_groups: Positive = 1
    """FoE groups H; 1 is the plain MoE"""
    num_ffn_heads: NonNegative = 0
    """heads of Multi-Head LatentMoE, each with its own sub-token, router and experts; 0: experts read whole tokens"""
    ffn_head_dim: NonNegative = 0
    """size of a sub-token; 0 takes hidden_size / num_ffn_heads"""
    max_seq_len: Positive = 2048
    """longest context in tokens"""
    rope_base: PositiveFloat = 500_000.0
    """base of the rotary embedding"""
    rope_scaling_factor: PositiveFloat = 1.0
    """positions are divided by this factor (linear RoPE scaling)"""
    norm_eps: PositiveFloat = 1e-5
    """epsilon of every RMSNorm"""
    merge_scale: Literal["mean", "rsqrt", "sum"] = "mean"
    """weight of a merged branch: 1/H (the paper's mean), 1/sqrt(H) or 1"""
    embedding_scale: PositiveFloat = 1.0
    """factor on the token embedding"""
    router_score: Literal["softmax", "sigmoid", "topk_softmax"] = "softmax"
    """non-linearity of the router; topk_softmax: the choice by logits, then the softmax over the chosen ones"""
    router_scope: Literal["global", "group"] = "global"
    """softmax over all experts, or over the experts of each group"""
    init_std: PositiveFloat = 0.02
    """standard deviation of the initial weights"""
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """dtype of activations and matmuls; router, norms, softmax and loss use at least float32"""

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        groups = self.num_groups
        require_multiple("num_kv_heads", self.num_kv_heads, "num_groups", groups)
        require_multiple("num_query_heads", self.num_query_heads, "num_kv_heads", self.num_kv_heads)
        require_multiple("num_experts", self.num_experts, "num_groups", groups)
        require_multiple("experts_per_token", self.experts_per_token, "num_groups", groups)
        if self.num_ffn_heads:
            self._check_heads()
        elif self.ffn_head_dim:
            raise ValueError(
                f"ffn_head_dim={self.ffn_head_dim} has no meaning without num_ffn_heads: set both, or none"
            )
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than num_experts={self.num_experts}: "
                "choose fewer experts per token or more experts"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd: rotary embeddings need an even head_dim")
        if self.router_score == "sigmoid" and self.router_scope == "group":
            raise ValueError(
                "router_scope=group has no meaning with router_score=sigmoid (each score stands alone): "
                "set router_scope=global"
            )
        if self.router_score == "topk_softmax" and self.experts_per_stack < 2:
            raise ValueError(
                f"router_score=topk_softmax gives the only expert of experts_per_token={self.experts_per_token} over "
                f"{self.num_stacks} stacks the weight 1, and the router no gradient: choose twice as many, or "
                "router_score=softmax with router_scope=group"
            )
        return self

    def _check_heads(self) -> None:
        heads = self.num_ffn_heads
        if self.num_groups > 1:
            raise ValueError(
                f"num_ffn_heads={heads} does not go with num_groups={self.num_groups}: experts are stacked by heads or "
                "by groups, set one of them"
            )
        require_multiple("num_experts", self.num_experts, "num_ffn_heads", heads)
        require_multiple("experts_per_token", self.experts_per_token, "num_ffn_heads", heads)
        if not self.ffn_head_dim:
            require_multiple("hidden_size", self.hidden_size, "num_ffn_heads", heads)
        if self.router_scope == "global" and self.router_score == "softmax":
            raise ValueError(
                f"router_scope=global has no meaning with num_ffn_heads={heads}, each of which routes on its own: "
                "set router_scope=group, or router_score=topk_softmax"
            )

    @property
    def num_stacks(self) -> int:
        """Stacks of experts with a router each: FoE's groups, the heads of Multi-Head LatentMoE, or 1."""
        return self.num_ffn_heads or self.num_groups

    @property
    def streams_scores(self) -> bool:
        """Whether routers keep the scores of the chosen experts alone, from which no auxiliary loss can be made."""
        return self.num_ffn_heads > 0 and self.router_score == "topk_softmax"

    def check_router_loss(self, name: str, coef: float) -> None:
        """ValueError for an auxiliary loss that this model's routers have no scores for."""
        if coef and self.streams_scores:
            raise ValueError(
                f"{name}={coef} needs the scores of all experts, of which router_score=topk_softmax keeps the chosen "
                "ones alone: set it to 0 and balance by router_bias_rate, or set router_score=softmax and "
                "router_scope=group"
            )

    @property
    def stack_axis(self) -> str:
        """Logical name of the dimension that runs over the stacks."""
        return "ffn_heads" if self.num_ffn_heads else "group"

    @property
    def experts_per_stack(self) -> int:
        """Chosen experts per token in each stack."""
        return self.experts_per_token // self.num_stacks

    @property
    def expert_width(self) -> int:
        """Size of what an expert reads and writes."""
        return self.ffn_head_dim or self.hidden_size // max(self.num_ffn_heads, 1)

    @property
    def expert_size(self) -> int:
        """Weights of one expert."""
        return (3 if self.expert_activation == "swiglu" else 2) * self.expert_width * self.expert_hidden_size

    @property
    def latent_width(self) -> int:
        """Size of all sub-tokens of a token; 0 without heads of experts."""
        return self.num_ffn_heads * self.expert_width
