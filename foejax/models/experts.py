"""The experts of the local groups: SwiGLU feed-forwards run as grouped matmuls over rows sorted by expert.

Shape letters: S groups on this device, N tokens, D width, E experts of a group, F expert hidden size, k choices per
token and group, R rows.
"""

from __future__ import annotations

import jax
from flax import nnx

from foejax.config import ModelConfig
from foejax.models.layers import make_param
from foejax.models.rows import plan_rows
from pallas_kernels import combine, grouped_matmul, grouped_swiglu


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
        gate, up, down = (_stack(w_SE) for w_SE in (self.gate_SEDF, self.up_SEDF, self.down_SEFD))
        hidden_RF = grouped_swiglu(h_ND, gate, up, plan.group_sizes, rows=plan.gathered())
        y_RD = grouped_matmul(hidden_RF, down, plan.group_sizes)
        row_Ck, weights_Ck = (x_SNk.reshape(-1, x_SNk.shape[-1]) for x_SNk in (plan.row_SNk, weights_SNk))
        out_CD = combine(y_RD, row_Ck, weights_Ck, plan.choice_R)
        return out_CD.reshape(*weights_SNk.shape[:2], -1)


def _stack(w_SE: nnx.Param) -> jax.Array:
    """The weights of every group's experts as those of one long list of experts."""
    w = w_SE[...]
    return w.reshape(-1, *w.shape[2:])
