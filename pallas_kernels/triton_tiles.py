"""Which tiles the Triton kernels over sorted rows use; no package of the extra `foejax[triton]` is needed to know.

Shape letters of a block: M rows, K contracted features, N output features.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike


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


Tiles = dict[float, Tile]
"""By the mean number of rows of an expert up to which a tile serves."""

# Chosen without timing them. All fit the 99 KiB of shared memory that every GPU since Ampere has. float32 products use
# no tensor cores, which would round their operands to 10 bits of mantissa.
MATMUL_TILES: dict[str, Tiles] = {
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
# Of weights of 8 bits, by the rows' dtype: with few rows an expert twice the depth has the same bytes in flight.
QUANTIZED_TILES: dict[str, Tiles] = {
    "bfloat16": {
        16: Tile(BM=16, BK=128, BN=128, warps=4, stages=4),
        32: Tile(BM=32, BK=128, BN=128, warps=4, stages=3),
        64: Tile(BM=64, BK=64, BN=128, warps=4, stages=4),
        math.inf: Tile(BM=128, BK=64, BN=128, warps=4, stages=3),
    },
    "float32": {
        16: Tile(BM=16, BK=64, BN=64, warps=8, stages=3),
        math.inf: Tile(BM=64, BK=32, BN=64, warps=8, stages=3),
    },
}
WEIGHT_GRADIENT_TILES: dict[str, Tiles] = {
    "bfloat16": {
        32: Tile(BM=32, BK=128, BN=128, warps=4, stages=4),
        math.inf: Tile(BM=64, BK=128, BN=128, warps=4, stages=3),
    },
    "float32": {
        math.inf: Tile(BM=32, BK=64, BN=64, warps=4, stages=3),
    },
}
BLOCKS_SIDE_BY_SIDE = 8


def matmul_tile(dtype: DTypeLike, num_rows: int, num_experts: int, *, is_quantized: bool) -> Tile:
    """The tile for rows of `dtype` by weights of the same or, quantised, of 8 bits."""
    return choose_tile(QUANTIZED_TILES if is_quantized else MATMUL_TILES, dtype, num_rows, num_experts)


def choose_tile(tiles: dict[str, Tiles], dtype: DTypeLike, num_rows: int, num_experts: int) -> Tile:
    """The first of a table's tiles that serves the mean number of rows of an expert."""
    return next(tile for limit, tile in tiles[jnp.dtype(dtype).name].items() if num_rows <= limit * num_experts)
