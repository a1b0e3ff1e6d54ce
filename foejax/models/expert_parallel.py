"""Experts spread over devices: tokens travel to the devices of their experts and their outputs travel back.

A token is sent once to every device that holds at least one of its experts, with its expert indices and weights; that
device returns the weighted sum of its experts' outputs. So a layer moves two token-sized all-to-alls, whose volume
grows with the number of distinct devices per token and not with k. Nothing is ever dropped: buffers are sized by the
largest number of tokens that any device sends to any other in this step, rounded up to one of a few static sizes.

Shape letters: N tokens on this device, D width, k choices per token, P devices that share experts, C buffer slots per
pair of devices.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from foejax.models.experts import Experts
from foejax.models.router import Routing
from foejax.models.rows import collect_rows, spread_rows
from sharding import Layout

EXCHANGED = "exchanged_tokens"
"""Checkpoint name of what arrived from other devices; saved by every remat policy."""

BUFFER_SLACK = 1.25
"""First buffer size, relative to the expected number of tokens per pair of devices under uniform routing."""


def buffer_sizes(num_tokens: int, k: int, num_experts: int, num_shards: int) -> tuple[int, ...]:
    """Static numbers of slots per pair of devices, ascending; the last one always suffices.

    Under uniform routing a token has an expert on a given device with probability 1 - C(A - A/P, k) / C(A, k).
    """
    elsewhere = math.comb(num_experts - num_experts // num_shards, k) / math.comb(num_experts, k)
    expected = math.ceil(BUFFER_SLACK * num_tokens * (1.0 - elsewhere))
    sizes = []
    while expected < 0.75 * num_tokens:
        sizes.append(expected)
        expected *= 2
    return (*sizes, num_tokens)


def exchange_and_run(experts: Experts, h_ND: jax.Array, routing: Routing, layout: Layout) -> jax.Array:
    """Outputs [1, N, D] of a layer whose experts are spread over `layout.num_expert_shards` devices.

    `routing` holds indices over all experts of the layer (one group).
    """
    shards = layout.num_expert_shards
    local_experts = experts.gate_SEDF[...].shape[1]
    num_tokens, k = routing.indices_SNk.shape[1:]
    device_Nk = jnp.where(routing.valid_SNk[0], routing.indices_SNk[0] // local_experts, shards)
    needed_PN = jnp.any(device_Nk[None] == jnp.arange(shards, dtype=jnp.int32)[:, None, None], axis=-1)
    slot_PN = jnp.cumsum(needed_PN, axis=1, dtype=jnp.int32) - 1
    sizes = buffer_sizes(num_tokens, k, shards * local_experts, shards)

    def run(slots: int) -> jax.Array:
        return _run_with_buffer(slots, experts, h_ND, routing, needed_PN, slot_PN, layout)

    if len(sizes) == 1:
        return run(sizes[0])
    largest = layout.max_over_all_local(jnp.max(jnp.sum(needed_PN, axis=1, dtype=jnp.int32)))
    choice = jnp.sum(largest > jnp.asarray(sizes[:-1], jnp.int32), dtype=jnp.int32)
    return jax.lax.switch(choice, [lambda slots=slots: run(slots) for slots in sizes])


def _run_with_buffer(
    slots: int,
    experts: Experts,
    h_ND: jax.Array,
    routing: Routing,
    needed_PN: jax.Array,
    slot_PN: jax.Array,
    layout: Layout,
) -> jax.Array:
    shards, num_tokens = needed_PN.shape
    local_experts = experts.gate_SEDF[...].shape[1]
    k = routing.indices_SNk.shape[-1]
    capacity = shards * slots
    base = slots * jnp.arange(shards, dtype=jnp.int32)[:, None]
    row_PN = jnp.where(needed_PN, base + slot_PN, capacity)
    choice_R = _choice_of_slot(row_PN, capacity)
    token_R = jnp.where(choice_R < row_PN.size, choice_R % num_tokens, num_tokens)

    def send(x_R: jax.Array) -> jax.Array:
        arrived = layout.exchange_local(x_R.reshape(shards, slots, *x_R.shape[1:]))
        return checkpoint_name(arrived.reshape(x_R.shape), EXCHANGED)

    rows_RD = send(spread_rows(h_ND, token_R, row_PN))
    weights_Rk = send(spread_rows(routing.weights_SNk[0], token_R, row_PN))
    expert_Nk = jnp.where(routing.valid_SNk[0], routing.indices_SNk[0], -1)
    expert_Rk = send(jnp.take(expert_Nk, token_R, axis=0, mode="fill", fill_value=-1))
    local_Rk = expert_Rk - layout.expert_offset_local(local_experts)
    here_Rk = (expert_Rk >= 0) & (local_Rk >= 0) & (local_Rk < local_experts)
    y_RD = experts(
        rows_RD,
        local_Rk[None],
        jnp.where(here_Rk, weights_Rk, 0.0)[None],
        here_Rk[None],
        max_rows=capacity * min(k, local_experts),
    )[0]
    back_PND = collect_rows(send(y_RD), row_PN, choice_R)
    return back_PND.sum(axis=0)[None]


def _choice_of_slot(row_PN: jax.Array, capacity: int) -> jax.Array:
    """Flat index into [P, N] of what each buffer slot holds, P * N where it is empty."""
    flat_PN = jnp.arange(row_PN.size, dtype=jnp.int32).reshape(row_PN.shape)
    return jnp.full(capacity, row_PN.size, jnp.int32).at[row_PN].set(flat_PN, mode="drop")
