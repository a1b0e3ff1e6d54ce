"""One program, any binding: models on many devices equal the same models on one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import packed_batch, relative_error, tiny_config, tiny_model

from foejax.config import ModelConfig
from foejax.models import LanguageModel, RoutingTrace
from sharding import Layout
from sharding.races import find_races

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def loss_gradient_logits(model: LanguageModel, remat: str = "none") -> tuple[Any, RoutingTrace]:
    """(loss, metrics, gradient, logits) and the routing trace, from two programs without races."""
    graphdef, params, rest = nnx.split(model, nnx.Param, nnx.Variable)
    batch = packed_batch()

    def loss(params: nnx.State, rest: nnx.State) -> Any:
        return nnx.merge(graphdef, params, rest).loss(batch, load_balance_coef=0.01, z_loss_coef=0.001, remat=remat)

    def logits(params: nnx.State, rest: nnx.State) -> Any:
        return nnx.merge(graphdef, params, rest).logits(batch, record_routing=True)

    (value, metrics), gradient = run_without_races(jax.value_and_grad(loss, has_aux=True), params, rest)
    values, trace = run_without_races(logits, params, rest)
    return (value, metrics, gradient, values), trace


def run_without_races(function: Callable[..., Any], *arguments: Any) -> Any:
    compiled = jax.jit(function).lower(*arguments).compile()
    assert not find_races(compiled.as_text() or "")
    return jax.tree.map(np.asarray, compiled(*arguments))


@cache
def on_one_device(config: ModelConfig) -> Any:
    return loss_gradient_logits(tiny_model(config))


def check_equal(config: ModelConfig, layout: Layout, remat: str = "none") -> None:
    expected, expected_trace = on_one_device(config)
    got, trace = loss_gradient_logits(tiny_model(config).with_layout(layout), remat)
    margin = expected_trace.margins.min()
    flips = int((trace.experts != expected_trace.experts).sum())
    print(f"smallest router margin {margin:.3e}, flipped choices {flips}")
    assert flips == 0, f"{flips} choices flipped; the smallest router margin is {margin:.3e}"
    assert relative_error(got, expected) <= TOLERANCE[config.dtype]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected[2])), "a parameter without gradient"


IN_EVERY_RUN = {(8, 4, "float64"), (4, 2, "float64"), (2, 4, "float64"), (8, 8, "float32")}
"""Besides each number of groups on eight devices in float64; `make test-slow` runs the rest of the product."""


def binding(groups: int, devices: int, dtype: str) -> Any:
    fast = (groups, devices, dtype) in IN_EVERY_RUN or (devices == 8 and dtype == "float64")
    marks = [pytest.mark.xdist_group(f"{groups} groups"), *([] if fast else [pytest.mark.slow])]
    return pytest.param(groups, devices, dtype, marks=marks)


EVERY_BINDING = [binding(*case) for case in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), TOLERANCE)]


@pytest.mark.parametrize(("groups", "devices", "dtype"), EVERY_BINDING)
def test_foe_sharded_equals_unsharded(groups: int, devices: int, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        config = tiny_config(num_groups=groups, dtype=dtype, num_layers=2)
        check_equal(config, Layout.create("foe", num_groups=groups, num_devices=devices))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "sizes", "remat", "dtype"),
    [
        ("ep", {"expert": 8, "data": 1}, "none", "float64"),
        ("ep", {"expert": 8, "data": 1}, "full", "float32"),
        ("ep", {"expert": 4, "data": 2}, "dots", "float64"),
        ("foe", {"group": 4, "data": 2}, "full", "float64"),
        ("foe", {"group": 2, "data": 4}, "dots", "float32"),
        ("foe", {"group": 2, "expert": 2, "data": 2}, "full", "float32"),
        ("tp", {"group": 4, "data": 2}, "full", "float32"),
        ("tp_ep", {"group": 4, "data": 2}, "full", "float32"),
        pytest.param("foe", {"group": 1, "expert": 2, "data": 1}, "none", "float32", marks=SLOW),
        pytest.param("foe", {"group": 1, "expert": 4, "data": 1}, "none", "float32", marks=SLOW),
        pytest.param("foe", {"group": 2, "expert": 2, "data": 1}, "dots", "float32", marks=SLOW),
        pytest.param("foe", {"group": 4, "expert": 2, "data": 1}, "none", "float32", marks=SLOW),
        pytest.param("foe", {"group": 2, "expert": 4, "data": 1}, "none", "float64", marks=SLOW),
        pytest.param("tp", {"group": 2, "data": 1}, "none", "float32", marks=SLOW),
        pytest.param("tp", {"group": 4, "data": 1}, "dots", "float32", marks=SLOW),
        pytest.param("tp", {"group": 8, "data": 1}, "none", "float64", marks=SLOW),
        pytest.param("tp_ep", {"group": 2, "data": 1}, "dots", "float32", marks=SLOW),
        pytest.param("tp_ep", {"group": 4, "data": 1}, "none", "float32", marks=SLOW),
        pytest.param("tp_ep", {"group": 8, "data": 1}, "none", "float64", marks=SLOW),
    ],
)
def test_layouts_and_remat_policies(kind: str, sizes: dict[str, int], remat: str, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        groups = 8 if kind == "foe" else 1
        config = tiny_config(num_groups=groups, dtype=dtype, num_layers=2)
        heads, experts = config.num_kv_heads, config.num_experts
        layout = Layout.create(kind, num_groups=groups, num_experts=experts, num_kv_heads=heads, **sizes)
        check_equal(config, layout, remat)


@pytest.mark.parametrize("options", [{"merge_scale": "sum"}, {"router_score": "sigmoid"}, {"router_scope": "group"}])
def test_options_are_independent_of_the_binding(options: dict[str, str]) -> None:
    config = tiny_config(num_layers=2, embedding_scale=0.5, **options)
    check_equal(config, Layout.create("foe", num_groups=8, num_devices=8))
