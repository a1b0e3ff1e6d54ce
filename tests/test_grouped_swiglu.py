"""Grouped SwiGLU against its formula: the dense reference of the grouped matmul, differentiated by JAX."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import grouped_matmul, grouped_swiglu
from pallas_kernels.gathered_rows import GatheredRows
from pallas_kernels.grouped_matmul.api import GroupedMatmulError
from pallas_kernels.grouped_swiglu.api import PREACTIVATIONS

SIZES = {"uneven": (17, 0, 40, 23), "padded": (0, 30, 1, 9), "only_padding": (0, 0, 0, 0), "one": (0, 80, 0, 0)}


def operands(sizes: tuple[int, ...], dtype: str, rows: int = 80) -> list[jax.Array]:
    """x, gate, up, row weights and a cotangent; rows past the last group are NaN in all that have rows."""
    random = np.random.default_rng(0)
    arrays = [random.normal(size=shape) for shape in ((rows, 16), (4, 16, 24), (4, 16, 24), (rows,), (rows, 24))]
    for position in (0, 3, 4):
        arrays[position][sum(sizes) :] = np.nan
    return [jnp.asarray(array, dtype) for array in arrays]


def formula(x: jax.Array, gate: jax.Array, up: jax.Array, weights: jax.Array, *, sizes: jax.Array) -> jax.Array:
    multiply = functools.partial(grouped_matmul, implementation="reference")
    live = jnp.arange(x.shape[0], dtype=jnp.int32) < sizes.sum(dtype=jnp.int32)
    gate, up = multiply(x, gate, sizes), multiply(x, up, sizes)
    return jnp.where(live, weights, jnp.zeros_like(weights))[:, None] * jax.nn.silu(gate) * up


def value_and_gradients(function: Callable[..., jax.Array], arrays: list[jax.Array]) -> list[np.ndarray]:
    *inputs, cotangent = arrays
    value, transpose = jax.vjp(function, *inputs)
    return [np.asarray(result) for result in (value, *transpose(cotangent))]


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float64") for name in SIZES), ("padded", "float32")])
def test_value_and_every_gradient(name: str, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        arrays, sizes = operands(SIZES[name], dtype), jnp.asarray(SIZES[name], jnp.int32)

        def ours(x: jax.Array, gate: jax.Array, up: jax.Array, weights: jax.Array) -> jax.Array:
            return grouped_swiglu(x, gate, up, sizes, row_weights_R=weights, implementation="xla")

        clean = [jnp.nan_to_num(array) for array in arrays]
        live = (jnp.arange(80, dtype=jnp.int32) < sizes.sum(dtype=jnp.int32))[:, None]
        clean[-1] = jnp.where(live, clean[-1], jnp.zeros_like(clean[-1]))
        expected = value_and_gradients(functools.partial(formula, sizes=sizes), clean)
        actual = value_and_gradients(ours, arrays)
    for found, wanted in zip(actual, expected, strict=True):
        assert found.dtype == dtype
        scale = np.abs(wanted).max(initial=0.0)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=scale * {"float64": 1e-13, "float32": 1e-5}[dtype])
    assert not actual[0][sum(SIZES[name]) :].any() and not actual[1][sum(SIZES[name]) :].any()


def test_without_weights_it_is_weights_of_one() -> None:
    x, gate, up, _, _ = operands(SIZES["padded"], "float32")
    sizes = jnp.asarray(SIZES["padded"], jnp.int32)
    plain = grouped_swiglu(x, gate, up, sizes)
    np.testing.assert_array_equal(plain, grouped_swiglu(x, gate, up, sizes, row_weights_R=jnp.ones(80)))
    np.testing.assert_allclose(plain, grouped_swiglu(x, gate, up, sizes, implementation="reference"), atol=1e-5)


def test_bfloat16_activation_is_computed_in_float32() -> None:
    x, gate, up, _, _ = operands(SIZES["one"], "bfloat16")
    sizes = jnp.asarray(SIZES["one"], jnp.int32)
    gates, ups = (grouped_matmul(x, w, sizes).astype(jnp.float32) for w in (gate, up))
    expected = (jax.nn.silu(gates) * ups).astype(jnp.bfloat16)
    np.testing.assert_array_equal(grouped_swiglu(x, gate, up, sizes), expected)


def test_gradients_inside_shard_map() -> None:
    mesh = jax.make_mesh((2, 4), ("data", "group"), axis_types=(AxisType.Auto,) * 2)
    x, gate, up, _, cotangent = (jnp.nan_to_num(array) for array in operands(SIZES["padded"], "float32"))
    sizes = jnp.asarray([2, 0, 5, 1], jnp.int32)  # of the 10 rows a device has

    def local(x: jax.Array, gate: jax.Array, up: jax.Array) -> jax.Array:
        return grouped_swiglu(x, gate, up, sizes)

    spec = P(("data", "group"))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(spec, P(), P()), out_specs=spec)

    def dense(x: jax.Array, gate: jax.Array, up: jax.Array) -> jax.Array:
        parts = [formula(part, gate, up, jnp.ones(10), sizes=sizes) for part in x.reshape(8, 10, -1)]
        return jnp.concatenate(parts)

    actual, expected = (value_and_gradients(jax.jit(f), [x, gate, up, cotangent]) for f in (sharded, dense))
    for found, wanted in zip(actual, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_rows_of_tokens_are_the_rows_themselves_and_save_the_tokens_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """30 tokens with two experts each or one; rows 40 to 79 are padding."""
    random, sizes = np.random.default_rng(1), jnp.asarray([11, 0, 20, 9], jnp.int32)
    _, gate, up, weights, cotangent = operands((11, 0, 20, 9), "float32")
    x_NK = jnp.asarray(random.normal(size=(30, 16)), jnp.float32)
    token_R = np.full(80, 30)
    token_R[:40] = random.permutation(np.r_[:30, :10])
    row_AN = np.full((2, 30), 80)
    for row, token in enumerate(token_R[:40]):
        row_AN[int(row_AN[0, token] < 80), token] = row
    rows = GatheredRows(jnp.asarray(token_R, jnp.int32), jnp.asarray(row_AN, jnp.int32))

    def gathered(x: jax.Array, gate: jax.Array, up: jax.Array, weights: jax.Array) -> jax.Array:
        return grouped_swiglu(x, gate, up, sizes, rows=rows, row_weights_R=weights)

    def copied(x: jax.Array, gate: jax.Array, up: jax.Array, weights: jax.Array) -> jax.Array:
        x_RK = jnp.where(token_R[:, None] < 30, x[np.minimum(token_R, 29)], jnp.zeros_like(x[:1]))
        return grouped_swiglu(x_RK, gate, up, sizes, row_weights_R=weights)

    arrays = [x_NK, gate, up, weights, cotangent]
    for found, wanted in zip(value_and_gradients(gathered, arrays), value_and_gradients(copied, arrays), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    print_saved_residuals(gathered, x_NK, gate, up, jnp.nan_to_num(weights))
    saved = capsys.readouterr().out
    assert "[30,16]" in saved and "[80,16]" not in saved


def test_a_checkpoint_policy_can_save_its_residuals(capsys: pytest.CaptureFixture[str]) -> None:
    x, gate, up, _, _ = operands(SIZES["one"], "float32")
    sizes = jnp.asarray(SIZES["one"], jnp.int32)
    policies = jax.checkpoint_policies
    saved = {}
    for policy in (policies.nothing_saveable, policies.save_only_these_names(PREACTIVATIONS)):
        print_saved_residuals(jax.checkpoint(lambda x: grouped_swiglu(x, gate, up, sizes), policy=policy), x)
        saved[policy] = capsys.readouterr().out.count("[80,24]")
    assert list(saved.values()) == [0, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up_EKF": jnp.ones((2, 3, 6))}, r"gate_EKF is float32\(2, 3, 5\) and up_EKF is float32\(2, 3, 6\): make"),
        ({"row_weights_R": jnp.ones(3)}, r"row_weights_R has shape \(3,\): give one per row, \(4,\)"),
        ({"x_XK": jnp.ones((4, 7))}, "x_RK has 7 features"),
        (
            {"rows": GatheredRows(jnp.zeros(6, jnp.int32), jnp.zeros((2, 3), jnp.int32))},
            r"rows.token_R has shape \(6,\) and rows.row_AN \(2, 3\): .* with the 4 tokens of x_XK",
        ),
        ({"implementation": "mosaic_gpu"}, "takes bfloat16 only, not float32|needs jax >= 0.11.1"),
    ],
)
def test_bad_arguments_name_the_way_out(change: dict[str, object], message: str) -> None:
    weights = jnp.ones((2, 3, 5))
    arguments = {"x_XK": jnp.ones((4, 3)), "gate_EKF": weights, "up_EKF": weights}
    with pytest.raises(GroupedMatmulError, match=message):
        grouped_swiglu(**({"group_sizes_E": jnp.ones(2, jnp.int32)} | arguments | change))
