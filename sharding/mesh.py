"""Device meshes: three axes, always in the same order, and how many devices each one gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

DATA, GROUP, EXPERT = "data", "group", "expert"
AXES = (DATA, GROUP, EXPERT)
"""Outermost first: `data` may cross hosts, `group` may, `expert` should not."""

LayoutKind = Literal["foe", "fsdp", "ep", "tp", "tp_ep", "hp"]


class MeshSizes(NamedTuple):
    """Devices along each mesh axis."""

    data: int
    group: int
    expert: int


def make_mesh(sizes: MeshSizes, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the first `prod(sizes)` devices, `data` outermost and `expert` innermost.

    Raises:
      ValueError: there are fewer devices than the mesh needs.
    """
    available = list(jax.devices() if devices is None else devices)
    needed = int(np.prod(sizes))
    if needed > len(available):
        raise ValueError(
            f"mesh data={sizes.data} x group={sizes.group} x expert={sizes.expert} needs {needed} devices and there "
            f"are {len(available)}: choose smaller axes, or simulate devices with --devices {needed}"
        )
    grid = np.array(available[:needed]).reshape(sizes)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def plan_mesh(
    kind: LayoutKind,
    num_devices: int,
    *,
    num_groups: int = 1,
    num_experts: int = 1,
    num_kv_heads: int = 1,
    num_ffn_heads: int = 1,
    data: int = 0,
    group: int = 0,
    expert: int = 0,
) -> MeshSizes:
    """Axis sizes for a layout; sizes given as 0 are derived from the device count.

    foe gives `group` as many devices as divide both the groups and the devices and the surplus to `data`; `expert` is 1
    unless given: that many devices then share each group. fsdp gives all to `data`; ep gives all it can to `expert` and
    the surplus to `data`; tp and tp_ep give `group` as many as divide heads and experts and the surplus to `data`. hp
    gives `group` as many as divide the heads and the surplus to `data`; more of `expert` than 1 needs one
    head a device.

    Raises:
      ValueError: sizes that do not multiply to the device count or do not divide the model.
    """
    if kind == "foe":
        expert = expert or 1
        group = group or _derive("group", num_devices // expert, data, num_groups, "num_groups")
        data = data or num_devices // (group * expert)
        _check_divides("group", group, "num_groups", num_groups)
        if expert > 1:
            _check_divides("expert", expert, "experts of a group (num_experts / num_groups)", num_experts // num_groups)
    elif kind == "ep":
        group = _fixed_at_one("group", group, kind)
        expert = expert or _derive("expert", num_devices, data, num_experts, "num_experts")
        data = data or num_devices // expert
        _check_divides("expert", expert, "num_experts", num_experts)
    elif kind in ("tp", "tp_ep"):
        expert = _fixed_at_one("expert", expert, kind)
        parts = math.gcd(num_kv_heads, num_experts)
        group = group or _derive("group", num_devices, data, parts, "gcd(num_kv_heads, num_experts)")
        data = data or num_devices // group
        _check_divides("group", group, "num_kv_heads", num_kv_heads)
        _check_divides("group", group, "num_experts", num_experts)
    elif kind == "hp":
        expert = expert or 1
        group = group or _derive("group", num_devices // expert, data, num_ffn_heads, "num_ffn_heads")
        data = data or num_devices // (group * expert)
        _check_divides("group", group, "num_ffn_heads", num_ffn_heads)
        if expert > 1:
            if group != num_ffn_heads:
                raise ValueError(
                    f"mesh.expert={expert} splits the experts of a head, and mesh.group={group} leaves "
                    f"{num_ffn_heads // group} heads on a device: set mesh.group={num_ffn_heads} first"
                )
            _check_divides("expert", expert, "experts of a head", num_experts // num_ffn_heads)
    else:
        group, expert = _fixed_at_one("group", group, kind), _fixed_at_one("expert", expert, kind)
        data = data or num_devices
    sizes = MeshSizes(data, group, expert)
    if int(np.prod(sizes)) != num_devices:
        raise ValueError(
            f"mesh data={data} x group={group} x expert={expert} is {int(np.prod(sizes))} devices and {num_devices} "
            "are to be used: choose mesh sizes whose product is the device count (mesh.devices)"
        )
    return sizes


def _derive(axis: str, num_devices: int, data: int, parts: int, field: str) -> int:
    """Size of a model axis: all devices left by `data`, or the parts of the model if those are fewer."""
    left = num_devices // data if data else num_devices
    if left % parts == 0:
        if data and left > parts:
            raise ValueError(
                f"mesh.data={data} leaves {left} devices to {field}={parts}: leave mesh.data at 0, and it takes the "
                "rest, or use another mesh.devices"
            )
        return parts
    if parts % left == 0:
        return left
    raise ValueError(
        f"{field}={parts} neither divides the {left} devices nor is divided by them: "
        f"set mesh.{axis} and mesh.data, or use another mesh.devices"
    )


def _fixed_at_one(axis: str, size: int, kind: str) -> int:
    if size > 1:
        raise ValueError(f"mesh.{axis}={size} does not fit mesh.layout={kind}: leave mesh.{axis} at 0 or 1")
    return 1


def _check_divides(axis: str, size: int, field: str, parts: int) -> None:
    if parts % size:
        raise ValueError(f"mesh.{axis}={size} does not divide {field}={parts}: choose a divisor of {parts}")
