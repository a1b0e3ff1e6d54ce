"""Multi-Head LatentMoE (arXiv 2602.04870): a token is cut into sub-tokens, and each head is an MoE of its own.

Since a sub-token's head is known before it is routed, devices that own different heads exchange sub-tokens first: two
all-to-alls of equal parts, whose size depends neither on the routing nor on the number of chosen experts (Head
Parallel, section 3 of the paper's code).

Shape letters: N tokens of this device, M tokens of all devices that exchange heads, D width, H heads, S heads of this
device, K size of a sub-token, P devices that exchange heads.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from foejax.config import ModelConfig
from foejax.models.expert_parallel import EXCHANGED, run_experts
from foejax.models.experts import Experts
from foejax.models.layers import make_param
from foejax.models.router import (
    RouterStats,
    Routing,
    SelectFn,
    make_selection_bias,
    route,
    route_projected,
    router_stats,
    tokens_per_expert,
)
from pallas_kernels.stacked_matmul import stacked_matmul
from sharding import Layout


class LatentHeads(nnx.Module):
    """Sub-tokens, a router and experts for every head, and what becomes of their outputs."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        heads, size, width = config.num_ffn_heads, config.expert_width, config.hidden_size
        into = nnx.initializers.normal(config.init_std)
        out = nnx.initializers.normal(config.init_std / math.sqrt(2 * config.num_layers))
        self.in_DHK = make_param(rngs, into, ("embed", None, None), (width, heads, size), config.dtype)
        self.out_HKD = make_param(rngs, out, (None, None, "embed"), (heads, size, width), config.dtype)
        self.router = HeadRouter(config, rngs)
        self.experts = Experts(config, rngs)

    def __call__(
        self, h_ND: jax.Array, layout: Layout, *, active_tokens: jax.Array, select_fn: SelectFn | None = None
    ) -> tuple[jax.Array, Routing, RouterStats]:
        """Outputs [N, D] of this device's tokens, and the routing of this device's heads over all tokens M.

        Args:
          active_tokens: [M] bool, False for padding.
        """
        u_SMK = self._split_local(h_ND, layout)
        routing, stats = self.router(u_SMK, active_tokens=active_tokens, select_fn=select_fn)
        return self._join_local(run_experts(self.experts, u_SMK, routing, layout), layout), routing, stats

    def _split_local(self, h_ND: jax.Array, layout: Layout) -> jax.Array:
        """Sub-tokens [S, M, K] of this device's heads."""
        in_DHK = self.in_DHK[...]
        width, heads, size = in_DHK.shape
        u_NF = stacked_matmul(h_ND[None], in_DHK.reshape(1, width, -1))[0]
        devices = layout.num_head_exchangers
        u_PSNK = u_NF.reshape(-1, devices, heads // devices, size).transpose(1, 2, 0, 3)
        return _exchange(u_PSNK, layout).swapaxes(0, 1).reshape(heads // devices, -1, size)

    def _join_local(self, y_SMK: jax.Array, layout: Layout) -> jax.Array:
        """The inverse exchange, and the outputs of all heads put together: [N, D]."""
        out_HKD = self.out_HKD[...]
        heads, tokens, size = y_SMK.shape
        devices = layout.num_head_exchangers
        y_PSNK = y_SMK.reshape(heads, devices, -1, size).swapaxes(0, 1)
        y_NF = _exchange(y_PSNK, layout).transpose(2, 0, 1, 3).reshape(tokens // devices, -1)
        return stacked_matmul(y_NF[None], out_HKD.reshape(1, -1, out_HKD.shape[-1]))[0]


class HeadRouter(nnx.Module):
    """Scores of each head's own experts from its own sub-tokens."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        heads = config.num_ffn_heads
        self.k, self.score, self.num_heads = config.experts_per_stack, config.router_score, heads
        init = nnx.initializers.normal(config.init_std)
        shape = (heads, config.expert_width, config.num_experts // heads)
        self.w_SKE = make_param(rngs, init, ("ffn_heads", "embed", None), shape, config.dtype, high_precision_use=True)
        self.selection_bias_SE = make_selection_bias(config)

    def __call__(
        self, u_SMK: jax.Array, *, active_tokens: jax.Array, select_fn: SelectFn | None = None
    ) -> tuple[Routing, RouterStats]:
        """Route every sub-token among the experts of its head; as `foejax.models.router.Router`.

        With `topk_softmax` the scores of all experts are never in memory, unless a `select_fn` asks for them, and the
        sums for auxiliary losses are zero.
        """
        w_SKE, bias_SE = self.w_SKE[...], self.selection_bias_SE[...]
        if self.score == "topk_softmax" and select_fn is None:
            routing = route_projected(u_SMK, w_SKE, self.k, selection_bias_SE=bias_SE, active_tokens=active_tokens)
            tokens_SE = tokens_per_expert(routing, w_SKE.shape[-1], w_SKE.dtype)
            return routing, RouterStats(tokens_SE, jnp.zeros_like(tokens_SE), jnp.zeros_like(tokens_SE, shape=()))
        logits_SME = jnp.einsum("smk,ske->sme", u_SMK.astype(w_SKE.dtype), w_SKE, precision="highest")
        normalizer_SM1 = jax.nn.logsumexp(logits_SME, axis=-1, keepdims=True)
        routing = route(
            logits_SME,
            self.k,
            score=self.score,
            log_normalizer=normalizer_SM1,
            selection_bias=bias_SE[:, None, :],
            select_fn=select_fn,
            active_tokens=active_tokens,
        )
        if self.score == "sigmoid":
            scores_SME = jax.nn.sigmoid(logits_SME)
            probability_SME = scores_SME / scores_SME.sum(axis=-1, keepdims=True)
        else:
            probability_SME = jnp.exp(logits_SME - normalizer_SM1)
        share = 1.0 / self.num_heads  # over the experts of all heads the probabilities of a token sum to 1
        return routing, router_stats(routing, probability_SME * share, normalizer_SM1, active_tokens)


def _exchange(x_P: jax.Array, layout: Layout) -> jax.Array:
    if layout.num_head_exchangers == 1:
        return x_P
    return checkpoint_name(layout.exchange_heads_local(x_P), EXCHANGED)
