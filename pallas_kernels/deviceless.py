"""Compiles programs for an H200 on a machine without a GPU, to see that a kernel lowers, fits and does not spill.

Needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt of JAX's own version and a `ptxas` (wheel nvidia-cuda-nvcc): the
extra `deviceless`. Nothing is autotuned and cuDNN is absent, so a compiled program says nothing about speed.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_H200: dict[str, int | float | str | bool] = {
    # NVIDIA H200 SXM data sheet, and the CUDA programming guide's table for compute capability 9.0
    "name": "NVIDIA H200",
    "device_vendor": "NVIDIA Corporation",
    "platform_version": "Compute Capability 9.0a",
    "core_count": 132,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "memory_bandwidth": 4_800_000_000_000,
    "device_memory_size": 151_397_597_184,
    "l2_cache_size": 52_428_800,
    "shared_memory_per_block": 49_152,
    "shared_memory_per_block_optin": 232_448,
    "shared_memory_per_core": 233_472,
    "registers_per_block_limit": 65_536,
    "registers_per_core_limit": 65_536,
    "threads_per_block_limit": 1024,
    "threads_per_core_limit": 2048,
    "threads_per_warp": 32,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "block_dim_limit_x": 2_147_483_647,
    "block_dim_limit_y": 65_535,
    "block_dim_limit_z": 65_535,
    "device_address_bits": 64,
    "pcie_bandwidth": 34_359_738_368,
    "ecc_enabled": True,
    "driver_version": "13.0.0",
    "runtime_version": "13.0.0",
    "compile_time_toolkit_version": "13.0.0",
    "dnn_version": "9.10.0",
}


def h200_mesh(axes: tuple[str, ...] = ("device",), shape: tuple[int, ...] = (1,)) -> Mesh:
    """A mesh of H200s that do not exist, for `jax.ShapeDtypeStruct`s with shardings.

    Raises:
      RuntimeError: the extra `deviceless` is not installed.
    """
    sizes = "x".join(["1", "1", str(math.prod(shape))])
    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=_target_config(), topology=sizes)
    except Exception as error:  # JAX raises what its plugin loader happens to
        raise RuntimeError(
            f"no deviceless compiler for CUDA ({error}): pip install 'foejax[deviceless]' at JAX {jax.__version__}"
        ) from error
    return topologies.make_mesh(topology, shape, axes)


def compile_for_h200(function: Callable[..., Any], *shapes: Any) -> jax.stages.Compiled:
    """Compile `function` for one H200; `shapes` are pytrees of anything with a shape and a dtype."""
    sharding = NamedSharding(h200_mesh(), PartitionSpec())
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)
    return jax.jit(function).lower(*abstract).compile()


@contextlib.contextmanager
def dumped_kernels(folder: Path) -> Iterator[None]:
    """While open, every Mosaic kernel that compiles leaves its PTX and the assembler's report in `folder`."""
    with mock.patch.dict(os.environ, {"MOSAIC_GPU_DUMP_TO": str(folder)}):
        yield


def _target_config() -> str:
    """The chip in the text form of XLA's target configuration."""
    fields = "\n".join(f"  {name}: {_literal(value)}" for name, value in _H200.items())
    capability = "  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }"
    return (
        f"gpu_device_info {{\n{fields}\n{capability}\n}}\n"
        f'platform_name: "CUDA"\ndnn_version_info {{ major: 9 minor: 10 patch: 0 }}\n'
        f'device_description_str: "{_H200["name"]}"\n'
    )


def _literal(value: int | float | str | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)
