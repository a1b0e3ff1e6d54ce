"""The grouped matmul's entry in the bench: its shapes, random operands, work and checks.

Shape letters: R rows sorted by expert, K contracted features, N output features, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernel_bench import checks, group_sizes
from experiments.kernel_bench.grouped_matmul_contenders import contenders
from experiments.kernel_bench.hopper_tiles import MatmulTiles
from experiments.kernel_bench.operands import EXACT_ROWS, EXACT_SIZES, ITEM, draw_sizes, generators, normal, slices
from experiments.kernel_bench.operations import ExactCase, Operands, Operation, Race, Results, Work
from pallas_kernels.grouped_matmul.shapes import DECODE_SHAPES, DECODE_TOKENS, SHAPES, DecodeShape, GroupedMatmulShape

STEPS = ("forward", "dgrad", "wgrad")
_ROW_TOLERANCE = 0.0125

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
    return tuple(Race(name, "forward", DECODE_SHAPES[name], ("uniform", "zipf"), "weight_bytes") for name in names)


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
    decode = isinstance(race.dims, DecodeShape)
    tiny: Dims = DecodeShape(race.dims.tokens, 2, 4, 16, 32) if decode else GroupedMatmulShape(64, 4, 16, 32)
    return dataclasses.replace(race, dims=tiny)


def operand_sets(race: Race, kind: str, calls: int, copies: int) -> list[Operands]:
    """Normal bfloat16 operands of `calls` calls, none of which shares rows or sizes with another."""
    rng, keys = generators(race, kind)
    rows, experts, contracted, features = _sizes(race.dims)
    drawn = 0 if race.step == "wgrad" else copies
    weights = [normal(next(keys), (experts, contracted, features), contracted**-0.5) for _ in range(drawn)]
    sets: list[Operands] = []
    for call in range(calls):
        sizes_E = jnp.asarray(draw_sizes(race.dims, kind, rng))
        left = normal(next(keys), (rows, features if race.step == "dgrad" else contracted))
        right = weights[call % copies] if weights else normal(next(keys), (rows, features))
        sets.append((left, right, sizes_E))
    return sets


def _sizes(dims: Dims) -> tuple[int, int, int, int]:
    return dims.rows, dims.experts, dims.contracted, dims.features


def output(step: str, dims: Dims) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The step's one result."""
    rows, experts, contracted, features = _sizes(dims)
    shapes = {"forward": (rows, features), "dgrad": (rows, contracted), "wgrad": (experts, contracted, features)}
    return (jax.ShapeDtypeStruct(shapes[step], jnp.bfloat16),)


def weight_bytes(race: Race) -> int:
    """Bytes of all experts' weights that the step reads."""
    _, experts, contracted, features = _sizes(race.dims)
    return 0 if race.step == "wgrad" else experts * contracted * features * ITEM


def work(race: Race, sets: Sequence[Operands]) -> Work:
    """Every row in use read and written once, and once the weights of experts with rows; wgrad writes all experts."""
    rows, experts, contracted, features = _sizes(race.dims)
    busy = float(np.mean([np.count_nonzero(np.asarray(sizes_E)) for *_, sizes_E in sets]))
    one_expert = contracted * features * ITEM
    weights = one_expert * (experts if race.step == "wgrad" else busy)
    row_bytes = rows * (contracted + features) * ITEM
    return Work(2.0 * rows * contracted * features, row_bytes + weights, one_expert * busy)


def wrong(race: Race, operands: Operands, results: Results) -> str | None:
    """Checks a result of any size against a random projection of it, every row of every expert in float32."""
    return checks.projection_fault(results[0], checks.projected_product(race.step, *operands), _ROW_TOLERANCE)


def exact_cases(tiny: bool) -> list[ExactCase]:
    """Uneven, empty, single, padded and overlong groups at few and at many experts, each in all steps."""
    rng = np.random.default_rng(0)
    few = GroupedMatmulShape(EXACT_ROWS, 6, 16, 32) if tiny else GroupedMatmulShape(EXACT_ROWS, 6, 256, 384)
    chosen = {name: (few, np.asarray(sizes, np.int32)) for name, sizes in EXACT_SIZES.items()}
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
    groups = slices(sizes_E, rows)
    for expert, own in enumerate(groups):
        y[own], dx[own], dw[expert] = x[own] @ w[expert], dy[own] @ w[expert].T, x[own].T @ dy[own]
    operands, expected = {
        "forward": ((x_RK, w_EKN), y),
        "dgrad": ((dy_RN, w_EKN), dx),
        "wgrad": ((x_RK, dy_RN), dw),
    }[step]
    zero = np.zeros(expected.shape, bool)
    if step == "wgrad":
        zero[[own.start == own.stop for own in groups]] = True
    else:
        zero[in_use:] = True
    ours_only = ours_only or int(sizes_E.sum()) != rows
    return ExactCase(name, step, dims, (*operands, jnp.asarray(sizes_E)), (expected,), (zero,), ours_only)


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
    MatmulTiles,
)
