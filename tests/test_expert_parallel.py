"""Tokens travelling to their experts: nothing dropped, and the gradient of the path that does not travel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from tiny import relative_error, tiny_config

from foejax.models.expert_parallel import buffer_sizes, exchange_and_run
from foejax.models.experts import Experts
from foejax.models.params import param_specs
from foejax.models.router import Routing
from sharding import Layout

TOKENS, K, EXPERTS = 64, 2, 32


def choices(kind: str) -> np.ndarray:
    """Expert indices [N, k]: spread evenly, all on one device, or each token on one device."""
    random = np.random.default_rng(0)
    if kind == "uniform":
        return np.stack([random.permutation(EXPERTS)[:K] for _ in range(TOKENS)])
    if kind == "one device":
        return np.stack([4 * 5 + random.permutation(4)[:K] for _ in range(TOKENS)])
    return np.stack([4 * random.integers(8) + random.permutation(4)[:K] for _ in range(TOKENS)])


def run(layout: Layout, experts: Experts, indices: np.ndarray) -> jax.Array:
    """Gradients of a scalar of the layer's output with respect to tokens, weights and parameters, and the output."""
    random = np.random.default_rng(1)
    h = jnp.asarray(random.normal(size=(TOKENS, 32)))
    weights = jnp.asarray(random.uniform(0.1, 1.0, (1, TOKENS, K)))
    valid = jnp.asarray(random.uniform(size=(1, TOKENS, K)) > 0.1)
    target = jnp.asarray(random.normal(size=(TOKENS, 32)))
    graphdef, state = nnx.split(experts)
    leaves, treedef = jax.tree.flatten(state)

    def local(leaves, h, weights, valid, indices):  # type: ignore[no-untyped-def]
        leaves, h, weights, valid, indices = jax.tree.map(layout.vary_local, (leaves, h, weights, valid, indices))
        module = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
        if layout.num_expert_shards == 1:
            return module(h, indices, weights, valid)
        routing = Routing(indices, weights, valid, weights[..., 0])
        return exchange_and_run(module, h, routing, layout)

    tokens, per_group = layout.batch_spec(None), PartitionSpec(None, layout.token_axes)
    specs = (param_specs(state, layout), tokens, per_group, per_group, per_group)
    mapped = layout.shard_map(local, in_specs=specs, out_specs=PartitionSpec("group", layout.token_axes))

    def scalar(leaves, h, weights):  # type: ignore[no-untyped-def]
        out = mapped(leaves, h, weights, valid, jnp.asarray(indices[None], jnp.int32))[0]
        return jnp.sum(out * target), out

    gradients, out = jax.jit(jax.grad(scalar, argnums=(0, 1, 2), has_aux=True))(leaves, h, weights)
    return jax.tree.map(np.asarray, (gradients, out))


@pytest.fixture(scope="module")
def experts() -> Experts:
    with jax.enable_x64(True):
        config = tiny_config(num_groups=1, dtype="float64", experts_per_token=K)
        return Experts(config, nnx.Rngs(0))


@pytest.mark.parametrize("kind", ["uniform", "one device", "clustered"])
def test_all_to_all_path_equals_the_local_one(experts: Experts, kind: str) -> None:
    with jax.enable_x64(True):
        indices = choices(kind)
        expected = run(Layout.single_device("ep"), experts, indices)
        got = run(Layout.create("ep", num_experts=EXPERTS, num_devices=8), experts, indices)
        assert relative_error(got, expected) <= 1e-12


def test_the_cases_above_use_different_buffer_sizes() -> None:
    sizes = buffer_sizes(TOKENS // 8, K, EXPERTS, 8)
    assert len(sizes) > 1 and sizes[-1] == TOKENS // 8
    device = choices("one device") // 4
    assert np.all(device == 5), "every token goes to one device: only the last size holds them"


@pytest.mark.parametrize(("tokens", "k", "experts", "shards"), [(1000, 2, 64, 8), (1000, 8, 64, 8), (7, 1, 8, 8)])
def test_buffer_sizes_ascend_to_what_always_suffices(tokens: int, k: int, experts: int, shards: int) -> None:
    sizes = buffer_sizes(tokens, k, experts, shards)
    assert list(sizes) == sorted(set(sizes)) and sizes[-1] == tokens
