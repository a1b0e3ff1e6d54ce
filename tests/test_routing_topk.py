"""Routing top-k: every backend against the reference, on one shared set of cases, and the reference against a sort.

A new backend is tested by adding its name to `BACKENDS`; `tests/kernels` runs the same cases through Triton.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from foejax.models import route
from pallas_kernels.routing_topk.api import RoutingTopk, RoutingTopkError, routing_topk

BACKENDS = ("xla",)


class Case(NamedTuple):
    tokens: int
    experts: int
    k: int
    biases: int = 0  # rows of the bias; 0 is no bias, 1 a bias without a leading axis
    values: str = "random"  # "ties": few different scores; "special": infinities, NaN and both zeros among them


CASES = {
    "foe_group": Case(40, 8, 1),
    "biased": Case(40, 64, 8, biases=1),
    "bias_per_group": Case(42, 24, 3, biases=3),
    "bias_per_token": Case(9, 20, 2, biases=9),
    "ties": Case(33, 70, 6, values="ties"),
    "ties_biased": Case(33, 17, 5, biases=1, values="ties"),
    "special": Case(64, 12, 4, values="special"),
    "special_biased": Case(64, 12, 4, biases=64, values="special"),
    "all_chosen": Case(7, 6, 6, biases=1, values="special"),
    "one_expert": Case(5, 1, 1),
    "one_token": Case(1, 128, 8),
    "no_tokens": Case(0, 8, 2),
}
# What needs more compilations runs on these alone.
OTHER_DTYPES = ("bias_per_group", "ties", "special_biased")


class Operands(NamedTuple):
    scores: jax.Array  # [N, E]
    bias: jax.Array | None  # [E] or [G, E]
    cotangent: jax.Array  # [N, k], of the values


def make_operands(case: Case, dtype: str) -> Operands:
    rng = np.random.default_rng(0)
    shape, bias_shape = (case.tokens, case.experts), (case.biases, case.experts)
    scores, bias = rng.random(shape), rng.normal(size=bias_shape) / 4
    if case.values == "ties":
        scores, bias = rng.integers(0, 4, shape) / 4, rng.integers(0, 3, bias_shape) / 4
    if case.values == "special":
        special = (np.nan, np.inf, -np.inf, -np.inf, -np.inf, 0.0, -0.0, 0.5)
        scores = rng.choice(special, shape)
        bias = rng.choice((0.0, 0.0, -np.inf, np.nan), bias_shape)
    cotangent = rng.normal(size=(case.tokens, case.k))
    scores, bias, cotangent = (jnp.asarray(array, dtype) for array in (scores, bias, cotangent))
    return Operands(scores, {0: None, 1: bias.reshape(-1)}.get(case.biases, bias), cotangent)


@functools.partial(jax.jit, static_argnums=(1, 2))
def choices_and_gradients(
    operands: Operands, k: int, implementation: str
) -> tuple[RoutingTopk, jax.Array, jax.Array | None]:
    def values_and_rest(scores: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, RoutingTopk]:
        chosen = routing_topk(scores, k, selection_bias=bias, implementation=implementation)
        return chosen.values_Nk, chosen

    _, transpose, chosen = jax.vjp(values_and_rest, operands.scores, operands.bias, has_aux=True)
    return chosen, *transpose(operands.cotangent)


def assert_same_as_reference(case: Case, dtype: str, implementation: str) -> None:
    """Bit for bit: a choice has no rounding."""
    operands = make_operands(case, dtype)
    actual, dscores, dbias = choices_and_gradients(operands, case.k, implementation)
    expected, expected_dscores, _ = choices_and_gradients(operands, case.k, "reference")
    for name, a, b in zip(RoutingTopk._fields, actual, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64), err_msg=name)
    assert dscores.dtype == dtype
    np.testing.assert_array_equal(np.asarray(dscores, np.float64), np.asarray(expected_dscores, np.float64))
    assert dbias is None or not np.any(dbias)


@pytest.mark.parametrize("case_name", ["biased", "ties", "special_biased", "all_chosen"])
def test_reference_is_a_stable_sort(case_name: str) -> None:
    case = CASES[case_name]
    operands = make_operands(case, "float32")
    chosen, dscores, _ = choices_and_gradients(operands, case.k, "reference")
    scores = np.asarray(operands.scores)
    with np.errstate(invalid="ignore"):  # inf - inf
        selection = scores if operands.bias is None else scores + np.asarray(operands.bias)
    selection = np.where(np.isnan(selection), -np.inf, selection)
    order = np.argsort(-selection, axis=1, kind="stable")
    np.testing.assert_array_equal(chosen.indices_Nk, order[:, : case.k])
    for n, row in enumerate(order):
        best = selection[n][row]
        valid = best[: case.k] > -np.inf
        np.testing.assert_array_equal(chosen.valid_Nk[n], valid)
        np.testing.assert_array_equal(chosen.values_Nk[n], np.where(valid, scores[n][row[: case.k]], 0))
        left = best[case.k] if case.k < case.experts else -np.inf
        margin = np.inf if left == -np.inf else 0 if left == best[case.k - 1] else best[case.k - 1] - left
        assert chosen.margin_N[n] == margin
        expected = np.zeros(case.experts)
        expected[row[: case.k][valid]] = np.asarray(operands.cotangent)[n][valid]
        np.testing.assert_array_equal(dscores[n], expected)


@pytest.mark.parametrize(
    ("case_name", "dtype"),
    [
        *((name, "float32") for name in CASES),
        *((name, dtype) for name in OTHER_DTYPES for dtype in ("float64", "bfloat16")),
    ],
)
@pytest.mark.parametrize("implementation", BACKENDS)
def test_choices_and_gradients_equal_the_reference(implementation: str, case_name: str, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        assert_same_as_reference(CASES[case_name], dtype, implementation)


@pytest.mark.parametrize("implementation", BACKENDS)
@hypothesis.given(
    scores=st.lists(st.sampled_from((np.nan, np.inf, -np.inf, -1.0, -0.0, 0.0, 1.0)), min_size=6, max_size=6),
    k=st.integers(1, 6),
)
@hypothesis.settings(max_examples=40)
def test_any_special_values(implementation: str, scores: list[float], k: int) -> None:
    operands = Operands(jnp.asarray([scores], jnp.float32), None, jnp.ones((1, k)))
    actual, expected = (choices_and_gradients(operands, k, name) for name in (implementation, "reference"))
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("implementation", ("reference", *BACKENDS))
def test_equals_lax_top_k_where_all_is_finite(implementation: str) -> None:
    scores = make_operands(CASES["ties"], "float32").scores
    values, indices = jax.lax.top_k(scores, 6)
    chosen = jax.jit(lambda scores: routing_topk(scores, 6, implementation=implementation))(scores)
    np.testing.assert_array_equal(chosen.indices_Nk, indices)
    np.testing.assert_array_equal(chosen.values_Nk, values)
    assert np.all(chosen.valid_Nk)


@pytest.mark.parametrize("implementation", ("reference", *BACKENDS))
def test_the_margin_has_no_gradient(implementation: str) -> None:
    scores = make_operands(CASES["biased"], "float32").scores
    margin = jax.jit(lambda scores: routing_topk(scores, 8, implementation=implementation).margin_N.sum())
    assert not np.any(jax.grad(margin)(scores))


@pytest.mark.parametrize("implementation", BACKENDS)
def test_serves_the_models_router(implementation: str) -> None:
    """Groups folded into the tokens; what a `select_fn` takes out becomes a bias of -inf."""
    groups, tokens, experts, k = 3, 10, 6, 2
    rng = np.random.default_rng(3)
    logits_SNE, bias_SE = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((3, 10, 6), (3, 6)))
    dead_SNE = jnp.asarray(rng.random((groups, tokens, experts)) < 0.6)

    def weights_of_model(logits_SNE: jax.Array) -> tuple[jax.Array, object]:
        routing = route(
            logits_SNE,
            k,
            selection_bias=bias_SE[:, None, :],
            select_fn=lambda scores, active: jnp.where(dead_SNE, -jnp.inf, scores),
        )
        return routing.weights_SNk, routing

    def weights_of_kernel(logits_SNE: jax.Array) -> tuple[jax.Array, RoutingTopk]:
        scores_SNE = jnp.exp(logits_SNE - jax.nn.logsumexp(logits_SNE, axis=-1, keepdims=True))
        bias_SNE = jnp.where(dead_SNE, -jnp.inf, jnp.broadcast_to(bias_SE[:, None, :], scores_SNE.shape))
        chosen = routing_topk(
            scores_SNE.reshape(-1, experts),
            k,
            selection_bias=bias_SNE.reshape(-1, experts),
            implementation=implementation,
        )
        return chosen.values_Nk.reshape(groups, tokens, k), chosen

    weights, transpose, routing = jax.vjp(weights_of_model, logits_SNE, has_aux=True)
    values, own_transpose, chosen = jax.vjp(weights_of_kernel, logits_SNE, has_aux=True)
    assert 0 < np.asarray(routing.valid_SNk).mean() < 1
    np.testing.assert_array_equal(chosen.valid_Nk.reshape(groups, tokens, k), routing.valid_SNk)
    np.testing.assert_array_equal(chosen.indices_Nk.reshape(groups, tokens, k), routing.indices_SNk)
    np.testing.assert_allclose(values, weights, rtol=1e-6)
    is_contested = np.isfinite(routing.margin_SN)
    np.testing.assert_allclose(
        np.asarray(chosen.margin_N).reshape(groups, tokens)[is_contested], routing.margin_SN[is_contested], atol=1e-6
    )
    cotangent = jnp.asarray(rng.normal(size=values.shape), jnp.float32)
    np.testing.assert_allclose(own_transpose(cotangent)[0], transpose(cotangent)[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize(("scores_axis", "bias_axis"), [("data", None), (None, "group"), ("data", "group")])
def test_gradients_inside_shard_map(implementation: str, scores_axis: str | None, bias_axis: str | None) -> None:
    """Scores that meet several biases get the sum of their gradients, as the same program without a mesh says."""
    mesh = jax.make_mesh((2, 2), ("data", "group"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(4)
    scores = jnp.asarray(rng.normal(size=(2 if scores_axis else 1, 6, 9)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=(2 if bias_axis else 1, 9)), jnp.float32)
    cotangent = jnp.asarray(rng.normal(size=(scores.shape[0], bias.shape[0], 6, 3)), jnp.float32)

    def local(scores: jax.Array, bias: jax.Array, *, name: str) -> jax.Array:
        return routing_topk(scores[0], 3, selection_bias=bias[0], implementation=name).values_Nk[None, None]

    def dense(scores: jax.Array, bias: jax.Array) -> jax.Array:
        one = functools.partial(local, name="reference")
        return jnp.concatenate([jnp.concatenate([one(s[None], b[None]) for b in bias], axis=1) for s in scores], axis=0)

    sharded = jax.shard_map(
        functools.partial(local, name=implementation),
        mesh=mesh,
        in_specs=(P(scores_axis), P(bias_axis)),
        out_specs=P(scores_axis, bias_axis),
    )

    def loss(choose: Callable[..., jax.Array], scores: jax.Array) -> jax.Array:
        return (choose(scores, bias) * cotangent).sum()

    actual, expected = (jax.jit(jax.value_and_grad(functools.partial(loss, run)))(scores) for run in (sharded, dense))
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_no_array_of_tokens_by_choices_by_experts(implementation: str) -> None:
    tokens, experts, k = 1024, 128, 8
    shapes = ((tokens, experts), (experts,), (tokens, k))
    operands = Operands(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    compiled = choices_and_gradients.lower(operands, k, implementation).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < k / 2 * tokens * experts * 4


def test_default_implementation_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    scores = jnp.ones((13, 7))
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        programs = [str(jax.make_jaxpr(lambda scores: routing_topk(scores, 3))(scores)) for _ in range(2)]
    assert [record.message for record in caplog.records] == [
        "routing_topk of float32 scores (13, 7) with k=3 on cpu: xla"
    ]
    assert "top_k" in programs[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores_NE": jnp.ones((2, 4, 6))}, r"scores_NE has shape \(2, 4, 6\): give it the axes \[N, E\]"),
        ({"scores_NE": jnp.ones((4, 6), jnp.int32)}, "scores_NE has dtype int32: use bfloat16"),
        ({"k": 0}, r"k=0 experts of 6 in scores_NE of shape \(4, 6\): choose 1 to E"),
        ({"k": 7}, "k=7 experts of 6"),
        ({"selection_bias": jnp.ones((6,), jnp.bfloat16)}, "scores_NE is float32 and selection_bias bfloat16: cast"),
        ({"selection_bias": jnp.ones((5,))}, r"selection_bias has shape \(1, 5\): give it \[E\] or \[G, E\] with E=6"),
        ({"selection_bias": jnp.ones((1, 4, 6))}, "selection_bias has shape"),
        ({"selection_bias": jnp.ones((3, 6))}, "selection_bias has 3 rows, which do not divide the 4 rows"),
        ({"implementation": "cuda"}, "implementation='cuda': choose one of"),
    ],
)
def test_bad_arguments_name_the_way_out(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"scores_NE": jnp.ones((4, 6)), "k": 2}
    with pytest.raises(RoutingTopkError, match=message):
        routing_topk(**(arguments | change))  # type: ignore[arg-type]


def test_a_missing_package_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    for module in ("routing_topk.triton", "jax_triton_launch"):
        monkeypatch.delitem(sys.modules, f"pallas_kernels.{module}", raising=False)
    with pytest.raises(RoutingTopkError, match=r"'triton': triton needs the extra foejax\[triton\] .*: xla, reference"):
        routing_topk(jnp.ones((4, 6)), 2, implementation="triton")
