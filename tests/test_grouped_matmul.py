"""Grouped matmul: every backend against the dense reference, on one shared set of cases.

A new backend is tested by adding its name to `BACKENDS`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from kernels.cases import Case

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul.api import GroupedMatmulError
from pallas_kernels.grouped_matmul.row_tiles import list_row_tiles
from pallas_kernels.grouped_matmul.shapes import SHAPES
from pallas_kernels.grouped_matmul.xla import tile_height

BACKENDS = ("xla", "cpu")
MESH_AXES = ("data", "group", "expert")


CASES = {
    "uneven": Case(200, 24, 40, (30, 1, 57, 16, 80, 16)),
    "padded": Case(200, 24, 40, (17, 40, 9, 8, 33, 21)),
    "one_expert_has_all": Case(200, 24, 40, (0, 0, 0, 200, 0, 0)),
    "empty_at_both_ends": Case(200, 24, 40, (0, 100, 0, 1, 64, 0)),
    "only_padding": Case(200, 24, 40, (0, 0, 0, 0, 0, 0)),
    "one_expert": Case(70, 16, 8, (61,)),
    "fewer_rows_than_experts": Case(3, 8, 16, (0, 1, 0, 0, 1, 0, 0, 0)),
    "no_rows": Case(0, 8, 16, (0, 0, 0)),
}
# These share their shapes and so one compilation; what needs more compilations runs on them alone.
COMPILED_ONCE = [name for name, case in CASES.items() if case.rows == 200]


class Operands(NamedTuple):
    rows: jax.Array  # [R, K]
    weights: jax.Array  # [E, K, N], or [E, N, K] with transpose_rhs
    cotangent: jax.Array  # [R, N]
    group_sizes: jax.Array  # [E]


@pytest.fixture(autouse=True)
def strict_promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def make_operands(case: Case, dtype: str, *, transpose_rhs: bool = False) -> Operands:
    """Random operands whose padding rows, in x as in the cotangent, are NaN."""
    rng = np.random.default_rng(0)
    x_RK = rng.normal(size=(case.rows, case.contracted))
    w_EKN = rng.normal(size=(len(case.group_sizes), case.contracted, case.features))
    dy_RN = rng.normal(size=(case.rows, case.features))
    x_RK[sum(case.group_sizes) :] = np.nan
    dy_RN[sum(case.group_sizes) :] = np.nan
    if transpose_rhs:
        w_EKN = w_EKN.swapaxes(1, 2)
    return Operands(*(jnp.asarray(a, dtype) for a in (x_RK, w_EKN, dy_RN)), jnp.asarray(case.group_sizes, jnp.int32))


@functools.partial(jax.jit, static_argnames=("transpose_rhs", "implementation"))
def product_and_gradients(
    operands: Operands, *, implementation: str, transpose_rhs: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def multiply(x_RK: jax.Array, w_EKN: jax.Array) -> jax.Array:
        return grouped_matmul(
            x_RK, w_EKN, operands.group_sizes, transpose_rhs=transpose_rhs, implementation=implementation
        )

    y_RN, transpose = jax.vjp(multiply, operands.rows, operands.weights)
    return y_RN, *transpose(operands.cotangent)


def assert_close(actual: jax.Array, expected: jax.Array, tolerance: float) -> None:
    """Within `tolerance` of the largest magnitude."""
    assert actual.shape == expected.shape
    scale = float(np.abs(expected).max()) if expected.size else 0.0
    np.testing.assert_allclose(np.asarray(actual, np.float64), np.asarray(expected), rtol=0, atol=tolerance * scale)


def test_reference_is_a_loop_over_experts() -> None:
    case = CASES["padded"]
    x_RK, w_EKN, dy_RN, _ = operands = make_operands(case, "float32")
    y_RN, dx_RK, dw_EKN = (np.zeros_like(a) for a in (dy_RN, x_RK, w_EKN))
    start = 0
    for expert, size in enumerate(case.group_sizes):
        rows = slice(start, start + size)
        y_RN[rows] = x_RK[rows] @ w_EKN[expert]
        dx_RK[rows] = dy_RN[rows] @ w_EKN[expert].T
        dw_EKN[expert] = x_RK[rows].T @ dy_RN[rows]
        start += size
    for actual, expected in zip(
        product_and_gradients(operands, implementation="reference"), (y_RN, dx_RK, dw_EKN), strict=True
    ):
        assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize(
    ("implementation", "case_name", "dtype", "transpose_rhs"),
    [
        *((backend, name, "float32", False) for backend in BACKENDS for name in CASES),
        *((backend, name, "float32", True) for backend in BACKENDS for name in COMPILED_ONCE),
        *(("xla", name, "float64", transpose_rhs) for name in COMPILED_ONCE for transpose_rhs in (False, True)),
    ],
)
def test_product_and_gradients_equal_the_reference(
    implementation: str, case_name: str, dtype: str, transpose_rhs: bool
) -> None:
    case = CASES[case_name]
    with jax.enable_x64(dtype == "float64"):
        operands = make_operands(case, dtype, transpose_rhs=transpose_rhs)
        actual = product_and_gradients(operands, implementation=implementation, transpose_rhs=transpose_rhs)
        expected = product_and_gradients(operands, implementation="reference", transpose_rhs=transpose_rhs)
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype == dtype
            assert_close(a, b, {"float32": 1e-5, "float64": 1e-12}[dtype])
    y_RN, dx_RK, dw_EKN = actual
    in_use = sum(case.group_sizes)
    assert not np.any(y_RN[in_use:]) and not np.any(dx_RK[in_use:])
    assert not np.any(np.asarray(dw_EKN)[np.asarray(case.group_sizes) == 0])


@pytest.mark.parametrize("implementation", BACKENDS)
def test_bfloat16_is_rounded_once(implementation: str) -> None:
    """Positive operands in many tiles of one expert: a sum kept in bfloat16 would drift by several roundings."""
    case = Case(512, 32, 24, (0, 500, 0, 0, 0, 0, 0, 0))
    operands = jax.tree.map(jnp.abs, make_operands(case, "bfloat16"))
    exact = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, operands)
    expected = product_and_gradients(exact, implementation="reference")
    for a, b in zip(product_and_gradients(operands, implementation=implementation), expected, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2.0**-8)


@st.composite
def sizes_within(draw: st.DrawFn, rows: int, experts: int) -> tuple[int, ...]:
    cuts = sorted(draw(st.lists(st.integers(0, rows), min_size=experts, max_size=experts)))
    return tuple(b - a for a, b in zip([0, *cuts], cuts, strict=False))


@pytest.mark.parametrize("implementation", BACKENDS)
@hypothesis.given(group_sizes=sizes_within(200, 6))
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
def test_any_group_sizes(implementation: str, group_sizes: tuple[int, ...]) -> None:
    operands = make_operands(Case(200, 24, 40, group_sizes), "float32")
    expected = product_and_gradients(operands, implementation="reference")
    for a, b in zip(product_and_gradients(operands, implementation=implementation), expected, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("group_sizes", [CASES[name].group_sizes for name in COMPILED_ONCE])
def test_tiles_in_use_cover_each_row_once(group_sizes: tuple[int, ...], alignment: int) -> None:
    height, rows = 16, 200
    sizes = jnp.asarray(group_sizes, jnp.int32)
    tiles = list_row_tiles(sizes, rows, height, alignment=alignment, with_padding=True)
    num_live = int(tiles.num_live)
    experts_R = np.full(rows, -1)
    listed = np.stack([tiles.experts, tiles.firsts, tiles.starts, tiles.stops], 1)
    for expert, first, start, stop in listed[:num_live]:
        assert first % alignment == 0 and 0 <= first <= start < stop <= first + height <= rows
        assert np.all(experts_R[start:stop] == -1)
        experts_R[start:stop] = expert
    np.testing.assert_array_equal(experts_R, np.repeat(range(7), [*group_sizes, rows - sum(group_sizes)]))
    assert np.all(listed[num_live:, 2] == listed[num_live:, 3])
    without = list_row_tiles(sizes, rows, height, alignment=alignment)
    kept = listed[:num_live][listed[:num_live, 0] < 6]
    assert int(without.num_live) == len(kept)
    if alignment == 1:
        assert len(kept) == sum(-(-size // height) for size in group_sizes)


def test_tile_height_follows_the_rows_of_an_expert() -> None:
    assert [tile_height(rows, 8) for rows in (1, 5, 8, 128, 256, 512, 2048, 1 << 20)] == [1, 5, 8, 16, 32, 32, 128, 128]


def varying_on(axes: tuple[str, ...], array: np.ndarray) -> jax.Array:
    """Leading mesh dimensions, of size 2 along `axes` and 1 elsewhere, with different values on each device."""
    shape = tuple(2 if axis in axes else 1 for axis in MESH_AXES)
    scale = 1 + 0.5 * np.arange(np.prod(shape)).reshape(*shape, *(1,) * array.ndim)
    return jnp.asarray(array * scale, jnp.float32)


def spec_of(axes: tuple[str, ...]) -> P:
    return P(*(axis if axis in axes else None for axis in MESH_AXES))


def cpu_mesh() -> Mesh:
    return jax.make_mesh((2, 2, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize(
    ("x_axes", "w_axes"),
    [(MESH_AXES, ()), (("data",), ("group", "expert")), (MESH_AXES, MESH_AXES), ((), ("group",))],
    ids=["weights_replicated", "disjoint", "all", "rows_replicated"],
)
def test_gradients_inside_shard_map(implementation: str, x_axes: tuple[str, ...], w_axes: tuple[str, ...]) -> None:
    """Replicated operands get their gradient summed over the mesh, as the same program without a mesh says."""
    rng = np.random.default_rng(1)
    x = varying_on(x_axes, rng.normal(size=(40, 8)))
    w = varying_on(w_axes, rng.normal(size=(4, 8, 16)))
    out_axes = tuple(axis for axis in MESH_AXES if axis in x_axes + w_axes)
    dy = varying_on(out_axes, rng.normal(size=(40, 16)))
    # Device-dependent sizes: each device runs its own number of tiles.
    sizes = np.stack([[30 - i, i, 0, 9 - i] for i in range(2 ** len(x_axes))])
    sizes = jnp.asarray(sizes.reshape(*x.shape[:3], 4), jnp.int32)

    def local(x: jax.Array, w: jax.Array, sizes: jax.Array, *, backend: str) -> jax.Array:
        return grouped_matmul(x[0, 0, 0], w[0, 0, 0], sizes[0, 0, 0], implementation=backend)[None, None, None]

    sharded = jax.shard_map(
        functools.partial(local, backend=implementation),
        mesh=cpu_mesh(),
        in_specs=(spec_of(x_axes), spec_of(w_axes), spec_of(x_axes)),
        out_specs=spec_of(out_axes),
    )

    def dense(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        everywhere = [jnp.broadcast_to(a, dy.shape[:3] + a.shape[3:]).reshape(-1, *a.shape[3:]) for a in (x, w, sizes)]
        one = functools.partial(grouped_matmul, implementation="reference")
        return jnp.stack([one(*operands) for operands in zip(*everywhere, strict=True)]).reshape(dy.shape)

    def loss(multiply: Callable[..., jax.Array], x: jax.Array, w: jax.Array) -> jax.Array:
        return (multiply(x, w, sizes) * dy).sum()

    actual = jax.jit(jax.value_and_grad(functools.partial(loss, sharded), (0, 1)))(x, w)
    expected = jax.jit(jax.value_and_grad(functools.partial(loss, dense), (0, 1)))(x, w)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_scan_of_checkpointed_layers_inside_shard_map(implementation: str) -> None:
    rng = np.random.default_rng(2)
    x_RD = jnp.asarray(rng.normal(size=(8 * 24, 16)), jnp.float32)
    w_LEDF = jnp.asarray(rng.normal(size=(3, 4, 16, 8)) / 4, jnp.float32)
    sizes_E = jnp.asarray([7, 0, 12, 3], jnp.int32)

    def layers(x_RD: jax.Array, w_LEDF: jax.Array, *, backend: str) -> jax.Array:
        multiply = functools.partial(grouped_matmul, implementation=backend)

        def layer(x_RD: jax.Array, w_EDF: jax.Array) -> tuple[jax.Array, None]:
            hidden_RF = jnp.tanh(multiply(x_RD, w_EDF, sizes_E))
            return x_RD + multiply(hidden_RF, w_EDF, sizes_E, transpose_rhs=True), None

        return jax.lax.scan(jax.checkpoint(layer), x_RD, w_LEDF)[0]

    sharded = jax.shard_map(
        functools.partial(layers, backend=implementation),
        mesh=cpu_mesh(),
        in_specs=(P(MESH_AXES), P()),
        out_specs=P(MESH_AXES),
    )

    def dense(x_RD: jax.Array, w_LEDF: jax.Array) -> jax.Array:
        run = functools.partial(layers, w_LEDF=w_LEDF, backend="reference")
        return jax.vmap(run)(x_RD.reshape(8, 24, 16)).reshape(x_RD.shape)

    def loss(run: Callable[..., jax.Array], x_RD: jax.Array, w_LEDF: jax.Array) -> jax.Array:
        return (run(x_RD, w_LEDF) ** 2).sum()

    actual = jax.jit(jax.value_and_grad(functools.partial(loss, sharded), (0, 1)))(x_RD, w_LEDF)
    expected = jax.jit(jax.value_and_grad(functools.partial(loss, dense), (0, 1)))(x_RD, w_LEDF)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_temporary_memory_does_not_grow_with_experts(implementation: str, dtype: str) -> None:
    """No buffer [E, R, K], and from JAX 0.11 on no float32 copy of bfloat16 weights or of their gradient either."""
    rows, contracted, features, experts = 2048, 64, 64, 64
    shapes = ((rows, contracted), (experts, contracted, features), (rows, features))
    abstract = Operands(
        *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), jax.ShapeDtypeStruct((experts,), jnp.int32)
    )
    compiled = product_and_gradients.lower(abstract, implementation=implementation).compile()
    itemsize = jnp.dtype(dtype).itemsize
    all_weights = experts * contracted * features * itemsize
    emulated = dtype == "bfloat16" and jax.__version_info__ < (0, 11)
    bound = 8 * all_weights if emulated else all_weights
    assert bound <= experts * rows * contracted * itemsize // 4
    assert compiled.memory_analysis().temp_size_in_bytes < bound


def test_default_implementation_is_logged_once_and_is_not_ragged_dot(caplog: pytest.LogCaptureFixture) -> None:
    x_RK, w_EKN, _, group_sizes_E = make_operands(Case(13, 3, 5, (4, 9)), "float32")
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        programs = [str(jax.make_jaxpr(grouped_matmul)(x_RK, w_EKN, group_sizes_E)) for _ in range(2)]
    assert len(caplog.records) == 1 and caplog.records[0].message.endswith(": cpu")
    assert "ragged_dot" not in programs[0] and "foejax_grouped_matmul" in programs[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_RK": jnp.ones((2, 4, 3))}, r"x_RK has shape \(2, 4, 3\): give it the axes \[R, K\]"),
        ({"x_RK": jnp.ones((4, 7))}, "x_RK has 7 features, .* contracts 3 with transpose_rhs=False"),
        ({"transpose_rhs": True}, "x_RK has 3 features, .* contracts 5 with transpose_rhs=True"),
        ({"group_sizes_E": jnp.ones((3,), jnp.int32)}, "group_sizes_E has 3 entries, but w_EKN has 2 experts"),
        ({"group_sizes_E": jnp.ones((2,))}, "group_sizes_E has dtype float32: count rows in int32"),
        ({"w_EKN": jnp.ones((2, 3, 5), jnp.bfloat16)}, "x_RK is float32 and w_EKN is bfloat16: cast"),
        (
            {"w_EKN": jnp.ones((0, 3, 5)), "group_sizes_E": jnp.ones((0,), jnp.int32)},
            "at least one expert is needed",
        ),
        ({"x_RK": jnp.ones((4, 3), jnp.int32), "w_EKN": jnp.ones((2, 3, 5), jnp.int32)}, "have dtype int32: use"),
        ({"implementation": "cuda"}, "implementation='cuda': choose one of"),
    ],
)
def test_bad_arguments_name_the_way_out(change: dict[str, object], message: str) -> None:
    arguments = {"x_RK": jnp.ones((4, 3)), "w_EKN": jnp.ones((2, 3, 5)), "group_sizes_E": jnp.ones((2,), jnp.int32)}
    with pytest.raises(GroupedMatmulError, match=message):
        grouped_matmul(**(arguments | change))


def test_named_shapes_are_the_papers() -> None:
    assert SHAPES["acceptance"] == (4096, 64, 512, 512)
    assert SHAPES["foe_7b/up"][1:] == (8, 2048, 1024) and SHAPES["foe_1b/down"][1:] == (8, 384, 768)
    assert SHAPES["olmoe_1b_7b/up"].rows == 8 * 4096
