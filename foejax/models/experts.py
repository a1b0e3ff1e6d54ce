"""The experts of the local groups: feed-forwards as grouped matmuls over rows sorted by expert.

Shape letters: S groups (or heads) on this device, N tokens, D width of an expert, E experts of a group, F expert
hidden size, k choices per token and group, R rows.
"""

from __future__ import annotations

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from foejax.config import ModelConfig
from foejax.models.layers import high_precision, make_param
from foejax.models.rows import plan_rows, spread_rows
from pallas_kernels import combine, grouped_matmul, grouped_swiglu
from pallas_kernels.gathered_rows import GatheredRows
from pallas_kernels.grouped_swiglu.api import PREACTIVATIONS


class Experts(nnx.Module):
    """SwiGLU (Shazeer, 2020) or GELU experts of every group or head; all local ones are one grouped matmul."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        groups, width, hidden = config.num_stacks, config.expert_width, config.expert_hidden_size
        experts, stack = config.num_experts // groups, config.stack_axis
        init, dtype = nnx.initializers.normal(config.init_std), config.dtype
        into, out = (stack, "experts", "embed", None), (stack, "experts", None, "embed")
        self.is_gated = config.expert_activation == "swiglu"
        if self.is_gated:
            self.gate_SEDF = make_param(rngs, init, into, (groups, experts, width, hidden), dtype)
        self.up_SEDF = make_param(rngs, init, into, (groups, experts, width, hidden), dtype)
        self.down_SEFD = make_param(rngs, init, out, (groups, experts, hidden, width), dtype)

    def __call__(
        self,
        x: jax.Array,
        indices_SNk: jax.Array,
        weights_SNk: jax.Array,
        valid_SNk: jax.Array,
        *,
        max_rows: int | None = None,
    ) -> jax.Array:
        """Weighted sum [S, N, D] of each token's chosen experts, per group; zero where nothing was chosen.

        Args:
          x: tokens that the groups share [N, D], or each group's own [S, N, D].
          indices_SNk, weights_SNk, valid_SNk: choices inside each group.
          max_rows: a bound on the number of valid choices, where the caller knows one below S * N * k.
        """
        plan = plan_rows(indices_SNk, valid_SNk, self.num_experts, max_rows)
        rows = plan.gathered() if x.ndim == 2 else plan.gathered_by_group()
        hidden_RF = self._hidden(x.reshape(-1, x.shape[-1]), rows, plan.group_sizes)
        y_RD = grouped_matmul(hidden_RF, _stack(self.down_SEFD), plan.group_sizes)
        row_Ck, weights_Ck = (x_SNk.reshape(-1, x_SNk.shape[-1]) for x_SNk in (plan.row_SNk, weights_SNk))
        out_CD = combine(y_RD, row_Ck, weights_Ck, plan.choice_R)
        return out_CD.reshape(*weights_SNk.shape[:2], -1)

    @property
    def num_experts(self) -> int:
        """Experts of each group that are on this device."""
        return self.up_SEDF[...].shape[1]

    def _hidden(self, x_XD: jax.Array, rows: GatheredRows, group_sizes: jax.Array) -> jax.Array:
        up = _stack(self.up_SEDF)
        if self.is_gated:
            return grouped_swiglu(x_XD, _stack(self.gate_SEDF), up, group_sizes, rows=rows)
        up_RF = grouped_matmul(spread_rows(x_XD, rows.token_R, rows.row_AN), up, group_sizes)
        return _gelu(checkpoint_name(up_RF, PREACTIVATIONS))


@jax.checkpoint
def _gelu(up_RF: jax.Array) -> jax.Array:
    """Exact GELU in high precision; of it the backward pass keeps its argument alone."""
    return jax.nn.gelu(up_RF.astype(high_precision(up_RF.dtype)), approximate=False).astype(up_RF.dtype)


def _stack(w_SE: nnx.Param) -> jax.Array:
    """The weights of every group's experts as those of one long list of experts."""
    w = w_SE[...]
    return w.reshape(-1, *w.shape[2:])
