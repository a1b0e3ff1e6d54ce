"""What tests of Hopper kernels share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as interpreter_memory
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper


@pytest.fixture
def mosaic_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Mosaic kernels run on CPU under race detection, in two thread blocks, so that a block has several tiles."""
    monkeypatch.setattr(hopper, "num_multiprocessors", lambda: 2)
    monkeypatch.setattr(gpu_callbacks, "wgmma", functools.partial(_wgmma, gpu_callbacks.wgmma))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    interpret_pallas_call.reset_gpu_interpret_mode_state()


def _wgmma(from_memory: Callable[..., Any], **arguments: Any) -> Any:
    """The interpreter takes the left operand for the key of a buffer, though wgmma may have it in registers."""
    left = np.asarray(arguments["a_allocation_key_as_array"])
    if left.ndim == 1:
        return from_memory(**arguments)
    memory, thread = gpu_callbacks._get_shared_memory(), arguments["thread"]
    info = interpreter_memory.GPULoggingInfo(arguments["mesh_location"], thread, arguments["source_info"])

    def buffer(name: str) -> tuple[Any, Any]:
        key = interpreter_memory.HostAllocationKey.from_array(arguments[f"{name}_allocation_key_as_array"])
        transforms = gpu_callbacks._remove_noop_transforms(arguments[f"{name}_transforms"])
        return key, memory.access(key, jax.tree.map(int, transforms))

    right, _, _ = memory.get_buffer_content(*buffer("b"), thread, logging_info=info)
    sums, _, _ = memory.get_buffer_content(*buffer("acc"), thread, logging_info=info)
    sums = sums + np.matmul(left, right, dtype=sums.dtype)
    memory.store_buffer_content(*buffer("acc"), sums, thread, logging_info=info)
    return arguments["token"]
