"""Routing: scores, the choice of experts, and what balances their load.

One interface serves every architecture: the stack axis S holds FoE groups (for the plain MoE, one group of all
experts; for Multi-Head LatentMoE, heads), and `route` chooses inside each of them.

Shape letters: N tokens, D width, H groups of the model, S groups on this device, E experts of a group, A all experts
(A = H * E), k experts chosen per token in each group, C tokens of every group after each other.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx, struct

from foejax.config import ModelConfig
from foejax.models.layers import high_precision, make_param
from pallas_kernels import projected_topk, routing_topk
from pallas_kernels.routing_topk.api import RoutingTopk
from sharding import Layout

SelectFn = Callable[[jax.Array, jax.Array], jax.Array]
"""(selection scores [S, N, E], active tokens [N] bool) -> selection scores; -inf takes an expert out."""


class SelectionBias(nnx.Variable):
    """Bias of the loss-free load balancing: added to scores for the choice only, not trained by gradients."""


@struct.dataclass
class Routing:
    """Chosen experts of every token in every local group.

    Attributes:
      indices_SNk: int32, expert inside the group (or head, here and below).
      weights_SNk: the router's score of each choice, 0 where not valid.
      valid_SNk: False where fewer than k live experts remain or the token is inactive.
      margin_SN: gap between the last chosen selection score and the best one not chosen; a choice with a tiny margin
        may fall differently in another order of summation.
      unrestricted_SN: sum of the weights that each token's choices would have without a `select_fn`; None where there
        is none.
    """

    indices_SNk: jax.Array
    weights_SNk: jax.Array
    valid_SNk: jax.Array
    margin_SN: jax.Array
    unrestricted_SN: jax.Array | None = None


@struct.dataclass
class RouterStats:
    """Per-device sums over this device's active tokens, from which the auxiliary losses are made.

    Attributes:
      tokens_SE: how many tokens chose each local expert.
      probability_SE: sum of each local expert's normalised score.
      z: sum over tokens of the squared log-normaliser of the logits.
    """

    tokens_SE: jax.Array
    probability_SE: jax.Array
    z: jax.Array


def route(
    logits_SNE: jax.Array,
    k: int,
    *,
    score: str = "softmax",
    log_normalizer: jax.Array | None = None,
    logit_bias: jax.Array | None = None,
    selection_bias: jax.Array | None = None,
    select_fn: SelectFn | None = None,
    active_tokens: jax.Array | None = None,
) -> Routing:
    """Choose k experts per token in every group.

    With `softmax` and `sigmoid` the chosen scores are the weights, not renormalised. With `topk_softmax` experts are
    chosen by their logits, and the weights are the softmax over the chosen ones (arXiv 2602.04870).

    Args:
      logits_SNE: router logits, at least float32.
      k: experts per token and group.
      score: `softmax`, `sigmoid` or `topk_softmax`.
      log_normalizer: log of the softmax denominator, broadcastable to [S, N, 1], of the biased logits; None takes it
        over the group's own experts.
      logit_bias: [S, 1 or N, E], added to the logits: steers the choice and enters the weights.
      selection_bias: [S, 1 or N, E], added to the scores for the choice only (loss-free balancing,
        arXiv 2408.15664).
      select_fn: sees the selection scores of all tokens of this step and may take experts out with -inf.
      active_tokens: [N] bool; inactive tokens (padding) choose nothing.

    Ties go to the lower expert index.
    """
    if logit_bias is not None:
        logits_SNE = logits_SNE + logit_bias
    if score == "sigmoid":
        scores_SNE = jax.nn.sigmoid(logits_SNE)
    elif score == "topk_softmax":
        scores_SNE = logits_SNE
    else:
        if log_normalizer is None:
            log_normalizer = jax.nn.logsumexp(logits_SNE, axis=-1, keepdims=True)
        scores_SNE = jnp.exp(logits_SNE - log_normalizer)
    if active_tokens is None:
        active_tokens = jnp.ones(logits_SNE.shape[1], bool)
    chosen, weights_Ck, unrestricted_C = _choose(scores_SNE, k, selection_bias, select_fn, active_tokens)
    shape = (*logits_SNE.shape[:2], k)
    valid_SNk = chosen.valid_Nk.reshape(shape) & active_tokens[None, :, None]
    weights_SNk = weights_Ck.reshape(shape)
    if score == "topk_softmax":
        weights_SNk = jax.nn.softmax(weights_SNk, axis=-1, where=valid_SNk)
    weights_SNk = jnp.where(valid_SNk, weights_SNk, 0.0)
    unrestricted_SN = None
    if unrestricted_C is not None:
        if score == "topk_softmax":
            unrestricted_C = jnp.ones_like(unrestricted_C)
        unrestricted_SN = jnp.where(active_tokens[None], unrestricted_C.reshape(shape[:2]), 0.0)
    margin_SN = chosen.margin_N.reshape(shape[:2])
    return Routing(chosen.indices_Nk.reshape(shape), weights_SNk, valid_SNk, margin_SN, unrestricted_SN)


def route_projected(
    x_SNK: jax.Array, w_SKE: jax.Array, k: int, *, selection_bias_SE: jax.Array, active_tokens: jax.Array
) -> Routing:
    """`route` of the logits x w with `topk_softmax`, of which no array holds them all.

    Args:
      x_SNK: sub-tokens of every head.
      w_SKE: weights of each head's router, at least float32.
      k: experts per token and head.
      selection_bias_SE, active_tokens: as for `route`.
    """
    chosen = projected_topk(x_SNK, w_SKE, k, selection_bias_SE=jax.lax.stop_gradient(selection_bias_SE))
    valid_SNk = chosen.valid_SNk & active_tokens[None, :, None]
    weights_SNk = jax.nn.softmax(chosen.values_SNk, axis=-1, where=valid_SNk)
    return Routing(chosen.indices_SNk, jnp.where(valid_SNk, weights_SNk, 0.0), valid_SNk, chosen.margin_SN)


def _choose(
    scores_SNE: jax.Array,
    k: int,
    selection_bias: jax.Array | None,
    select_fn: SelectFn | None,
    active_tokens: jax.Array,
) -> tuple[RoutingTopk, jax.Array, jax.Array | None]:
    """The choice, the chosen scores [S * N, k], groups after each other, and their sum without a `select_fn`."""
    scores_CE = scores_SNE.reshape(-1, scores_SNE.shape[-1])
    if select_fn is None:
        bias = None if selection_bias is None else selection_bias.reshape(-1, scores_SNE.shape[-1])
        chosen = routing_topk(scores_CE, k, selection_bias=bias)
        return chosen, chosen.values_Nk, None
    selection_SNE = jax.lax.stop_gradient(scores_SNE if selection_bias is None else scores_SNE + selection_bias)
    chosen = routing_topk(select_fn(selection_SNE, active_tokens).reshape(scores_CE.shape), k)
    free = routing_topk(selection_SNE.reshape(scores_CE.shape), k)
    weights_Ck, free_weights_Ck = (
        jnp.take_along_axis(scores_CE, choice.indices_Nk, axis=-1) for choice in (chosen, free)
    )
    return chosen, weights_Ck, jnp.where(free.valid_Nk, free_weights_Ck, 0.0).sum(axis=-1)


class Router(nnx.Module):
    """Scores of all experts from the merged residual; its small weight is replicated over the groups."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        groups, experts = config.num_groups, config.num_experts
        self.k = config.experts_per_stack
        self.score, self.scope = config.router_score, config.router_scope
        init, dtype = nnx.initializers.normal(config.init_std), config.dtype
        shape = (config.hidden_size, groups, experts // groups)
        self.w_DHE = make_param(rngs, init, ("embed", None, None), shape, dtype, high_precision_use=True)
        self.selection_bias_SE = make_selection_bias(config)

    def __call__(
        self,
        h_ND: jax.Array,
        layout: Layout,
        *,
        active_tokens: jax.Array,
        select_fn: SelectFn | None = None,
    ) -> tuple[Routing, RouterStats]:
        """Route every token in this device's groups.

        Returns the choices and the sums from which the auxiliary losses are made.
        """
        w_DHE = self.w_DHE[...]
        logits_HNE = jnp.einsum("nd,dhe->hne", h_ND.astype(w_DHE.dtype), w_DHE, precision="highest")
        global_scope = self.scope == "global"
        log_normalizer = jax.nn.logsumexp(logits_HNE, axis=(0, 2) if global_scope else (2,), keepdims=True)
        own_SNE = layout.group_slice_local(logits_HNE, dim=0)
        own_normalizer = log_normalizer if global_scope else layout.group_slice_local(log_normalizer, dim=0)
        routing = route(
            own_SNE,
            self.k,
            score=self.score,
            log_normalizer=own_normalizer,
            selection_bias=self.selection_bias_SE[...][:, None, :],
            select_fn=select_fn,
            active_tokens=active_tokens,
        )
        if self.score == "sigmoid":
            total = jax.nn.sigmoid(logits_HNE).sum(axis=(0, 2))[None, :, None]
            probability_SNE = jax.nn.sigmoid(own_SNE) / total
        else:
            share = 1.0 if global_scope else 1.0 / logits_HNE.shape[0]
            probability_SNE = jnp.exp(own_SNE - own_normalizer) * share
        return routing, router_stats(routing, probability_SNE, log_normalizer, active_tokens)


def make_selection_bias(config: ModelConfig) -> SelectionBias:
    """Zeros [S, E], one for every expert."""
    dtype = high_precision(config.dtype)
    zeros_SE = jnp.zeros((config.num_stacks, config.num_experts // config.num_stacks), dtype)
    return SelectionBias(zeros_SE, logical_axes=(config.stack_axis, None), use_dtype=dtype)


def router_stats(
    routing: Routing, probability_SNE: jax.Array, log_normalizer_XN1: jax.Array, active_tokens: jax.Array
) -> RouterStats:
    """The sums, of every token's normalised scores and of the log-normaliser of its logits, over X groups or scopes."""
    active = active_tokens.astype(probability_SNE.dtype)
    return RouterStats(
        tokens_SE=tokens_per_expert(routing, probability_SNE.shape[-1], probability_SNE.dtype),
        probability_SE=jnp.einsum("sne,n->se", probability_SNE, active, precision="highest"),
        z=jnp.sum(jnp.mean(jnp.square(log_normalizer_XN1[..., 0]), axis=0) * active),
    )


def tokens_per_expert(routing: Routing, num_experts: int, dtype: jnp.dtype) -> jax.Array:
    """Choices [S, E] of every expert; counted one by one, since an array over choices and experts would be large."""
    groups = routing.indices_SNk.shape[0]
    group_S1 = jnp.arange(groups, dtype=jnp.int32)[:, None]
    expert_SX = jnp.where(routing.valid_SNk, routing.indices_SNk, num_experts).reshape(groups, -1)
    counts_SE = jnp.zeros_like(expert_SX, shape=(groups, num_experts))
    return counts_SE.at[group_S1, expert_SX].add(1, mode="drop").astype(dtype)


def load_balance_loss(
    tokens_SE: jax.Array, probability_SE: jax.Array, *, num_tokens: jax.Array, num_experts: int, k: int
) -> jax.Array:
    """Switch-style balance loss: num_experts * sum_e f_e p_e, 1 under uniform load (arXiv 2101.03961, eq. 4).

    f_e is the share of all choices that fell on expert e and p_e its mean normalised score; over all experts both sum
    to 1. Given some of the groups it is their part of the sum, so that devices add up to the loss counted once.

    Args:
      tokens_SE: [..., S, E] choices of each expert over the whole batch; no gradient flows through them.
      probability_SE: [..., S, E] sum over the batch of each expert's normalised score.
      num_tokens: active tokens in the batch.
      num_experts: experts over all groups.
      k: experts per token over all groups.
    """
    fraction = jax.lax.stop_gradient(tokens_SE) / (num_tokens * k)
    return num_experts * jnp.sum(fraction * probability_SE / num_tokens, axis=(-2, -1))
