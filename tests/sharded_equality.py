"""Loss, gradient, logits and routing of a tiny model on any mesh, against those on one device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from tiny import packed_batch, relative_error, tiny_model

from foejax.config import ModelConfig
from foejax.models import LanguageModel, RoutingTrace
from sharding import Layout
from sharding.races import find_races

TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def loss_gradient_logits(model: LanguageModel, remat: str = "none") -> tuple[Any, RoutingTrace]:
    """(loss, metrics, gradient, logits) and the routing trace, from two programs without races."""
    graphdef, params, rest = nnx.split(model, nnx.Param, nnx.Variable)
    batch = packed_batch()
    router_losses = {} if model.config.streams_scores else {"load_balance_coef": 0.01, "z_loss_coef": 0.001}

    def loss(params: nnx.State, rest: nnx.State) -> Any:
        return nnx.merge(graphdef, params, rest).loss(batch, remat=remat, **router_losses)

    def logits(params: nnx.State, rest: nnx.State) -> Any:
        return nnx.merge(graphdef, params, rest).logits(batch, record_routing=True)

    (value, metrics), gradient = run_without_races(jax.value_and_grad(loss, has_aux=True), params, rest)
    values, trace = run_without_races(logits, params, rest)
    return (value, metrics, gradient, values), trace


def run_without_races(function: Callable[..., Any], *arguments: Any) -> Any:
    """Results of the jitted function as NumPy arrays."""
    compiled = jax.jit(function).lower(*arguments).compile()
    assert not find_races(compiled.as_text() or "")
    return jax.tree.map(_on_host, compiled(*arguments))


def _on_host(x: jax.Array) -> np.ndarray:
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


@cache
def on_one_device(config: ModelConfig) -> Any:
    return loss_gradient_logits(tiny_model(config))


def check_equal(config: ModelConfig, layout: Layout, remat: str = "none") -> None:
    """The tiny model on this mesh equals the one on one device."""
    compare(config, loss_gradient_logits(tiny_model(config).with_layout(layout), remat))


def compare(config: ModelConfig, found: tuple[Any, RoutingTrace]) -> None:
    """What `loss_gradient_logits` found on some mesh is, up to rounding, what it finds on one device."""
    (expected, expected_trace), (got, trace) = on_one_device(config), found
    margin = expected_trace.margins.min()
    flips = int((trace.experts != expected_trace.experts).sum())
    print(f"smallest router margin {margin:.3e}, flipped choices {flips}")
    assert flips == 0, f"{flips} choices flipped; the smallest router margin is {margin:.3e}"
    assert relative_error(jax.tree.leaves(got), jax.tree.leaves(expected)) <= TOLERANCE[config.dtype]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(expected[2])), "a parameter without gradient"
