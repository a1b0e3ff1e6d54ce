"""The binding between a model written for one group and a mesh of devices.

A `Layout` says where parameters and tokens live and supplies the few operations that cross devices. Models call
these operations and never name a mesh axis.

Shape letters: S groups on this device, N tokens on this device, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sharding.collectives import all_to_all_local, gather_local, gather_param_local, reduce_scatter_local, vary_local
from sharding.hosts import check_hosts
from sharding.mesh import AXES, DATA, EXPERT, GROUP, LayoutKind, MeshSizes, make_mesh, plan_mesh

LogicalAxes = tuple[str | None, ...]


@dataclass(frozen=True)
class Layout:
    """Where a model lives: a mesh, what is split over which axis, and how groups meet.

    Attributes:
      mesh: axes `data`, `group`, `expert`.
      kind: foe (groups over `group`, each over `expert`), fsdp (data parallel), ep (experts over `expert`), tp (heads
        and experts over `group`, every device all tokens), tp_ep (the same, and outside attention each device its
        slice of the tokens) or hp (heads of the experts over `group`, each over `expert`, every device its own tokens).
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
        num_kv_heads: int = 1,
        num_ffn_heads: int = 1,
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
            needed = {"ep": data and expert, "fsdp": data}.get(kind, data and group)
            num_devices = given if needed else len(jax.devices())
        sizes = plan_mesh(
            kind,
            num_devices,
            num_groups=num_groups,
            num_experts=num_experts,
            num_kv_heads=num_kv_heads,
            num_ffn_heads=num_ffn_heads,
            data=data,
            group=group,
            expert=expert,
        )
        mesh = make_mesh(sizes)
        check_hosts(mesh, kind)
        return cls(mesh, kind, shard_params)

    @classmethod
    def single_device(cls, kind: LayoutKind = "foe") -> Layout:
        """One device that holds every group and every expert."""
        return cls(make_mesh(MeshSizes(1, 1, 1)), kind)

    @classmethod
    def abstract(cls, kind: LayoutKind, sizes: MeshSizes, *, shard_params: bool = False) -> Layout:
        """A layout of devices that are not here: enough to count with, not to lower or to run a program."""
        mesh = AbstractMesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))
        return cls(cast(Mesh, mesh), kind, shard_params)

    @property
    def sizes(self) -> MeshSizes:
        """Devices along each axis."""
        return MeshSizes(*(self.mesh.shape[axis] for axis in AXES))

    @property
    def splits_heads(self) -> bool:
        """Whether the heads of one group, and not whole groups, are split over `group`."""
        return self.kind in ("tp", "tp_ep")

    @property
    def slices_tokens(self) -> bool:
        """Whether a device carries its slice of the tokens through the layers, and all of them in attention alone."""
        return self.kind == "tp_ep" and self.mesh.shape[GROUP] > 1

    @property
    def expert_axis(self) -> str:
        """Mesh axis of the devices that share the experts of a layer."""
        return GROUP if self.splits_heads else EXPERT

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Mesh axes over which the batch is split; over the others every device holds the same tokens."""
        return (*self.routed_token_axes, GROUP) if self.exchanges_heads else self.routed_token_axes

    @property
    def routed_token_axes(self) -> tuple[str, ...]:
        """The same where tokens are routed: with `exchanges_heads`, devices of the `group` axis have joined theirs."""
        return (DATA, EXPERT)

    @property
    def exchanges_heads(self) -> bool:
        """Whether devices of the `group` axis have tokens of their own, and meet in the heads of the experts."""
        return self.kind == "hp"

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
        if self.exchanges_heads:
            rules = {"ffn_heads": GROUP, "experts": EXPERT}
        else:
            rules = {"heads" if self.splits_heads else "group": GROUP, "vocab": GROUP, "experts": self.expert_axis}
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
        """Partition of an array whose dimension number `leading` runs over the groups, or heads, of the experts."""
        return PartitionSpec(*(None,) * leading, None if self.splits_heads else GROUP)

    @property
    def head_axes(self) -> tuple[str | None, str | None]:
        """Mesh axes of two dimensions that run over the groups and over the key/value heads of a group."""
        if self.exchanges_heads:
            return (None, None)
        return (None, GROUP) if self.splits_heads else (GROUP, None)

    @property
    def routing_spec(self) -> PartitionSpec:
        """Partition of routing [L, H, N] that `routing_slice_local` has cut."""
        if self.splits_heads:
            return PartitionSpec(None, None, (*self.token_axes, *self.slice_axes))
        return PartitionSpec(None, GROUP, self.routed_token_axes)

    @property
    def logits_spec(self) -> PartitionSpec:
        """Partition of logits [B, V] of which every device computes its part of the vocabulary."""
        return self.batch_spec(self.copies_axis)

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
        return gather_local(x, self.rules["vocab"], dim)

    def group_slice_local(self, x: jax.Array, dim: int) -> jax.Array:
        """The part of `x` along `dim` (all groups, or all experts in group order) that this device's groups own."""
        return x if self.splits_heads else self._slice_local(x, dim)

    def own_tokens_local(self, x_N: jax.Array) -> jax.Array:
        """Of tokens that all devices of the `group` axis hold, those that this device carries through the layers."""
        return self._slice_local(self._pad_to_slices(x_N), 0) if self.slices_tokens else x_N

    def whole_tokens_local(self, x_SND: jax.Array, num_tokens: int) -> jax.Array:
        """All tokens [S, num_tokens, D], out of the slices that the devices of the `group` axis carry."""
        return gather_local(x_SND, GROUP, 1)[:, :num_tokens]

    def merge_local(self, own_SND: jax.Array, branch_SND: jax.Array) -> jax.Array:
        """Sum over all groups of what their experts added and what attention adds, of the tokens carried here: [N, D].

        Groups over the mesh meet here and nowhere else. Where one group's heads are split, its experts' outputs are
        whole already and the branch alone is summed; `own_SND` then holds the tokens carried here.
        """
        if self.num_token_slices == 1:
            return (own_SND + branch_SND).sum(axis=0)
        if not self.splits_heads:
            return self.vary_local(lax.psum((own_SND + branch_SND).sum(axis=0), GROUP))
        own_ND, branch_ND = own_SND.sum(axis=0), branch_SND.sum(axis=0)
        if not self.slices_tokens:
            return own_ND + self.vary_local(lax.psum(branch_ND, GROUP))
        return own_ND + reduce_scatter_local(self._pad_to_slices(branch_ND), GROUP, dim=0)

    def last_merge_local(self, out_SND: jax.Array) -> jax.Array:
        """Sum over all groups of what the last layer's experts added, [N, D]."""
        total_ND = out_SND.sum(axis=0)
        if self.num_token_slices == 1 or self.splits_heads:
            return total_ND
        return self.vary_local(lax.psum(total_ND, GROUP))

    def last_merge_slice_local(self, out_SND: jax.Array) -> jax.Array:
        """The same, of which this device gets its slice of the tokens: [N / devices in `group`, D]."""
        total_ND = out_SND.sum(axis=0)
        if self.num_token_slices == 1 or self.slices_tokens:
            return total_ND
        if self.splits_heads:
            return self._slice_local(total_ND, 0)
        return reduce_scatter_local(total_ND, GROUP, dim=0)

    def token_slice_local(self, x_N: jax.Array) -> jax.Array:
        """This device's slice of tokens that all devices of the `group` axis hold."""
        return self._slice_local(x_N, 0)

    def residual_slice_local(self, residual_ND: jax.Array) -> jax.Array:
        """This device's slice of the residual that it carries."""
        return residual_ND if self.slices_tokens else self._slice_local(residual_ND, 0)

    def routing_slice_local(self, x_LSN: jax.Array) -> jax.Array:
        """Routing as `routing_spec` splits it: where devices hold the same of it, this device's slice."""
        return self._slice_local(x_LSN, 2) if self.splits_heads and not self.slices_tokens else x_LSN

    def pick_rows_local(self, x_ND: jax.Array, rows_M: jax.Array) -> jax.Array:
        """Tokens [M, D] by their number among all, out of the slices that the devices of the `group` axis carry."""
        place_M = rows_M - lax.axis_index(GROUP) * x_ND.shape[0]
        place_M = jnp.where(place_M < 0, x_ND.shape[0], place_M)
        picked_MD = jnp.take(x_ND, place_M, axis=0, mode="fill", fill_value=0)
        return self.vary_local(lax.psum(picked_MD, GROUP))

    def _slice_local(self, x: jax.Array, dim: int) -> jax.Array:
        count = self.num_token_slices
        if count == 1:
            return x
        size = x.shape[dim] // count
        return lax.dynamic_slice_in_dim(x, lax.axis_index(GROUP) * size, size, axis=dim)

    def _pad_to_slices(self, x_N: jax.Array) -> jax.Array:
        """Zeros appended until the tokens split evenly."""
        pad = -x_N.shape[0] % self.mesh.shape[GROUP]
        return jnp.pad(x_N, [(0, pad), *[(0, 0)] * (x_N.ndim - 1)]) if pad else x_N

    @property
    def slice_axes(self) -> tuple[str, ...]:
        """Mesh axes over which `token_slice_local` cuts a device's tokens."""
        return (self.copies_axis,) if self.copies_axis else ()

    @property
    def copies_axis(self) -> str | None:
        """Mesh axis along which devices hold the same tokens; None where every device has its own."""
        return None if self.exchanges_heads else GROUP

    @property
    def num_token_slices(self) -> int:
        """Into how many slices `token_slice_local` cuts a device's tokens: the devices that hold the same ones."""
        return self.mesh.shape[self.copies_axis] if self.copies_axis else 1

    def exchange_heads_local(self, x_P: jax.Array) -> jax.Array:
        """All-to-all of equal parts along the `group` axis: block p goes to device p."""
        return all_to_all_local(x_P, GROUP)

    def routed_tokens_local(self, x_N: jax.Array) -> jax.Array:
        """Of every token that this device routes: with `exchanges_heads`, those of all devices of the `group` axis."""
        return x_N if self.num_head_exchangers == 1 else lax.all_gather(x_N, GROUP, axis=0, tiled=True)

    @property
    def num_head_exchangers(self) -> int:
        """Devices that send each other the sub-tokens of their heads."""
        return self.mesh.shape[GROUP] if self.exchanges_heads else 1

    @property
    def num_expert_shards(self) -> int:
        """Devices that share the experts of a layer; 1 where experts are at hand."""
        return self.mesh.shape[self.expert_axis]

    @property
    def num_token_shards_of_experts(self) -> int:
        """Parts of the routed tokens that meet in the same copy of the experts."""
        return self.mesh.shape[EXPERT]

    @property
    def exchanges_tokens(self) -> bool:
        """Whether the devices that share experts send each other tokens; otherwise they hold the same ones."""
        return self.num_expert_shards > 1 and self.kind != "tp"

    def exchange_local(self, x_P: jax.Array) -> jax.Array:
        """All-to-all between the devices that share experts: block p goes to device p."""
        return all_to_all_local(x_P, self.expert_axis)

    def join_experts_local(self, out_SND: jax.Array) -> jax.Array:
        """Sum of what each device's experts made of the same tokens."""
        return self.vary_local(lax.psum(out_SND, self.expert_axis))

    def sum_over_expert_shards_local(self, x: jax.Array) -> jax.Array:
        """Sum over the tokens of all devices that share the experts of a layer, the same on all of them."""
        return self.vary_local(lax.psum(x, self.expert_axis)) if self.exchanges_tokens else x

    def expert_offset_local(self, local_experts: int) -> jax.Array:
        """Index of this device's first expert, of `local_experts` per device."""
        return lax.axis_index(self.expert_axis) * local_experts

    def max_over_expert_shards_local(self, x: jax.Array) -> jax.Array:
        """Largest value on any of the devices that share the experts of a layer, the same on all of them."""
        return lax.pmax(x, self.expert_axis)

    @property
    def num_head_shards(self) -> int:
        """Devices over which the heads of one group are split."""
        return self.mesh.shape[GROUP] if self.splits_heads else 1

    def mean_over_head_shards_local(self, x: jax.Array) -> jax.Array:
        """Mean over the devices that share the heads of a group, the same on all of them."""
        return self.vary_local(lax.pmean(x, GROUP))

    def token_shard_index_local(self) -> jax.Array:
        """Which part of the batch this device holds."""
        return lax.axis_index(self.token_axes)

    def agree_local(self, x: jax.Array) -> jax.Array:
        """A value that devices with the same tokens hold alike, marked as such so that it can leave the program."""
        return lax.pmax(x, self.copies_axis) if self.copies_axis else x

    def max_over_all_local(self, x: jax.Array) -> jax.Array:
        """Largest value on any device, the same on all."""
        return lax.pmax(x, AXES)

    def sum_over_tokens_local(self, x: jax.Array) -> jax.Array:
        """Sum of per-device routing statistics over the tokens of the batch, each counted once."""
        if not self.splits_heads:
            return lax.psum(x, self.routed_token_axes)
        total = lax.psum(x, AXES)
        return total if self.slices_tokens else total / self.mesh.shape[GROUP]

    def sum_over_group_tokens_local(self, x: jax.Array) -> jax.Array:
        """Routing statistics of all tokens that devices of the `group` axis share, to leave with `group_spec`."""
        if not self.splits_heads:
            return x
        return lax.psum(x, GROUP) if self.slices_tokens else self.agree_local(x)

    def sum_over_groups_local(self, x: jax.Array) -> jax.Array:
        """Sum of per-device group statistics over the groups of all devices."""
        return x if self.splits_heads else lax.psum(x, GROUP)

    def mean_over_groups_local(self, x: jax.Array) -> jax.Array:
        """A statistic that every device of the `group` axis computes alike, counted once."""
        return x if self.splits_heads else lax.pmean(x, GROUP)

    def sum_over_all_local(self, x: jax.Array) -> jax.Array:
        """Sum over every device of the mesh."""
        return lax.psum(x, AXES)
