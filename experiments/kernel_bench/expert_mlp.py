"""A layer's whole expert MLP while decoding, from tokens and their choices to tokens: races, operands, work, checks.

A step is named by the dtype that the weights are stored in: (x_ND, indices_Nk, router_weights_Nk, gate, up, down) ->
out_ND, everything but the weights bfloat16, the router's weights float32. In "int8" and "float8_e4m3fn" the three
weights are `QuantizedWeights`.

Shape letters: N tokens, k choices of a token, E experts, D width, F expert hidden size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernel_bench import group_sizes
from experiments.kernel_bench.checks import element_fault
from experiments.kernel_bench.expert_mlp_contenders import contenders
from experiments.kernel_bench.operands import ITEM, generators, normal
from experiments.kernel_bench.operations import ExactCase, Operands, Operation, Race, Results, Work
from pallas_kernels.grouped_matmul.shapes import EXPERT_MLP_SHAPES, ExpertMlpShape
from pallas_kernels.quantized import QuantizedWeights, Weights, dequantize, quantize

STEPS = ("bfloat16", "int8", "float8_e4m3fn")
_TOLERANCE = 2.0**-5  # gate, up, the activation, each choice's row and their sum are rounded
_SLACK = 6.0
_FEW_TOKENS, _MANY_TOKENS = 1, 32

_RACES = tuple(Race(name, step, dims, ("uniform", "zipf"), "weight_bytes") for step in STEPS
               for name, dims in EXPERT_MLP_SHAPES.items())  # fmt: skip
_PARTS: dict[str, tuple[Race, ...]] = {
    model: tuple(
        race
        for race in _RACES
        if race.shape.startswith(f"{model}/")
        # 8 bits at all numbers of tokens for one model; the others show one token and many.
        and (model == "olmoe_1b_7b" or race.step == "bfloat16" or race.dims.tokens in (_FEW_TOKENS, _MANY_TOKENS))
    )
    for model in ("olmoe_1b_7b", "qwen3_30b_a3b", "mixtral_8x7b", "deepseek_v3")
}


def shrink(race: Race) -> Race:
    """The same step on a few kilobytes."""
    return dataclasses.replace(race, dims=ExpertMlpShape(8, 2, 4, 16, 32))


def operand_sets(race: Race, kind: str, calls: int, copies: int) -> list[Operands]:
    """Normal operands of `calls` calls, each with choices of its own; router weights sum to one."""
    rng, keys = generators(race, kind)
    weights = [_draw_weights(next(keys), race.dims, race.step) for _ in range(copies)]
    return [
        (
            normal(next(keys), (race.dims.tokens, race.dims.model_size)),
            *_draw_choices(race.dims, rng, skewed=kind == "zipf"),
            *weights[call % copies],
        )
        for call in range(calls)
    ]


def _draw_choices(dims: ExpertMlpShape, rng: np.random.Generator, *, skewed: bool) -> tuple[jax.Array, jax.Array]:
    tokens, top_k, experts, *_ = dims
    scores_Nk = rng.uniform(0.1, 1, size=(tokens, top_k))
    indices_Nk = group_sizes.chosen(tokens, top_k, experts, rng, skewed=skewed)
    return jnp.asarray(indices_Nk), jnp.asarray(scores_Nk / scores_Nk.sum(1, keepdims=True), jnp.float32)


def _draw_weights(key: jax.Array, dims: ExpertMlpShape, dtype: str) -> tuple[Weights, Weights, Weights]:
    """Gate, up and down."""
    keys = jax.random.split(key, 3)
    gate, up, down = (_draw(own, shape, dtype) for own, shape in zip(keys, _weight_shapes(dims), strict=True))
    return gate, up, down


def _weight_shapes(dims: ExpertMlpShape) -> tuple[tuple[int, int, int], ...]:
    _, _, experts, width, hidden = dims
    return (experts, width, hidden), (experts, width, hidden), (experts, hidden, width)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: jax.Array, shape: tuple[int, int, int], dtype: str) -> Weights:
    def of_one_expert(key: jax.Array) -> Any:
        w_1KN = normal(key, (1, *shape[1:]), shape[1] ** -0.5)
        # mypy cannot know that a step's name is a dtype.
        stored = w_1KN if dtype == "bfloat16" else quantize(w_1KN, dtype)  # type: ignore[arg-type, unused-ignore]
        return jax.tree.map(lambda array: array[0], stored)

    weights: Weights = jax.lax.map(of_one_expert, jax.random.split(key, shape[0]))
    return weights


def output(step: str, dims: ExpertMlpShape) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The tokens."""
    return (jax.ShapeDtypeStruct((dims.tokens, dims.model_size), jnp.bfloat16),)


def _one_expert_bytes(race: Race) -> int:
    width, hidden = race.dims.model_size, race.dims.expert_hidden
    values, scales = 3 * width * hidden, 2 * hidden + width
    return ITEM * values if race.step == "bfloat16" else values + 4 * scales


def weight_bytes(race: Race) -> int:
    """Bytes of all experts' weights, their scales included."""
    return race.dims.experts * _one_expert_bytes(race)


def work(race: Race, sets: Sequence[Operands]) -> Work:
    """Tokens in and out once, and the weights of each expert that any token chose once."""
    tokens, top_k, _, width, hidden = race.dims
    touched = float(np.mean([len(np.unique(np.asarray(operands[1]))) for operands in sets])) * _one_expert_bytes(race)
    return Work(6.0 * tokens * top_k * width * hidden, touched + 2 * tokens * width * ITEM, touched)


def wrong(race: Race, operands: Operands, results: Results) -> str | None:
    """Compares every element with the MLP of each row by itself in float32."""
    return element_fault(results[0], _expected(operands), _TOLERANCE)


@jax.jit
def _expected(operands: Operands) -> jax.Array:
    x_ND, indices_Nk, router_Nk, *weights = operands

    def of_one_choice(token_and_expert: tuple[jax.Array, jax.Array]) -> jax.Array:
        token, expert = token_and_expert
        gate, up, down = (_wide(jax.tree.map(lambda array: array[expert][None], w)) for w in weights)
        product = functools.partial(jnp.einsum, "k,kn->n", precision="highest")
        x_D = x_ND[token].astype(jnp.float32)
        hidden_F = jax.nn.silu(product(x_D, gate)) * product(x_D, up)
        return product(hidden_F.astype(jnp.bfloat16).astype(jnp.float32), down)

    tokens, k = indices_Nk.shape
    token_R = jnp.arange(tokens * k, dtype=jnp.int32) // k
    y_RD = jax.lax.map(of_one_choice, (token_R, indices_Nk.reshape(-1)))
    return jnp.einsum("nk,nkd->nd", router_Nk, y_RD.reshape(tokens, k, -1), precision="highest")


def _wide(one_expert: Any) -> jax.Array:
    """The matrix [K, N] of weights with one expert, in float32."""
    if isinstance(one_expert, QuantizedWeights):
        return dequantize(one_expert)[0]
    return one_expert[0].astype(jnp.float32)


def exact_cases(tiny: bool) -> list[ExactCase]:
    """One token, more rows an expert than a decode kernel takes, and on a GPU some in between, in each dtype."""
    rng = np.random.default_rng(0)
    width, hidden = (16, 32) if tiny else (256, 384)
    chosen = {
        "one token": ExpertMlpShape(1, 8, 64, width, hidden),
        "many rows an expert": ExpertMlpShape(300, 2, 3, width, hidden),
    }
    if not tiny:
        chosen["few tokens"] = ExpertMlpShape(13, 2, 6, width, hidden)
    return [_exact_case(name, step, dims, rng) for name, dims in chosen.items() for step in STEPS]


def _exact_case(name: str, step: str, dims: ExpertMlpShape, rng: np.random.Generator) -> ExactCase:
    x_ND = jnp.asarray(rng.normal(size=(dims.tokens, dims.model_size)), jnp.bfloat16)
    indices_Nk, router_Nk = _draw_choices(dims, rng, skewed=True)
    weights = [_draw_on_host(rng, shape, step) for shape in _weight_shapes(dims)]
    gate, up, down = (dequantized for _, dequantized in weights)
    x, indices, router = np.asarray(x_ND, np.float64), np.asarray(indices_Nk), np.asarray(router_Nk, np.float64)
    expected = np.zeros(x.shape)
    for token, choice in np.ndindex(indices.shape):
        expert = indices[token, choice]
        pre = x[token] @ gate[expert]
        row = (pre / (1 + np.exp(-pre)) * (x[token] @ up[expert])) @ down[expert]
        expected[token] += router[token, choice] * row
    operands = (x_ND, indices_Nk, router_Nk, *(stored for stored, _ in weights))
    return ExactCase(name, step, dims, operands, (expected,), (np.zeros(x.shape, bool),), False, _SLACK)


def _draw_on_host(rng: np.random.Generator, shape: tuple[int, int, int], dtype: str) -> tuple[Weights, np.ndarray]:
    """Weights, and what they stand for [E, K, N] in float64; 8 bits use their whole range."""
    experts, contracted, features = shape
    normal_ENK = rng.normal(size=(experts, features, contracted)) * contracted**-0.5
    if dtype == "bfloat16":
        w_EKN = jnp.asarray(normal_ENK.swapaxes(1, 2), jnp.bfloat16)
        return w_EKN, np.asarray(w_EKN, np.float64)
    unit = np.abs(normal_ENK).max() / float(jnp.finfo(dtype).max if dtype.startswith("float") else 127)
    scales_EN = (unit * rng.uniform(1, 2, size=(experts, features))).astype(np.float32)
    values_ENK = np.asarray(np.rint(normal_ENK / unit) if dtype == "int8" else normal_ENK / unit, jnp.dtype(dtype))
    dequantized_ENK = values_ENK.astype(np.float64) * scales_EN[:, :, None].astype(np.float64)
    return QuantizedWeights(jnp.asarray(values_ENK), jnp.asarray(scales_EN)), dequantized_ENK.swapaxes(1, 2)


EXPERT_MLP = Operation(
    "expert_mlp", _PARTS, shrink, contenders, operand_sets, output, weight_bytes, work, wrong, exact_cases
)  # fmt: skip
