"""Routing top-k as Triton kernels: one pass over tiles of experts, the best k + 1 so far in registers.

Selection scores are turned into integers of the same order, so that there is a value below -inf for "taken or absent",
and NaN and the two zeros need no care after that.

Shape letters: N tokens, E experts, k choices, G blocks of tokens with a bias each; inside the kernels M tokens of a
program, T experts of a tile, C candidates (a power of two above k).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl

from pallas_kernels.jax_triton_launch import launch

_MOST_CHOICES = 31
_WIDEST_TILE = 512
_TILE_ELEMENTS = 512
"""Scores of a program, which is one warp: 16 a thread, and no barriers."""


def refusal(shape: tuple[int, ...], k: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Why these scores cannot be taken, or None."""
    if k > _MOST_CHOICES:
        return f"triton keeps the best in registers and takes k up to {_MOST_CHOICES}, not {k}"
    return None


@functools.partial(jax.jit, static_argnames="k")
def choose(
    scores_NE: jax.Array, bias_GE: jax.Array | None, k: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Values, indices, validity [N, k] and margin [N]; contract as in `api.routing_topk`, without a gradient."""
    tokens, experts = scores_NE.shape
    best = triton.next_power_of_2(k + 1)
    height, width = tile_shape(tokens, experts)
    tokens_per_bias = 1 if bias_GE is None else max(tokens // bias_GE.shape[0], 1)
    values_Nk, indices_Nk, count_N, margin_N = launch(
        _choose_kernel,
        (scores_NE, bias_GE, tokens, tokens_per_bias),
        [
            jax.ShapeDtypeStruct((tokens, k), scores_NE.dtype),
            jax.ShapeDtypeStruct((tokens, k), jnp.int32),
            jax.ShapeDtypeStruct((tokens,), jnp.int32),
            jax.ShapeDtypeStruct((tokens,), np.promote_types(scores_NE.dtype, np.float32)),
        ],
        name="routing_topk",
        grid=(triton.cdiv(tokens, height),),
        num_warps=1,
        NUM_EXPERTS=experts,
        K=k,
        HAS_BIAS=bias_GE is not None,
        HEIGHT=height,
        WIDTH=width,
        CANDIDATES=best,
    )
    valid_Nk = jnp.arange(k, dtype=jnp.int32)[None, :] < count_N[:, None]
    return values_Nk, indices_Nk, valid_Nk, margin_N


@functools.partial(jax.jit, static_argnames="num_experts")
def spread(dvalues_Nk: jax.Array, indices_Nk: jax.Array, num_experts: int) -> jax.Array:
    """dscores_NE: each value's gradient at its expert, zero elsewhere; an index out of range means none."""
    tokens, k = indices_Nk.shape
    height, width = tile_shape(tokens, num_experts)
    (dscores_NE,) = launch(
        _spread_kernel,
        (dvalues_Nk, indices_Nk, tokens),
        [jax.ShapeDtypeStruct((tokens, num_experts), dvalues_Nk.dtype)],
        name="routing_topk_gradient",
        grid=(triton.cdiv(tokens, height), triton.cdiv(num_experts, width)),
        num_warps=1,
        NUM_EXPERTS=num_experts,
        K=k,
        HEIGHT=height,
        WIDTH=width,
    )
    return dscores_NE


def tile_shape(tokens: int, experts: int) -> tuple[int, int]:
    """Tokens and experts of a program's tile: powers of two, all experts if they are at most 512.

    A tile of all experts needs no merge with the best of earlier tiles.
    """
    width = min(triton.next_power_of_2(experts), _WIDEST_TILE)
    return min(_TILE_ELEMENTS // width, 64, triton.next_power_of_2(max(tokens, 1))), width


@triton.jit
def to_ordered(selection):  # type: ignore[no-untyped-def]
    """Integers in the order of the floats, NaN as -inf and -0 as +0; the smallest integer is left over."""
    selection = tl.where(selection == selection, selection, float("-inf"))
    selection = tl.where(selection == 0, 0.0, selection)
    if selection.dtype == tl.float64:
        bits = selection.to(tl.int64, bitcast=True)
        ordered = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = selection.to(tl.int32, bitcast=True)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ordered


@triton.jit
def from_ordered(ordered):  # type: ignore[no-untyped-def]
    """The float that `to_ordered` was given; NaN for the integer that is left over."""
    if ordered.dtype == tl.int64:
        bits = ordered ^ ((ordered >> 63) & 0x7FFFFFFFFFFFFFFF)
        selection = bits.to(tl.float64, bitcast=True)
    else:
        bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
        selection = bits.to(tl.float32, bitcast=True)
    return selection


@triton.jit
def take_best(  # type: ignore[no-untyped-def]
    ordered_MT,
    best_MC,
    expert_T,
    index_MC,
    absent: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    is_streaming: tl.constexpr,
):
    """The highest score of a tile and of the best so far, its expert, and both without it.

    Scores are ordered integers, `absent` where there is none (left); where that is the highest, the expert is any. The
    best so far are of earlier tiles, so that there are none without streaming.
    """
    top_M = tl.max(ordered_MT, 1)
    if is_streaming:
        top_M = tl.maximum(top_M, tl.max(best_MC, 1))
    winner_M = tl.min(tl.where(ordered_MT == top_M[:, None], expert_T[None, :], NUM_EXPERTS), 1)
    if is_streaming:
        # Of equals an earlier tile's expert has the lower index.
        winner_M = tl.minimum(winner_M, tl.min(tl.where(best_MC == top_M[:, None], index_MC, NUM_EXPERTS), 1))
        best_MC = tl.where(index_MC == winner_M[:, None], absent, best_MC)
    ordered_MT = tl.where(expert_T[None, :] == winner_M[:, None], absent, ordered_MT)
    return top_M, winner_M, ordered_MT, best_MC


@triton.jit
def store_choices(  # type: ignore[no-untyped-def]
    best_MC,
    index_MC,
    value_MC,
    token_M,
    exists_M,
    values_ptr,
    indices_ptr,
    counts_ptr,
    margins_ptr,
    K: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """Writes the first K of the candidates, how many of them are valid, and the margin to the one after them.

    Values are 0 already where not valid.
    """
    rank_C = tl.arange(0, CANDIDATES)
    is_choice_MC = exists_M[:, None] & (rank_C < K)[None, :]
    selection_MC = from_ordered(best_MC)
    valid_MC = selection_MC > float("-inf")
    offset_MC = token_M.to(tl.int64)[:, None] * K + rank_C[None, :]
    tl.store(values_ptr + offset_MC, value_MC, mask=is_choice_MC)
    tl.store(indices_ptr + offset_MC, index_MC, mask=is_choice_MC)
    tl.store(counts_ptr + token_M, tl.sum((is_choice_MC & valid_MC).to(tl.int32), 1), mask=exists_M)
    last_M = tl.sum(tl.where((rank_C == K - 1)[None, :], selection_MC, 0), 1)
    left_M = tl.sum(tl.where((rank_C == K)[None, :], selection_MC, 0), 1)
    gap_M = tl.where(last_M == left_M, 0, last_M - left_M)
    tl.store(margins_ptr + token_M, tl.where(left_M > float("-inf"), gap_M, float("inf")), mask=exists_M)


@triton.jit
def _choose_kernel(  # type: ignore[no-untyped-def]
    scores_ptr,
    bias_ptr,
    num_tokens,
    tokens_per_bias,
    values_ptr,
    indices_ptr,
    counts_ptr,
    margins_ptr,
    NUM_EXPERTS: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    sum_type: tl.constexpr = margins_ptr.dtype.element_ty
    ordered_type: tl.constexpr = tl.int64 if sum_type == tl.float64 else tl.int32
    absent: tl.constexpr = -(2**63) if sum_type == tl.float64 else -(2**31)
    is_streaming: tl.constexpr = NUM_EXPERTS > WIDTH
    token_M = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    exists_M = token_M < num_tokens
    scores_M = scores_ptr + token_M.to(tl.int64) * NUM_EXPERTS
    bias_M = bias_ptr + (token_M // tokens_per_bias).to(tl.int64) * NUM_EXPERTS
    rank_C = tl.arange(0, CANDIDATES)
    best_MC = tl.full((HEIGHT, CANDIDATES), absent, ordered_type)
    index_MC = tl.full((HEIGHT, CANDIDATES), NUM_EXPERTS, tl.int32)
    for start in range(0, NUM_EXPERTS, WIDTH):
        expert_T = start + tl.arange(0, WIDTH)
        exists_MT = exists_M[:, None] & (expert_T < NUM_EXPERTS)[None, :]
        selection_MT = tl.load(scores_M[:, None] + expert_T[None, :], mask=exists_MT, other=0).to(sum_type)
        if HAS_BIAS:
            selection_MT += tl.load(bias_M[:, None] + expert_T[None, :], mask=exists_MT, other=0).to(sum_type)
        ordered_MT = tl.where(exists_MT, to_ordered(selection_MT), absent)
        new_best_MC = tl.full((HEIGHT, CANDIDATES), absent, ordered_type)
        new_index_MC = tl.full((HEIGHT, CANDIDATES), NUM_EXPERTS, tl.int32)
        for rank in range(K + 1):
            top_M, winner_M, ordered_MT, best_MC = take_best(
                ordered_MT, best_MC, expert_T, index_MC, absent, NUM_EXPERTS, is_streaming
            )
            new_best_MC = tl.where(rank_C[None, :] == rank, top_M[:, None], new_best_MC)
            new_index_MC = tl.where(rank_C[None, :] == rank, winner_M[:, None], new_index_MC)
        best_MC, index_MC = new_best_MC, new_index_MC
    valid_MC = from_ordered(best_MC) > float("-inf")
    is_choice_MC = exists_M[:, None] & (rank_C < K)[None, :]
    value_MC = tl.load(scores_M[:, None] + index_MC, mask=is_choice_MC & valid_MC, other=0)
    store_choices(
        best_MC, index_MC, value_MC, token_M, exists_M, values_ptr, indices_ptr, counts_ptr, margins_ptr, K, CANDIDATES
    )


@triton.jit
def _spread_kernel(  # type: ignore[no-untyped-def]
    dvalues_ptr,
    indices_ptr,
    num_tokens,
    dscores_ptr,
    NUM_EXPERTS: tl.constexpr,
    K: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    token_M = tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)
    expert_T = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    exists_M = token_M < num_tokens
    first_M = token_M.to(tl.int64) * K
    dscore_MT = tl.zeros((HEIGHT, WIDTH), dvalues_ptr.dtype.element_ty)
    for rank in range(K):
        index_M = tl.load(indices_ptr + first_M + rank, mask=exists_M, other=-1)
        dvalue_M = tl.load(dvalues_ptr + first_M + rank, mask=exists_M, other=0)
        dscore_MT = tl.where(expert_T[None, :] == index_M[:, None], dvalue_M[:, None], dscore_MT)
    exists_MT = exists_M[:, None] & (expert_T < NUM_EXPERTS)[None, :]
    dscores_MT = dscores_ptr + token_M.to(tl.int64)[:, None] * NUM_EXPERTS + expert_T[None, :]
    tl.store(dscores_MT, dscore_MT, mask=exists_MT)
