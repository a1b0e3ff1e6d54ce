"""Which tiles the Hopper kernels use: a table of measured choices, and a rule for shapes that are not in it.

Shape letters: R rows, K contracted features, N output features, E experts.
"""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import NamedTuple

COMPUTE_WARPGROUPS = 2
SWAPPED_COLUMNS = 128
SWAPPED_DEPTH = 128
"""Features of the weights, and steps of the contraction, that a stage of the swapped kernel holds."""
STORE_COLUMNS = 32
PARTIAL_COLUMNS = 32
"""Columns that pass through shared memory at a time on their way out, of whole and of partial row tiles."""

SHARED_MEMORY = 232_448
"""Bytes of shared memory a thread block can have on Hopper (CUDA programming guide, compute capability 9.0)."""
_BARRIERS = 1024
_STAGES = (2, 3, 4, 5)
"""With six the unrolled first loads make the TMA warpgroup spill."""
_TABLE = Path(__file__).with_name("hopper_tiles.json")


class Tiles(NamedTuple):
    """Tiles of one kernel.

    Attributes:
      rows: of the output a thread block computes at a time.
      columns: likewise; half of them for each compute warpgroup.
      depth: of the contraction a pipeline stage holds.
      stages: of the pipeline.
      snake: tiles along the rows that are visited before the next column, for reuse of weights in L2.
    """

    rows: int
    columns: int
    depth: int
    stages: int
    snake: int

    @property
    def suit_every_kernel(self) -> bool:
        """Not the product alone: in the others either warpgroup needs 64 of the rows, and deeper stages would spill."""
        return self.rows == 128 and self.depth == 64

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory a thread block needs, barriers rounded up."""
        stage = 2 * (self.rows + self.columns) * self.depth
        return self.stages * stage + 2 * COMPUTE_WARPGROUPS * self.rows * (STORE_COLUMNS + PARTIAL_COLUMNS) + _BARRIERS


class SwappedTiles(NamedTuple):
    """Tiles of the kernel with swapped operands: `SWAPPED_COLUMNS` features by `rows` rows, `SWAPPED_DEPTH` a stage.

    Attributes:
      rows: of an expert that a thread block serves at a time: 8, 16, 32 or 64.
      stages: of the pipeline.
    """

    rows: int
    stages: int

    def shared_memory(self, itemsize: int, num_weights: int) -> int:
        """Bytes of shared memory a thread block needs, barriers rounded up; `itemsize` of the weights."""
        stage = (2 * self.rows + itemsize * num_weights * SWAPPED_COLUMNS) * SWAPPED_DEPTH
        return self.stages * stage + 2 * SWAPPED_COLUMNS * self.rows + _BARRIERS


CANDIDATES = tuple(
    tiles
    for tiles in itertools.starmap(Tiles, itertools.product((64, 128), (128, 256), (64, 128), _STAGES, (1, 4, 8, 16)))
    if tiles.shared_memory <= SHARED_MEMORY
)
"""What a sweep on a GPU tries; the product alone takes all of them."""


def matmul_tiles(
    num_rows: int, num_experts: int, contracted: int, features: int, *, transpose_rhs: bool = False
) -> Tiles:
    """Tiles of y_RN = x_RK w_EKN, with weights stored [E, N, K] if `transpose_rhs`: the table's, or by rule."""
    operation = "matmul transposed" if transpose_rhs else "matmul"
    measured = _table().get(table_key(operation, num_rows, num_experts, contracted, features))
    return measured or by_rule(128 if num_rows >= 128 * num_experts else 64, features)


def swapped_tiles(num_rows: int, num_experts: int, itemsize: int, *, num_weights: int) -> SwappedTiles | None:
    """Tiles with swapped operands, for weights of 8 bits, or up to 32 rows an expert on average; None for others.

    Tiles start at aligned rows: with 7 rows more than an expert has on average, most experts need one tile only.

    Args:
      itemsize: bytes of an element of the weights.
    """
    if itemsize > 1 and num_rows > 32 * num_experts:
        return None
    share = -(-num_rows // num_experts)
    rows = next((height for height in (8, 16, 32) if share + 7 <= height), 64)
    fitting = [s for s in _STAGES if SwappedTiles(rows, s).shared_memory(itemsize, num_weights) <= SHARED_MEMORY]
    return SwappedTiles(rows, fitting[-1])


def weight_gradient_tiles(contracted: int, features: int) -> Tiles:
    """Tiles of dw_EKN = x_RK^T dy_RN: the table's, or by rule."""
    return _table().get(table_key("weight_gradient", 0, 0, contracted, features)) or by_rule(128, features)


def swiglu_tiles(num_rows: int, num_experts: int, width: int, hidden: int) -> Tiles:
    """Tiles of the fused gate and up, half of the columns each: the table's, or by rule."""
    return _table().get(table_key("swiglu", num_rows, num_experts, width, hidden)) or by_rule(128, 256)


def by_rule(rows: int, features: int) -> Tiles:
    """The widest columns that divide N, and as many stages as shared memory holds."""
    columns = 256 if features % 256 == 0 else 128
    fitting = [stages for stages in _STAGES if Tiles(rows, columns, 64, stages, 1).shared_memory <= SHARED_MEMORY]
    return Tiles(rows, columns, 64, fitting[-1], 8)


def table_key(operation: str, num_rows: int, num_experts: int, contracted: int, features: int) -> str:
    """Key of the table: rows an expert are rounded down to a power of two, since batches differ by little.

    Args:
      operation: "matmul", "matmul transposed" (weights stored [E, N, K], as in the gradient of x), "swiglu", or
        "weight_gradient", with no rows and experts.
    """
    share = num_rows // num_experts if num_experts else 0
    return f"{operation} {1 << share.bit_length() >> 1}x{contracted}x{features} E{num_experts}"


@functools.cache
def _table() -> dict[str, Tiles]:
    return {key: Tiles(*values) for key, values in json.loads(_TABLE.read_text()).items()}
