"""What a collective sends between hosts: bytes that leave each host, by the order of the devices in its groups.

The audit's `wire_bytes` is what one device sends, wherever to. On a ring only the neighbours that live on two hosts use
the network between them, so that what leaves a host depends on which devices meet and in which order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from sharding.audit import UNKNOWN_AXES, Collective
from sharding.formulas import ring_egress

RING_OPS = ("all-reduce", "reduce-scatter", "all-gather")
PAIRWISE_OPS = ("all-to-all",)


def host_egress_bytes(collective: Collective, mesh: Mesh | AbstractMesh, hosts: Sequence[str]) -> dict[str, float]:
    """Bytes that every host sends to other hosts in one execution of a collective, dtype as written.

    All-reduce, reduce-scatter and all-gather run on a ring through the devices of a group in mesh order, as in Gloo
    and, unless it picks a tree, NCCL; every device of it sends `ring_egress` to the next one, the last one to the
    first. In an all-to-all each device sends each other one its part directly. Headers, acknowledgements and set-up
    are not in it.

    Args:
      collective: one of `sharding.audit.audit` of a program on this mesh; multiply by its `count` for one run.
      mesh: the mesh of the program; its sizes are enough.
      hosts: name of the host of every mesh device, in the order of `mesh.devices.flat`. In a run of several processes
        `[names[device.process_index] for device in mesh.devices.flat]`, with `names = sharding.hosts.host_names()`;
        on simulated devices any names, one for each host that is imagined.

    Returns:
      Bytes by host, in the order in which the hosts appear; 0.0 for one that sends nothing to another.

    Raises:
      ValueError: another number of hosts than devices; a collective whose groups follow no mesh axes; an op of which
        the audit does not tell who sends to whom (a permute, a broadcast, a ragged all-to-all).
    """
    if len(hosts) != mesh.size:
        raise ValueError(f"hosts={list(hosts)}: give the host of each of the {mesh.size} mesh devices")
    if collective.op not in RING_OPS + PAIRWISE_OPS:
        raise ValueError(
            f"{collective.op} at {collective.op_name!r}: who sends to whom is not known from an audit; "
            f"only {', '.join(RING_OPS + PAIRWISE_OPS)} can be counted"
        )
    if collective.axes == UNKNOWN_AXES:
        raise ValueError(
            f"{collective.op} at {collective.op_name!r}: its groups follow no axes of the mesh {dict(mesh.shape)}"
        )
    egress = dict.fromkeys(hosts, 0.0)
    sent = _bytes_per_link(collective)
    for group in groups_along(mesh, collective.axes):
        for source, target in _links(collective.op, group):
            if hosts[source] != hosts[target]:
                egress[hosts[source]] += sent
    return egress


def groups_along(mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> list[list[int]]:
    """Device positions (in `mesh.devices.flat`) that differ along `axes` alone, each group in mesh order."""
    dims = [mesh.axis_names.index(axis) for axis in axes]
    kept = [dim for dim in range(len(mesh.axis_names)) if dim not in dims]
    size = int(np.prod([mesh.shape[axis] for axis in axes]))
    positions = np.arange(mesh.size).reshape(tuple(mesh.shape.values())).transpose([*kept, *dims])
    return positions.reshape(-1, size).tolist()


def _bytes_per_link(collective: Collective) -> float:
    if collective.op in PAIRWISE_OPS:
        return collective.payload_bytes / collective.group_size
    return ring_egress(collective.op, collective.payload_bytes, collective.group_size)


def _links(op: str, group: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Who sends to whom: every device to the next one of the ring, or to each other one."""
    if op in RING_OPS:
        yield from zip(group, [*group[1:], group[0]], strict=True)
    else:
        yield from ((source, target) for source in group for target in group if source != target)
