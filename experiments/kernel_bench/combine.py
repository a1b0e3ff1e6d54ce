"""The combine's entry in the bench: races, operands, contenders and checks.

Steps: "forward" (rows_RD, row_Nk, weights_Nk, choice_R) -> out_ND; "backward" (dout_ND and these) -> (drows_RD,
dweights_Nk). Rows bfloat16, weights float32, as the model has them.

Shape letters: R rows, D width, N tokens, k choices of a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernel_bench.checks import element_fault
from experiments.kernel_bench.contenders import Steps, own_backend, torch_peer
from experiments.kernel_bench.operands import ITEM, generators, normal
from experiments.kernel_bench.operations import Contender, ExactCase, Operands, Operation, Race, Results, Work
from pallas_kernels import combine
from pallas_kernels.combine.shapes import SHAPES, CombineShape

STEPS = ("forward", "backward")
_TOLERANCE = 2.0**-6
_SLACK = 3.0  # some contenders round the weights
_SIZES = ("permuted",)
_RESULTS = {"forward": ("out",), "backward": ("drows", "dweights")}


def _races(*names: str) -> tuple[Race, ...]:
    return tuple(Race(name, step, SHAPES[name], _SIZES, "bytes") for name in names for step in STEPS)


_PARTS: dict[str, tuple[Race, ...]] = {
    # Qwen3-30B-A3B combines as OLMoE does.
    "moe": _races("olmoe_1b_7b", "mixtral_8x7b", "deepseek_v3"),
    "foe": _races("foe_7b_stacked", "foe_1b_stacked"),
}


def contenders(on_gpu: bool) -> tuple[Contender, ...]:
    """Everybody; who cannot run here says why."""
    return (
        _ours("triton", on_gpu),
        _ours("xla", on_gpu),
        Contender("jnp gather and einsum", "peer", {"forward": _gather_and_einsum, "backward": _transposed_einsum}),
        torch_peer(
            "torch index_select", on_gpu, _torch_steps, remark="index_select, mul and sum, gathers backward too"
        ),
    )


def _ours(name: str, on_gpu: bool) -> Contender:
    def steps(module: ModuleType) -> Steps:
        def forward(*operands: jax.Array) -> jax.Array:
            return combine(*operands, implementation=name)  # type: ignore[arg-type, unused-ignore]

        return {"forward": forward, "backward": module.gradients}

    return own_backend("combine", name, on_gpu, steps)


def _gather_and_einsum(rows_RD: jax.Array, row_Nk: jax.Array, weights_Nk: jax.Array, choice_R: jax.Array) -> jax.Array:
    weights_Nk = weights_Nk.astype(rows_RD.dtype)
    return jnp.einsum("nk,nkd->nd", weights_Nk, rows_RD[row_Nk], preferred_element_type=jnp.float32).astype(
        rows_RD.dtype
    )


def _transposed_einsum(
    dout_ND: jax.Array, rows_RD: jax.Array, row_Nk: jax.Array, weights_Nk: jax.Array, choice_R: jax.Array
) -> tuple[jax.Array, ...]:
    """JAX's own gradient, which scatters."""
    _, transpose = jax.vjp(
        lambda rows, weights: _gather_and_einsum(rows, row_Nk, weights, choice_R), rows_RD, weights_Nk
    )
    drows_RD, dweights_Nk = transpose(dout_ND)
    return drows_RD, dweights_Nk


def _torch_steps(torch: Any) -> Steps:
    def forward(rows_RD: Any, row_Nk: Any, weights_Nk: Any, choice_R: Any) -> Any:
        rows_NkD = rows_RD.index_select(0, row_Nk.flatten()).view(*row_Nk.shape, -1)
        return (rows_NkD * weights_Nk[:, :, None].to(rows_RD.dtype)).sum(1)

    def backward(dout_ND: Any, rows_RD: Any, row_Nk: Any, weights_Nk: Any, choice_R: Any) -> tuple[Any, Any]:
        dout_RD = dout_ND.index_select(0, choice_R // row_Nk.shape[1])
        weight_R1 = weights_Nk.flatten().index_select(0, choice_R)[:, None].to(dout_ND.dtype)
        product_R = (rows_RD * dout_RD).sum(1, dtype=torch.float32)
        return dout_RD * weight_R1, product_R.index_select(0, row_Nk.flatten()).view(row_Nk.shape)

    return {"forward": forward, "backward": backward}


def shrink(race: Race) -> Race:
    """The same step on a few kilobytes."""
    return dataclasses.replace(race, dims=CombineShape(32, 2, 64))


def operand_sets(race: Race, kind: str, calls: int, copies: int) -> list[Operands]:
    """Normal rows in random order, each of one choice."""
    rng, keys = generators(race, kind)
    return [_draw(race.step, race.dims, rng, keys) for _ in range(calls)]


def _draw(step: str, dims: CombineShape, rng: np.random.Generator, keys: Any) -> Operands:
    choice_R = rng.permutation(dims.rows).astype(np.int32)
    row_Nk = np.argsort(choice_R).astype(np.int32).reshape(dims.tokens, dims.top_k)
    weights_Nk = jnp.asarray(rng.uniform(size=row_Nk.shape), jnp.float32)
    operands = (normal(next(keys), (dims.rows, dims.width)), jnp.asarray(row_Nk), weights_Nk, jnp.asarray(choice_R))
    return operands if step == "forward" else (normal(next(keys), (dims.tokens, dims.width)), *operands)


def output(step: str, dims: CombineShape) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The tokens, or the gradients of rows and weights."""
    if step == "forward":
        return (jax.ShapeDtypeStruct((dims.tokens, dims.width), jnp.bfloat16),)
    return (
        jax.ShapeDtypeStruct((dims.rows, dims.width), jnp.bfloat16),
        jax.ShapeDtypeStruct((dims.tokens, dims.top_k), jnp.float32),
    )


def work(race: Race, sets: Sequence[Operands]) -> Work:
    """Rows and tokens moved once, the rows twice backward, and the indices that a pass needs."""
    tokens, top_k, width = race.dims
    passes = 1 if race.step == "forward" else 2
    rows_and_tokens = (passes * tokens * top_k + tokens) * width * ITEM
    indices_and_weights = tokens * top_k * 4 * (2 if race.step == "forward" else 4)
    return Work(2.0 * passes * tokens * top_k * width, float(rows_and_tokens + indices_and_weights), 0.0)


def wrong(race: Race, operands: Operands, results: Results) -> str | None:
    """Compares every element with sums in float32."""
    for name, result, expected in zip(_RESULTS[race.step], results, _expected(operands), strict=True):
        fault = element_fault(result, expected, _TOLERANCE)
        if fault is not None:
            return f"{name}: {fault}"
    return None


@jax.jit
def _expected(operands: Operands) -> tuple[jax.Array, ...]:
    *gradient, rows_RD, row_Nk, weights_Nk, choice_R = operands
    rows_RD = rows_RD.astype(jnp.float32)
    if not gradient:
        return (jnp.stack([weights_Nk[:, j, None] * rows_RD[row_Nk[:, j]] for j in range(row_Nk.shape[1])]).sum(0),)
    dout_RD = gradient[0].astype(jnp.float32)[choice_R // row_Nk.shape[1]]
    return weights_Nk.reshape(-1)[choice_R][:, None] * dout_RD, (rows_RD * dout_RD).sum(1)[row_Nk]


def exact_cases(tiny: bool) -> list[ExactCase]:
    """All choices with rows, and for ours choices without a row and rows of no choice, which hold NaN."""
    rng = np.random.default_rng(0)
    dims = CombineShape(13, 3, 24) if tiny else CombineShape(133, 8, 768)
    return [_exact_case(name, step, dims, rng) for name in ("all", "some have no row") for step in STEPS]


def _exact_case(name: str, step: str, dims: CombineShape, rng: np.random.Generator) -> ExactCase:
    keys = iter(jax.random.split(jax.random.key(int(rng.integers(2**31))), 2))
    dout_ND, rows_RD, row_Nk, weights_Nk, choice_R = _draw("backward", dims, rng, keys)
    none_R = rng.random(dims.rows) < (0.0 if name == "all" else 0.3)
    rows_RD = jnp.where(none_R[:, None], jnp.nan, rows_RD)
    no_row_Nk = none_R[np.asarray(row_Nk)]
    row_Nk, choice_R = jnp.where(no_row_Nk, dims.rows, row_Nk), jnp.where(none_R, dims.rows, choice_R)
    rows, weights, dout = (np.asarray(array, np.float64) for array in (rows_RD, weights_Nk, dout_ND))
    out, drows, dweights = np.zeros(dout.shape), np.zeros(rows.shape), np.zeros(weights.shape)
    for token, choice in zip(*np.nonzero(~no_row_Nk), strict=True):
        row = int(row_Nk[token, choice])
        out[token] += weights[token, choice] * rows[row]
        drows[row] = weights[token, choice] * dout[token]
        dweights[token, choice] = rows[row] @ dout[token]
    operands: Operands = (rows_RD, row_Nk, weights_Nk, choice_R)
    if step == "forward":
        return ExactCase(name, step, dims, operands, (out,), (no_row_Nk.all(1),), name != "all", _SLACK)
    gradients, zero = (drows, dweights), (none_R, no_row_Nk)
    return ExactCase(name, step, dims, (dout_ND, *operands), gradients, zero, name != "all", _SLACK)


COMBINE = Operation(
    "combine", _PARTS, shrink, contenders, operand_sets, output, lambda race: 0, work, wrong, exact_cases
)  # fmt: skip
