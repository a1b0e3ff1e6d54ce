"""The seam between `--tune` and the tile table of the Hopper kernels; its GPU side has not been run on a GPU yet."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.kernel_bench.operations import BenchError, Race


class _HopperTiles:
    """The candidates and the table of the Hopper kernels of one operation.

    Raises:
      BenchError: the kernels cannot be imported here.
    """

    def __init__(self, operation: str) -> None:
        try:
            self._tiles = importlib.import_module("pallas_kernels.hopper_tiles")
            self._kernels = importlib.import_module(f"pallas_kernels.{operation}.mosaic_gpu")
        except ImportError as error:
            raise BenchError(f"--tune needs the Hopper kernels of pallas_kernels: {error}") from error
        self.path = Path(str(self._tiles.__file__)).with_suffix(".json")

    def candidates(self, race: Race) -> Sequence[Any]:
        """All tiles; a kernel that does not take one raises, and the sweep notes why."""
        candidates: Sequence[Any] = self._tiles.CANDIDATES
        return candidates

    def _key(self, *arguments: Any) -> str:
        key: Callable[..., str] = self._tiles.table_key
        return key(*arguments)


class MatmulTiles(_HopperTiles):
    """Tiles of the product, of the product with transposed weights (dgrad), and of the weight gradient."""

    def __init__(self) -> None:
        super().__init__("grouped_matmul")

    def step(self, race: Race, tiles: Any) -> Callable[..., Any]:
        """The race's step with these tiles."""
        if race.step == "wgrad":
            return functools.partial(self._kernels.weight_gradient, tiles=tiles)
        return functools.partial(self._kernels.matmul, tiles=tiles, transpose_rhs=race.step == "dgrad")

    def key(self, race: Race) -> str:
        """Key of the table; dgrad contracts over the features."""
        rows, experts, contracted, features = race.dims
        if race.step == "wgrad":
            return self._key("weight_gradient", 0, 0, contracted, features)
        if race.step == "dgrad":
            return self._key("matmul transposed", rows, experts, features, contracted)
        return self._key("matmul", rows, experts, contracted, features)


class SwigluTiles(_HopperTiles):
    """Tiles of the fused gate and up; inference chooses them, training uses the same."""

    def __init__(self) -> None:
        super().__init__("grouped_swiglu")

    def step(self, race: Race, tiles: Any) -> Callable[..., Any]:
        """The forward step with these tiles; the others share its key."""
        return functools.partial(self._kernels.swiglu, tiles=tiles, save_inputs=False)

    def key(self, race: Race) -> str:
        """Key of the table, whatever the step."""
        return self._key("swiglu", *race.dims)
