"""Eight simulated CPU devices and strict promotion for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

# XLA reads these when its first backend starts, so they are set before JAX is imported. On a busy machine eight
# simulated devices may take long to meet in a collective; the default limit of 40 seconds would end the process.
_XLA_FLAGS = {
    "xla_force_host_platform_device_count": 8,
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": 120,
    "xla_cpu_collective_call_terminate_timeout_seconds": 600,
}
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [_given, *(f"--{name}={value}" for name, value in _XLA_FLAGS.items() if name not in _given)]
).strip()

from foejax.devices import avoid_broken_reductions  # noqa: E402

avoid_broken_reductions()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Derandomized: a failing example fails on every machine. No deadline: the first example compiles.
hypothesis.settings.register_profile("foejax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("foejax")


@pytest.fixture
def loose_promotion() -> Iterator[None]:
    """JAX's default promotion, for tests that run third-party code which relies on it."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
