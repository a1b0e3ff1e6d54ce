"""The seam between `--tune` and the tile table of the Hopper kernels; its GPU side has not been run on a GPU yet."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.kernel_bench.operations import BenchError, Race


class HopperTiles:
    """The Hopper kernels' tiles, candidates and table.

    Raises:
      BenchError: the kernels cannot be imported here.
    """

    def __init__(self) -> None:
        try:
            self._tiles = importlib.import_module("pallas_kernels.hopper_tiles")
            self._kernels = importlib.import_module("pallas_kernels.grouped_matmul.mosaic_gpu")
        except ImportError as error:
            raise BenchError(f"--tune needs the Hopper kernels of pallas_kernels: {error}") from error
        self.path = Path(str(self._tiles.__file__)).with_suffix(".json")

    def candidates(self, race: Race) -> Sequence[Any]:
        """All tiles; a kernel that does not take one raises, and the sweep notes why."""
        candidates: Sequence[Any] = self._tiles.CANDIDATES
        return candidates

    def step(self, race: Race, tiles: Any) -> Callable[..., Any]:
        """The race's step with these tiles."""
        if race.step == "wgrad":
            return functools.partial(self._kernels.weight_gradient, tiles=tiles)
        return functools.partial(self._kernels.matmul, tiles=tiles, transpose_rhs=race.step == "dgrad")

    def key(self, race: Race) -> str:
        """Key of the table; dgrad is the product with K and N exchanged."""
        contracted, features = race.dims.contracted, race.dims.features
        key: Callable[..., str] = self._tiles.table_key
        if race.step == "wgrad":
            return key("weight_gradient", 0, 0, contracted, features)
        if race.step == "dgrad":
            contracted, features = features, contracted
        return key("matmul", race.dims.rows, race.dims.experts, contracted, features)
