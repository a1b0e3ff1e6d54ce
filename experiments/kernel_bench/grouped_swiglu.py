"""The fused gate and up projections with their activation: races, random operands, work and checks.

Steps: "forward" (x_RK, gate_EKF, up_EKF, group_sizes_E) -> hidden_RF, as in inference; "forward+backward" of these and
grad_RF -> (hidden_RF, dx_RK, dgate_EKF, dup_EKF), as in training.

Shape letters: R rows sorted by expert, K width, F expert hidden size, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernel_bench.checks import element_fault, projected_product, projection_fault
from experiments.kernel_bench.grouped_swiglu_contenders import contenders
from experiments.kernel_bench.hopper_tiles import SwigluTiles
from experiments.kernel_bench.operands import EXACT_ROWS, EXACT_SIZES, ITEM, draw_sizes, generators, normal, slices
from experiments.kernel_bench.operations import ExactCase, Operands, Operation, Race, Results, Work
from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul.shapes import SHAPES, GroupedMatmulShape

STEPS = ("forward", "forward+backward")
_PRODUCT_TOLERANCE, _GRADIENT_TOLERANCE = 0.0125, 0.04  # of a row's norm; gradients are products of rounded products
_ELEMENT_TOLERANCE = 2.0**-6  # of the activation, whose factors are rounded too
_SLACK = {"forward": 3.0, "forward+backward": 6.0}


def _races(model: str, steps: tuple[str, ...] = STEPS) -> tuple[Race, ...]:
    return tuple(Race(f"{model}/up", step, SHAPES[f"{model}/up"], ("uniform", "zipf")) for step in steps)


_PARTS: dict[str, tuple[Race, ...]] = {
    "acceptance_gpu": _races("acceptance_gpu"),
    **{model: _races(model) for model in ("foe_7b_stacked", "qwen3_30b_a3b", "mixtral_8x7b")},
    # Two calls' gradients of all its experts do not fit into the memory beside the weights.
    "deepseek_v3": _races("deepseek_v3", ("forward",)),
    **{model: _races(model) for model in ("foe_1b_stacked", "foe_7b", "foe_1b", "olmoe_1b_7b")},
}


def shrink(race: Race) -> Race:
    """The same step on a few kilobytes."""
    return dataclasses.replace(race, dims=GroupedMatmulShape(64, 4, 16, 32))


def operand_sets(race: Race, kind: str, calls: int, copies: int) -> list[Operands]:
    """Normal bfloat16 operands of `calls` calls, none of which shares rows or sizes with another."""
    rng, keys = generators(race, kind)
    rows, experts, width, hidden = race.dims
    weights = [
        tuple(normal(next(keys), (experts, width, hidden), width**-0.5) for _ in range(2)) for _ in range(copies)
    ]
    sets: list[Operands] = []
    for call in range(calls):
        sizes_E = jnp.asarray(draw_sizes(race.dims, kind, rng))
        grads = () if race.step == "forward" else (normal(next(keys), (rows, hidden)),)
        sets.append((normal(next(keys), (rows, width)), *weights[call % copies], sizes_E, *grads))
    return sets


def output(step: str, dims: GroupedMatmulShape) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The activation, and in training all gradients."""
    rows, experts, width, hidden = dims
    shapes: list[tuple[int, ...]] = [(rows, hidden)]
    if step != "forward":
        shapes += [(rows, width), (experts, width, hidden), (experts, width, hidden)]
    return tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)


def weight_bytes(race: Race) -> int:
    """Bytes of all experts' gates and ups."""
    return 2 * race.dims.experts * race.dims.contracted * race.dims.features * ITEM


def work(race: Race, sets: Sequence[Operands]) -> Work:
    """Rows, and the weights of experts with rows, read and written once a pass; gradients written for all experts."""
    rows, experts, width, hidden = race.dims
    busy = float(np.mean([np.count_nonzero(np.asarray(operands[3])) for operands in sets]))
    one_expert = 2 * width * hidden * ITEM
    flops = 4.0 * rows * width * hidden
    forward_bytes = rows * (width + hidden) * ITEM + one_expert * busy
    if race.step == "forward":
        return Work(flops, forward_bytes, one_expert * busy)
    # Forward writes gate and up beside the activation; backward reads them, x and grad, and writes dx.
    row_bytes = rows * (2 * hidden + 3 * hidden + 2 * width) * ITEM
    return Work(3 * flops, forward_bytes + row_bytes + one_expert * (busy + experts), one_expert * busy)


def wrong(race: Race, operands: Operands, results: Results) -> str | None:
    """Compares the activation element by element, and the gradients by a random projection of every row.

    Gate and up come from our plain XLA backend, whose products are checked by projection here too.

    Raises:
      RuntimeError: those products are wrong, so that nothing can be checked.
    """
    x_RK, *weights, sizes_E = operands[:4]
    products = [_product(x_RK, w_EKF, sizes_E) for w_EKF in weights]
    for product_RF, w_EKF in zip(products, weights, strict=True):
        projected_R = projected_product("forward", x_RK, w_EKF, sizes_E)
        fault = projection_fault(product_RF, projected_R, _PRODUCT_TOLERANCE)
        if fault is not None:
            raise RuntimeError(f"what results are compared with is wrong itself: {fault}")
    fault = element_fault(results[0], _activate(*products), _ELEMENT_TOLERANCE)
    if fault is not None:
        return f"activation: {fault}"
    if race.step == "forward":
        return None
    d_products = _activation_gradients(*products, operands[4])
    projected = [
        sum(projected_product("dgrad", dy, w, sizes_E) for dy, w in zip(d_products, weights, strict=True)),
        *(projected_product("wgrad", x_RK, dy, sizes_E) for dy in d_products),
    ]
    for name, gradient, expected in zip(("dx", "dgate", "dup"), results[1:], projected, strict=True):
        fault = projection_fault(gradient, expected, _GRADIENT_TOLERANCE)
        if fault is not None:
            return f"{name}: {fault}"
    return None


@jax.jit
def _product(x_RK: jax.Array, w_EKF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return grouped_matmul(x_RK, w_EKF, sizes_E, implementation="xla")


@jax.jit
def _activate(gate_RF: jax.Array, up_RF: jax.Array) -> jax.Array:
    return jax.nn.silu(gate_RF.astype(jnp.float32)) * up_RF.astype(jnp.float32)


@jax.jit
def _activation_gradients(gate_RF: jax.Array, up_RF: jax.Array, grad_RF: jax.Array) -> tuple[jax.Array, jax.Array]:
    _, transpose = jax.vjp(_activate, gate_RF, up_RF)
    d_gate_RF, d_up_RF = transpose(grad_RF.astype(jnp.float32))
    return d_gate_RF, d_up_RF


def exact_cases(tiny: bool) -> list[ExactCase]:
    """The sizes of the grouped matmul's cases with few experts, each in both steps."""
    rng = np.random.default_rng(0)
    dims = GroupedMatmulShape(EXACT_ROWS, 6, 16, 32) if tiny else GroupedMatmulShape(EXACT_ROWS, 6, 256, 384)
    return [
        _exact_case(name, step, dims, np.asarray(sizes, np.int32), rng)
        for name, sizes in EXACT_SIZES.items()
        for step in STEPS
    ]


def _exact_case(
    name: str, step: str, dims: GroupedMatmulShape, sizes_E: np.ndarray, rng: np.random.Generator
) -> ExactCase:
    rows, experts, width, hidden = dims
    in_use = min(int(sizes_E.sum()), rows)

    def random(scale: float, *shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * scale, jnp.bfloat16)

    x_RK = random(1, rows, width).at[in_use:].set(jnp.nan)
    grad_RF = random(1, rows, hidden).at[in_use:].set(jnp.nan)
    weights = [random(width**-0.5, experts, width, hidden) for _ in range(2)]
    x, dh, gate_w, up_w = (np.asarray(array, np.float64) for array in (x_RK, grad_RF, *weights))
    h, dx, d_gate_w, d_up_w = (np.zeros(result.shape) for result in output("forward+backward", dims))
    groups = slices(sizes_E, rows)
    for expert, own in enumerate(groups):
        gate, up = x[own] @ gate_w[expert], x[own] @ up_w[expert]
        sigmoid = 1 / (1 + np.exp(-gate))
        h[own] = gate * sigmoid * up
        d_gate, d_up = dh[own] * up * sigmoid * (1 + gate * (1 - sigmoid)), dh[own] * gate * sigmoid
        dx[own] = d_gate @ gate_w[expert].T + d_up @ up_w[expert].T
        d_gate_w[expert], d_up_w[expert] = x[own].T @ d_gate, x[own].T @ d_up
    padding, unused = np.arange(rows) >= in_use, np.array([own.start == own.stop for own in groups])
    count = len(output(step, dims))
    operands = (x_RK, *weights, jnp.asarray(sizes_E), *([] if step == "forward" else [grad_RF]))
    expected, zero = (h, dx, d_gate_w, d_up_w)[:count], (padding, padding, unused, unused)[:count]
    return ExactCase(name, step, dims, operands, expected, zero, int(sizes_E.sum()) != rows, _SLACK[step])


GROUPED_SWIGLU = Operation(
    "grouped_swiglu",
    _PARTS,
    shrink,
    contenders,
    operand_sets,
    output,
    weight_bytes,
    work,
    wrong,
    exact_cases,
    SwigluTiles,
)
