"""Multi-Head LatentMoE: its routers, its experts, and what a training step makes of them on a mesh.

Logits against an independent forward pass: tests/test_mhlmoe_oracle.py; meshes against one device:
tests/test_sharded_equality.py.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import config_for, layout_for, packed_batch, tiny_model

from foejax.config import TrainingConfig
from foejax.evaluation.evaluate import model_loss, split_model
from foejax.models.experts import Experts
from foejax.models.latent_heads import HeadRouter, LatentHeads
from foejax.models.router import route, route_projected
from foejax.training.optimizer import learning_rate_schedule, make_optimizer, update_selection_bias
from foejax.training.step import Metrics, TrainState, create_train_state, make_train_step

HEADS, EXPERTS, K = 8, 8, 2
"""Of `config_for("hp")`: heads, experts of each, and how many of them a sub-token chooses."""


def sub_tokens(count: int, heads: int = HEADS, size: int = 8, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(heads, count, size)), jnp.float32)


# Routers


def test_the_choice_is_by_biased_logits_and_weights_are_the_softmax_over_the_chosen_clean_ones() -> None:
    random = np.random.default_rng(1)
    u, w = sub_tokens(50), jnp.asarray(random.normal(size=(HEADS, 8, EXPERTS)), jnp.float32)
    bias = jnp.asarray(random.normal(size=(HEADS, EXPERTS)), jnp.float32)
    active = jnp.arange(50) != 7
    streamed = route_projected(u, w, K, selection_bias_SE=bias, active_tokens=active)
    logits = jnp.einsum("snk,ske->sne", u, w, precision="highest")
    dense = route(logits, K, score="topk_softmax", selection_bias=bias[:, None], active_tokens=active)
    expected = np.argsort(-np.asarray(logits + bias[:, None]), axis=-1, stable=True)[..., :K]
    for routing in (streamed, dense):
        np.testing.assert_array_equal(routing.indices_SNk, expected)
        chosen = np.take_along_axis(np.asarray(logits), expected, axis=-1)
        weights = np.exp(chosen) / np.exp(chosen).sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(routing.weights_SNk, np.where(active[None, :, None], weights, 0), rtol=1e-5)
    assert not np.asarray(streamed.valid_SNk)[:, 7].any() and streamed.valid_SNk.sum() == HEADS * 49 * K


def test_routers_get_no_gradient_outside_the_chosen_columns() -> None:
    w = jnp.asarray(np.random.default_rng(2).normal(size=(HEADS, 8, EXPERTS)), jnp.float32)
    u, zeros, active = sub_tokens(3), jnp.zeros((HEADS, EXPERTS)), jnp.ones(3, bool)

    def first_weights(w: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
        routing = route_projected(u, w, K, selection_bias_SE=bias, active_tokens=active)
        return routing.weights_SNk[..., 0].sum(), routing.indices_SNk

    (of_w, of_bias), indices = jax.grad(first_weights, argnums=(0, 1), has_aux=True)(w, zeros)
    chosen = (np.asarray(indices)[..., None] == np.arange(EXPERTS)).any(axis=(1, 2))
    assert 0 < chosen.sum() < chosen.size, "every column was chosen"
    touched = np.abs(of_w).max(axis=1) > 0
    np.testing.assert_array_equal(touched, chosen)
    assert not np.any(of_bias)


def test_no_array_holds_the_scores_of_all_experts() -> None:
    heads, tokens, experts = 4, 8192, 256
    config = config_for("hp", num_ffn_heads=heads, num_experts=heads * experts, experts_per_token=heads * K)
    graphdef, state = nnx.split(HeadRouter(config, nnx.Rngs(0)))

    def loss(state: nnx.State, u: jax.Array) -> Any:
        routing, stats = nnx.merge(graphdef, state)(u, active_tokens=jnp.ones(tokens, bool))
        return jnp.square(routing.weights_SNk).sum(), stats.tokens_SE

    compiled = jax.jit(jax.grad(loss, has_aux=True)).lower(state, sub_tokens(tokens, heads)).compile()
    scores = heads * tokens * experts * 4
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 2


def test_auxiliary_losses_count_once_whatever_the_number_of_heads() -> None:
    """With equal logits everywhere the losses are 1 and log(experts of a head)^2; streamed scores have none."""
    options: dict[str, Any] = {"router_score": "softmax", "router_scope": "group", "num_layers": 1, "init_std": 1e-12}
    model = tiny_model(config_for("hp", **options))
    for found in (model, model.with_layout(layout_for("hp", model.config, group=4, data=2))):
        metrics = jax.jit(lambda model=found: model.loss(packed_batch(), load_balance_coef=1.0, z_loss_coef=1.0)[1])()
        np.testing.assert_allclose(metrics["load_balance_loss"], 1.0, rtol=1e-3)
        np.testing.assert_allclose(metrics["z_loss"], np.log(EXPERTS) ** 2, rtol=1e-3)
    streamed = tiny_model(config_for("hp", num_layers=1))
    with pytest.raises(ValueError, match=r"z_loss_coef=0\.1 needs the scores of all experts"):
        streamed.loss(packed_batch(), z_loss_coef=0.1)


def test_the_bias_rule_drives_the_load_towards_uniform() -> None:
    """Sub-tokens with a mean of their own make some experts of every head everybody's favourites."""
    random = np.random.default_rng(3)
    u = sub_tokens(2000) + jnp.asarray(random.normal(size=(HEADS, 1, 8)), jnp.float32)
    w = jnp.asarray(random.normal(size=(HEADS, 8, EXPERTS)), jnp.float32)

    def loads(bias_SE: jax.Array) -> jax.Array:
        routing = route_projected(u, w, K, selection_bias_SE=bias_SE, active_tokens=jnp.ones(2000, bool))
        return jax.nn.one_hot(routing.indices_SNk, EXPERTS).sum(axis=(1, 2))

    def step(bias_SE: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        loads_SE = loads(bias_SE)
        bias_1E = update_selection_bias(bias_SE.reshape(1, -1), loads_SE.reshape(1, -1), 0.02, HEADS)
        return bias_1E.reshape(bias_SE.shape), (loads_SE.max(axis=1) / loads_SE.mean(axis=1)).max()

    bias_SE, worst = jax.jit(lambda: jax.lax.scan(step, jnp.zeros((HEADS, EXPERTS)), length=400))()
    assert worst[0] > 2.5, "the start is too even to show anything"
    assert worst[-1] < 1.1
    np.testing.assert_allclose(bias_SE.sum(axis=1), 0, atol=1e-4)  # biases do not drift


# Experts


def test_gelu_experts_are_attention_with_a_shifted_score() -> None:
    """O exp(lse) - sum V = GELU(u K') V for softmax attention with scores log(1 + GELU(u K')) (arXiv 2602.04870)."""
    config = config_for("hp", num_layers=1)
    experts, random = Experts(config, nnx.Rngs(0)), np.random.default_rng(4)
    u = sub_tokens(20)
    indices = jnp.asarray(np.argsort(random.random((HEADS, 20, EXPERTS)), axis=-1)[..., :K], jnp.int32)
    weights = jnp.asarray(random.random(indices.shape), jnp.float32)
    found = experts(u, indices, weights, jnp.ones(indices.shape, bool))

    keys_SEFD, values_SEFD = experts.up_SEDF[...].swapaxes(2, 3), experts.down_SEFD[...]
    products_SENF = jnp.einsum("snd,sefd->senf", u, keys_SEFD, precision="highest")
    scores_SENF = jnp.log1p(jax.nn.gelu(products_SENF, approximate=False))
    attended_SEND = jnp.einsum("senf,sefd->send", jax.nn.softmax(scores_SENF), values_SEFD, precision="highest")
    lse_SEN = jax.nn.logsumexp(scores_SENF, axis=-1)
    y_SEND = attended_SEND * jnp.exp(lse_SEN)[..., None] - values_SEFD.sum(axis=2)[:, :, None]
    y_SNED = y_SEND.swapaxes(1, 2)
    chosen_SNkD = jnp.take_along_axis(y_SNED, indices[..., None], axis=2)
    expected = (chosen_SNkD * weights[..., None]).sum(axis=2)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_backward_pass_keeps_nothing_wide_but_what_matmuls_need() -> None:
    """Without remat two arrays as large as rows x expert hidden size stay: GELU's argument, and its value for dW."""
    config = config_for("hp", num_layers=1, expert_hidden_size=64)
    graphdef, state = nnx.split(Experts(config, nnx.Rngs(0)))
    indices = jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32), (HEADS, 40, K))
    weights = jnp.ones(indices.shape)

    def run(state: nnx.State, u: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(u, indices, weights, jnp.ones(indices.shape, bool))

    _, backward = jax.eval_shape(lambda state, u: jax.vjp(run, state, u), state, sub_tokens(40))
    rows = HEADS * 40 * K
    wide = [leaf.shape for leaf in jax.tree.leaves(backward) if leaf.shape[-1:] == (64,) and leaf.size >= rows * 64]
    assert len(wide) == 2, wide


def test_projections_start_as_published() -> None:
    """W_in with deviation init_std, W_out with init_std / sqrt(2 L) (section 1 of the specification)."""
    config = config_for("hp", num_layers=8, hidden_size=256, ffn_head_dim=32, init_std=0.02)
    heads = LatentHeads(config, nnx.Rngs(0))
    np.testing.assert_allclose(np.std(heads.in_DHK[...]), 0.02, rtol=0.02)
    np.testing.assert_allclose(np.std(heads.out_HKD[...]), 0.02 / math.sqrt(16), rtol=0.02)


# A training step


@cache
def after_a_step(devices: int) -> tuple[TrainState, Metrics]:
    """State and metrics after one step whose gradient is clipped to a hundredth."""
    config = config_for("hp", num_layers=1)
    layout = layout_for("hp", config, group=devices, data=1)
    training = TrainingConfig(
        num_steps=10, warmup_steps=0, decay_start_step=9, clip_norm=0.01,
        load_balance_coef=0.0, z_loss_coef=0.0, router_bias_rate=0.01,
    )  # fmt: skip
    graphdef, params, router_state = split_model(tiny_model(config).with_layout(layout))
    optimizer = make_optimizer(training)
    state = create_train_state(params, router_state, optimizer, jax.random.key(0), layout.mesh)
    step = make_train_step(
        model_loss(graphdef), optimizer, learning_rate_schedule(training), state, layout.mesh,
        router_bias_rate=training.router_bias_rate, num_stacks=config.num_stacks,
    )  # fmt: skip
    return step(state, packed_batch())


@pytest.mark.parametrize("devices", [2, 8])
def test_gradients_are_clipped_by_one_factor_and_heads_are_scaled_like_shared_weights(devices: int) -> None:
    """Adam's first moment is the clipped gradient times 1 - beta1: what a device makes of it alone would show there."""
    (alone, alone_metrics), (spread, metrics) = after_a_step(1), after_a_step(devices)
    assert alone_metrics["grad_norm"] > 1, "nothing to clip"
    np.testing.assert_allclose(metrics["grad_norm"], alone_metrics["grad_norm"], rtol=1e-5)
    moments = [jax.tree_util.tree_leaves_with_path(state.opt_state) for state in (alone, spread)]
    for (path, expected), (_, found) in zip(*moments, strict=True):
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(found, expected, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path))
    np.testing.assert_array_equal(*(jax.tree.leaves(state.router_state)[0] for state in (alone, spread)))


def test_copies_of_shared_weights_stay_equal_on_all_devices() -> None:
    state, _ = after_a_step(8)
    shared = [leaf for leaf in jax.tree.leaves(state.params) if leaf.sharding.is_fully_replicated]
    split = [leaf for leaf in jax.tree.leaves(state.params) if not leaf.sharding.is_fully_replicated]
    assert len(split) == 3, "experts' two matrices and routers"
    assert len(shared) > 8
    for leaf in shared:
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert all(np.array_equal(copies[0], copy) for copy in copies[1:])
