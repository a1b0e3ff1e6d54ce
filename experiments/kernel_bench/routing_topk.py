"""The routing top-k's entry in the bench: races, scores, contenders and checks.

Steps: "forward" (scores_NE,) -> (values_Nk, indices_Nk), best first; "backward" (scores_NE, indices_Nk, dvalues_Nk) ->
dscores_NE, which reads nothing of the scores but their shape. All float32, as the router computes them.

Shape letters: N tokens, E experts, k choices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernel_bench.contenders import Steps, own_backend, torch_peer
from experiments.kernel_bench.operands import generators
from experiments.kernel_bench.operations import Contender, ExactCase, Operands, Operation, Race, Results, Work
from pallas_kernels import routing_topk
from pallas_kernels.routing_topk.shapes import SHAPES, RoutingShape

TOP_K = 8
STEPS = ("forward", "backward")
_ITEM = 4  # bytes of a float32 and of an index
_SIZES = ("normal",)

_PARTS: dict[str, tuple[Race, ...]] = {
    part: tuple(
        Race(name, step, dims, _SIZES, "bytes")
        for name, dims in SHAPES.items()
        if name.startswith(f"{part}/")
        for step in STEPS
    )
    for part in ("tokens_65536", "tokens_4096")
}


def contenders(on_gpu: bool) -> tuple[Contender, ...]:
    """Everybody; who cannot run here says why."""
    return (
        _ours("triton", on_gpu),
        _ours("xla", on_gpu),
        Contender("jax.lax.top_k", "peer", {"forward": _lax_top_k, "backward": _scatter}),
        torch_peer("torch.topk", on_gpu, _torch_steps),
    )


def _ours(name: str, on_gpu: bool) -> Contender:
    def steps(module: ModuleType) -> Steps:
        def forward(scores_NE: jax.Array) -> tuple[jax.Array, jax.Array]:
            chosen = routing_topk(scores_NE, TOP_K, implementation=name)  # type: ignore[arg-type, unused-ignore]
            return chosen.values_Nk, chosen.indices_Nk

        def backward(scores_NE: jax.Array, indices_Nk: jax.Array, dvalues_Nk: jax.Array) -> jax.Array:
            dscores_NE: jax.Array = module.spread(dvalues_Nk, indices_Nk, scores_NE.shape[1])
            return dscores_NE

        return {"forward": forward, "backward": backward}

    remark = "also finds the margin and which choices are valid" if name == "triton" else ""
    return own_backend("routing_topk", name, on_gpu, steps, remark=remark)


def _lax_top_k(scores_NE: jax.Array) -> tuple[jax.Array, jax.Array]:
    values_Nk, indices_Nk = jax.lax.top_k(scores_NE, TOP_K)
    return values_Nk, indices_Nk


def _scatter(scores_NE: jax.Array, indices_Nk: jax.Array, dvalues_Nk: jax.Array) -> jax.Array:
    """What its own gradient does."""
    token_N1 = jnp.arange(scores_NE.shape[0])[:, None]
    return jnp.zeros_like(scores_NE).at[token_N1, indices_Nk].add(dvalues_Nk)


def _torch_steps(torch: Any) -> Steps:
    def backward(scores_NE: Any, indices_Nk: Any, dvalues_Nk: Any) -> Any:
        return torch.zeros_like(scores_NE).scatter_(1, indices_Nk.long(), dvalues_Nk)

    return {"forward": lambda scores_NE: tuple(torch.topk(scores_NE, TOP_K)), "backward": backward}


def shrink(race: Race) -> Race:
    """The same step on a few kilobytes."""
    return dataclasses.replace(race, dims=RoutingShape(64, 16, TOP_K))


def operand_sets(race: Race, kind: str, calls: int, copies: int) -> list[Operands]:
    """Normal scores; for the gradient k different experts for each token."""
    _, keys = generators(race, kind)
    tokens, experts, top_k = race.dims
    sets: list[Operands] = []
    for _ in range(calls):
        scores_NE = jax.random.normal(next(keys), (tokens, experts), jnp.float32)
        if race.step == "backward":
            indices_Nk = jnp.argsort(jax.random.uniform(next(keys), (tokens, experts)), axis=1)[:, :top_k]
            dvalues_Nk = jax.random.normal(next(keys), (tokens, top_k), jnp.float32)
            sets.append((scores_NE, indices_Nk.astype(jnp.int32), dvalues_Nk))
        else:
            sets.append((scores_NE,))
    return sets


def output(step: str, dims: RoutingShape) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Values and indices, or the gradient of all scores."""
    if step == "backward":
        return (jax.ShapeDtypeStruct((dims.tokens, dims.experts), jnp.float32),)
    shape = (dims.tokens, dims.top_k)
    return jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)


def work(race: Race, sets: Sequence[Operands]) -> Work:
    """One comparison a score, and every score and every choice moved once."""
    tokens, experts, top_k = race.dims
    return Work(float(tokens * experts), float(tokens * (experts + 2 * top_k) * _ITEM), 0.0)


def wrong(race: Race, operands: Operands, results: Results) -> str | None:
    """Compares with `jax.lax.top_k`, or the gradient with what was to be spread; ties may be broken either way."""
    bad = int(_wrong_rows(operands, results))
    return f"{bad} of {race.dims.tokens} tokens are wrong" if bad else None


@jax.jit
def _wrong_rows(operands: Operands, results: Results) -> jax.Array:
    scores_NE, *gradient = operands
    expert_1E = jnp.arange(scores_NE.shape[1])[None, :]

    def spread(values_Nk: jax.Array, indices_Nk: jax.Array) -> jax.Array:
        spread_NE = jnp.zeros_like(scores_NE)
        for choice in range(values_Nk.shape[1]):
            spread_NE += jnp.where(indices_Nk[:, choice, None] == expert_1E, values_Nk[:, choice, None], 0)
        return spread_NE

    if gradient:
        indices_Nk, dvalues_Nk = gradient
        return jnp.any(results[0] != spread(dvalues_Nk, indices_Nk), axis=1).sum()
    values_Nk, indices_Nk = results
    best_Nk, _ = jax.lax.top_k(scores_NE, values_Nk.shape[1])
    named_Nk = jnp.take_along_axis(scores_NE, indices_Nk, axis=1, mode="fill", fill_value=jnp.nan)
    times_chosen_NE = spread(jnp.ones_like(values_Nk), indices_Nk)
    wrong_N = jnp.any((values_Nk != best_Nk) | (named_Nk != best_Nk), axis=1) | jnp.any(times_chosen_NE > 1, axis=1)
    return wrong_N.sum()


def exact_cases(tiny: bool) -> list[ExactCase]:
    """Random scores, and for ours ties, both zeros, NaN and choices that are none."""
    rng = np.random.default_rng(0)
    tokens, sizes = (17, (16,)) if tiny else (301, (64, 1000))
    return [case for experts in sizes for case in _exact_cases(RoutingShape(tokens, experts, TOP_K), rng)]


def _exact_cases(dims: RoutingShape, rng: np.random.Generator) -> list[ExactCase]:
    tokens, experts, k = dims
    plain_NE = rng.normal(size=(tokens, experts)).astype(np.float32)
    ties_NE = rng.integers(-2, 3, size=(tokens, experts)).astype(np.float32)
    ties_NE[rng.random(ties_NE.shape) < 0.5] *= -1  # some zeros are negative
    missing_NE = np.where(rng.random(plain_NE.shape) < 0.2, np.nan, plain_NE)
    indices_Nk = rng.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)[:, :k].astype(np.int32)
    dvalues_Nk = rng.normal(size=(tokens, k)).astype(np.float32)
    none_Nk = np.where(rng.random(indices_Nk.shape) < 0.3, experts, indices_Nk).astype(np.int32)
    cases = []
    for name, scores_NE, ours_only in (("random", plain_NE, False), ("ties", ties_NE, True), ("NaN", missing_NE, True)):
        order_Nk = np.argsort(-np.where(np.isnan(scores_NE), -np.inf, scores_NE), axis=1, kind="stable")[:, :k]
        values_Nk = np.nan_to_num(np.take_along_axis(scores_NE, order_Nk, 1), nan=0.0).astype(np.float64)
        expected = (values_Nk, order_Nk)
        cases.append(_selection(f"{name}, {experts}", "forward", dims, (scores_NE,), expected, ours_only))
    for name, chosen_Nk, ours_only in (("random", indices_Nk, False), ("not valid", none_Nk, True)):
        dscores_NE = np.zeros((tokens, experts + 1))
        np.put_along_axis(dscores_NE, chosen_Nk, dvalues_Nk, 1)
        operands = (plain_NE, chosen_Nk, dvalues_Nk)
        cases.append(_selection(f"{name}, {experts}", "backward", dims, operands, (dscores_NE[:, :-1],), ours_only))
    return cases


def _selection(
    name: str,
    step: str,
    dims: RoutingShape,
    operands: Sequence[np.ndarray],
    expected: tuple[np.ndarray, ...],
    ours_only: bool,
) -> ExactCase:
    zero = tuple(array == 0 for array in expected)
    return ExactCase(name, step, dims, tuple(map(jnp.asarray, operands)), expected, zero, ours_only, slack=0.0)


ROUTING_TOPK = Operation(
    "routing_topk", _PARTS, shrink, contenders, operand_sets, output, lambda race: 0, work, wrong, exact_cases
)  # fmt: skip
