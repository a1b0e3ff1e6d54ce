"""Experts spread over devices: tokens travel to the devices of their experts and their outputs travel back.

A token is sent once to every device that holds at least one of its experts, with its expert indices and weights: one
copy serves all groups of the device, which share the token. That device returns, for each group that has experts of the
token there, the weighted sum of their outputs, since groups do not share what their experts say. So a layer moves two
token-sized all-to-alls, whose volume grows with the number of distinct devices per token (and group) and not with k.

Nothing is ever dropped: buffers are sized by what any device sends to any other in this step, rounded up to one of a
few static sizes. Only devices that exchange tokens agree on the size; others may take another one in the same layer.

Shape letters: S groups on this device, N tokens on this device, D width, E experts of a group, k choices per token and
group, P devices that share experts, C slots per pair of devices for tokens, Q slots per pair for outputs, R = P * C.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from foejax.models.experts import Experts
from foejax.models.router import Routing
from foejax.models.rows import collect_rows, spread_rows
from sharding import Layout

EXCHANGED = "exchanged_tokens"
"""Checkpoint name of what arrived from other devices, or was agreed with them; saved by every remat policy."""

BUFFER_SLACK = 1.25
"""First buffer size, relative to the expected number of slots per pair of devices under uniform routing."""
WORTH_A_BRANCH = 0.9
"""Buffers above this share of the largest ones save too little to be compiled as another branch of the program."""


class BufferSize(NamedTuple):
    """Slots per pair of devices: of tokens on their way to experts, and of outputs on their way back."""

    tokens: int
    outputs: int


def buffer_sizes(num_tokens: int, k: int, num_experts: int, num_shards: int, groups: int = 1) -> tuple[BufferSize, ...]:
    """Static buffer sizes, ascending; the last one always suffices.

    Under uniform routing none of a group's k choices is on a given device with probability C(E - E/P, k) / C(E, k); the
    device needs the token unless that is so for all groups, and returns an output for each group where it is not.

    Args:
      num_tokens: tokens N on one device.
      k: experts per token and group.
      num_experts: experts E of a group.
      num_shards: devices P that share them.
      groups: groups S on one device.
    """
    missed = math.comb(num_experts - num_experts // num_shards, k) / math.comb(num_experts, k)
    tokens = math.ceil(BUFFER_SLACK * num_tokens * (1.0 - missed**groups))
    outputs = math.ceil(BUFFER_SLACK * num_tokens * groups * (1.0 - missed))
    sizes = []
    while outputs < WORTH_A_BRANCH * num_tokens * groups:
        sizes.append(BufferSize(tokens if tokens < WORTH_A_BRANCH * num_tokens else num_tokens, outputs))
        tokens, outputs = 2 * tokens, 2 * outputs
    return (*sizes, BufferSize(num_tokens, num_tokens * groups))


def run_experts(experts: Experts, h: jax.Array, routing: Routing, layout: Layout) -> jax.Array:
    """Outputs [S, N, D] of a layer's experts, wherever they are.

    Args:
      h: tokens [N, D] that the groups share, or each group's own [S, N, D].
      routing: indices over all experts of each group.
    """
    if layout.num_expert_shards == 1:
        return experts(h, routing.indices_SNk, routing.weights_SNk, routing.valid_SNk)
    run = exchange_and_run if layout.exchanges_tokens else _run_and_join
    return run(experts, h[0] if h.ndim == 3 else h, routing, layout)  # groups of several devices are one a device


def _run_and_join(experts: Experts, h_ND: jax.Array, routing: Routing, layout: Layout) -> jax.Array:
    """Every device runs its own experts on tokens that all of them hold, and their outputs are summed."""
    local_experts = experts.num_experts
    groups, num_tokens, k = routing.indices_SNk.shape
    local_SNk = routing.indices_SNk - layout.expert_offset_local(local_experts)
    here_SNk = routing.valid_SNk & (local_SNk >= 0) & (local_SNk < local_experts)
    weights_SNk = jnp.where(here_SNk, routing.weights_SNk, 0.0)
    max_rows = groups * num_tokens * min(k, local_experts)
    return layout.join_experts_local(experts(h_ND, local_SNk, weights_SNk, here_SNk, max_rows=max_rows))


def exchange_and_run(experts: Experts, h_ND: jax.Array, routing: Routing, layout: Layout) -> jax.Array:
    """`run_experts` where tokens travel between `layout.num_expert_shards` devices."""
    shards = layout.num_expert_shards
    local_experts = experts.num_experts
    groups, num_tokens, k = routing.indices_SNk.shape
    device_SNk = jnp.where(routing.valid_SNk, routing.indices_SNk // local_experts, shards)
    devices = jnp.arange(shards, dtype=jnp.int32)[:, None, None, None]
    needed_PSN = jnp.any(device_SNk[None] == devices, axis=-1)
    sizes = buffer_sizes(num_tokens, k, shards * local_experts, shards, groups)

    def run(size: BufferSize) -> jax.Array:
        return _run_with_buffers(size, experts, h_ND, routing, needed_PSN, layout)

    if len(sizes) == 1:
        return run(sizes[0])
    counts_2P = jnp.stack([needed_PSN.any(axis=1).sum(axis=1), needed_PSN.sum(axis=(1, 2))]).astype(jnp.int32)
    largest_2 = checkpoint_name(layout.max_over_expert_shards_local(counts_2P.max(axis=1)), EXCHANGED)
    too_small = jnp.any(largest_2[None] > jnp.asarray(sizes[:-1], jnp.int32), axis=1)
    return jax.lax.switch(too_small.sum(dtype=jnp.int32), [lambda size=size: run(size) for size in sizes])


def _run_with_buffers(
    size: BufferSize, experts: Experts, h_ND: jax.Array, routing: Routing, needed_PSN: jax.Array, layout: Layout
) -> jax.Array:
    shards, groups, num_tokens = needed_PSN.shape
    local_experts, k = experts.num_experts, routing.indices_SNk.shape[-1]
    there = _fill_slots(needed_PSN.any(axis=1), size.tokens)
    back = _fill_slots(needed_PSN.reshape(shards, -1), size.outputs)
    token_R = jnp.where(there.entry_R < there.row_PX.size, there.entry_R % num_tokens, num_tokens)

    def send(x_R: jax.Array) -> jax.Array:
        arrived = layout.exchange_local(x_R.reshape(shards, -1, *x_R.shape[1:]))
        return checkpoint_name(arrived.reshape(x_R.shape), EXCHANGED)

    rows_RD = send(spread_rows(h_ND, token_R, there.row_PX))
    weights_SRk = _by_group(send(spread_rows(_by_token(routing.weights_SNk), token_R, there.row_PX)), k)
    expert_Nx = _by_token(jnp.where(routing.valid_SNk, routing.indices_SNk, -1))
    expert_SRk = _by_group(send(jnp.take(expert_Nx, token_R, axis=0, mode="fill", fill_value=-1)), k)
    local_SRk = expert_SRk - layout.expert_offset_local(local_experts)
    here_SRk = (expert_SRk >= 0) & (local_SRk >= 0) & (local_SRk < local_experts)
    y_SRD = experts(
        rows_RD,
        local_SRk,
        jnp.where(here_SRk, weights_SRk, 0.0),
        here_SRk,
        max_rows=shards * size.outputs * min(k, local_experts),
    )
    # The only group's outputs lie in the slots in which their tokens came.
    y_RD = y_SRD[0] if groups == 1 else _pack_outputs(y_SRD, here_SRk.any(axis=-1), shards, size.outputs)
    return collect_rows(send(y_RD), back.row_PX, back.entry_R).sum(axis=0).reshape(groups, num_tokens, -1)


class _Slots(NamedTuple):
    """Buffers with a part for each device: which slot each entry has, and which entry each slot holds.

    Attributes:
      row_PX: int32, slot of each entry; P * (slots of a part) where it has none.
      entry_R: int32, flat index into [P, X] of each slot's entry; P * X where it is empty.
    """

    row_PX: jax.Array
    entry_R: jax.Array


def _fill_slots(needed_PX: jax.Array, slots: int) -> _Slots:
    """Give the needed entries the slots of their device's part, in order."""
    shards = needed_PX.shape[0]
    slot_PX = jnp.cumsum(needed_PX, axis=1, dtype=jnp.int32) - 1
    base = slots * jnp.arange(shards, dtype=jnp.int32)[:, None]
    row_PX = jnp.where(needed_PX, base + slot_PX, shards * slots)
    flat_PX = jnp.arange(row_PX.size, dtype=jnp.int32).reshape(row_PX.shape)
    entry_R = jnp.full(shards * slots, row_PX.size, jnp.int32).at[row_PX].set(flat_PX, mode="drop")
    return _Slots(row_PX, entry_R)


def _pack_outputs(y_SRD: jax.Array, has_output_SR: jax.Array, shards: int, slots: int) -> jax.Array:
    """Outputs [P * Q, D] without the empty ones, in the order in which the tokens' devices expect them.

    Those number their (group, token) pairs group by group, and tokens arrive in their order.
    """
    groups, rows, width = y_SRD.shape
    has_output_PSC = has_output_SR.reshape(groups, shards, -1).swapaxes(0, 1)
    packed = _fill_slots(has_output_PSC.reshape(shards, -1), slots)
    row_SR = packed.row_PX.reshape(has_output_PSC.shape).swapaxes(0, 1).reshape(1, -1)
    place_PSC = jnp.arange(groups * rows, dtype=jnp.int32).reshape(groups, shards, -1).swapaxes(0, 1)
    place_R = jnp.take(place_PSC.reshape(-1), packed.entry_R, mode="fill", fill_value=groups * rows)
    return spread_rows(y_SRD.reshape(-1, width), place_R, row_SR)


def _by_token(x_SNk: jax.Array) -> jax.Array:
    """What all groups have to say of a token, [N, S * k]."""
    return x_SNk.swapaxes(0, 1).reshape(x_SNk.shape[1], -1)


def _by_group(x_Rx: jax.Array, k: int) -> jax.Array:
    """The inverse, [S, R, k]."""
    return x_Rx.reshape(x_Rx.shape[0], -1, k).swapaxes(0, 1)
