"""The binding between a model written for one group and a mesh of devices.

A `Layout` says where parameters and tokens live and supplies the few operations that cross devices. Models call
these operations and never name a mesh axis.

Shape letters: S groups on this device, N tokens on this device, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.collectives import all_to_all_local, gather_param_local, reduce_scatter_local, vary_local
from sharding.hosts import check_hosts
from sharding.mesh import AXES, DATA, EXPERT, GROUP, LayoutKind, MeshSizes, make_mesh, plan_mesh

LogicalAxes = tuple[str | None, ...]


@dataclass(frozen=True)
class Layout:
    """Where a model lives: a mesh, what is split over which axis, and how groups meet.

    Attributes:
      mesh: axes `data`, `group`, `expert`.
      kind: foe (groups over `group`), fsdp (data parallel) or ep (experts over `expert`).
      shard_params: parameters are also split over `data` and gathered layer by layer (training); otherwise they are
        replicated over `data` (decoding).
    """

    mesh: Mesh
    kind: LayoutKind
    shard_params: bool = True

    @classmethod
    def create(
        cls,
        kind: LayoutKind,
        *,
        num_groups: int = 1,
        num_experts: int = 1,
        num_devices: int = 0,
        data: int = 0,
        group: int = 0,
        expert: int = 0,
        shard_params: bool = True,
    ) -> Layout:
        """Plan and make the mesh for a layout; see `plan_mesh`.

        With `num_devices` at 0 the axes given decide, or, where they leave it open, all devices there are.
        """
        if not num_devices:
            given = max(data, 1) * max(group, 1) * max(expert, 1)
            needed = {"foe": data and group, "ep": data and expert, "fsdp": data}[kind]
            num_devices = given if needed else len(jax.devices())
        sizes = plan_mesh(
            kind, num_devices, num_groups=num_groups, num_experts=num_experts, data=data, group=group, expert=expert
        )
        mesh = make_mesh(sizes)
        check_hosts(mesh, kind)
        return cls(mesh, kind, shard_params)

    @classmethod
    def single_device(cls, kind: LayoutKind = "foe") -> Layout:
        """One device that holds every group and every expert."""
        return cls(make_mesh(MeshSizes(1, 1, 1)), kind)

    @property
    def sizes(self) -> MeshSizes:
        """Devices along each axis."""
        return MeshSizes(*(self.mesh.shape[axis] for axis in AXES))

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Mesh axes over which the batch is split; over the others every device holds the same tokens."""
        return (DATA, EXPERT)

    @property
    def num_token_shards(self) -> int:
        """Number of parts the batch is split into."""
        return int(np.prod([self.mesh.shape[axis] for axis in self.token_axes]))

    @cached_property
    def hosts(self) -> dict[int, int]:
        """Process index of every device id in the mesh."""
        return {device.id: device.process_index for device in self.mesh.devices.flat}

    @cached_property
    def rules(self) -> dict[str, str]:
        """Mesh axis of every logical axis that is split; the others are replicated."""
        rules = {"group": GROUP, "vocab": GROUP}
        if self.kind == "ep":
            rules["experts"] = EXPERT
        if self.shard_params:
            rules["embed"] = DATA
        return {logical: axis for logical, axis in rules.items() if self.mesh.shape[axis] > 1}

    @property
    def gathers_params(self) -> bool:
        """Whether parameters are split over `data` and gathered where they are used."""
        return "embed" in self.rules

    def spec(self, logical_axes: LogicalAxes) -> PartitionSpec:
        """Partition of an array whose dimensions have these logical names.

        Raises:
          ValueError: two of them map to one mesh axis.
        """
        axes = [self.rules.get(name) if name else None for name in logical_axes]
        used = [axis for axis in axes if axis]
        if len(used) != len(set(used)):
            raise ValueError(f"logical axes {logical_axes} map twice to one mesh axis: {axes}")
        return PartitionSpec(*axes)

    def batch_spec(self, *trailing: str | None) -> PartitionSpec:
        """Partition of an array whose leading dimension is the batch."""
        return PartitionSpec(self.token_axes, *trailing)

    def group_spec(self, leading: int) -> PartitionSpec:
        """Partition of an array whose dimension number `leading` runs over the groups."""
        return PartitionSpec(*(None,) * leading, GROUP)

    @property
    def logits_spec(self) -> PartitionSpec:
        """Partition of logits [B, V] of which every device computes its part of the vocabulary."""
        return self.batch_spec(GROUP)

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """`spec` on this mesh."""
        return NamedSharding(self.mesh, spec)

    def shard_map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`function` as the program of one device, manual over every mesh axis."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True)

    # Operations for use inside shard_map. Activations vary over all axes; every parameter is made so on entry.

    def vary_local(self, x: jax.Array) -> jax.Array:
        """Mark an array as differing between devices, so that it can meet activations."""
        return vary_local(x, AXES)

    def enter_param_local(self, shard: jax.Array, spec: PartitionSpec, dtype: Any) -> jax.Array:
        """A parameter as the layer uses it: gathered over `data`, in `dtype`, its gradient summed where replicated."""
        shard = self.vary_local(shard)
        if DATA not in spec:
            return shard.astype(dtype)
        return gather_param_local(shard, DATA, spec.index(DATA), jnp.dtype(dtype))

    def gather_vocab_local(self, x: jax.Array, dim: int) -> jax.Array:
        """Join an array that is split over the vocabulary along `dim`."""
        if "vocab" not in self.rules:
            return x
        return lax.all_gather(x, self.rules["vocab"], axis=dim, tiled=True)

    def group_slice_local(self, x: jax.Array, dim: int) -> jax.Array:
        """The part of `x` along `dim` (all groups, or all experts in group order) that this device's groups own."""
        count = self.mesh.shape[GROUP]
        if count == 1:
            return x
        size = x.shape[dim] // count
        return lax.dynamic_slice_in_dim(x, lax.axis_index(GROUP) * size, size, axis=dim)

    def merge_local(self, delta_SND: jax.Array) -> jax.Array:
        """Sum over all groups, [N, D], the same on every device of the `group` axis: the one collective of a layer."""
        total_ND = delta_SND.sum(axis=0)
        if self.mesh.shape[GROUP] == 1:
            return total_ND
        return self.vary_local(lax.psum(total_ND, GROUP))

    def merge_token_slice_local(self, delta_SND: jax.Array) -> jax.Array:
        """Sum over all groups, of which this device gets its slice of the tokens: [N / devices in `group`, D]."""
        total_ND = delta_SND.sum(axis=0)
        if self.mesh.shape[GROUP] == 1:
            return total_ND
        return reduce_scatter_local(total_ND, GROUP, dim=0)

    def token_slice_local(self, x_N: jax.Array) -> jax.Array:
        """This device's slice of tokens that all devices of the `group` axis hold."""
        return self.group_slice_local(x_N, dim=0)

    @property
    def slice_axes(self) -> tuple[str, ...]:
        """Mesh axes over which `token_slice_local` cuts a device's tokens."""
        return (GROUP,)

    @property
    def num_token_slices(self) -> int:
        """Into how many slices `token_slice_local` cuts a device's tokens."""
        return self.mesh.shape[GROUP]

    @property
    def num_expert_shards(self) -> int:
        """Devices that share the experts of a layer and exchange tokens for them; 1 where experts are at hand."""
        return self.mesh.shape[EXPERT]

    def exchange_local(self, x_P: jax.Array) -> jax.Array:
        """All-to-all between the devices that share experts: block p goes to device p."""
        return all_to_all_local(x_P, EXPERT)

    def sum_over_expert_shards_local(self, x: jax.Array) -> jax.Array:
        """Sum over the devices that share the experts of a layer, the same on all of them."""
        return x if self.num_expert_shards == 1 else self.vary_local(lax.psum(x, EXPERT))

    def expert_offset_local(self, local_experts: int) -> jax.Array:
        """Index of this device's first expert, of `local_experts` per device."""
        return lax.axis_index(EXPERT) * local_experts

    def token_shard_index_local(self) -> jax.Array:
        """Which part of the batch this device holds."""
        return lax.axis_index(self.token_axes)

    def agree_local(self, x: jax.Array) -> jax.Array:
        """A value that all devices of the `group` axis hold alike, marked as such so that it can leave the program."""
        return lax.pmax(x, GROUP)

    def max_over_all_local(self, x: jax.Array) -> jax.Array:
        """Largest value on any device, the same on all."""
        return lax.pmax(x, AXES)

    def sum_over_tokens_local(self, x: jax.Array) -> jax.Array:
        """Sum of per-device token statistics over the parts of the batch."""
        return lax.psum(x, self.token_axes)

    def sum_over_groups_local(self, x: jax.Array) -> jax.Array:
        """Sum of per-device group statistics over the devices of the `group` axis."""
        return lax.psum(x, GROUP)

    def mean_over_groups_local(self, x: jax.Array) -> jax.Array:
        """A statistic that every device of the `group` axis computes alike, counted once."""
        return lax.pmean(x, GROUP)

    def sum_over_all_local(self, x: jax.Array) -> jax.Array:
        """Sum over every device of the mesh."""
        return lax.psum(x, AXES)
