"""Moving tokens to rows sorted by expert and back, by gathers alone in both directions.

XLA's scatter is slow and, on GPU, not deterministic; since both the sorted order and its inverse are known, every
gather's transpose is written as the gather through the inverse.

Shape letters: N tokens, R rows, D width, S groups on this device, E experts of a group, k choices per token and group.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels.backends import device_kind
from pallas_kernels.gathered_rows import GatheredRows, take_rows


@struct.dataclass
class RowPlan:
    """Which token each expert row holds, and where each choice's row is. An index out of range means: none.

    Attributes:
      token_R: int32, token of each row; N for rows beyond the last live one.
      choice_R: int32, flat index into (S, N, k) of each row's choice; S * N * k for dead rows.
      row_SNk: int32, row of each choice; R where it has none.
      group_sizes: int32 [S * E], rows of each expert, in order.
    """

    token_R: jax.Array
    choice_R: jax.Array
    row_SNk: jax.Array
    group_sizes: jax.Array

    def gathered(self) -> GatheredRows:
        """The rows as copies of tokens [N, D] that all groups share."""
        num_tokens = self.row_SNk.shape[1]
        return GatheredRows(self.token_R, self.row_SNk.transpose(0, 2, 1).reshape(-1, num_tokens))

    def gathered_by_group(self) -> GatheredRows:
        """The rows as copies of tokens [S * N, D], of which every group has its own."""
        choices = self.row_SNk.shape[-1]
        return GatheredRows(self.choice_R // choices, self.row_SNk.reshape(-1, choices).T)


def largest_counted() -> int:
    """Choices up to which comparing all pairs beats sorting: on a GPU that is a few small kernels, a sort is many."""
    return 64 if device_kind() == "cpu" else 1024


def plan_rows(indices_SNk: jax.Array, valid_SNk: jax.Array, num_experts: int, max_rows: int | None = None) -> RowPlan:
    """Sort the valid choices by (group, expert), stably.

    Args:
      indices_SNk: expert inside the group of each choice.
      valid_SNk: which choices count.
      num_experts: experts per group.
      max_rows: rows to keep; must be at least the number of valid choices. None keeps one per choice.
    """
    groups, tokens, k = indices_SNk.shape
    choices = groups * tokens * k
    rows = choices if max_rows is None else min(max_rows, choices)
    stack = num_experts * jnp.arange(groups, dtype=jnp.int32)[:, None, None]
    expert_C = jnp.where(valid_SNk, indices_SNk + stack, groups * num_experts).reshape(-1)
    sort = _sort_by_counting if choices <= largest_counted() else _sort
    order_C, row_C, group_sizes = sort(expert_C, groups * num_experts)
    live = jnp.arange(rows, dtype=jnp.int32) < group_sizes.sum(dtype=jnp.int32)
    kept = order_C[:rows]
    return RowPlan(
        token_R=jnp.where(live, (kept // k) % tokens, tokens),
        choice_R=jnp.where(live, kept, choices),
        row_SNk=jnp.where(valid_SNk, row_C.reshape(indices_SNk.shape), rows),
        group_sizes=group_sizes,
    )


_Sorted = tuple[jax.Array, jax.Array, jax.Array]
"""Choice at each place, place of each choice [C], and how many choices each expert has; all int32."""


def _sort(expert_C: jax.Array, num_experts: int) -> _Sorted:
    choice_C = jnp.arange(expert_C.size, dtype=jnp.int32)
    order_C = jnp.argsort(expert_C, stable=True).astype(jnp.int32)
    row_C = jnp.zeros_like(choice_C).at[order_C].set(choice_C, unique_indices=True)
    bounds = jnp.searchsorted(expert_C[order_C], jnp.arange(num_experts + 1, dtype=jnp.int32)).astype(jnp.int32)
    return order_C, row_C, jnp.diff(bounds)


def _sort_by_counting(expert_C: jax.Array, num_experts: int) -> _Sorted:
    """By comparing all pairs of choices."""
    choice_C = jnp.arange(expert_C.size, dtype=jnp.int32)
    key_C = expert_C * expert_C.size + choice_C
    row_C = (key_C[None, :] < key_C[:, None]).sum(1, dtype=jnp.int32)
    order_C = jnp.where(row_C[None, :] == choice_C[:, None], choice_C[None, :], 0).sum(1, dtype=jnp.int32)
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    return order_C, row_C, (expert_C[None, :] == experts[:, None]).sum(1, dtype=jnp.int32)


@jax.custom_vjp
def spread_rows(x_ND: jax.Array, token_R: jax.Array, row_AN: jax.Array) -> jax.Array:
    """rows[r] = x[token_R[r]], zero where the token is out of range.

    `row_AN` [A, N] lists the rows of every token (out of range: none); the gradient sums over them.
    """
    return take_rows(x_ND, token_R)


def _spread_fwd(x_ND: jax.Array, token_R: jax.Array, row_AN: jax.Array) -> tuple[jax.Array, jax.Array]:
    return take_rows(x_ND, token_R), row_AN


def _spread_bwd(row_AN: jax.Array, grad_RD: jax.Array) -> tuple[jax.Array, None, None]:
    return take_rows(grad_RD, row_AN).sum(axis=0), None, None


spread_rows.defvjp(_spread_fwd, _spread_bwd)


@jax.custom_vjp
def collect_rows(rows_RD: jax.Array, row_X: jax.Array, choice_R: jax.Array) -> jax.Array:
    """out[x] = rows[row_X[x]] for an index array of any shape X, zero where the row is out of range.

    `choice_R` is the flat index into X that each row answers (out of range: none); the gradient is gathered by it.
    """
    return take_rows(rows_RD, row_X)


def _collect_fwd(rows_RD: jax.Array, row_X: jax.Array, choice_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    return take_rows(rows_RD, row_X), choice_R


def _collect_bwd(choice_R: jax.Array, grad_XD: jax.Array) -> tuple[jax.Array, None, None]:
    return take_rows(grad_XD.reshape(-1, grad_XD.shape[-1]), choice_R), None, None


collect_rows.defvjp(_collect_fwd, _collect_bwd)
