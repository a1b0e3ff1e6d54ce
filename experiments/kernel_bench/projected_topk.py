"""The projected top-k's entry in the bench: races, operands, contenders and checks.

Steps: "forward" (x_SNK, w_SKE, bias_SE) -> (values_SNk, indices_SNk), best first; "backward" (x_SNK, w_SKE,
indices_SNk, dvalues_SNk) -> (dx_SNK, dw_SKE). Tokens bfloat16, everything else float32, as the model has them.

Shape letters: S stacks, N tokens, K features, E experts, k choices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernel_bench.checks import element_fault
from experiments.kernel_bench.contenders import Steps, own_backend
from experiments.kernel_bench.operands import ITEM, generators, normal
from experiments.kernel_bench.operations import Contender, ExactCase, Operands, Operation, Race, Results, Work
from pallas_kernels import projected_topk
from pallas_kernels.projected_topk.shapes import SHAPES, ProjectedShape

TOP_K = 4
_FORWARD_TOLERANCE = 1e-4  # of logits of size one, which contenders sum in different orders
_GRADIENT_TOLERANCE = 2.0**-6
_SIZES = ("normal",)


def _races(part: str) -> tuple[Race, ...]:
    return tuple(
        Race(name, step, dims, _SIZES, "flops" if step == "forward" else "bytes")
        for name, dims in SHAPES.items()
        if name.startswith(f"{part}/")
        for step in ("forward", "backward")
    )


_PARTS: dict[str, tuple[Race, ...]] = {part: _races(part) for part in ("experts_256", "experts_64")}


def contenders(on_gpu: bool) -> tuple[Contender, ...]:
    """Everybody; who cannot run here says why."""
    dense: Steps = {"forward": _dense, "backward": _dense_gradients}
    remark = "holds all logits, and their gradient"
    return (
        _ours("triton", on_gpu),
        _ours("xla", on_gpu),
        Contender("jnp.einsum and jax.lax.top_k", "peer", dense, remark=remark),
    )


def _ours(name: str, on_gpu: bool) -> Contender:
    def steps(module: ModuleType) -> Steps:
        def forward(x_SNK: jax.Array, w_SKE: jax.Array, bias_SE: jax.Array) -> tuple[jax.Array, jax.Array]:
            chosen = projected_topk(x_SNK, w_SKE, TOP_K, selection_bias_SE=bias_SE, implementation=name)  # type: ignore[arg-type, unused-ignore]
            return chosen.values_SNk, chosen.indices_SNk

        return {"forward": forward, "backward": module.gradients}

    return own_backend(
        "projected_topk", name, on_gpu, steps, remark="also finds the margin and which choices are valid"
    )


def _logits(x_SNK: jax.Array, w_SKE: jax.Array) -> jax.Array:
    return jnp.einsum("snk,ske->sne", x_SNK.astype(jnp.float32), w_SKE, precision="highest")


def _dense(x_SNK: jax.Array, w_SKE: jax.Array, bias_SE: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits_SNE = _logits(x_SNK, w_SKE)
    _, indices_SNk = jax.lax.top_k(logits_SNE + bias_SE[:, None, :], TOP_K)
    return jnp.take_along_axis(logits_SNE, indices_SNk, axis=2), indices_SNk


def _dense_gradients(
    x_SNK: jax.Array, w_SKE: jax.Array, indices_SNk: jax.Array, dvalues_SNk: jax.Array
) -> tuple[jax.Array, ...]:
    """JAX's own gradient, which scatters into that of all logits."""
    _, transpose = jax.vjp(
        lambda x, w: jnp.take_along_axis(_logits(x, w), indices_SNk, axis=2, mode="fill", fill_value=0), x_SNK, w_SKE
    )
    dx_SNK, dw_SKE = transpose(dvalues_SNk)
    return dx_SNK, dw_SKE


def shrink(race: Race) -> Race:
    """The same step on a few kilobytes."""
    return dataclasses.replace(race, dims=ProjectedShape(2, 32, 16, 24, TOP_K))


def operand_sets(race: Race, kind: str, calls: int, copies: int) -> list[Operands]:
    """Normal logits and biases; for the gradient k different experts for each token."""
    _, keys = generators(race, kind)
    stacks, tokens, features, experts, top_k = race.dims
    sets: list[Operands] = []
    for _ in range(calls):
        x_SNK = normal(next(keys), (stacks, tokens, features))
        w_SKE = jax.random.normal(next(keys), (stacks, features, experts), jnp.float32) / np.float32(features**0.5)
        if race.step == "backward":
            _, indices_SNk = jax.lax.top_k(jax.random.uniform(next(keys), (stacks, tokens, experts)), top_k)
            sets.append((x_SNK, w_SKE, indices_SNk, jax.random.normal(next(keys), indices_SNk.shape, jnp.float32)))
        else:
            sets.append((x_SNK, w_SKE, jax.random.normal(next(keys), (stacks, experts), jnp.float32)))
    return sets


def output(step: str, dims: ProjectedShape) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Values and indices, or the gradients of tokens and weights."""
    stacks, tokens, features, experts, top_k = dims
    if step == "backward":
        return (
            jax.ShapeDtypeStruct((stacks, tokens, features), jnp.bfloat16),
            jax.ShapeDtypeStruct((stacks, features, experts), jnp.float32),
        )
    shape = (stacks, tokens, top_k)
    return jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)


def work(race: Race, sets: Sequence[Operands]) -> Work:
    """The product of tokens and weights, or what of its gradient is not zero; operands and results moved once."""
    stacks, tokens, features, experts, top_k = race.dims
    passes, met = (1, experts) if race.step == "forward" else (2, top_k)
    flops = 2.0 * passes * stacks * tokens * features * met
    tokens_and_weights = passes * stacks * features * (tokens * ITEM + experts * 4)
    biases = stacks * experts * 4 if race.step == "forward" else 0
    return Work(flops, float(tokens_and_weights + biases + stacks * tokens * top_k * 8), 0.0)


def wrong(race: Race, operands: Operands, results: Results) -> str | None:
    """Compares with all logits, or their gradient; logits that rounding can swap may come in either order."""
    if race.step == "forward":
        bad = int(_wrong_tokens(operands, results))
        return f"{bad} of {race.dims.stacks * race.dims.tokens} choices are wrong" if bad else None
    for name, result, expected in zip(("dx", "dw"), results, jax.jit(_dense_gradients)(*operands), strict=True):
        fault = element_fault(result, expected.astype(jnp.float32), _GRADIENT_TOLERANCE)
        if fault is not None:
            return f"{name}: {fault}"
    return None


@jax.jit
def _wrong_tokens(operands: Operands, results: Results) -> jax.Array:
    x_SNK, w_SKE, bias_SE = operands
    values_SNk, indices_SNk = results
    logits_SNE = _logits(x_SNK, w_SKE)
    selection_SNE = logits_SNE + bias_SE[:, None, :]

    def named(scores_SNE: jax.Array) -> jax.Array:
        return jnp.take_along_axis(scores_SNE, indices_SNk, axis=2, mode="fill", fill_value=jnp.nan)

    best_SNk, _ = jax.lax.top_k(selection_SNE, indices_SNk.shape[2])
    ordered_SNk = jnp.sort(indices_SNk, axis=2)
    is_twice_SN = (ordered_SNk[..., 1:] == ordered_SNk[..., :-1]).any(axis=2)
    is_right_SNk = jnp.abs(values_SNk - named(logits_SNE)) <= _FORWARD_TOLERANCE
    is_right_SNk &= jnp.abs(named(selection_SNE) - best_SNk) <= _FORWARD_TOLERANCE
    return (is_twice_SN | ~is_right_SNk.all(axis=2)).sum()


def exact_cases(tiny: bool) -> list[ExactCase]:
    """Operands of which no sum rounds, and for ours ties, NaN and choices that are none."""
    rng = np.random.default_rng(0)
    sizes = ((2, 17, 16, 24),) if tiny else ((4, 301, 64, 64), (2, 150, 100, 1000))
    shapes = [ProjectedShape(*size, TOP_K) for size in sizes]
    return [
        *(_forward_case(name, dims, rng) for dims in shapes for name in ("random", "ties", "NaN")),
        *(_backward_case(name, dims, rng) for dims in shapes for name in ("random", "not valid")),
    ]


def _draw(span: int, rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Multiples of 1 / span."""
    return rng.integers(-span, span + 1, shape) / span


def _forward_case(name: str, dims: ProjectedShape, rng: np.random.Generator) -> ExactCase:
    stacks, tokens, features, experts, k = dims
    span = 1 if name == "ties" else 32
    x_SNK, w_SKE, bias_SE = (
        _draw(span, rng, *shape)
        for shape in ((stacks, tokens, features), (stacks, features, experts), (stacks, experts))
    )
    if name == "NaN":
        w_SKE[:, 0, ::5] = np.nan
    logits_SNE = x_SNK @ w_SKE
    selection_SNE = np.nan_to_num(logits_SNE + bias_SE[:, None, :], nan=-np.inf)
    indices_SNk = np.argsort(-selection_SNE, axis=2, kind="stable")[..., :k]
    values_SNk = np.take_along_axis(logits_SNE, indices_SNk, 2)
    operands = (jnp.asarray(x_SNK, jnp.bfloat16), jnp.asarray(w_SKE, jnp.float32), jnp.asarray(bias_SE, jnp.float32))
    zero = (values_SNk == 0, indices_SNk == 0)
    case = f"{name}, {features} by {experts}"
    return ExactCase(case, "forward", dims, operands, (values_SNk, indices_SNk), zero, name != "random", slack=0.0)


def _backward_case(name: str, dims: ProjectedShape, rng: np.random.Generator) -> ExactCase:
    stacks, tokens, features, experts, k = dims
    x_SNK, w_SKE, dvalues_SNk = (
        _draw(32, rng, *shape)
        for shape in ((stacks, tokens, features), (stacks, features, experts), (stacks, tokens, k))
    )
    indices_SNk = rng.permuted(np.tile(np.arange(experts), (stacks, tokens, 1)), axis=2)[..., :k]
    if name == "not valid":
        indices_SNk[rng.random(indices_SNk.shape) < 0.3] = experts
    dlogits_SNE = np.zeros((stacks, tokens, experts + 1))
    np.put_along_axis(dlogits_SNE, indices_SNk, dvalues_SNk, 2)
    dlogits_SNE = dlogits_SNE[..., :-1]
    dx_SNK, dw_SKE = dlogits_SNE @ w_SKE.swapaxes(1, 2), x_SNK.swapaxes(1, 2) @ dlogits_SNE
    operands = (
        jnp.asarray(x_SNK, jnp.bfloat16),
        jnp.asarray(w_SKE, jnp.float32),
        jnp.asarray(indices_SNk, jnp.int32),
        jnp.asarray(dvalues_SNk, jnp.float32),
    )
    zero = (dx_SNK == 0, dw_SKE == 0)
    case = f"{name}, {features} by {experts}"
    return ExactCase(case, "backward", dims, operands, (dx_SNK, dw_SKE), zero, name != "random")


PROJECTED_TOPK = Operation(
    "projected_topk", _PARTS, shrink, contenders, operand_sets, output, lambda race: 0, work, wrong, exact_cases
)  # fmt: skip
