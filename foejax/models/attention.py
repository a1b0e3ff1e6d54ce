"""Attention of one group, over the local stack of groups.

Shape letters: S groups on this device, N tokens, D width, Q query heads of a group, G key/value heads of a group,
K head size, F features of all heads of a group.
"""

from __future__ import annotations

import jax
from flax import nnx

from foejax.config import ModelConfig
from foejax.models.cache import AttentionCache
from foejax.models.layers import apply_rotary, make_norm, make_param, rms_norm
from pallas_kernels.stacked_matmul import stacked_matmul


class GroupAttention(nnx.Module):
    """Each group attends over its own stream with its own heads, QK-norm over the group's own slice."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        groups, width, head = config.num_groups, config.hidden_size, config.head_dim
        queries, keys = config.num_query_heads // groups, config.num_kv_heads // groups
        init, dtype = nnx.initializers.normal(config.init_std), config.dtype
        self.eps = config.norm_eps
        self.q_SDQK = make_param(rngs, init, ("group", "embed", None, None), (groups, width, queries, head), dtype)
        self.k_SDGK = make_param(rngs, init, ("group", "embed", None, None), (groups, width, keys, head), dtype)
        self.v_SDGK = make_param(rngs, init, ("group", "embed", None, None), (groups, width, keys, head), dtype)
        self.o_SQKD = make_param(rngs, init, ("group", None, None, "embed"), (groups, queries, head, width), dtype)
        self.q_norm_SQK = make_norm(rngs, ("group", None, None), (groups, queries, head), dtype)
        self.k_norm_SGK = make_norm(rngs, ("group", None, None), (groups, keys, head), dtype)

    def __call__(
        self, x_SND: jax.Array, angles_NK: jax.Array, cache: AttentionCache, layer: jax.Array
    ) -> tuple[jax.Array, AttentionCache]:
        """Attention branch [S, N, D] of the normalised streams, and the cache with this layer written."""
        angles = angles_NK[:, None, None, :]
        q_NSQK = _project(x_SND, self.q_SDQK[...])
        k_NSGK = _project(x_SND, self.k_SDGK[...])
        v_NSGK = _project(x_SND, self.v_SDGK[...])
        q_NSQK = apply_rotary(rms_norm(q_NSQK, self.q_norm_SQK[...][None], self.eps, axis=(-2, -1)), angles)
        k_NSGK = apply_rotary(rms_norm(k_NSGK, self.k_norm_SGK[...][None], self.eps, axis=(-2, -1)), angles)
        cache = cache.write(layer, k_NSGK, v_NSGK)
        out_NSQK = cache.attend(layer, q_NSQK, k_NSGK, v_NSGK)
        o_SQKD = self.o_SQKD[...]
        groups, queries, head, width = o_SQKD.shape
        out_SNF = out_NSQK.swapaxes(0, 1).reshape(groups, -1, queries * head)
        return stacked_matmul(out_SNF, o_SQKD.reshape(groups, -1, width)), cache


def _project(x_SND: jax.Array, w_SDHK: jax.Array) -> jax.Array:
    """Heads of every token, [N, S, H, K]."""
    groups, width, *heads = w_SDHK.shape
    y_SNF = stacked_matmul(x_SND, w_SDHK.reshape(groups, width, -1))
    return y_SNF.reshape(*y_SNF.shape[:2], *heads).swapaxes(0, 1)
