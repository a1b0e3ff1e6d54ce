"""What leaves a host, against figures worked out by hand and measured on a veth between two namespaces."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from jax.sharding import Mesh

from sharding.audit import Collective
from sharding.crossing import groups_along, host_egress_bytes
from sharding.mesh import MeshSizes, make_mesh

MB = 1_000_000
TWO_HOSTS = ["node0"] * 4 + ["node1"] * 4


def collective(op: str, *axes: str, group_size: int, payload: int = 64 * MB) -> Collective:
    return Collective(
        op=op,
        axes=axes,
        group_size=group_size,
        count=3,
        payload_bytes=payload,
        wire_bytes=0,
        dtype="f32",
        compiled_dtype="f32",
        shapes=((payload // 4,),),
        op_name="jit(f)/merge",
    )


def mesh(data: int = 1, group: int = 1, expert: int = 1) -> Mesh:
    return make_mesh(MeshSizes(data, group, expert), jax.devices())


def test_a_ring_over_all_devices_crosses_once_each_way() -> None:
    egress = host_egress_bytes(collective("all-reduce", "group", group_size=8), mesh(group=8), TWO_HOSTS)
    assert egress == {"node0": 112 * MB, "node1": 112 * MB}


@pytest.mark.parametrize(
    ("op", "expected"),
    [("all-reduce", 256), ("reduce-scatter", 128), ("all-gather", 256), ("all-to-all", 128)],
)
def test_pairs_across_the_hosts_all_cross(op: str, expected: int) -> None:
    egress = host_egress_bytes(collective(op, "data", group_size=2), mesh(data=2, group=4), TWO_HOSTS)
    assert egress == {"node0": expected * MB, "node1": expected * MB}


@pytest.mark.parametrize("op", ["all-reduce", "all-gather", "all-to-all"])
def test_nothing_leaves_a_host_from_groups_inside_it(op: str) -> None:
    egress = host_egress_bytes(collective(op, "expert", group_size=4), mesh(data=2, expert=4), TWO_HOSTS)
    assert egress == {"node0": 0.0, "node1": 0.0}


def test_all_to_all_sends_the_other_hosts_share() -> None:
    egress = host_egress_bytes(collective("all-to-all", "expert", group_size=8), mesh(expert=8), TWO_HOSTS)
    assert egress == {"node0": 128 * MB, "node1": 128 * MB}


def test_a_ring_counts_by_its_order_and_not_by_its_members() -> None:
    alternating = ["node0", "node1"] * 4
    ring = collective("all-reduce", "group", group_size=8)
    assert host_egress_bytes(ring, mesh(group=8), alternating) == {"node0": 4 * 112 * MB, "node1": 4 * 112 * MB}
    pairwise = collective("all-to-all", "group", group_size=8)
    assert host_egress_bytes(pairwise, mesh(group=8), alternating) == {"node0": 128 * MB, "node1": 128 * MB}


def test_three_hosts_need_not_send_alike() -> None:
    hosts = ["a"] * 4 + ["b"] * 2 + ["c"] * 2
    exchange = collective("all-to-all", "group", group_size=8, payload=8 * MB)
    assert host_egress_bytes(exchange, mesh(group=8), hosts) == {"a": 16 * MB, "b": 12 * MB, "c": 12 * MB}


def test_several_axes_are_one_ring_in_mesh_order() -> None:
    assert groups_along(mesh(data=2, group=2, expert=2), ("data", "expert")) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    both = collective("all-reduce", "data", "group", group_size=8)
    assert host_egress_bytes(both, mesh(data=2, group=4), TWO_HOSTS) == {"node0": 112 * MB, "node1": 112 * MB}


def test_what_cannot_be_counted_is_refused_by_name() -> None:
    two = mesh(data=2, group=4)
    with pytest.raises(ValueError, match="each of the 8 mesh devices"):
        host_egress_bytes(collective("all-reduce", "group", group_size=4), two, ["node0", "node1"])
    with pytest.raises(ValueError, match="collective-permute at 'jit"):
        host_egress_bytes(collective("collective-permute", "group", group_size=2), two, TWO_HOSTS)
    unknown = dataclasses.replace(collective("all-reduce", group_size=4), axes=("?",))
    with pytest.raises(ValueError, match="follow no axes"):
        host_egress_bytes(unknown, two, TWO_HOSTS)
