"""One transformer layer, written as the program of one group over an explicit local stack of groups.

The equations are those of Federation of Experts (arXiv 2605.06206, Table 2) with the shared residual r and each
group's own expert output m carried apart, so that a group's stream is r + m. With one group it is the plain
mixture-of-experts layer, or with `num_ffn_heads` that of Multi-Head LatentMoE.

Shape letters: S groups on this device, N tokens, D width, E experts of a group, k choices per token and group.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.ad_checkpoint import checkpoint_name

from foejax.config import ModelConfig
from foejax.models.attention import GroupAttention
from foejax.models.cache import AttentionCache
from foejax.models.expert_parallel import run_experts
from foejax.models.experts import Experts
from foejax.models.latent_heads import LatentHeads
from foejax.models.layers import make_norm, rms_norm
from foejax.models.router import Router, RouterStats, Routing, SelectFn
from sharding import Layout

MERGED_RESIDUAL = "merged_residual"
"""Checkpoint name of the residual after the groups met; saved by every remat policy, so no merge runs twice."""
WHOLE_TOKENS = "whole_tokens"
"""Checkpoint name of what attention reads where devices carry slices of the tokens; saved likewise."""


@struct.dataclass
class Streams:
    """State between layers: the residual all groups share and what each group's experts added for itself.

    N are the tokens that this device carries: all that it attends to or, where `layout.slices_tokens`, its slice.
    """

    residual_ND: jax.Array
    expert_out_SND: jax.Array


class Block(nnx.Module):
    """Attention of each group on its own stream, one merge, then each group's own experts."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.eps = config.norm_eps
        width, dtype = config.hidden_size, config.dtype
        self.attention_norm_SD = make_norm(rngs, ("group", None), (config.num_groups, width), dtype)
        self.attention = GroupAttention(config, rngs)
        self.expert_norm_D = make_norm(rngs, (None,), (width,), dtype)
        self.heads = LatentHeads(config, rngs) if config.num_ffn_heads else None
        if self.heads is None:
            self.router = Router(config, rngs)
            self.experts = Experts(config, rngs)

    def __call__(
        self,
        streams: Streams,
        layer: jax.Array,
        angles_NK: jax.Array,
        cache: AttentionCache,
        layout: Layout,
        *,
        merge_scale: jax.Array,
        active_tokens: jax.Array,
        select_fn: SelectFn | None = None,
    ) -> tuple[Streams, AttentionCache, RouterStats, Routing]:
        """Run the layer on this device's groups.

        Args:
          streams: state at the layer's entry.
          layer: index of the layer, for the cache.
          angles_NK: rotary angles [tokens attended to, K/2].
          merge_scale: weight of the merged branches, a scalar in the activations' dtype.
          active_tokens: [N] bool, False for padding, of the tokens that are routed here
            (`layout.routed_tokens_local` of those carried here).
        """
        residual_ND, expert_out_SND = streams.residual_ND, streams.expert_out_SND
        with jax.named_scope("attention"):
            x_SND = residual_ND[None] + expert_out_SND
            normed_SND = rms_norm(x_SND, self.attention_norm_SD[...][:, None, :], self.eps)
            if layout.slices_tokens:
                whole_SND = layout.whole_tokens_local(normed_SND, angles_NK.shape[0])
                normed_SND = checkpoint_name(whole_SND, WHOLE_TOKENS)
            branch_SND, cache = self.attention(normed_SND, angles_NK, cache, layer, layout)
        with jax.named_scope("merge"):
            merged_ND = layout.merge_local(expert_out_SND, branch_SND)
            residual_ND = checkpoint_name(residual_ND + merge_scale * merged_ND, MERGED_RESIDUAL)
        with jax.named_scope("experts"):
            h_ND = rms_norm(residual_ND, self.expert_norm_D[...][None], self.eps)
            if self.heads is None:
                routing, stats = self.router(h_ND, layout, active_tokens=active_tokens, select_fn=select_fn)
                expert_out_SND = run_experts(self.experts, h_ND, routing, layout)
            else:
                out_ND, routing, stats = self.heads(h_ND, layout, active_tokens=active_tokens, select_fn=select_fn)
                expert_out_SND = out_ND[None]
        return Streams(residual_ND, expert_out_SND), cache, stats, routing


def merge_scales(config: ModelConfig) -> tuple[float, float]:
    """Weights of the merged branches: in the first layer, whose attention is the ordinary one, and in the others."""
    groups = config.num_groups
    return 1.0, {"mean": 1.0 / groups, "rsqrt": groups**-0.5, "sum": 1.0}[config.merge_scale]


def layer_merge_scale(config: ModelConfig, layer: jax.Array) -> jax.Array:
    """Weight of the merged branches in `layer`, a scalar in the activations' dtype."""
    first, later = merge_scales(config)
    return jnp.where(layer == 0, first, later).astype(config.dtype)
