"""Combine: every backend against the reference, on one shared set of cases, and the reference against a loop.

A new backend is tested by adding its name to `BACKENDS`; `tests/kernels` runs the same cases through Triton.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from foejax.models.rows import collect_rows, plan_rows
from pallas_kernels.combine.api import CombineError, combine

BACKENDS = ("xla",)


class Case(NamedTuple):
    tokens: int
    k: int
    width: int
    rows: int
    live: float = 1.0  # share of the choices that have a row


CASES = {
    "one_choice": Case(24, 1, 48, 24),
    "all_live": Case(20, 4, 48, 80),
    "some_live": Case(20, 4, 48, 80, 0.6),
    "few_rows": Case(64, 8, 32, 20, 0.03),
    "none_live": Case(20, 4, 48, 80, 0.0),
    "odd_width": Case(9, 3, 37, 30, 0.9),
    "one_token": Case(1, 6, 130, 6),
    "no_tokens": Case(0, 2, 8, 5),
    "no_rows": Case(6, 2, 8, 0, 0.0),
}
# What needs more compilations runs on these alone.
OTHER_DTYPES = ("some_live", "odd_width")


class Operands(NamedTuple):
    rows: jax.Array  # [R, D]
    row: jax.Array  # [N, k]
    weights: jax.Array  # [N, k]
    choice: jax.Array  # [R]
    cotangent: jax.Array  # [N, D]


def make_operands(case: Case, dtype: str, weights_dtype: str | None = None) -> Operands:
    """Random operands; rows of no choice and weights of choices without a row are NaN."""
    rng = np.random.default_rng(0)
    choices = case.tokens * case.k
    live = rng.permutation(choices)[: min(round(case.live * choices), case.rows)]
    row = rng.choice([-1, case.rows, case.rows + 7, -case.rows - 1], choices)
    row[live] = rng.permutation(case.rows)[: live.size]
    choice = rng.choice([-1, choices, choices + 3], case.rows)
    choice[row[live]] = live
    rows = np.full((case.rows, case.width), np.nan)
    rows[row[live]] = rng.normal(size=(live.size, case.width))
    weights = np.full(choices, np.nan)
    weights[live] = rng.normal(size=live.size)
    shape = (case.tokens, case.k)
    return Operands(
        jnp.asarray(rows, dtype),
        jnp.asarray(row.reshape(shape), jnp.int32),
        jnp.asarray(weights.reshape(shape), weights_dtype or dtype),
        jnp.asarray(choice, jnp.int32),
        jnp.asarray(rng.normal(size=(case.tokens, case.width)), dtype),
    )


@functools.partial(jax.jit, static_argnames="implementation")
def sums_and_gradients(operands: Operands, *, implementation: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    def add_up(rows: jax.Array, weights: jax.Array) -> jax.Array:
        return combine(rows, operands.row, weights, operands.choice, implementation=implementation)

    out, transpose = jax.vjp(add_up, operands.rows, operands.weights)
    return out, *transpose(operands.cotangent)


def assert_same_as_reference(case: Case, dtype: str, implementation: str, *, weights_dtype: str | None = None) -> None:
    """Within a few roundings of the largest magnitude; exactly zero where there is no row or no choice.

    bfloat16 is held against the reference in float32, so that more than one rounding would show.
    """
    operands = make_operands(case, dtype, weights_dtype)
    actual = sums_and_gradients(operands, implementation=implementation)
    exact = operands
    if dtype == "bfloat16":
        exact = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, operands)
    expected = sums_and_gradients(exact, implementation="reference")
    for a, b, dtype_of in zip(actual, expected, (dtype, dtype, operands.weights.dtype), strict=True):
        assert a.dtype == dtype_of and a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        rounding = 2.0**-8 if jnp.dtype(dtype_of) == jnp.bfloat16 else 0.0
        scale = np.abs(b).max() if b.size else 0.0
        np.testing.assert_allclose(a, b, rtol=rounding, atol=scale * (1e-14 if dtype == "float64" else 1e-6))
    has_row = (operands.row >= 0) & (operands.row < case.rows)
    has_token = (operands.choice >= 0) & (operands.choice < case.tokens * case.k)
    out, drows, dweights = actual
    assert not np.any(np.asarray(out)[~np.any(has_row, axis=1)])
    assert not np.any(np.asarray(drows)[~has_token]) and not np.any(np.asarray(dweights)[~has_row])


def test_reference_is_a_loop_over_choices() -> None:
    case = CASES["some_live"]
    rows, row, weights, choice, cotangent = operands = make_operands(case, "float32")
    out, drows, dweights = (np.zeros(array.shape, np.float64) for array in (cotangent, rows, weights))
    for n in range(case.tokens):
        for j in range(case.k):
            r = int(row[n, j])
            if 0 <= r < case.rows:
                assert int(choice[r]) == n * case.k + j
                out[n] += weights[n, j] * rows[r]
                drows[r] = weights[n, j] * cotangent[n]
                dweights[n, j] = rows[r] @ cotangent[n]
    for a, b in zip(sums_and_gradients(operands, implementation="reference"), (out, drows, dweights), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())


@pytest.mark.parametrize(
    ("case_name", "dtype", "weights_dtype"),
    [
        *((name, "float32", "float32") for name in CASES),
        *((name, "float64", "float64") for name in OTHER_DTYPES),
        *((name, "bfloat16", weights_dtype) for name in OTHER_DTYPES for weights_dtype in ("bfloat16", "float32")),
    ],
)
@pytest.mark.parametrize("implementation", BACKENDS)
def test_sums_and_gradients_equal_the_reference(
    implementation: str, case_name: str, dtype: str, weights_dtype: str
) -> None:
    with jax.enable_x64(dtype == "float64"):
        assert_same_as_reference(CASES[case_name], dtype, implementation, weights_dtype=weights_dtype)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_bfloat16_is_rounded_once(implementation: str) -> None:
    """Positive terms of many choices: a sum kept in bfloat16 would drift by several roundings."""
    operands = jax.tree.map(jnp.abs, make_operands(Case(16, 32, 64, 512), "bfloat16"))
    exact = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, operands)
    row = jnp.asarray(np.random.default_rng(1).permutation(512).reshape(16, 32), jnp.int32)
    choice = jnp.argsort(row.reshape(-1)).astype(jnp.int32)
    operands, exact = (o._replace(row=row, choice=choice) for o in (operands, exact))
    expected = sums_and_gradients(exact, implementation="reference")
    for a, b in zip(sums_and_gradients(operands, implementation=implementation), expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2.0**-8)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_serves_the_models_experts(implementation: str) -> None:
    """`collect_rows` and the weighted sum of the expert layer, over the model's own row plan."""
    groups, tokens, k, experts, width, kept = 2, 12, 3, 5, 16, 60
    rng = np.random.default_rng(2)
    indices = jnp.asarray(rng.integers(0, experts, (groups, tokens, k)), jnp.int32)
    valid = jnp.asarray(rng.random((groups, tokens, k)) < 0.7)
    plan = plan_rows(indices, valid, experts, kept)
    rows = jnp.asarray(rng.normal(size=(kept, width)), jnp.float32)
    weights = jnp.where(valid, jnp.asarray(rng.random((groups, tokens, k)), jnp.float32), 0)
    cotangent = jnp.asarray(rng.normal(size=(groups, tokens, width)), jnp.float32)

    def of_model(rows: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sum(weights[..., None] * collect_rows(rows, plan.row_SNk, plan.choice_R), axis=2)

    def of_kernel(rows: jax.Array, weights: jax.Array) -> jax.Array:
        flat = (plan.row_SNk.reshape(-1, k), weights.reshape(-1, k))
        return combine(rows, *flat, plan.choice_R, implementation=implementation).reshape(groups, tokens, width)

    @functools.partial(jax.jit, static_argnums=0)
    def run(add_up: Callable[..., jax.Array], rows: jax.Array, weights: jax.Array) -> tuple[jax.Array, ...]:
        out, transpose = jax.vjp(add_up, rows, weights)
        return out, *transpose(cotangent)

    assert 0 < int(plan.group_sizes.sum()) < kept
    for a, b in zip(run(of_kernel, rows, weights), run(of_model, rows, weights), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("axes", [("data", None), (None, "group"), ("data", "group")])
def test_gradients_inside_shard_map(implementation: str, axes: tuple[str | None, str | None]) -> None:
    """Rows and weights vary over different mesh axes; a replicated operand's gradient is the sum over the mesh."""
    rows_axis, weights_axis = axes
    mesh = jax.make_mesh((2, 2), ("data", "group"), axis_types=(AxisType.Auto,) * 2)
    operands = make_operands(CASES["all_live"], "float32")
    rows = jnp.stack([operands.rows, 2 - operands.rows])[: 2 if rows_axis else 1]
    weights = jnp.stack([operands.weights, 3 * operands.weights])[: 2 if weights_axis else 1]
    scale = jnp.arange(1.0, 1 + rows.shape[0] * weights.shape[0]).reshape(rows.shape[0], weights.shape[0], 1, 1)

    def local(rows: jax.Array, weights: jax.Array, *, name: str) -> jax.Array:
        return combine(rows[0], operands.row, weights[0], operands.choice, implementation=name)[None, None]

    def dense(rows: jax.Array, weights: jax.Array) -> jax.Array:
        one = functools.partial(local, name="reference")
        return jnp.concatenate([jnp.concatenate([one(r[None], w[None]) for w in weights], axis=1) for r in rows])

    sharded = jax.shard_map(
        functools.partial(local, name=implementation),
        mesh=mesh,
        in_specs=(P(rows_axis), P(weights_axis)),
        out_specs=P(rows_axis, weights_axis),
    )

    def loss(add_up: Callable[..., jax.Array], rows: jax.Array, weights: jax.Array) -> jax.Array:
        return (add_up(rows, weights) ** 2 * scale).sum()

    actual, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, run), (0, 1)))(rows, weights) for run in (sharded, dense)
    )
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("implementation", BACKENDS)
def test_scan_of_checkpointed_layers(implementation: str) -> None:
    operands = make_operands(CASES["all_live"], "float32")

    def loss(rows: jax.Array, weights: jax.Array, *, name: str) -> jax.Array:
        def layer(rows: jax.Array, weights: jax.Array) -> tuple[jax.Array, None]:
            out = combine(rows, operands.row, weights, operands.choice, implementation=name)
            return rows + jnp.tanh(jnp.repeat(out, 4, axis=0)), None

        layers = jnp.stack([weights, 2 * weights, -weights])
        return (jax.lax.scan(jax.checkpoint(layer), rows, layers)[0] ** 2).sum()

    actual, expected = (
        jax.jit(jax.grad(functools.partial(loss, name=name), (0, 1)))(operands.rows, operands.weights)
        for name in (implementation, "reference")
    )
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("implementation", BACKENDS)
def test_no_array_of_tokens_by_choices_by_width(implementation: str) -> None:
    tokens, k, width = 256, 8, 256
    rows = tokens * k
    shapes = ((rows, width), (tokens, k), (tokens, k), (rows,), (tokens, width))
    dtypes = (jnp.float32, jnp.int32, jnp.float32, jnp.int32, jnp.float32)
    operands = Operands(*(jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes, strict=True)))

    def forward(operands: Operands) -> jax.Array:
        return combine(*operands[:4], implementation=implementation)

    compiled = jax.jit(forward).lower(operands).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < k / 2 * tokens * width * 4


def test_default_implementation_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    operands = make_operands(Case(13, 2, 5, 26), "float32")
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        programs = [str(jax.make_jaxpr(combine)(*operands[:4])) for _ in range(2)]
    assert [record.message for record in caplog.records] == [
        "combine of float32 rows (26, 5) by choices (13, 2) on cpu: xla"
    ]
    assert "gather" in programs[0] and "scatter" not in programs[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows_RD": jnp.ones((8, 2, 5))}, r"rows_RD has shape \(8, 2, 5\): give it the axes \[R, D\]"),
        ({"row_Nk": jnp.zeros((8,), jnp.int32)}, r"row_Nk has shape \(8,\): give it the axes \[N, k\]"),
        ({"weights_Nk": jnp.ones((4, 3))}, r"weights_Nk has shape \(4, 3\) and row_Nk \(4, 2\): give one weight"),
        (
            {"row_Nk": jnp.zeros((4, 0), jnp.int32), "weights_Nk": jnp.ones((4, 0))},
            r"row_Nk has shape \(4, 0\): at least one choice",
        ),
        ({"choice_R": jnp.zeros((7,), jnp.int32)}, "choice_R has 7 entries and rows_RD 8 rows: give one entry per row"),
        ({"row_Nk": jnp.zeros((4, 2))}, "row_Nk has dtype float32: give indices in int32"),
        ({"choice_R": jnp.zeros((8,))}, "choice_R has dtype float32: give indices in int32"),
        ({"rows_RD": jnp.ones((8, 5), jnp.int32)}, "rows_RD has dtype int32: use bfloat16"),
        (
            {"weights_Nk": jnp.ones((4, 2), jnp.bfloat16)},
            "weights_Nk is bfloat16 and rows_RD float32: cast",
        ),
        ({"implementation": "cuda"}, "implementation='cuda': choose one of"),
    ],
)
def test_bad_arguments_name_the_way_out(change: dict[str, object], message: str) -> None:
    names = ("rows_RD", "row_Nk", "weights_Nk", "choice_R")
    arguments = dict(zip(names, make_operands(Case(4, 2, 5, 8), "float32"), strict=False))
    with pytest.raises(CombineError, match=message):
        combine(**(arguments | change))  # type: ignore[arg-type]


def test_a_missing_package_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    for module in ("combine.triton", "jax_triton_launch"):
        monkeypatch.delitem(sys.modules, f"pallas_kernels.{module}", raising=False)
    with pytest.raises(CombineError, match=r"'triton': triton needs the extra foejax\[triton\] .*: xla, reference"):
        combine(*make_operands(Case(4, 2, 5, 8), "float32")[:4], implementation="triton")
