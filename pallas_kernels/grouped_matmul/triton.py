"""Grouped matmul in Triton, through jax-triton: two kernels (`triton_kernels.py`) and how they are started.

Addresses are formed by pointer, so groups may start at any row and K and N need not be multiples of a block. Neither
triton nor jax_triton is imported before a kernel starts: they are the extra `foejax[triton]`.

Shape letters: R rows sorted by expert, K contracted features, N output features and E experts.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.grouped_matmul.row_tiles import list_row_tiles
from pallas_kernels.varying import cast_to_varying, varying_axes


class Tile(NamedTuple):
    """Sizes of a kernel's blocks, its warps, and how many blocks of operands are in flight."""

    BM: int
    BK: int
    BN: int
    warps: int
    stages: int

    @property
    def blocks(self) -> dict[str, int]:
        return {"BM": self.BM, "BK": self.BK, "BN": self.BN}


class KernelCall(NamedTuple):
    """One launch, as `jax_triton.triton_call` and Triton's interpreter both understand it."""

    kernel: str  # its name in `triton_kernels.py`
    operands: tuple[jax.Array, ...]
    result: jax.ShapeDtypeStruct
    num_programs: int
    constants: dict[str, int]
    tile: Tile


# Keyed by dtype and by the mean number of rows of an expert up to which a tile serves; chosen without timing them. All
# fit the 99 KiB of shared memory that every GPU since Ampere has. float32 products use no tensor cores, which would
# round their operands to 10 bits of mantissa.
MATMUL_TILES: dict[str, dict[float, Tile]] = {
    "bfloat16": {
        16: Tile(BM=16, BK=64, BN=128, warps=4, stages=5),
        32: Tile(BM=32, BK=64, BN=128, warps=4, stages=4),
        64: Tile(BM=64, BK=64, BN=128, warps=4, stages=4),
        math.inf: Tile(BM=128, BK=64, BN=128, warps=4, stages=3),
    },
    "float32": {
        16: Tile(BM=16, BK=32, BN=64, warps=4, stages=3),
        math.inf: Tile(BM=64, BK=32, BN=64, warps=4, stages=3),
    },
}
WEIGHT_GRADIENT_TILES: dict[str, dict[float, Tile]] = {
    "bfloat16": {
        32: Tile(BM=32, BK=128, BN=128, warps=4, stages=4),
        math.inf: Tile(BM=64, BK=128, BN=128, warps=4, stages=3),
    },
    "float32": {
        math.inf: Tile(BM=32, BK=64, BN=64, warps=4, stages=3),
    },
}

_BLOCKS_SIDE_BY_SIDE = 8


@functools.partial(jax.jit, static_argnames="transpose_rhs")
def matmul(x_RK: jax.Array, w_EKN: jax.Array, group_sizes_E: jax.Array, *, transpose_rhs: bool = False) -> jax.Array:
    """y_RN = rows of `x_RK` times their expert's matrix; contract as in `api.grouped_matmul`, without a gradient."""
    return _launch(matmul_call(x_RK, w_EKN, group_sizes_E, transpose_rhs=transpose_rhs))


@jax.jit
def weight_gradient(x_RK: jax.Array, dy_RN: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """dw_EKN: for each expert the sum over its rows of x outer dy, summed in float32; zero without rows."""
    return _launch(weight_gradient_call(x_RK, dy_RN, group_sizes_E))


def refusal(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], dtype: DTypeLike, *, transpose_rhs: bool = False
) -> str | None:
    """Why this backend cannot multiply such operands, as a clause; None if it can. Every shape is taken."""
    name = jnp.dtype(dtype).name
    if name not in MATMUL_TILES:
        return f"triton takes {' and '.join(MATMUL_TILES)} only, not {name}"
    return why_not_importable()


def matmul_call(
    x_RK: jax.Array, w_EKN: jax.Array, group_sizes_E: jax.Array, *, transpose_rhs: bool = False
) -> KernelCall:
    """The launch whose result is `matmul`."""
    num_rows, contracted = x_RK.shape
    num_experts, features = w_EKN.shape[0], w_EKN.shape[1 if transpose_rhs else 2]
    tile = _choose_tile(MATMUL_TILES, x_RK.dtype, num_rows, num_experts)
    tasks = list_row_tiles(group_sizes_E, num_rows, tile.BM, with_padding=True)
    num_tasks = tasks.starts.shape[0]
    constants = {
        "num_tasks": num_tasks,
        "num_experts": num_experts,
        "K": contracted,
        "N": features,
        "w_stride_K": 1 if transpose_rhs else features,
        "w_stride_N": contracted if transpose_rhs else 1,
        "tasks_side_by_side": _BLOCKS_SIDE_BY_SIDE,
        **tile.blocks,
    }
    result = jax.ShapeDtypeStruct((num_rows, features), x_RK.dtype)
    num_programs = num_tasks * _ceil_divide(features, tile.BN)
    operands = (x_RK, w_EKN, tasks.experts, tasks.starts, tasks.stops)
    return KernelCall("multiply_rows", operands, result, num_programs, constants, tile)


def weight_gradient_call(x_RK: jax.Array, dy_RN: jax.Array, group_sizes_E: jax.Array) -> KernelCall:
    """The launch whose result is `weight_gradient`."""
    num_rows, contracted = x_RK.shape
    num_experts, features = group_sizes_E.shape[0], dy_RN.shape[1]
    tile = _choose_tile(WEIGHT_GRADIENT_TILES, x_RK.dtype, num_rows, num_experts)
    # Row at which each expert starts, and the row at which the last one ends.
    bounds = jnp.pad(jnp.minimum(jnp.cumsum(group_sizes_E, dtype=jnp.int32), num_rows), (1, 0))
    constants = {"K": contracted, "N": features, "blocks_side_by_side": _BLOCKS_SIDE_BY_SIDE, **tile.blocks}
    result = jax.ShapeDtypeStruct((num_experts, contracted, features), x_RK.dtype)
    num_programs = num_experts * _ceil_divide(contracted, tile.BK) * _ceil_divide(features, tile.BN)
    return KernelCall("contract_rows", (x_RK, dy_RN, bounds), result, num_programs, constants, tile)


def _choose_tile(tiles: dict[str, dict[float, Tile]], dtype: DTypeLike, num_rows: int, num_experts: int) -> Tile:
    """The first tile of the table that serves the mean number of rows of an expert."""
    return next(tile for limit, tile in tiles[jnp.dtype(dtype).name].items() if num_rows <= limit * num_experts)


def _ceil_divide(size: int, block: int) -> int:
    return -(-size // block)


def _launch(call: KernelCall) -> jax.Array:
    axes = varying_axes(*call.operands)
    if call.result.size == 0 or call.num_programs == 0 or any(operand.size == 0 for operand in call.operands):
        return cast_to_varying(jnp.zeros(call.result.shape, call.result.dtype), axes)
    import jax_triton

    kernels = importlib.import_module("pallas_kernels.grouped_matmul.triton_kernels")
    result = jax_triton.triton_call(
        *call.operands,
        kernel=getattr(kernels, call.kernel),
        out_shape=call.result,
        grid=(call.num_programs,),
        name=call.kernel,
        num_warps=call.tile.warps,
        num_stages=call.tile.stages,
        **call.constants,
    )
    # jax-triton types results as equal on all devices, but they vary as the operands do. The cast comes in time only
    # under jit: an eager shard_map would have kept one device's result already.
    return cast_to_varying(result, axes)


@functools.cache
def why_not_importable() -> str | None:
    try:
        importlib.import_module("jax_triton")
        importlib.import_module("triton")
    except Exception as error:  # versions that do not fit raise TypeError and others
        return f"the triton backend needs the extra foejax[triton]: pip install foejax[triton] ({error})"
    return None
