"""Closed formulas for what FoE and its MoE baselines send, per device, to hold against an audit.

Every figure is what ONE device holds and sends. The paper adds up its two sides differently: `docs/communication.md`
works through that difference. N = tokens on one device before the exchange, D = width, L = layers, E = experts,
k = experts per token, n = devices on the mesh axis, H heads of experts (Multi-Head LatentMoE), K = size of a sub-token.
"""

from __future__ import annotations

import math
from typing import Any, Literal

Op = Literal[
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
]


def ring_egress(op: str, payload: float, group_size: int) -> float:
    """What one device sends when `op` runs on a ring of `group_size` devices, in the unit of `payload`.

    `payload` is the operand on one device: the whole array for all-reduce and reduce-scatter, the device's own shard
    for all-gather, the whole send buffer (own part included) for all-to-all. A ragged all-to-all gets the upper bound
    (its sizes are known at run time only), a broadcast the average; in a permute every device sends.

    Raises:
      ValueError: unknown op, or a group without devices.
    """
    if group_size < 1:
        raise ValueError(f"group_size={group_size}: a collective needs at least one device")
    share = (group_size - 1) / group_size
    factors = {
        "all-reduce": 2 * share,
        "all-gather": group_size - 1,
        "reduce-scatter": share,
        "all-to-all": share,
        "ragged-all-to-all": share,
        "collective-broadcast": share,
        "collective-permute": 1 if group_size > 1 else 0,
    }
    if op not in factors:
        raise ValueError(f"op={op!r} is not a collective: choose one of {', '.join(factors)}")
    return factors[op] * payload


def expected_destinations(num_experts: int, experts_per_token: int, num_devices: int) -> float:
    """Expected number of distinct devices that a token's k experts live on, under uniform routing without repeats.

    P (1 - C(E - E/P, k) / C(E, k)) for E experts in equal blocks on P devices. A dispatch that sends a token once to
    each destination device sends this many copies instead of k.

    Raises:
      ValueError: the experts do not divide over the devices, or k is more than E.
    """
    if num_experts % num_devices:
        raise ValueError(
            f"num_experts={num_experts} does not divide over num_devices={num_devices}: "
            f"choose num_experts as a multiple of {num_devices}"
        )
    if not 1 <= experts_per_token <= num_experts:
        raise ValueError(f"experts_per_token={experts_per_token} is not between 1 and num_experts={num_experts}")
    elsewhere = num_experts - num_experts // num_devices
    missed = math.comb(elsewhere, experts_per_token) / math.comb(num_experts, experts_per_token)
    return num_devices * (1 - missed)


def foe_forward(
    num_layers: int,
    num_tokens: int,
    width: int,
    axis_size: int,
    *,
    axis: str = "group",
    last_merge: Literal["all-reduce", "reduce-scatter"] = "reduce-scatter",
    itemsize: int = 2,
) -> list[dict[str, Any]]:
    """Token-sized collectives of one FoE forward pass: one merge a layer and one at the end, L + 1 in all.

    Args:
      num_tokens: tokens N that each device of the group axis processes (all of them process the same).
      axis_size: devices on the group axis, min(H, devices): groups that share a device add up before the wire.
      last_merge: the head works on a slice of the tokens after a reduce-scatter (training, prefill) or on all of
        them after an all-reduce.
    """
    merges = num_layers + (last_merge == "all-reduce")
    elements = num_tokens * width
    rows = [_row("merge of the groups", "all-reduce", axis, merges, "N D", elements, axis_size, itemsize)]
    if last_merge == "reduce-scatter":
        rows.append(_row("last merge", "reduce-scatter", axis, 1, "N D", elements, axis_size, itemsize))
    return rows


def moe_ep_forward(
    num_layers: int,
    num_tokens: int,
    width: int,
    axis_size: int,
    *,
    num_experts: int,
    experts_per_token: int,
    deduplicate: bool,
    axis: str = "expert",
    itemsize: int = 2,
) -> list[dict[str, Any]]:
    """Token-sized collectives of one expert-parallel MoE forward pass: dispatch and combine in every layer.

    Args:
      num_tokens: tokens N that live on each device before the dispatch (each device has its own).
      deduplicate: a token goes once to each device that holds some of its experts, not once for each expert.
    """
    copies = expected_destinations(num_experts, experts_per_token, axis_size) if deduplicate else experts_per_token
    formula = "n (1 - C(E-E/n,k)/C(E,k)) N D" if deduplicate else "k N D"
    what = "dispatch and combine, " + ("one copy per device" if deduplicate else "one copy per expert")
    elements = copies * num_tokens * width
    return [_row(what, "all-to-all", axis, 2 * num_layers, formula, elements, axis_size, itemsize)]


def moe_tp_forward(
    num_layers: int, num_tokens: int, width: int, axis_size: int, *, axis: str = "group", itemsize: int = 2
) -> list[dict[str, Any]]:
    """Token-sized collectives of one tensor-parallel MoE forward pass: one all-reduce after attention, one after the
    experts, in every layer; each device processes the same `num_tokens`."""
    elements = num_tokens * width
    what = "sum after attention and after the experts"
    return [_row(what, "all-reduce", axis, 2 * num_layers, "N D", elements, axis_size, itemsize)]


def moe_tp_ep_forward(
    num_layers: int,
    num_tokens: int,
    width: int,
    axis_size: int,
    *,
    num_experts: int,
    experts_per_token: int,
    axis: str = "group",
    itemsize: int = 2,
) -> list[dict[str, Any]]:
    """Token-sized collectives of one MoE forward pass with heads over the axis and tokens sliced outside attention.

    Args:
      num_tokens: tokens N that each device attends to; it carries N / n of them through router and experts, which
        exchange them as in `moe_ep_forward`, one copy per device.
    """
    elements = num_tokens * width
    around = [
        _row("sum after attention", "reduce-scatter", axis, num_layers, "N D", elements, axis_size, itemsize),
        _row(
            "tokens to attention", "all-gather", axis, num_layers, "N D / n", elements / axis_size, axis_size, itemsize
        ),
    ]
    return around + moe_ep_forward(
        num_layers,
        num_tokens // axis_size,
        width,
        axis_size,
        num_experts=num_experts,
        experts_per_token=experts_per_token,
        deduplicate=True,
        axis=axis,
        itemsize=itemsize,
    )


def hp_forward(
    num_layers: int, num_tokens: int, latent_width: int, axis_size: int, *, axis: str = "group", itemsize: int = 2
) -> list[dict[str, Any]]:
    """Token-sized collectives of one forward pass with Head Parallel (arXiv 2602.04870): sub-tokens to the devices of
    their heads and back, in every layer; 2 H K (n-1)/n elements per token.

    Neither the routing nor the number of chosen experts is in it. The backward pass sends as much again.

    Args:
      num_tokens: tokens N that live on each device before the exchange (each device has its own).
      latent_width: H K, all sub-tokens of a token; usually D.
    """
    elements = num_tokens * latent_width
    what = "sub-tokens to their heads and back"
    return [_row(what, "all-to-all", axis, 2 * num_layers, "N H K", elements, axis_size, itemsize)]


def communication_table(
    *,
    num_layers: int,
    tokens_per_device: int,
    width: int,
    num_devices: int,
    num_groups: int,
    num_experts: int,
    experts_per_token: int,
    latent_width: int = 0,
    itemsize: int = 2,
) -> list[dict[str, Any]]:
    """All layouts for the same work, one forward pass of `num_devices * tokens_per_device` tokens on `num_devices`.

    FoE and tensor parallelism process all of the tokens on every device, expert and head parallelism their own share
    of them: that factor decides the comparison. Groups beyond the device count share devices; devices beyond the group
    count replicate the FoE layout over `data`, and each replica then sees fewer tokens.

    Args:
      latent_width: H K of a Multi-Head LatentMoE whose heads are at least as many as the devices; 0 is the width,
        with which E experts and k choices in each head weigh and compute what the MoE's do.

    Returns:
      Rows with the keys layout, what, op, axes, count, formula, payload_elements, wire_elements, payload_bytes,
      wire_bytes (of one execution, per device) and total_wire_bytes (of all `count`).

    Raises:
      ValueError: neither of num_devices and num_groups divides the other; experts that do not divide.
    """
    if num_devices % num_groups and num_groups % num_devices:
        raise ValueError(
            f"num_groups={num_groups} and num_devices={num_devices}: one must divide the other for groups to share "
            "devices evenly"
        )
    axis = min(num_groups, num_devices)
    everywhere = tokens_per_device * num_devices

    def expert_parallel(deduplicate: bool) -> list[dict[str, Any]]:
        return moe_ep_forward(
            num_layers,
            tokens_per_device,
            width,
            num_devices,
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            deduplicate=deduplicate,
            itemsize=itemsize,
        )

    layouts = {
        "foe": foe_forward(num_layers, tokens_per_device * axis, width, axis, itemsize=itemsize),
        "moe ep": expert_parallel(deduplicate=False),
        "moe ep, de-duplicated": expert_parallel(deduplicate=True),
        "moe tp": moe_tp_forward(num_layers, everywhere, width, num_devices, itemsize=itemsize),
        "moe tp_ep": moe_tp_ep_forward(
            num_layers,
            everywhere,
            width,
            num_devices,
            num_experts=num_experts,
            experts_per_token=experts_per_token,
            itemsize=itemsize,
        ),
        "mhlmoe hp": hp_forward(num_layers, tokens_per_device, latent_width or width, num_devices, itemsize=itemsize),
    }
    return [{"layout": layout, **row} for layout, rows in layouts.items() for row in rows]


def _row(
    what: str, op: Op, axis: str, count: int, formula: str, elements: float, axis_size: int, itemsize: int
) -> dict[str, Any]:
    wire = ring_egress(op, elements, axis_size)
    return {
        "what": what,
        "op": op,
        "axes": [axis],
        "count": count if axis_size > 1 else 0,
        "formula": formula,
        "payload_elements": elements,
        "wire_elements": wire,
        "payload_bytes": round(elements * itemsize),
        "wire_bytes": round(wire * itemsize),
        "total_wire_bytes": round(count * wire * itemsize),
    }
