"""Simulated devices: one CPU as many, for layouts and collectives without the hardware.

The one place that decides which devices JAX starts with; it must run before JAX's first backend does.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys

_COUNT_FLAG = "--xla_force_host_platform_device_count"
# Simulated devices share the cores, so that one may wait long for the others in a collective; XLA's default limit of
# 40 seconds would end the process.
_PATIENCE = {
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds": 120,
    "--xla_cpu_collective_call_terminate_timeout_seconds": 600,
}

# With several simulated devices, fused reductions that XLA of jaxlib 0.11 hands to YNNPACK return NaN.
_BROKEN_REDUCTIONS_JAXLIB = "0.11."
_YNN_FLAG, _NO_REDUCTIONS = "--xla_cpu_experimental_ynn_fusion_type", "-reduce"


def avoid_broken_reductions() -> None:
    """Keep jaxlib 0.11 on CPU from reductions that are wrong with several devices; before JAX's first backend."""
    given = os.environ.get("XLA_FLAGS", "")
    is_broken = importlib.metadata.version("jaxlib").startswith(_BROKEN_REDUCTIONS_JAXLIB)
    if is_broken and _YNN_FLAG not in given:
        os.environ["XLA_FLAGS"] = f"{given} {_YNN_FLAG}={_NO_REDUCTIONS}".strip()


def simulated_environment(count: int) -> dict[str, str]:
    """The variables with which a process started now sees `count` CPU devices."""
    given = re.sub(rf"{_COUNT_FLAG}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    flags = {_COUNT_FLAG: count} | {name: seconds for name, seconds in _PATIENCE.items() if name not in given}
    xla_flags = " ".join([*given.split(), *(f"{name}={value}" for name, value in flags.items())])
    return {"XLA_FLAGS": xla_flags, "JAX_PLATFORMS": "cpu"}


def simulate_devices(count: int, processes: int = 1) -> None:
    """Make JAX see `count` CPU devices.

    Devices that JAX has already started with are kept where there are enough of them.

    Args:
      count: devices over all processes.
      processes: how many there are (`sharding.hosts.start` comes first); each simulates its share.

    Raises:
      ValueError: JAX has started with fewer devices, or `count` is not positive or does not divide over the processes.
    """
    if count < 1:
        raise ValueError(f"devices={count} is not a number of devices: choose at least 1")
    if count % processes:
        raise ValueError(
            f"devices={count} does not divide over {processes} processes: choose a multiple of {processes}"
        )
    avoid_broken_reductions()
    os.environ.update(simulated_environment(count // processes))
    imported_before = "jax" in sys.modules
    import jax

    if imported_before:
        jax.config.update("jax_platforms", "cpu")
    available = len(jax.devices())
    if available < count:
        raise ValueError(
            f"devices={count} cannot be simulated: JAX has started with {available} already; "
            "call simulate_devices before any other use of JAX"
        )
