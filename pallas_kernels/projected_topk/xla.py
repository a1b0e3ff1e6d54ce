"""Projected top-k in plain XLA: a loop over blocks of tokens, of which one block's logits are in memory at a time.

Shape letters: S stacks, N tokens, K features, E experts, k choices, M tokens of a block, C tokens of all stacks, R
experts of all stacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.combine import xla as combine
from pallas_kernels.routing_topk import xla as routing_topk
from pallas_kernels.varying import cast_to_varying, varying_axes

_BLOCK_LOGITS = 1 << 20
"""Of all stacks together."""


def refusal(k: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Takes everything."""
    return None


def choose(x_SNK: jax.Array, w_SKE: jax.Array, bias_SE: jax.Array | None, k: int) -> tuple[jax.Array, ...]:
    """Values, indices, validity [S, N, k] and margin [S, N]; contract as in `api`, without a gradient."""
    stacks, tokens, _ = x_SNK.shape
    experts, dtype = w_SKE.shape[2], w_SKE.dtype

    def choose_block(start: jax.Array, is_new_M: jax.Array, results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x_SMK = lax.dynamic_slice_in_dim(x_SNK, start, len(is_new_M), 1).astype(dtype)
        logits_SME = jnp.einsum("smk,ske->sme", x_SMK, w_SKE, precision="highest")
        chosen = routing_topk.choose(logits_SME.reshape(-1, experts), bias_SE, k)
        return tuple(
            lax.dynamic_update_slice_in_dim(result, block.reshape(stacks, -1, *result.shape[2:]), start, 1)
            for result, block in zip(results, chosen, strict=True)
        )

    shapes = [((stacks, tokens, k), each) for each in (dtype, jnp.int32, jnp.bool)] + [((stacks, tokens), dtype)]
    axes = varying_axes(x_SNK, w_SKE)
    results = tuple(cast_to_varying(jnp.zeros(*each), axes) for each in shapes)
    return _for_each_block(choose_block, tokens, stacks * experts, results)


def gradients(
    x_SNK: jax.Array, w_SKE: jax.Array, indices_SNk: jax.Array, dvalues_SNk: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """dx_SNK and dw_SKE from the gradient of the values; an index out of range means none."""
    dx_SNK = input_gradient(combine.weighted_sum, w_SKE, indices_SNk, dvalues_SNk).astype(x_SNK.dtype)
    return dx_SNK, weight_gradient(x_SNK, w_SKE, indices_SNk, dvalues_SNk)


def input_gradient(
    weighted_sum: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    w_SKE: jax.Array,
    indices_SNk: jax.Array,
    dvalues_SNk: jax.Array,
) -> jax.Array:
    """dx_SNK in the weights' dtype: the columns of each token's experts, combined by the gradients of its values.

    Args:
      weighted_sum: of a backend of `combine`.
    """
    stacks, features, experts = w_SKE.shape
    first_S11 = jnp.arange(stacks, dtype=jnp.int32)[:, None, None] * experts
    row_SNk = jnp.where(indices_SNk < experts, first_S11 + indices_SNk, stacks * experts)
    rows_RK = w_SKE.swapaxes(1, 2).reshape(-1, features)
    tokens, k = indices_SNk.shape[1:]
    return weighted_sum(rows_RK, row_SNk.reshape(-1, k), dvalues_SNk.reshape(-1, k)).reshape(stacks, tokens, features)


def weight_gradient(x_SNK: jax.Array, w_SKE: jax.Array, indices_SNk: jax.Array, dvalues_SNk: jax.Array) -> jax.Array:
    """dw_SKE in the weights' dtype: for each expert the sum of the tokens that chose it, times its values' gradients.

    By matmuls, which add in the same order every time, as additions to one expert's column from everywhere would not.
    """
    stacks, _, experts = w_SKE.shape
    tokens, k = indices_SNk.shape[1:]

    def add_block(start: jax.Array, is_new_M: jax.Array, dw_SKE: jax.Array) -> jax.Array:
        x_SMK, indices_SMk, dvalues_SMk = (
            lax.dynamic_slice_in_dim(array, start, len(is_new_M), 1) for array in (x_SNK, indices_SNk, dvalues_SNk)
        )
        indices_SMk = jnp.where(is_new_M[None, :, None], indices_SMk, experts)
        dlogits_CE = routing_topk.spread(dvalues_SMk.reshape(-1, k), indices_SMk.reshape(-1, k), experts)
        # A token whose x is NaN has chosen nothing, and zero times NaN would be NaN in all columns.
        has_choice_SM1 = (indices_SMk < experts).any(axis=2, keepdims=True)
        x_SMK = jnp.where(has_choice_SM1, x_SMK, 0).astype(w_SKE.dtype)
        dlogits_SME = dlogits_CE.reshape(stacks, -1, experts)
        return dw_SKE + jnp.einsum("smk,sme->ske", x_SMK, dlogits_SME, precision="highest")

    zeros_SKE = cast_to_varying(jnp.zeros_like(w_SKE), varying_axes(x_SNK, w_SKE))
    return _for_each_block(add_block, tokens, stacks * experts, zeros_SKE)


_Carry = TypeVar("_Carry")


def _for_each_block(
    body: Callable[[jax.Array, jax.Array, _Carry], _Carry], tokens: int, logits_of_token: int, carry: _Carry
) -> _Carry:
    """Carries through blocks of equally many tokens: `body` gets a block's first token and which are new to it [M].

    The last block starts early enough to be as high as the others, and then meets tokens of the one before again.
    """
    num_blocks = -(-tokens * logits_of_token // _BLOCK_LOGITS)
    if num_blocks <= 1:
        return body(jnp.int32(0), jnp.ones(tokens, bool), carry)
    height = -(-tokens // num_blocks)

    def step(index: jax.Array, carry: _Carry) -> _Carry:
        start = jnp.minimum(index * height, tokens - height)
        return body(start, start + jnp.arange(height, dtype=start.dtype) >= index * height, carry)

    return lax.fori_loop(0, -(-tokens // height), step, carry)
