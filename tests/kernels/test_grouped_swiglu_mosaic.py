"""The fused SwiGLU kernel in Mosaic's interpreter, with its race detection, against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.cases import CASES, Case, make_operands
from pallas_kernels import grouped_swiglu
from pallas_kernels.grouped_swiglu import mosaic_gpu

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("mosaic_interpreter")]


def operands(case: Case) -> tuple[np.ndarray, ...]:
    """x, gate, up (scaled so that the activation bends), sizes, and a weight for each live row."""
    x_RK, gate_EKF, _, sizes = make_operands(case, "bfloat16")
    up_EKF = make_operands(case._replace(rows=case.rows + 1), "bfloat16").w_EKN
    scale = np.asarray(case.contracted**-0.5, gate_EKF.dtype)
    weights = np.where(np.arange(case.rows) < sizes.sum(), np.random.default_rng(1).random(case.rows), 0)
    return x_RK, gate_EKF * scale, up_EKF * scale, sizes, weights.astype(np.float32)


def in_float64(arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x_RK, gate_EKF, up_EKF, sizes, weights = arrays
    gate, up = (np.zeros((x_RK.shape[0], gate_EKF.shape[2])) for _ in range(2))
    start = 0
    for expert, size in enumerate(sizes):
        rows = slice(start, min(start + int(size), x_RK.shape[0]))
        for result, weight in ((gate, gate_EKF), (up, up_EKF)):
            result[rows] = x_RK[rows].astype(np.float64) @ weight[expert].astype(np.float64)
        start += int(size)
    return gate / (1 + np.exp(-gate)) * up * weights[:, None], gate, up


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("many_experts", "sum_above_rows")])
def test_hidden_and_what_the_activation_was_given(name: str) -> None:
    arrays = operands(CASES[name])

    @jax.jit
    def run(*operands: jax.Array, weights_R: jax.Array) -> tuple[jax.Array, ...]:
        return mosaic_gpu.swiglu(*operands, weights_R=weights_R, save_inputs=True)

    for actual, expected in zip(run(*arrays[:4], weights_R=arrays[4]), in_float64(arrays), strict=True):
        found = np.asarray(actual).astype(np.float64)
        np.testing.assert_allclose(found, expected, rtol=2.0**-8, atol=1e-5 * np.abs(expected).max(initial=0.0))
        assert not found[arrays[3].sum() :].any()
    assert not interpret_pallas_call.get_races().races_found


def test_the_public_function_and_its_gradients() -> None:
    """Against the same function on the loop backend: they differ by where bfloat16 rounds."""
    *arrays, weights = map(jnp.asarray, operands(CASES["uneven"]))

    def both(implementation: str) -> tuple[jax.Array, ...]:
        def run(x: jax.Array, gate: jax.Array, up: jax.Array, weights: jax.Array) -> jax.Array:
            return grouped_swiglu(x, gate, up, arrays[3], row_weights_R=weights, implementation=implementation)

        hidden, transpose = jax.vjp(run, *arrays[:3], weights)
        return hidden, *transpose(jnp.ones_like(hidden))

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        actual = jax.jit(both, static_argnums=0)("mosaic_gpu")
    for found, expected in zip(actual, jax.jit(both, static_argnums=0)("xla"), strict=True):
        found, expected = (np.asarray(array).astype(np.float64) for array in (found, expected))
        np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-6 * np.abs(expected).max())
