"""The grouped matmul's entry in the bench: its shapes, random operands, work and checks.

Shape letters: R rows sorted by expert, K contracted features, N output features, E experts.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernel_bench import group_sizes
from experiments.kernel_bench.grouped_matmul_contenders import contenders
from experiments.kernel_bench.grouped_matmul_tiles import HopperTiles
from experiments.kernel_bench.operations import ExactCase, Operands, Operation, Race, Work
from pallas_kernels.grouped_matmul.shapes import DECODE_SHAPES, DECODE_TOKENS, SHAPES, DecodeShape, GroupedMatmulShape

STEPS = ("forward", "dgrad", "wgrad")
_ITEM = 2  # bytes of a bfloat16
_ROW_TOLERANCE = 0.0125
"""Of a row's norm: rounding each element to bfloat16 moves a row's random projection by 0.0011 of it at one sigma."""

Dims = GroupedMatmulShape | DecodeShape


def _training(
    model: str, sizes: tuple[str, ...] = ("uniform", "zipf"), down: tuple[str, ...] = ("forward",)
) -> tuple[Race, ...]:
    """All steps of the up projection; of the down projection `down`: its gradients have the up projection's sizes."""
    return tuple(
        Race(name, step, SHAPES[name], sizes)
        for name, steps in ((f"{model}/up", STEPS), (f"{model}/down", down))
        for step in steps
    )


def _decode(model: str, projections: tuple[str, ...] = ("up",)) -> tuple[Race, ...]:
    names = [f"{model}/decode_{tokens}/{projection}" for tokens in DECODE_TOKENS for projection in projections]
    return tuple(Race(name, "forward", DECODE_SHAPES[name], ("uniform", "zipf"), decode=True) for name in names)


_PARTS: dict[str, tuple[Race, ...]] = {
    "acceptance_gpu": _training("acceptance_gpu", ("uniform", "zipf", "half_empty"), STEPS),
    "decode_olmoe_1b_7b": _decode("olmoe_1b_7b", ("up", "down")),
    **{
        model: _training(model)
        for model in ("foe_7b_stacked", "qwen3_30b_a3b", "mixtral_8x7b", "deepseek_v3", "foe_1b_stacked")
    },
    **{f"decode_{model}": _decode(model) for model in ("qwen3_30b_a3b", "deepseek_v3", "mixtral_8x7b")},
    **{model: _training(model) for model in ("foe_7b", "foe_1b", "olmoe_1b_7b")},
}


def shrink(race: Race) -> Race:
    """The same step on a few kilobytes."""
    tiny: Dims = DecodeShape(race.dims.tokens, 2, 4, 16, 32) if race.decode else GroupedMatmulShape(64, 4, 16, 32)
    return dataclasses.replace(race, dims=tiny)


def _draw_sizes(race: Race, kind: str, rng: np.random.Generator) -> np.ndarray:
    dims = race.dims
    if isinstance(dims, DecodeShape):
        return group_sizes.routed(dims.tokens, dims.top_k, dims.experts, rng, skewed=kind == "zipf")
    if kind == "uniform":
        return group_sizes.uniform(dims.rows, dims.experts)
    return {"zipf": group_sizes.zipf, "half_empty": group_sizes.half_empty}[kind](dims.rows, dims.experts, rng)


def operand_sets(race: Race, kind: str, calls: int, copies: int) -> list[Operands]:
    """Normal bfloat16 operands of `calls` calls, none of which shares rows or sizes with another."""
    seed = zlib.crc32(f"{race.shape} {race.step} {kind}".encode())
    rng = np.random.default_rng(seed)
    keys = iter(jax.random.split(jax.random.key(seed), 2 * calls + copies))
    rows, experts, contracted, features = _sizes(race)
    weights = [] if race.step == "wgrad" else [_normal(next(keys), (experts, contracted, features), contracted**-0.5)]
    weights += [_normal(next(keys), weight.shape, contracted**-0.5) for weight in weights for _ in range(copies - 1)]
    sets: list[Operands] = []
    for call in range(calls):
        sizes_E = jnp.asarray(_draw_sizes(race, kind, rng))
        left = _normal(next(keys), (rows, features if race.step == "dgrad" else contracted))
        right = weights[call % copies] if weights else _normal(next(keys), (rows, features))
        sets.append((left, right, sizes_E))
    return sets


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    if len(shape) == 3:  # one matrix at a time: all experts' random bits together can pass 2**31 elements
        return jax.lax.map(lambda key: _normal(key, shape[1:], scale), jax.random.split(key, shape[0]))
    return (jax.random.normal(key, shape, jnp.float32) * scale).astype(jnp.bfloat16)


def _sizes(race: Race) -> tuple[int, int, int, int]:
    dims: Dims = race.dims
    return dims.rows, dims.experts, dims.contracted, dims.features


def output(race: Race) -> tuple[int, ...]:
    """Shape of the step's result."""
    rows, experts, contracted, features = _sizes(race)
    shapes = {"forward": (rows, features), "dgrad": (rows, contracted), "wgrad": (experts, contracted, features)}
    return shapes[race.step]


def weight_bytes(race: Race) -> int:
    """Bytes of all experts' weights that the step reads."""
    _, experts, contracted, features = _sizes(race)
    return 0 if race.step == "wgrad" else experts * contracted * features * _ITEM


def work(race: Race, sets: Sequence[Operands]) -> Work:
    """Every row in use read and written once, and once the weights of experts with rows; wgrad writes all experts."""
    rows, experts, contracted, features = _sizes(race)
    busy = float(np.mean([np.count_nonzero(np.asarray(sizes_E)) for *_, sizes_E in sets]))
    one_expert = contracted * features * _ITEM
    weights = one_expert * (experts if race.step == "wgrad" else busy)
    row_bytes = rows * (contracted + features) * _ITEM
    return Work(2.0 * rows * contracted * features, row_bytes + weights, one_expert * busy)


def wrong(race: Race, operands: Operands, result: jax.Array) -> str | None:
    """Checks a result of any size against a random projection of it, every row of every expert in float32.

    Multiplying y = x w by a random vector v must give x (w v), which costs no product of matrices. A single wrong
    element moves its row's projection by many times the rounding error.
    """
    if result.shape != output(race) or result.dtype != jnp.bfloat16:
        return f"result is {result.dtype}{list(result.shape)}, not bfloat16{list(output(race))}"
    bad, worst = (np.asarray(value) for value in _projection_error(*operands, result, race.step))
    if not bad:
        return None
    return f"{int(bad)} rows of the result are wrong, by up to {float(worst):.3g} of a row's norm"


@functools.partial(jax.jit, static_argnames="step")
def _projection_error(
    left: jax.Array, right: jax.Array, sizes_E: jax.Array, result: jax.Array, step: str
) -> tuple[jax.Array, jax.Array]:
    """How many rows are off (NaN included) and by how much at most, in units of the row's norm."""
    v = jax.random.normal(jax.random.key(7), result.shape[-1:], jnp.float32).astype(jnp.bfloat16)
    project = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision="highest")
    if step == "wgrad":
        got, squares = project("ekn,n->ek", result, v), jnp.square(result.astype(jnp.float32)).sum(-1)
        belongs_RE = _expert_of_row(sizes_E, left.shape[0])[:, None] == jnp.arange(sizes_E.shape[0])[None, :]
        weighted_RE = jnp.where(belongs_RE, project("rn,n->r", right, v)[:, None], 0.0)
        expected = project("rk,re->ek", left.astype(jnp.float32), weighted_RE)
    else:
        got, squares = project("rn,n->r", result, v), jnp.square(result.astype(jnp.float32)).sum(-1)
        direction = project("ekn,n->ek" if step == "forward" else "ekn,k->en", right, v)
        expected = (left.astype(jnp.float32) * direction[_expert_of_row(sizes_E, left.shape[0])]).sum(-1)
    error = jnp.abs(got - expected)
    # The floor only catches rows of exact zeros, whose norm is zero.
    norm = jnp.sqrt(squares) + 1e-6
    return jnp.sum(~(error <= _ROW_TOLERANCE * norm)), jnp.nanmax(error / norm)


def _expert_of_row(sizes_E: jax.Array, rows: int) -> jax.Array:
    ends_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
    return (jnp.arange(rows, dtype=jnp.int32)[:, None] >= ends_E[None, :]).sum(1, dtype=jnp.int32)


def exact_cases(tiny: bool) -> list[ExactCase]:
    """Uneven, empty, single, padded and overlong groups at few and at many experts, each in all steps."""
    rng = np.random.default_rng(0)
    few = GroupedMatmulShape(1000, 6, 16, 32) if tiny else GroupedMatmulShape(1000, 6, 256, 384)
    cases = {
        "uneven": [31, 2, 130, 7, 350, 480],
        "one has all": [0, 0, 1000, 0, 0, 0],
        "ones": [1, 1, 995, 1, 1, 1],
        "padded": [17, 240, 0, 133, 200, 1],
        "only padding": [0, 0, 0, 0, 0, 0],
        "more than the rows": [300, 0, 400, 500, 600, 0],
    }
    chosen = {name: (few, np.asarray(sizes, np.int32)) for name, sizes in cases.items()}
    if not tiny:
        for experts, rows in ((1, 136), (64, 2048), (256, 2056)):
            many = GroupedMatmulShape(rows, experts, 128, 256)
            chosen[f"zipf over {experts}"] = many, group_sizes.zipf(rows, experts, rng)
        chosen["decode"] = GroupedMatmulShape(8, 64, 256, 128), group_sizes.routed(1, 8, 64, rng, skewed=False)
    return [
        _exact_case(name, step, dims, sizes_E, rng, ours_only=dims != few)
        for name, (dims, sizes_E) in chosen.items()
        for step in STEPS
    ]


def _exact_case(
    name: str,
    step: str,
    dims: GroupedMatmulShape,
    sizes_E: np.ndarray,
    rng: np.random.Generator,
    ours_only: bool,
) -> ExactCase:
    rows, experts, contracted, features = dims
    in_use = min(int(sizes_E.sum()), rows)

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    x_RK, w_EKN, dy_RN = random(rows, contracted), random(experts, contracted, features), random(rows, features)
    x_RK, dy_RN = (side.at[in_use:].set(jnp.nan) for side in (x_RK, dy_RN))
    x, w, dy = (np.asarray(array, np.float64) for array in (x_RK, w_EKN, dy_RN))
    y, dx, dw = np.zeros((rows, features)), np.zeros((rows, contracted)), np.zeros((experts, contracted, features))
    ends_E = np.minimum(np.cumsum(sizes_E), rows)
    for expert, (start, stop) in enumerate(zip([0, *ends_E[:-1]], ends_E, strict=True)):
        own = slice(start, stop)
        y[own], dx[own], dw[expert] = x[own] @ w[expert], dy[own] @ w[expert].T, x[own].T @ dy[own]
    operands, expected = {
        "forward": ((x_RK, w_EKN), y),
        "dgrad": ((dy_RN, w_EKN), dx),
        "wgrad": ((x_RK, dy_RN), dw),
    }[step]
    zero = np.zeros(expected.shape, bool)
    if step == "wgrad":
        zero[np.diff(ends_E, prepend=0) == 0] = True
    else:
        zero[in_use:] = True
    ours_only = ours_only or int(sizes_E.sum()) != rows
    return ExactCase(name, step, dims, (*operands, jnp.asarray(sizes_E)), expected, zero, ours_only)


GROUPED_MATMUL = Operation(
    "grouped_matmul",
    _PARTS,
    shrink,
    contenders,
    operand_sets,
    output,
    weight_bytes,
    work,
    wrong,
    exact_cases,
    HopperTiles,
)
