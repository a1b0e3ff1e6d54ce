"""From the rows a process has read to arrays on the mesh."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

Batch = dict[str, jax.Array]
HostBatch = Mapping[str, np.ndarray]


def data_shard(sharding: NamedSharding, batch_size: int) -> tuple[int, int]:
    """Which part of the batch this process reads, as (index, count).

    Processes whose devices hold the same rows (a `group` axis that crosses hosts) read the same part.

    Raises:
      ValueError: the batch does not divide into the shards of the mesh, or this process's rows do not lie together.
    """
    shards = int(np.prod([sharding.mesh.shape[axis] for axis in _axes_of(sharding.spec, 0)]))
    if batch_size % shards:
        raise ValueError(
            f"a batch of {batch_size} sequences does not divide over {shards} batch shards of the mesh: choose a "
            f"multiple of {shards} (data.batch_size / training.gradient_accumulation), or a smaller mesh.data"
        )
    rows = [index[0] for index in sharding.addressable_devices_indices_map((batch_size,)).values() if index]
    start = min(part.start or 0 for part in rows)
    stop = max(batch_size if part.stop is None else part.stop for part in rows)
    if len({(part.start, part.stop) for part in rows}) * (batch_size // shards) != stop - start:
        sizes = ", ".join(f"mesh.{axis}={size}" for axis, size in sharding.mesh.shape.items())
        raise ValueError(
            f"the devices of a process hold rows of the batch that do not lie together ({sizes}): start processes "
            "whose devices are all of mesh.group x mesh.expert, or leave mesh.expert at 1"
        )
    return start // (stop - start), batch_size // (stop - start)


def place_batch(batch: HostBatch, sharding: NamedSharding, accumulation: int = 1) -> Batch:
    """Put a process's rows of a batch on the mesh.

    Args:
      batch: arrays [rows of this process, T].
      sharding: partition of [B, T] arrays, rows first.
      accumulation: number A of micro-batches; above 1 the result is [A, B / A, T], and the process's rows are those of
        the first micro-batch, then those of the second one, and so on.
    """
    if accumulation > 1:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
        batch = {name: rows.reshape(accumulation, -1, *rows.shape[1:]) for name, rows in batch.items()}
    return {name: jax.make_array_from_process_local_data(sharding, np.asarray(rows)) for name, rows in batch.items()}


def _axes_of(spec: PartitionSpec, dim: int) -> tuple[str, ...]:
    axes = spec[dim] if len(spec) > dim else None
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
