"""The Hopper kernels in Mosaic's interpreter, with its race detection, against float64.

The interpreter starts with NaN in all memory and refuses reads out of bounds. It is laxer than the hardware about
layouts: `test_aot.py` compiles the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.sharding import AxisType, PartitionSpec

from kernels.cases import CASES, assert_close, expected_results, make_operands
from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import mosaic_gpu
from pallas_kernels.grouped_matmul.api import GroupedMatmulError
from pallas_kernels.hopper_tiles import Tiles

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("mosaic_interpreter")]

SMALL = Tiles(rows=64, columns=128, depth=64, stages=2, snake=2)
WIDE = Tiles(rows=128, columns=256, depth=64, stages=3, snake=1)


def run(kernel: Callable[..., jax.Array], *arguments: np.ndarray, **options: object) -> np.ndarray:
    result = np.asarray(jax.jit(lambda *arrays: kernel(*arrays, **options))(*arguments))
    assert not interpret_pallas_call.get_races().races_found
    return result


@pytest.mark.parametrize("name", CASES)
def test_product_and_gradients(name: str) -> None:
    operands = make_operands(CASES[name], "bfloat16")
    x_RK, w_EKN, dy_RN, sizes = operands
    expected = expected_results(operands)
    assert_close(run(mosaic_gpu.matmul, x_RK, w_EKN, sizes, tiles=SMALL), expected.y_RN, "bfloat16")
    dx_RK = run(mosaic_gpu.matmul, dy_RN, w_EKN, sizes, transpose_rhs=True, tiles=SMALL)
    assert_close(dx_RK, expected.dx_RK, "bfloat16")
    assert_close(run(mosaic_gpu.weight_gradient, x_RK, dy_RN, sizes), expected.dw_EKN, "bfloat16")


def test_wide_tiles_and_several_of_them() -> None:
    """Whole tiles of 128 rows, two blocks of columns, a pipeline that goes round."""
    case = CASES["uneven"]._replace(rows=512, contracted=320, features=512, group_sizes=(256, 130, 0, 126))
    operands = make_operands(case, "bfloat16")
    x_RK, w_EKN, dy_RN, sizes = operands
    expected = expected_results(operands)
    assert_close(run(mosaic_gpu.matmul, x_RK, w_EKN, sizes, tiles=WIDE), expected.y_RN, "bfloat16")
    case = case._replace(contracted=256)
    operands = make_operands(case, "bfloat16")
    x_RK, w_EKN, dy_RN, sizes = operands
    dw_EKN = run(mosaic_gpu.weight_gradient, x_RK, dy_RN, sizes, tiles=WIDE)
    assert_close(dw_EKN, expected_results(operands).dw_EKN, "bfloat16")


def test_the_public_function_differentiates_through_it() -> None:
    operands = make_operands(CASES["empty_experts_and_padding"], "bfloat16")
    x_RK, w_EKN, dy_RN, sizes = map(jnp.asarray, operands)

    @jax.jit
    def both(x_RK: jax.Array, w_EKN: jax.Array, dy_RN: jax.Array) -> tuple[jax.Array, ...]:
        def multiply(x_RK: jax.Array, w_EKN: jax.Array) -> jax.Array:
            return grouped_matmul(x_RK, w_EKN, sizes, implementation="mosaic_gpu")

        y_RN, transpose = jax.vjp(multiply, x_RK, w_EKN)
        return y_RN, *transpose(dy_RN)

    for actual, expected in zip(both(x_RK, w_EKN, dy_RN), expected_results(operands), strict=True):
        assert_close(np.asarray(actual), expected, "bfloat16")


def test_inside_shard_map_the_result_varies_as_its_operands() -> None:
    """Lowered, not run: the interpreter's callbacks have no rule for a mesh of several devices."""
    mesh = jax.make_mesh((2,), ("group",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("group")

    def local(x_RK: jax.Array, w_EKN: jax.Array, sizes: jax.Array) -> jax.Array:
        y_RN = grouped_matmul(x_RK, w_EKN, sizes, implementation="mosaic_gpu")
        assert jax.typeof(y_RN).manual_axis_type.varying == {"group"}
        return y_RN

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec)
    shapes = ((64, 128), (4, 128, 128))
    abstract = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    out = jax.eval_shape(mapped, *abstract, jax.ShapeDtypeStruct((4,), jnp.int32))
    assert out.shape == (64, 128)


@pytest.mark.parametrize(
    ("shapes", "dtype", "message"),
    [
        (((8, 128), (2, 128, 128)), "float32", "takes bfloat16 only, not float32; these can: .*xla"),
        (((8, 100), (2, 100, 128)), "bfloat16", r"multiples of 128 only, not 100"),
        (((8, 128), (2, 128, 64)), "bfloat16", "multiples of 128 only, not 64"),
        (((0, 128), (2, 128, 128)), "bfloat16", "at least one row"),
    ],
)
def test_what_it_cannot_take_names_who_can(shapes: tuple[tuple[int, ...], ...], dtype: str, message: str) -> None:
    x_RK, w_EKN = (jnp.zeros(shape, dtype) for shape in shapes)
    with pytest.raises(GroupedMatmulError, match=message):
        grouped_matmul(x_RK, w_EKN, jnp.zeros(2, jnp.int32), implementation="mosaic_gpu")
