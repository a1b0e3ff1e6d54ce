"""What tests of Hopper kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper


@pytest.fixture
def mosaic_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Mosaic kernels run on CPU under race detection, in two thread blocks, so that a block has several tiles."""
    monkeypatch.setattr(hopper, "num_multiprocessors", lambda: 2)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    interpret_pallas_call.reset_gpu_interpret_mode_state()
