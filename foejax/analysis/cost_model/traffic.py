"""What collectives take on a cluster: a latency, and bytes over the links inside a host and between hosts.

The collectives are those that `sharding.forward_pass` states exactly, so nothing is compiled. Bytes that cross hosts
are those of `sharding.crossing`: rings through the devices in mesh order, all-to-alls in pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from foejax.analysis.cost_model.cluster import Cluster
from sharding import Layout
from sharding.audit import Collective
from sharding.crossing import RING_OPS, groups_along, host_egress_bytes
from sharding.formulas import ring_egress
from sharding.mesh import MeshSizes


@dataclass(frozen=True)
class Traffic:
    """One collective of a step, on the fullest device and host.

    Attributes:
      count: executions in a step.
      payload: operand bytes on one device.
      link_bytes: that a device sends inside its host, one execution.
      network_bytes: that a host sends to other hosts, all devices of it together, one execution.
      devices, hosts: that one group of it spans.
    """

    what: str
    op: str
    axes: tuple[str, ...]
    count: int
    payload: float
    link_bytes: float
    network_bytes: float
    devices: int
    hosts: int


def traffic_of(row: Mapping[str, Any], layout: Layout, hosts: Sequence[str]) -> Traffic:
    """Who sends what where, of a row with op, axes, count and payload_bytes (audited, or stated by a formula).

    Args:
      hosts: name of the host of every mesh device.

    Raises:
      ValueError: an op of which nobody can tell who sends to whom.
    """
    unit = _unit_traffic(row["op"], tuple(row["axes"]), layout.sizes, tuple(hosts))
    payload = row["payload_bytes"]
    return replace(
        unit,
        what=row.get("what", row["op"]),
        count=row["count"],
        payload=payload,
        link_bytes=unit.link_bytes * payload / _UNIT,
        network_bytes=unit.network_bytes * payload / _UNIT,
    )


_UNIT = 1 << 20
"""Bytes of the operand for which figures are kept: all of them grow with it in proportion."""


@cache
def _unit_traffic(op: str, axes: tuple[str, ...], sizes: MeshSizes, hosts: tuple[str, ...]) -> Traffic:
    mesh = Layout.abstract("foe", sizes).mesh
    groups = groups_along(mesh, axes)
    collective = Collective(
        op=op,
        axes=axes,
        group_size=len(groups[0]),
        count=1,
        payload_bytes=_UNIT,
        wire_bytes=0,
        dtype="",
        compiled_dtype="",
        shapes=(),
        op_name=op,
    )
    return Traffic(
        what=op,
        op=op,
        axes=axes,
        count=1,
        payload=_UNIT,
        link_bytes=_link_bytes(op, _UNIT, groups, hosts),
        network_bytes=max(host_egress_bytes(collective, mesh, hosts).values()),
        devices=len(groups[0]),
        hosts=max(len({hosts[device] for device in group}) for group in groups),
    )


def seconds(traffic: Traffic, cluster: Cluster) -> tuple[float, str]:
    """Of one execution, and on which fabric it waits: `link` or `network`.

    Latency plus the slower of the two fabrics: a library moves pieces on both at once. All adapters of a host share
    what leaves it, as they do where rings leave a host by different devices.
    """
    device = cluster.accelerator
    link_rate = device.link_bandwidth * cluster.link_fraction
    network_rate = device.network_bandwidth * cluster.network_fraction * cluster.devices_per_host
    link_bytes, network_bytes = _hierarchical_bytes(traffic, cluster)
    on_links, on_network = link_bytes / link_rate, network_bytes / network_rate
    fabric = "network" if on_network > on_links or traffic.hosts == traffic.devices else "link"
    return cluster.collective_latency + _steps_latency(traffic, cluster) + max(on_links, on_network), fabric


def _link_bytes(op: str, payload: float, groups: Sequence[Sequence[int]], hosts: Sequence[str]) -> float:
    """What a device sends inside its host: on a ring all it sends if its neighbour is there; of pairs those there."""
    here = max(sum(hosts[device] == hosts[other] for other in group) for group in groups for device in group)
    if op in RING_OPS:
        return ring_egress(op, payload, len(groups[0])) if here > 1 else 0.0
    return payload * (here - 1) / len(groups[0])


def _hierarchical_bytes(traffic: Traffic, cluster: Cluster) -> tuple[float, float]:
    """Bytes on links and network, those of a hierarchical all-reduce where the cluster has it."""
    if traffic.op != "all-reduce" or cluster.all_reduce == "ring" or traffic.hosts == 1:
        return traffic.link_bytes, traffic.network_bytes
    on_host = ring_egress("all-reduce", traffic.payload, traffic.devices // traffic.hosts)
    between, around = (ring_egress("all-reduce", 1.0, size) for size in (traffic.hosts, traffic.devices))
    return on_host, traffic.network_bytes * between / around


def _steps_latency(traffic: Traffic, cluster: Cluster) -> float:
    """Seconds of the steps: a ring waits for its slowest link in every one; pairs go one after the other."""
    inside, outside = cluster.link_latency, cluster.network_latency
    rounds = 2 if traffic.op == "all-reduce" else 1
    if traffic.hosts == 1:
        return rounds * (traffic.devices - 1) * inside
    per_host = traffic.devices // traffic.hosts
    if traffic.op not in RING_OPS:
        return (per_host - 1) * inside + (traffic.devices - per_host) * outside
    if traffic.op == "all-reduce" and cluster.all_reduce == "hierarchical":
        return 2 * (per_host - 1) * inside + 2 * (traffic.hosts - 1) * outside
    return rounds * (traffic.devices - 1) * outside
