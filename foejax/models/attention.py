"""Attention of one group, over the local stack of groups.

Shape letters: S groups on this device, N tokens, D width, Q query heads of a group, G key/value heads of a group,
K head size, F features of all heads of a group.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from foejax.config import ModelConfig
from foejax.models.cache import AttentionCache
from foejax.models.layers import apply_rotary, make_norm, make_param, mean_square, rms_norm
from pallas_kernels.stacked_matmul import stacked_matmul
from sharding import Layout

HEAD_SQUARES = "head_squares"
"""Checkpoint name of mean squares over heads on several devices; saved by every remat policy."""


class GroupAttention(nnx.Module):
    """Each group attends over its own stream with its own heads, QK-norm over the group's own slice."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        groups, width, head = config.num_groups, config.hidden_size, config.head_dim
        queries, keys = config.num_query_heads // groups, config.num_kv_heads // groups
        init, dtype = nnx.initializers.normal(config.init_std), config.dtype
        self.eps = config.norm_eps
        self.q_SDQK = make_param(rngs, init, ("group", "embed", "heads", None), (groups, width, queries, head), dtype)
        self.k_SDGK = make_param(rngs, init, ("group", "embed", "heads", None), (groups, width, keys, head), dtype)
        self.v_SDGK = make_param(rngs, init, ("group", "embed", "heads", None), (groups, width, keys, head), dtype)
        self.o_SQKD = make_param(rngs, init, ("group", "heads", None, "embed"), (groups, queries, head, width), dtype)
        self.q_norm_SQK = make_norm(rngs, ("group", "heads", None), (groups, queries, head), dtype)
        self.k_norm_SGK = make_norm(rngs, ("group", "heads", None), (groups, keys, head), dtype)

    def __call__(
        self, x_SND: jax.Array, angles_NK: jax.Array, cache: AttentionCache, layer: jax.Array, layout: Layout
    ) -> tuple[jax.Array, AttentionCache]:
        """Attention branch [S, N, D] of the normalised streams, and the cache with this layer written.

        Where a group's heads are split over devices, each has the part of the branch that its heads make.
        """
        angles = angles_NK[:, None, None, :]
        q_NSQK = _project(x_SND, self.q_SDQK[...])
        k_NSGK = _project(x_SND, self.k_SDGK[...])
        v_NSGK = _project(x_SND, self.v_SDGK[...])
        q_squares, k_squares = _mean_squares(q_NSQK, k_NSGK, layout)
        q_NSQK = rms_norm(q_NSQK, self.q_norm_SQK[...][None], self.eps, squares=q_squares)
        k_NSGK = rms_norm(k_NSGK, self.k_norm_SGK[...][None], self.eps, squares=k_squares)
        q_NSQK, k_NSGK = apply_rotary(q_NSQK, angles), apply_rotary(k_NSGK, angles)
        cache = cache.write(layer, k_NSGK, v_NSGK)
        out_NSQK = cache.attend(layer, q_NSQK, k_NSGK, v_NSGK)
        o_SQKD = self.o_SQKD[...]
        groups, queries, head, width = o_SQKD.shape
        out_SNF = out_NSQK.swapaxes(0, 1).reshape(groups, -1, queries * head)
        return stacked_matmul(out_SNF, o_SQKD.reshape(groups, -1, width)), cache


def _mean_squares(q_NSQK: jax.Array, k_NSGK: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Of each token's queries and of its keys, over all heads of the group, those on other devices included."""
    q_squares, k_squares = (mean_square(x, axis=(-2, -1)) for x in (q_NSQK, k_NSGK))
    if layout.num_head_shards == 1:
        return q_squares, k_squares
    both = layout.mean_over_head_shards_local(jnp.stack([q_squares, k_squares]))
    q_squares, k_squares = checkpoint_name(both, HEAD_SQUARES)
    return q_squares, k_squares


def _project(x_SND: jax.Array, w_SDHK: jax.Array) -> jax.Array:
    """Heads of every token, [N, S, H, K]."""
    groups, width, *heads = w_SDHK.shape
    y_SNF = stacked_matmul(x_SND, w_SDHK.reshape(groups, width, -1))
    return y_SNF.reshape(*y_SNF.shape[:2], *heads).swapaxes(0, 1)
