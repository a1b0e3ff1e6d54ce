"""Routing: the one interface, its hooks, and losses that are counted once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from tiny import packed_batch, tiny_config, tiny_model

from foejax.models import route
from foejax.models.router import load_balance_loss


def logits(shape: tuple[int, ...] = (2, 5, 4), seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_weights_are_the_scores_of_the_chosen_and_not_renormalised() -> None:
    x = logits()
    normalizer = jax.nn.logsumexp(x, axis=(0, 2), keepdims=True)
    routing = route(x, 2, log_normalizer=normalizer)
    scores = np.asarray(jax.nn.softmax(x.transpose(1, 0, 2).reshape(5, 8), axis=-1)).reshape(5, 2, 4).transpose(1, 0, 2)
    best = np.sort(scores, axis=-1)[..., ::-1][..., :2]
    np.testing.assert_allclose(routing.weights_SNk, best, rtol=1e-6)
    assert np.all(np.take_along_axis(scores, np.asarray(routing.indices_SNk), -1) == best)
    assert np.all(routing.valid_SNk)
    np.testing.assert_allclose(routing.margin_SN, best[..., 1] - np.sort(scores, -1)[..., 1], rtol=1e-4)


def test_group_softmax_sums_to_one_when_all_are_chosen() -> None:
    routing = route(logits(), 4)
    np.testing.assert_allclose(routing.weights_SNk.sum(-1), 1.0, rtol=1e-6)


def test_ties_go_to_the_lower_index() -> None:
    assert np.asarray(route(jnp.zeros((1, 1, 4)), 2).indices_SNk).tolist() == [[[0, 1]]]


def test_selection_bias_steers_the_choice_and_never_the_weight() -> None:
    x = logits()
    bias = jnp.zeros((2, 1, 4)).at[:, :, 3].set(10.0)
    routing = route(x, 1, selection_bias=bias)
    assert np.all(routing.indices_SNk == 3)
    np.testing.assert_allclose(routing.weights_SNk[..., 0], jax.nn.softmax(x, axis=-1)[..., 3], rtol=1e-6)
    gradient = jax.grad(lambda b: route(x, 1, selection_bias=b).weights_SNk.sum())(bias)
    assert np.all(gradient == 0)


def test_logit_bias_steers_and_enters_the_weight() -> None:
    x = logits()
    bias = jnp.zeros((2, 1, 4)).at[:, :, 3].set(10.0)
    routing = route(x, 1, logit_bias=bias)
    assert np.all(routing.indices_SNk == 3)
    np.testing.assert_allclose(routing.weights_SNk[..., 0], jax.nn.softmax(x + bias, axis=-1)[..., 3], rtol=1e-6)


def test_select_fn_takes_experts_out_and_valid_says_so() -> None:
    def only_first_two_then_none(scores: jax.Array, active: jax.Array) -> jax.Array:
        keep = jnp.arange(4)[None, :] < jnp.where(jnp.arange(5) == 4, 0, 1)[:, None]
        return jnp.where(keep[None], scores, -jnp.inf)

    routing = route(logits(), 2, select_fn=only_first_two_then_none)
    assert np.asarray(routing.valid_SNk).tolist() == [[[True, False]] * 4 + [[False, False]]] * 2
    assert np.all(np.where(routing.valid_SNk, 1.0, routing.weights_SNk) == np.where(routing.valid_SNk, 1.0, 0.0))


def test_weights_without_a_select_fn_sum_to_one_where_the_chosen_are_normalised() -> None:
    routing = route(logits(), 2, score="topk_softmax", select_fn=lambda scores, active: scores.at[..., 0].set(-jnp.inf))
    np.testing.assert_allclose(routing.weights_SNk.sum(-1), 1.0, rtol=1e-6)
    assert np.all(routing.unrestricted_SN == 1) and not np.any(routing.indices_SNk == 0)


def test_inactive_tokens_choose_nothing() -> None:
    active = jnp.asarray([True, False, True, True, False])
    routing = route(logits(), 2, active_tokens=active)
    assert np.all(routing.valid_SNk == active[None, :, None])
    assert np.all(np.asarray(routing.weights_SNk)[:, ~np.asarray(active)] == 0)


def test_sigmoid_scores_stand_alone() -> None:
    x = logits()
    routing = route(x, 1, score="sigmoid", log_normalizer=jnp.full((1, 1, 1), 99.0))
    np.testing.assert_allclose(routing.weights_SNk[..., 0], jax.nn.sigmoid(x).max(-1), rtol=1e-6)


def test_top_one_router_gets_a_gradient() -> None:
    x = logits()
    normalizer = jax.nn.logsumexp(x, axis=(0, 2), keepdims=True)
    gradient = jax.grad(lambda x: route(x, 1, log_normalizer=normalizer).weights_SNk.sum())(x)
    assert np.abs(gradient).max() > 0.01


def test_load_balance_loss_is_one_when_uniform_and_more_when_not() -> None:
    uniform = load_balance_loss(
        jnp.full((2, 4), 25.0), jnp.full((2, 4), 12.5), num_tokens=jnp.float32(100), num_experts=8, k=2
    )
    np.testing.assert_allclose(uniform, 1.0, rtol=1e-6)
    skewed = jnp.asarray([[88.0, 4, 4, 4], [25, 25, 25, 25]])
    assert load_balance_loss(skewed, skewed / 2, num_tokens=jnp.float32(100), num_experts=8, k=2) > 1.5


def test_auxiliary_losses_count_once_whatever_the_number_of_groups() -> None:
    """With equal logits everywhere the losses are 1 and log(E)^2 for one group as for eight."""
    for groups in (1, 8):
        model = tiny_model(tiny_config(num_groups=groups, num_layers=2, init_std=1e-12))
        metrics = jax.jit(lambda model=model: model.loss(packed_batch(), load_balance_coef=1.0, z_loss_coef=1.0)[1])()
        np.testing.assert_allclose(metrics["load_balance_loss"], 1.0, rtol=1e-3)
        np.testing.assert_allclose(metrics["z_loss"], np.log(32.0) ** 2, rtol=1e-3)
        assert metrics["tokens_per_expert"].shape == (2, 32)
        assert float(metrics["tokens_per_expert"].sum()) == 2 * 8 * float(metrics["num_tokens"])
