"""Projected top-k: every backend against the reference, on one shared set of cases, and its gradient against a loop.

A new backend is tested by adding its name to `BACKENDS`; `tests/kernels` runs the same cases through Triton. The
operands are small multiples of 1/32 of which no sum rounds, so that results are compared bit for bit.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import routing_topk
from pallas_kernels.projected_topk import xla
from pallas_kernels.projected_topk.api import ProjectedTopk, ProjectedTopkError, projected_topk

BACKENDS = ("xla",)


class Case(NamedTuple):
    stacks: int
    tokens: int
    features: int
    experts: int
    k: int
    has_bias: bool = False
    values: str = "random"  # "ties": few different logits; "special": infinities and NaN among the operands


CASES = {
    "plain": Case(2, 23, 16, 24, 3),
    "biased": Case(3, 17, 8, 40, 4, has_bias=True),
    "ties": Case(2, 19, 4, 50, 6, values="ties"),
    "ties_biased": Case(2, 19, 4, 50, 6, has_bias=True, values="ties"),
    "special": Case(2, 21, 6, 20, 4, has_bias=True, values="special"),
    "all_chosen": Case(2, 7, 5, 6, 6, has_bias=True),
    "one_expert": Case(1, 5, 3, 1, 1),
    "one_token": Case(4, 1, 20, 33, 2, has_bias=True),
    "no_tokens": Case(2, 0, 4, 8, 2, has_bias=True),
}


class Operands(NamedTuple):
    x: jax.Array  # [S, N, K]
    w: jax.Array  # [S, K, E]
    bias: jax.Array | None  # [S, E]
    cotangent: jax.Array  # [S, N, k], of the values


def make_operands(case: Case, x_dtype: str = "float32", w_dtype: str = "float32") -> Operands:
    rng = np.random.default_rng(0)
    stacks, tokens, features, experts, k, has_bias, values = case
    span = 1 if values == "ties" else 32

    def draw(*shape: int) -> np.ndarray:
        return rng.integers(-span, span + 1, shape) / span

    x, w, bias = draw(stacks, tokens, features), draw(stacks, features, experts), draw(stacks, experts)
    if values == "special":
        x[:, ::5] = np.nan
        x[:, 1::5, 0] = 0
        w[:, 0, 0], w[:, 0, 1], w[:, 0, 2] = np.inf, -np.inf, np.nan
        bias[0, 2:-2] = -np.inf
        bias[1, 3] = np.nan
    return Operands(
        jnp.asarray(x, x_dtype),
        jnp.asarray(w, w_dtype),
        jnp.asarray(bias, w_dtype) if has_bias else None,
        jnp.asarray(draw(stacks, tokens, k), w_dtype),
    )


@functools.partial(jax.jit, static_argnames=("k", "implementation", "block_logits"))
def choices_and_gradients(
    operands: Operands, *, k: int, implementation: str, block_logits: int = xla._BLOCK_LOGITS
) -> tuple[ProjectedTopk, tuple[jax.Array, jax.Array, jax.Array | None]]:
    """The choices and the gradients of x, w and the bias."""

    def values_and_rest(x: jax.Array, w: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, ProjectedTopk]:
        chosen = projected_topk(x, w, k, selection_bias_SE=bias, implementation=implementation)
        return chosen.values_SNk, chosen

    with mock.patch.object(xla, "_BLOCK_LOGITS", block_logits):
        _, transpose, chosen = jax.vjp(values_and_rest, *operands[:3], has_aux=True)
        return chosen, transpose(operands.cotangent)


def looped_gradients(operands: Operands, chosen: ProjectedTopk) -> tuple[np.ndarray, np.ndarray]:
    """dx and dw in float64, choice by choice."""
    x, w, _, cotangent = (None if each is None else np.asarray(each, np.float64) for each in operands)
    dx, dw = np.zeros_like(x), np.zeros_like(w)
    with np.errstate(invalid="ignore"):  # 0 * inf, inf - inf
        for s, n, j in np.argwhere(np.asarray(chosen.valid_SNk)):
            expert = int(chosen.indices_SNk[s, n, j])
            dx[s, n] += w[s, :, expert] * cotangent[s, n, j]
            dw[s, :, expert] += x[s, n] * cotangent[s, n, j]
    return dx, dw


def assert_same_as_reference(
    case: Case, x_dtype: str, w_dtype: str, implementation: str, block_logits: int = xla._BLOCK_LOGITS
) -> None:
    """Bit for bit: nothing rounds but the last step to bfloat16."""
    operands = make_operands(case, x_dtype, w_dtype)
    run = functools.partial(choices_and_gradients, operands, k=case.k)
    actual, (dx, dw, dbias) = run(implementation=implementation, block_logits=block_logits)
    expected, _ = run(implementation="reference")
    for name, a, b in zip(ProjectedTopk._fields, actual, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64), err_msg=name)
    assert dx.dtype == x_dtype and dw.dtype == w_dtype
    for ours, looped in zip((dx, dw), looped_gradients(operands, expected), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), looped.astype(ours.dtype))
    assert dbias is None or not np.any(dbias)


@pytest.mark.parametrize("name", ["plain", "ties_biased", "special"])
def test_reference_is_routing_topk_of_all_logits(name: str) -> None:
    case = CASES[name]
    x, w, bias, _ = operands = make_operands(case)
    chosen, (dx, dw, _) = choices_and_gradients(operands, k=case.k, implementation="reference")
    choose = jax.jit(lambda logits, bias: routing_topk(logits, case.k, selection_bias=bias, implementation="xla"))
    for s in range(case.stacks):
        with np.errstate(invalid="ignore"):  # 0 * inf, inf - inf
            logits = np.asarray(x[s]) @ np.asarray(w[s])
        for a, b in zip(chosen, choose(logits, None if bias is None else bias[s]), strict=True):
            np.testing.assert_array_equal(a[s], b)
    if case.values != "special":  # JAX multiplies what was not chosen by zero
        for a, b in zip((dx, dw), looped_gradients(operands, chosen), strict=True):
            np.testing.assert_array_equal(a, b)


def test_cases_cover_what_they_are_named_for() -> None:
    special, _ = choices_and_gradients(make_operands(CASES["special"]), k=4, implementation="reference")
    assert 0.5 < np.asarray(special.valid_SNk).mean() < 0.9 and np.any(np.isinf(special.values_SNk))
    tied, _ = choices_and_gradients(make_operands(CASES["ties"]), k=6, implementation="reference")
    assert np.mean(np.asarray(tied.margin_SN) == 0) > 0.5


@pytest.mark.parametrize(
    ("name", "x_dtype", "w_dtype"),
    [
        *((name, "float32", "float32") for name in CASES),
        *((name, *dtypes) for name in ("biased", "special") for dtypes in (("bfloat16", "float32"), ("float64",) * 2)),
    ],
)
@pytest.mark.parametrize("implementation", BACKENDS)
def test_choices_and_gradients_equal_the_reference(implementation: str, name: str, x_dtype: str, w_dtype: str) -> None:
    with jax.enable_x64(w_dtype == "float64"):
        assert_same_as_reference(CASES[name], x_dtype, w_dtype, implementation)


@pytest.mark.parametrize(("name", "height"), [("ties_biased", 5), ("special", 8), ("special", 1)])
def test_blocks_of_tokens_equal_the_whole(name: str, height: int) -> None:
    """Also where the last block overlaps the one before: no token's gradient counts twice."""
    case = CASES[name]
    assert height == 1 or case.tokens % height
    block_logits = height * case.stacks * case.experts
    assert_same_as_reference(case, "bfloat16", "float32", "xla", block_logits)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_columns_that_nobody_chose_get_no_gradient(implementation: str) -> None:
    """On operands whose sums round, against the gradient of all logits."""
    rng = np.random.default_rng(1)
    shapes = ((2, 9, 16), (2, 16, 64), (2, 64), (2, 9, 3))
    operands = Operands(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes))
    run = functools.partial(choices_and_gradients, operands, k=3)
    chosen, gradients = run(implementation=implementation)
    expected, expected_gradients = run(implementation="reference")
    np.testing.assert_array_equal(chosen.indices_SNk, expected.indices_SNk)
    for a, b in zip((chosen.values_SNk, *gradients[:2]), (expected.values_SNk, *expected_gradients[:2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    is_chosen_SE = (np.asarray(chosen.indices_SNk)[..., None] == np.arange(64)).any(axis=(1, 2))
    has_gradient_SE = np.asarray(gradients[1] != 0).any(axis=1)
    np.testing.assert_array_equal(has_gradient_SE, is_chosen_SE)
    assert 0.1 < is_chosen_SE.mean() < 0.9


@pytest.mark.parametrize("implementation", ("reference", *BACKENDS))
def test_the_margin_has_no_gradient(implementation: str) -> None:
    x, w, bias, _ = make_operands(CASES["biased"])

    def margin(x: jax.Array, w: jax.Array) -> jax.Array:
        return projected_topk(x, w, 4, selection_bias_SE=bias, implementation=implementation).margin_SN.sum()

    assert not any(np.any(gradient) for gradient in jax.jit(jax.grad(margin, argnums=(0, 1)))(x, w))


def largest_array(program: str) -> int:
    """Elements of the largest array that a program's text names."""
    return max(math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w\[(\d[\d,]*)\]", program))


def test_no_array_holds_all_logits() -> None:
    """Forward and backward, as traced and as compiled."""
    case = Case(2, 128, 4, 64, 2, has_bias=True)
    logits = case.stacks * case.tokens * case.experts
    block = logits // 8
    run = functools.partial(choices_and_gradients, make_operands(case, "bfloat16"), k=case.k)
    for name in ("xla", "reference"):
        lowered = run.func.trace(*run.args, **run.keywords, implementation=name, block_logits=block)
        programs = [str(lowered.jaxpr), lowered.lower().compile().as_text() or ""]
        if name == "reference":
            assert min(map(largest_array, programs)) >= logits
        else:
            assert max(map(largest_array, programs)) <= block * case.k


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize(("x_axis", "w_axis"), [("data", None), (None, "group"), ("data", "group")])
def test_gradients_inside_shard_map(implementation: str, x_axis: str | None, w_axis: str | None) -> None:
    """An operand that meets several others gets the sum of its gradients, as the same program without a mesh says."""
    mesh = jax.make_mesh((2, 2), ("data", "group"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(4)
    x, w, bias = (
        jnp.asarray(rng.normal(size=(2 if axis else 1, 2, *shape)), jnp.float32)
        for axis, shape in ((x_axis, (7, 4)), (w_axis, (4, 9)), (w_axis, (9,)))
    )
    cotangent = jnp.asarray(rng.normal(size=(len(x), len(w), 2, 7, 3)), jnp.float32)

    def local(x: jax.Array, w: jax.Array, bias: jax.Array, *, name: str) -> jax.Array:
        chosen = projected_topk(x[0], w[0], 3, selection_bias_SE=bias[0], implementation=name)  # type: ignore[arg-type]
        return chosen.values_SNk[None, None]

    def dense(x: jax.Array, w: jax.Array, bias: jax.Array) -> jax.Array:
        one = functools.partial(local, name="reference")
        rows = [[one(a[None], b[None], c[None]) for b, c in zip(w, bias, strict=True)] for a in x]
        return jnp.concatenate([jnp.concatenate(row, axis=1) for row in rows], axis=0)

    sharded = jax.shard_map(
        functools.partial(local, name=implementation),
        mesh=mesh,
        in_specs=(P(x_axis), P(w_axis), P(w_axis)),
        out_specs=P(x_axis, w_axis),
    )

    def loss(choose: Callable[..., jax.Array], x: jax.Array, w: jax.Array) -> jax.Array:
        return (choose(x, w, bias) * cotangent).sum()

    with mock.patch.object(xla, "_BLOCK_LOGITS", 3 * 2 * 9):
        actual, expected = (
            jax.jit(jax.value_and_grad(functools.partial(loss, run), argnums=(0, 1)))(x, w) for run in (sharded, dense)
        )
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_default_implementation_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    x, w = jnp.ones((2, 13, 3)), jnp.ones((2, 3, 7))
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        for _ in range(2):
            jax.make_jaxpr(lambda x, w: projected_topk(x, w, 3))(x, w)
    assert [record.message for record in caplog.records] == [
        "projected_topk of float32 x (2, 13, 3) and float32 w (2, 3, 7) with k=3 on cpu: xla"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_SNK": jnp.ones((4, 3))}, r"x_SNK has shape \(4, 3\): give it the axes \[S, N, K\]"),
        ({"w_SKE": jnp.ones((2, 5, 6))}, r"w_SKE has shape \(2, 5, 6\): give it \[S, K, E\] with S=2 and K=3"),
        ({"w_SKE": jnp.ones((3, 6))}, r"w_SKE has shape \(3, 6\)"),
        ({"w_SKE": jnp.ones((2, 3, 6), jnp.bfloat16)}, "w_SKE has dtype bfloat16: use float32 or float64"),
        ({"x_SNK": jnp.ones((2, 4, 3), jnp.float16)}, "x_SNK has dtype float16 and w_SKE float32: use bfloat16"),
        ({"k": 0}, r"k=0 experts of 6 in w_SKE of shape \(2, 3, 6\): choose 1 to E"),
        ({"k": 7}, "k=7 experts of 6"),
        ({"selection_bias_SE": jnp.ones((6,))}, r"selection_bias_SE has shape \(6,\): give it \[S, E\] with S=2"),
        (
            {"selection_bias_SE": jnp.ones((2, 6), jnp.bfloat16)},
            "w_SKE is float32 and selection_bias_SE bfloat16: cast",
        ),
        ({"implementation": "cuda"}, "implementation='cuda': choose one of"),
    ],
)
def test_bad_arguments_name_the_way_out(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"x_SNK": jnp.ones((2, 4, 3)), "w_SKE": jnp.ones((2, 3, 6)), "k": 2}
    with pytest.raises(ProjectedTopkError, match=message):
        projected_topk(**(arguments | change))  # type: ignore[arg-type]
