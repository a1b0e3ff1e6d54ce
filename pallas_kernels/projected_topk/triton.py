"""Projected top-k as a Triton kernel: tiles of logits come and go in registers, merged into the best k + 1 so far.

The order of logits and the merge are those of `routing_topk`. The gradient of x is a `combine`, that of w is XLA's.

Shape letters: S stacks, N tokens, K features, E experts, k choices; inside the kernel M tokens of a program, D features
and T experts of a tile, C candidates (a power of two above k).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.combine import triton as combine
from pallas_kernels.jax_triton_launch import launch
from pallas_kernels.projected_topk.xla import input_gradient, weight_gradient
from pallas_kernels.routing_topk import triton as routing_topk
from pallas_kernels.routing_topk.triton import from_ordered, store_choices, take_best, to_ordered

# Chosen without timing them. Products are of float32 on the ordinary cores: tensor cores would round their operands.
_WIDEST_TILE, _TALLEST_TILE, _DEEPEST_TILE = 128, 64, 32
_LEAST_OF_A_DOT = 16
_TILE_LOGITS, _LOGITS_OF_A_WARP = 4096, 512
_STAGES = 3


def refusal(k: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Why these operands cannot be taken, or None."""
    if dtype != jnp.float32:
        return f"triton multiplies in float32, not {jnp.dtype(dtype)}"
    return routing_topk.refusal((), k, dtype)


@functools.partial(jax.jit, static_argnames="k")
def choose(x_SNK: jax.Array, w_SKE: jax.Array, bias_SE: jax.Array | None, k: int) -> tuple[jax.Array, ...]:
    """Values, indices, validity [S, N, k] and margin [S, N]; contract as in `api`, without a gradient."""
    stacks, tokens, features = x_SNK.shape
    experts = w_SKE.shape[2]
    height, depth, width = tile_shape(tokens, features, experts)
    values_SNk, indices_SNk, count_SN, margin_SN = launch(
        _choose_kernel,
        (x_SNK, w_SKE, bias_SE, tokens),
        [
            jax.ShapeDtypeStruct((stacks, tokens, k), jnp.float32),
            jax.ShapeDtypeStruct((stacks, tokens, k), jnp.int32),
            jax.ShapeDtypeStruct((stacks, tokens), jnp.int32),
            jax.ShapeDtypeStruct((stacks, tokens), jnp.float32),
        ],
        name="projected_topk",
        grid=(stacks * triton.cdiv(tokens, height),),
        num_warps=max(height * width // _LOGITS_OF_A_WARP, 1),
        num_stages=_STAGES,
        NUM_FEATURES=features,
        NUM_EXPERTS=experts,
        K=k,
        HAS_BIAS=bias_SE is not None,
        HEIGHT=height,
        DEPTH=depth,
        WIDTH=width,
        CANDIDATES=triton.next_power_of_2(k + 1),
    )
    valid_SNk = jnp.arange(k, dtype=jnp.int32)[None, None, :] < count_SN[:, :, None]
    return values_SNk, indices_SNk, valid_SNk, margin_SN


def gradients(
    x_SNK: jax.Array, w_SKE: jax.Array, indices_SNk: jax.Array, dvalues_SNk: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """dx_SNK and dw_SKE from the gradient of the values; an index out of range means none."""
    dx_SNK = input_gradient(combine.weighted_sum, w_SKE, indices_SNk, dvalues_SNk).astype(x_SNK.dtype)
    return dx_SNK, weight_gradient(x_SNK, w_SKE, indices_SNk, dvalues_SNk)


def tile_shape(tokens: int, features: int, experts: int) -> tuple[int, int, int]:
    """Tokens, features and experts of a program's tile: powers of two, as many experts as fit."""

    def fit(size: int, most: int) -> int:
        return min(max(triton.next_power_of_2(size), _LEAST_OF_A_DOT), most)

    width = fit(experts, _WIDEST_TILE)
    return fit(tokens, min(_TILE_LOGITS // width, _TALLEST_TILE)), fit(features, _DEEPEST_TILE), width


@triton.jit
def _choose_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    w_ptr,
    bias_ptr,
    num_tokens,
    values_ptr,
    indices_ptr,
    counts_ptr,
    margins_ptr,
    NUM_FEATURES: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HEIGHT: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    absent: tl.constexpr = -(2**31)
    is_streaming: tl.constexpr = NUM_EXPERTS > WIDTH
    # Programs that run at the same time have the same stack, whose weights stay in L2.
    programs_of_stack = tl.cdiv(num_tokens, HEIGHT)
    stack = (tl.program_id(0) // programs_of_stack).to(tl.int64)
    token_M = tl.program_id(0) % programs_of_stack * HEIGHT + tl.arange(0, HEIGHT)
    exists_M = token_M < num_tokens
    row_M = stack * num_tokens + token_M
    x_M1 = x_ptr + row_M[:, None] * NUM_FEATURES
    w_stack_ptr = w_ptr + stack * (NUM_FEATURES * NUM_EXPERTS)
    rank_C = tl.arange(0, CANDIDATES)
    best_MC = tl.full((HEIGHT, CANDIDATES), absent, tl.int32)
    index_MC = tl.full((HEIGHT, CANDIDATES), NUM_EXPERTS, tl.int32)
    value_MC = tl.zeros((HEIGHT, CANDIDATES), tl.float32)
    for start in range(0, NUM_EXPERTS, WIDTH):
        expert_T = start + tl.arange(0, WIDTH)
        is_expert_T = expert_T < NUM_EXPERTS
        logits_MT = tl.zeros((HEIGHT, WIDTH), tl.float32)
        for done in range(0, NUM_FEATURES, DEPTH):
            feature_D = done + tl.arange(0, DEPTH)
            is_feature_D = feature_D < NUM_FEATURES
            x_MD = tl.load(x_M1 + feature_D[None, :], mask=exists_M[:, None] & is_feature_D[None, :], other=0)
            w_DT_ptrs = w_stack_ptr + feature_D[:, None] * NUM_EXPERTS + expert_T[None, :]
            w_DT = tl.load(w_DT_ptrs, mask=is_feature_D[:, None] & is_expert_T[None, :], other=0)
            logits_MT = tl.dot(x_MD.to(tl.float32), w_DT, logits_MT, input_precision="ieee")
        selection_MT = logits_MT
        if HAS_BIAS:
            bias_T = tl.load(bias_ptr + stack * NUM_EXPERTS + expert_T, mask=is_expert_T, other=0)
            selection_MT = logits_MT + bias_T[None, :]
        ordered_MT = tl.where(exists_M[:, None] & is_expert_T[None, :], to_ordered(selection_MT), absent)
        new_best_MC = tl.full((HEIGHT, CANDIDATES), absent, tl.int32)
        new_index_MC = tl.full((HEIGHT, CANDIDATES), NUM_EXPERTS, tl.int32)
        new_value_MC = tl.zeros((HEIGHT, CANDIDATES), tl.float32)
        for rank in range(K + 1):
            left_MC = best_MC
            top_M, winner_M, ordered_MT, best_MC = take_best(
                ordered_MT, best_MC, expert_T, index_MC, absent, NUM_EXPERTS, is_streaming
            )
            value_M = tl.sum(tl.where(expert_T[None, :] == winner_M[:, None], logits_MT, 0), 1)
            if is_streaming:
                is_winner_MC = (index_MC == winner_M[:, None]) & (left_MC == top_M[:, None])
                value_M += tl.sum(tl.where(is_winner_MC, value_MC, 0), 1)
            is_rank_MC = (rank_C == rank)[None, :]
            new_best_MC = tl.where(is_rank_MC, top_M[:, None], new_best_MC)
            new_index_MC = tl.where(is_rank_MC, winner_M[:, None], new_index_MC)
            new_value_MC = tl.where(is_rank_MC, value_M[:, None], new_value_MC)
        best_MC, index_MC, value_MC = new_best_MC, new_index_MC, new_value_MC
    value_MC = tl.where(from_ordered(best_MC) > float("-inf"), value_MC, 0)
    store_choices(
        best_MC, index_MC, value_MC, row_M, exists_M, values_ptr, indices_ptr, counts_ptr, margins_ptr, K, CANDIDATES
    )
