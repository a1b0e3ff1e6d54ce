"""Schedules, weight decay only on matrices, the clip, and the loss-free selection-bias update."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from foejax.config import TrainingConfig
from foejax.training.optimizer import (
    decay_mask,
    is_decayed,
    learning_rate_schedule,
    make_optimizer,
    update_selection_bias,
)

BASE = dict(num_steps=20, warmup_steps=4, decay_start_step=10, learning_rate=1e-2, final_learning_rate_fraction=0.1)


def rates(**changes: object) -> np.ndarray:
    """Learning rates of steps 1 .. num_steps."""
    schedule = learning_rate_schedule(TrainingConfig(**(BASE | changes)))
    return np.array([schedule(jnp.int32(taken)) for taken in range(20)])


def test_wsd_warms_up_stays_and_decays_to_its_final_fraction():
    found = rates(schedule="wsd")
    np.testing.assert_allclose(found[:4], [0.0025, 0.005, 0.0075, 0.01], rtol=1e-6)
    np.testing.assert_allclose(found[4:10], 0.01, rtol=1e-6)
    np.testing.assert_allclose(np.diff(found[9:]), -0.0009, rtol=1e-4)
    np.testing.assert_allclose(found[-1], 0.001, rtol=1e-6)


def test_cosine_is_halfway_at_half_time():
    found = rates(schedule="cosine")
    np.testing.assert_allclose(found[[3, 11, 19]], [0.01, 0.0055, 0.001], rtol=1e-5)
    assert np.all(np.diff(found[3:]) < 0)


@pytest.mark.parametrize("changes", [dict(warmup_steps=0), dict(decay_start_step=20), dict(schedule="constant")])
def test_schedule_without_one_of_its_parts(changes: dict[str, object]):
    found = rates(**changes)
    assert np.all(found > 0) and np.isclose(found.max(), 0.01)
    expected_end = 0.001 if changes == dict(warmup_steps=0) else 0.01
    np.testing.assert_allclose(found[-1], expected_end, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "decayed"),
    [
        ("embedding", True),
        ("head", True),
        ("blocks.attention.w_q", True),
        ("blocks.router", True),
        ("blocks.normalizer_free.w_up", True),
        ("blocks.input_norm", False),
        ("blocks.attention.q_norm", False),
        ("final_norm", False),
        ("blocks.router_bias", False),
    ],
)
def test_only_matrices_decay(name: str, decayed: bool):
    assert is_decayed(name) is decayed


class TwoParameters(nnx.Module):
    def __init__(self) -> None:
        self.weight = nnx.Param(jnp.full((2, 3), 2.0))
        self.input_norm = nnx.Param(jnp.full((4, 2, 3), 2.0))  # stacked over layers and groups: more axes than a matrix


def test_decay_is_decoupled_and_spares_stacked_norms():
    config = TrainingConfig(**BASE, weight_decay=0.5)
    _, params, _ = nnx.split(TwoParameters(), nnx.Param, nnx.Variable)
    assert jax.tree.leaves(decay_mask(params)) == [False, True]
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    after = nnx.to_pure_dict(optax.apply_updates(params, updates))
    np.testing.assert_array_equal(after["input_norm"], 2.0)
    np.testing.assert_allclose(after["weight"], 2.0 - 0.0025 * 0.5 * 2.0, rtol=1e-6)


def test_update_is_adamw_behind_a_global_clip():
    config = TrainingConfig(**BASE, clip_norm=1.0, weight_decay=0.0, beta1=0.9, beta2=0.95, adam_eps=0.1)
    params = {"weight": jnp.zeros((2,), jnp.float32)}
    optimizer = make_optimizer(config)
    grads = {"weight": jnp.array([3.0, 4.0])}
    updates, opt_state = optimizer.update(grads, optimizer.init(params), params)
    clipped = np.array([0.6, 0.8])  # norm 5 clipped to 1; the first Adam step is g / (|g| + eps)
    np.testing.assert_allclose(updates["weight"], -0.0025 * clipped / (clipped + 0.1), rtol=1e-5)
    moments = [leaf for leaf in jax.tree.leaves(opt_state) if leaf.shape == (2,)]
    assert [moment.dtype for moment in moments] == [jnp.float32, jnp.float32]
    np.testing.assert_allclose(moments[0], 0.1 * clipped, rtol=1e-5)
    np.testing.assert_allclose(moments[1], 0.05 * clipped**2, rtol=1e-5)


def test_selection_bias_moves_towards_the_mean_of_its_own_group():
    bias = jnp.zeros((1, 4))
    loads = jnp.array([[10.0, 20.0, 100.0, 100.0]])  # group 0: experts 0, 1; group 1: experts 2, 3 (balanced)
    np.testing.assert_allclose(update_selection_bias(bias, loads, 0.01, 2), [[0.01, -0.01, 0.0, 0.0]])
    np.testing.assert_allclose(update_selection_bias(bias, loads, 0.01, 1), [[0.01, 0.01, -0.01, -0.01]])
