"""The experts of the local groups: SwiGLU feed-forwards run as grouped matmuls over rows sorted by expert.

Shape letters: S groups on this device, N tokens, D width, E experts of a group, F expert hidden size, k choices per
token and group, R rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from foejax.config import ModelConfig
from foejax.models.layers import make_param
from foejax.models.rows import collect_rows, plan_rows, spread_rows
from pallas_kernels import grouped_matmul, grouped_swiglu


class Experts(nnx.Module):
    """SwiGLU experts (Shazeer, 2020) of every group; all local groups are one grouped matmul."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        groups, width, hidden = config.num_groups, config.hidden_size, config.expert_hidden_size
        experts = config.num_experts // groups
        init, dtype = nnx.initializers.normal(config.init_std), config.dtype
        into, out = ("group", "experts", "embed", None), ("group", "experts", None, "embed")
        self.gate_SEDF = make_param(rngs, init, into, (groups, experts, width, hidden), dtype)
        self.up_SEDF = make_param(rngs, init, into, (groups, experts, width, hidden), dtype)
        self.down_SEFD = make_param(rngs, init, out, (groups, experts, hidden, width), dtype)

    def __call__(
        self,
        h_ND: jax.Array,
        indices_SNk: jax.Array,
        weights_SNk: jax.Array,
        valid_SNk: jax.Array,
        *,
        max_rows: int | None = None,
    ) -> jax.Array:
        """Weighted sum [S, N, D] of each token's chosen experts, per group; zero where nothing was chosen.

        Args:
          h_ND: normed residual, shared by the groups.
          indices_SNk, weights_SNk, valid_SNk: choices inside each group.
          max_rows: a bound on the number of valid choices, where the caller knows one below S * N * k.
        """
        num_experts = self.gate_SEDF[...].shape[1]
        plan = plan_rows(indices_SNk, valid_SNk, num_experts, max_rows)
        row_AN = plan.row_SNk.transpose(0, 2, 1).reshape(-1, h_ND.shape[0])
        x_RD = spread_rows(h_ND, plan.token_R, row_AN)
        hidden_RF = grouped_swiglu(x_RD, _stack(self.gate_SEDF), _stack(self.up_SEDF), plan.group_sizes)
        y_RD = grouped_matmul(hidden_RF, _stack(self.down_SEFD), plan.group_sizes)
        y_SNkD = collect_rows(y_RD, plan.row_SNk, plan.choice_R)
        return jnp.sum(weights_SNk.astype(h_ND.dtype)[..., None] * y_SNkD, axis=2)


def _stack(w_SE: nnx.Param) -> jax.Array:
    """The weights of every group's experts as those of one long list of experts."""
    w = w_SE[...]
    return w.reshape(-1, *w.shape[2:])
