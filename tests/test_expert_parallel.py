"""Tokens travelling to their experts: nothing dropped, and the gradient of the path that does not travel."""

from __future__ import annotations

from functools import cache

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


def choices(kind: str, groups: int = 1, shards: int = 8) -> np.ndarray:
    """Expert indices [H, N, k] in each group: spread evenly, all on one device, or each token on one device."""
    random = np.random.default_rng(0)
    experts = EXPERTS // groups
    held = experts // shards

    def of_token() -> np.ndarray:
        if kind == "uniform":
            return random.permutation(experts)[:K]
        device = shards - 1 if kind == "one device" else random.integers(shards)
        return held * device + random.permutation(held)[:K]

    return np.stack([[of_token() for _ in range(TOKENS)] for _ in range(groups)])


def run(layout: Layout, experts: Experts, indices: np.ndarray) -> jax.Array:
    """Gradients of a scalar of the layer's output with respect to tokens, weights and parameters, and the output."""
    random, groups = np.random.default_rng(1), indices.shape[0]
    h = jnp.asarray(random.normal(size=(TOKENS, 32)))
    weights = jnp.asarray(random.uniform(0.1, 1.0, (groups, TOKENS, K)))
    valid = jnp.asarray(random.uniform(size=(groups, TOKENS, K)) > 0.1)
    target = jnp.asarray(random.normal(size=(groups, TOKENS, 32)))
    graphdef, state = nnx.split(experts)
    leaves, treedef = jax.tree.flatten(state)

    def local(leaves, h, weights, valid, indices):  # type: ignore[no-untyped-def]
        leaves, h, weights, valid, indices = jax.tree.map(layout.vary_local, (leaves, h, weights, valid, indices))
        module = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
        if layout.num_expert_shards == 1:
            return module(h, indices, weights, valid)
        routing = Routing(indices, weights, valid, weights[..., 0])
        return exchange_and_run(module, h, routing, layout)

    tokens, per_group = layout.batch_spec(None), PartitionSpec("group", layout.token_axes)
    specs = (param_specs(state, layout), tokens, per_group, per_group, per_group)
    mapped = layout.shard_map(local, in_specs=specs, out_specs=PartitionSpec("group", layout.token_axes))

    def scalar(leaves, h, weights):  # type: ignore[no-untyped-def]
        out = mapped(leaves, h, weights, valid, jnp.asarray(indices, jnp.int32))
        return jnp.sum(out * target), out

    gradients, out = jax.jit(jax.grad(scalar, argnums=(0, 1, 2), has_aux=True))(leaves, h, weights)
    return jax.tree.map(np.asarray, (gradients, out))


@cache
def make_experts(groups: int) -> Experts:
    with jax.enable_x64(True):
        config = tiny_config(num_groups=groups, dtype="float64", experts_per_token=K * groups)
        return Experts(config, nnx.Rngs(0))


@pytest.mark.parametrize("kind", ["uniform", "one device", "clustered"])
def test_all_to_all_path_equals_the_local_one(kind: str) -> None:
    with jax.enable_x64(True):
        expected = run(Layout.single_device("ep"), make_experts(1), choices(kind))
        got = run(Layout.create("ep", num_experts=EXPERTS, num_devices=8), make_experts(1), choices(kind))
        assert relative_error(got, expected) <= 1e-12


SHARED_GROUPS = [
    (4, {"group": 2, "expert": 4, "data": 1}, "mixed"),
    (4, {"group": 1, "expert": 4, "data": 2}, "uniform"),
    (2, {"group": 2, "expert": 2, "data": 2}, "clustered"),
]


@pytest.mark.parametrize(("groups", "sizes", "kind"), SHARED_GROUPS)
def test_groups_share_the_copies_of_a_token(groups: int, sizes: dict[str, int], kind: str) -> None:
    """In the mixed case the devices of one half of the groups need larger buffers than those of the other."""
    shards = sizes["expert"]
    if kind == "mixed":
        halves = [choices(each, groups, shards) for each in ("uniform", "one device")]
        indices = np.concatenate([halves[0][: groups // 2], halves[1][groups // 2 :]])
    else:
        indices = choices(kind, groups, shards)
    with jax.enable_x64(True):
        expected = run(Layout.single_device(), make_experts(groups), indices)
        layout = Layout.create("foe", num_groups=groups, num_experts=EXPERTS, shard_params=False, **sizes)
        assert relative_error(run(layout, make_experts(groups), indices), expected) <= 1e-12


def test_the_cases_above_use_different_buffer_sizes() -> None:
    tokens = TOKENS // 8
    sizes = buffer_sizes(tokens, K, EXPERTS, 8)
    assert len(sizes) > 1 and sizes[-1] == (tokens, tokens)
    assert np.all(choices("one device") // 4 == 7), "every token goes to one device: only the last size holds them"
    tokens = TOKENS // 4
    mixed = buffer_sizes(tokens, K, EXPERTS // 4, 4, groups=2)
    counts = [(choices(kind, 4, 4)[:2] // 2 == 3).any(-1).sum(0).reshape(4, -1) for kind in ("uniform", "one device")]
    fits = [each.sum(1).max() <= mixed[0].outputs for each in counts]
    assert len(mixed) == 2 and fits == [True, False]


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("tokens", "k", "experts", "shards"), [(1000, 2, 64, 8), (1000, 8, 64, 8), (7, 1, 8, 8)])
def test_buffer_sizes_ascend_to_what_always_suffices(
    tokens: int, k: int, experts: int, shards: int, groups: int
) -> None:
    sizes = buffer_sizes(tokens, k, experts, shards, groups)
    assert [size.outputs for size in sizes] == sorted({size.outputs for size in sizes})
    assert [size.tokens for size in sizes] == sorted(size.tokens for size in sizes)
    assert sizes[-1] == (tokens, groups * tokens)
    if groups == 1:
        assert all(size.tokens == size.outputs for size in sizes)
