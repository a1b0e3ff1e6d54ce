"""Results of a program where the host of every process can read them.

In one process that is everywhere. In several a process reaches the shards of its own devices alone, and every device
therefore gathers the whole result.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from sharding.mesh import AXES


def readable_local(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """A result that would leave the program by `spec`, as it has to leave by `readable_spec(spec)`."""
    if jax.process_count() == 1:
        return x
    for dim, axes in enumerate(spec):
        if axes is not None:
            x = lax.all_gather(x, axes, axis=dim, tiled=True)
    return x[None]


def readable_spec(spec: PartitionSpec) -> PartitionSpec:
    """How a result leaves the program: by `spec`, or in several processes one copy for each device."""
    return spec if jax.process_count() == 1 else PartitionSpec(AXES)


def read(results: Any) -> Any:
    """NumPy arrays of what left a program by `readable_spec`, whole; waits for it."""
    if jax.process_count() == 1:
        return jax.device_get(results)
    own = jax.device_get(jax.tree.map(lambda copies: copies.addressable_data(0), results))
    return jax.tree.map(lambda copies: copies[0], own)
