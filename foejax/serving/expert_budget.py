"""Batch-aware expert budgets: the tokens of a decoding step share a few experts, so that fewer weights are read.

After XShare (arXiv 2602.07265). For one layer and step, with g_i(e) the selection score of expert e for token i and B
the step's active tokens:

    U(e) = sum_{i in B} g_i(e)                    summed gate score
    W    = union_{i in B} top-k0(g_i)             warm-up: what every token keeps
    S    = W and the best others by U, until |S| = max(m, |W|)
    token i then takes its top-k inside S.

f(S) = sum_{e in S} U(e) is modular, so that S is the best set of its size that holds W, and without a warm-up the best
of all. Nothing is trained; every layer and step chooses anew. What a request gets depends on what shares its batch.

Where the paper's text is not at hand, our reading:
  - g is what the router chooses by: the softmax or sigmoid over the experts, plus the selection bias of loss-free
    balancing where there is one. Weights stay the scores themselves, which this model does not renormalise.
  - The warm-up counts towards the budget and may exceed it: |S| = max(m, |W|).
  - A budget is split evenly over parts: FoE groups, heads of experts, or the devices that experts are spread over. In
    each part the best m_g = m / parts stay, the optimum under a limit for every device (a partition matroid). In a part
    |W| may exceed m_g as above. A token of many choices may so lose one even when it is alone; with one part and
    m >= k it does not.
  - Ties go to the lower index.

Only steps that decode and do nothing else are budgeted. A prompt's tokens reach nearly all experts whatever is done,
and its keys and values, which others may share, stay exact. So a sequence that is preempted computes its tokens again
without a budget.

Devices that share a layer's experts sum U and W, since each reads what any of them sends; devices that hold copies of
the experts choose for their own tokens.

Shape letters: S groups on this device, N tokens on this device, E experts of a group, P parts of a group, R requests,
L layers, H groups of the model, A all experts (A = H * E), T steps of a launch, C copies of the experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from foejax.config import ConfigError, ModelConfig
from foejax.models.router import Routing, SelectFn
from pallas_kernels import routing_topk
from sharding import Layout


@dataclass(frozen=True)
class ExpertBudget:
    """How many experts of a layer a decoding step may read.

    Attributes:
      part_size: m_g, experts of each part.
      warm_up: k0, choices of every token inside each group that stay in any case.
      parts: into how many equal runs of experts a group is split; the devices that hold it.
    """

    part_size: int
    warm_up: int = 0
    parts: int = 1


def check_scores(model: ModelConfig) -> None:
    """ConfigError for a model whose routers choose by logits, of which a sum over tokens says nothing."""
    if model.router_score == "topk_softmax":
        raise ConfigError(
            "an expert budget sums the scores of all experts, and router_score=topk_softmax has none before experts "
            "are chosen: serve without expert_budget"
        )


def make_select_fn(budget: ExpertBudget, layout: Layout) -> SelectFn:
    """The budget as a hook of the router, for use inside shard_map; axes: `expert`."""

    def select(scores_SNE: jax.Array, active_N: jax.Array) -> jax.Array:
        kept_SE = choose_experts(
            scores_SNE,
            active_N,
            budget.part_size,
            warm_up=budget.warm_up,
            parts=budget.parts,
            sum_over_devices=layout.sum_over_expert_shards_local,
        )
        return keep_only(scores_SNE, kept_SE)

    return select


def keep_only(scores_SNE: jax.Array, kept_SE: jax.Array) -> jax.Array:
    """Selection scores with -inf for the experts outside a set."""
    return jnp.where(kept_SE[:, None], scores_SNE, -jnp.inf)


def choose_experts(
    scores_SNE: jax.Array,
    active: jax.Array,
    part_size: int | jax.Array,
    *,
    warm_up: int = 0,
    parts: int = 1,
    sum_over_devices: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
    """The set S of every group, bool [S, E].

    Args:
      scores_SNE: selection scores.
      active: [N] or [S, N] bool; other tokens have no say.
      part_size: m_g, experts kept in each part; may be traced.
      warm_up: k0, from 0 to E.
      parts: P, a divisor of E.
      sum_over_devices: of an array like U, over the devices whose tokens share these experts.
    """
    active_SN = jnp.broadcast_to(jnp.atleast_2d(active), scores_SNE.shape[:2])
    votes = jnp.stack([_gate_sums(scores_SNE, active_SN), _warm_up_counts(scores_SNE, active_SN, warm_up)])
    gate_SE, count_SE = sum_over_devices(votes)
    return _fill(count_SE > 0, (gate_SE,), part_size, parts)


def choose_experts_for_drafts(
    scores_SNE: jax.Array,
    active_N: jax.Array,
    request_N: jax.Array,
    part_size: int | jax.Array,
    *,
    num_requests: int,
    request_size: int | jax.Array,
    warm_up: int = 0,
    parts: int = 1,
) -> jax.Array:
    """The set S [S, E] where requests bring several drafted tokens each, which agree more than strangers do.

    Every request r first chooses for itself, S_r = the request_size best by U_r(e) = sum over its tokens of g_i(e). The
    layer then orders the experts by the score of the requests that chose them,

        V(e) = sum_{r : e in S_r} U_r(e),

    and fills the budget after the warm-up: greedy inside the union of the S_r and, where that is smaller than the
    budget, by U beyond it. The paper's step from requests to the layer is not known; this reading never exceeds
    max(m_g, |W|), and is `choose_experts` for one request, or where request_size is E.

    Args:
      request_N: int32, from 0 to num_requests - 1, of each token.
      num_requests: R.
      request_size: m_r, at least 1; may be traced.
      scores_SNE, active_N, part_size, warm_up, parts: see `choose_experts`.
    """
    active_SN = jnp.broadcast_to(active_N, scores_SNE.shape[:2])
    own_RN = request_N[None] == jnp.arange(num_requests, dtype=request_N.dtype)[:, None]
    gates_RSE = jax.vmap(lambda own_N: _gate_sums(scores_SNE, active_SN & own_N[None]))(own_RN)
    chosen_RSE = _rank(gates_RSE) < request_size
    # Who has no active token votes for nothing.
    chosen_RSE &= jnp.any(own_RN & active_N[None], axis=1)[:, None, None]
    joint_SE = jnp.where(chosen_RSE, gates_RSE, 0.0).sum(axis=0)
    count_SE = _warm_up_counts(scores_SNE, active_SN, warm_up)
    keys = (jnp.any(chosen_RSE, axis=0), joint_SE, gates_RSE.sum(axis=0))
    return _fill(count_SE > 0, keys, part_size, parts)


def expected_distinct_experts(num_experts: int, k: int, num_tokens: int) -> float:
    """Distinct experts that tokens would hit if each chose k at random: N (1 - (1 - k / N)^B)."""
    return num_experts * (1.0 - (1.0 - k / num_experts) ** num_tokens)


def _gate_sums(scores_SNE: jax.Array, active_SN: jax.Array) -> jax.Array:
    """U [S, E]."""
    return jnp.where(active_SN[..., None], scores_SNE, 0.0).sum(axis=1)


def _warm_up_counts(scores_SNE: jax.Array, active_SN: jax.Array, warm_up: int) -> jax.Array:
    """How many active tokens have each expert among their first `warm_up` [S, E], in the scores' dtype."""
    groups, tokens, experts = scores_SNE.shape
    if warm_up == 0:
        return jnp.zeros_like(scores_SNE[:, 0])
    first = routing_topk(scores_SNE.reshape(-1, experts), warm_up)
    valid_SNk = first.valid_Nk.reshape(groups, tokens, warm_up) & active_SN[..., None]
    chosen_SNkE = jax.nn.one_hot(first.indices_Nk.reshape(valid_SNk.shape), experts, dtype=scores_SNE.dtype)
    return jnp.where(valid_SNk[..., None], chosen_SNkE, 0.0).sum(axis=(1, 2))


def _fill(forced_SE: jax.Array, keys: tuple[jax.Array, ...], part_size: int | jax.Array, parts: int) -> jax.Array:
    """In each part the forced experts, and the best of the others by `keys` until `part_size` are there."""
    shape = (forced_SE.shape[0], parts, forced_SE.shape[1] // parts)
    forced, *split = (x_SE.reshape(shape) for x_SE in (forced_SE, *keys))
    return (forced | (_rank(forced, *split) < part_size)).reshape(forced_SE.shape)


def _rank(*keys: jax.Array) -> jax.Array:
    """Place of each entry along the last axis, int32: highest first key first, ties by the next, then by index."""
    *leading, size = keys[0].shape
    index = jnp.arange(size, dtype=jnp.int32)
    before = jnp.broadcast_to(index[:, None] < index[None, :], (*leading, size, size))
    for key in reversed(keys):
        other, own = key[..., :, None], key[..., None, :]
        before = (other > own) | ((other == own) & before)
    return before.sum(axis=-2, dtype=jnp.int32)


class ExpertSums(NamedTuple):
    """What a step tells of its experts, from this device's tokens and groups.

    Attributes:
      tokens_LSE: int32, choices that fell on each expert.
      kept_LS, base_LS: sums of the chosen weights, and of those chosen without a budget; None where there was none.
    """

    tokens_LSE: jax.Array
    kept_LS: jax.Array | None
    base_LS: jax.Array | None

    @classmethod
    def of(cls, tokens_LSE: jax.Array, routing: Routing | None) -> ExpertSums:
        """From a stack's counts and, where a budget applied, its choices with leading dimension L."""
        counts = tokens_LSE.astype(jnp.int32)
        if routing is None or routing.unrestricted_SN is None:
            return cls(counts, None, None)
        return cls(counts, routing.weights_SNk.sum(axis=(-2, -1)), routing.unrestricted_SN.sum(axis=-1))


@dataclass(frozen=True)
class ExpertReads:
    """Which experts a launch read, step by step.

    Attributes:
      tokens_TCLA: choices that fell on each expert, of the tokens that share a copy of the experts.
      kept_mass_TCL: summed weight of the choices as a share of what it would be without a budget; 1 without one.
    """

    tokens_TCLA: np.ndarray
    kept_mass_TCL: np.ndarray

    @property
    def distinct(self) -> np.ndarray:
        """How many experts were read, [T, C, L]."""
        return (self.tokens_TCLA > 0).sum(axis=-1)


def read_expert_sums(sums: ExpertSums, expert_shards: int) -> ExpertReads:
    """Join what the devices reported.

    Args:
      sums: on the host, fields [token shards, T, L, H] (counts: and E); the token shards run over the copies of the
        experts and then over the `expert_shards` devices that share one.
    """

    def join(x: np.ndarray) -> np.ndarray:
        """Sum over the devices of a copy: [T, C, L, ...]."""
        copies = x.reshape(-1, expert_shards, *x.shape[1:]).sum(axis=1)
        return np.moveaxis(copies, 0, 1)

    tokens = join(np.asarray(sums.tokens_LSE))
    tokens_TCLA = tokens.reshape(*tokens.shape[:3], -1)
    if sums.kept_LS is None or sums.base_LS is None:
        return ExpertReads(tokens_TCLA, np.ones(tokens_TCLA.shape[:3]))
    kept, base = (join(np.asarray(x, np.float64)).sum(axis=-1) for x in (sums.kept_LS, sums.base_LS))
    return ExpertReads(tokens_TCLA, np.where(base > 0, kept / np.where(base > 0, base, 1.0), 1.0))
