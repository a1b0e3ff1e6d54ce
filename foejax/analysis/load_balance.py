"""How real routing falls on devices: the share of choices that stay at home, and how uneven the devices' loads are.

Both are read off a routing trace and hold for any layout, so a model on one device tells how it would do on eight. The
names are those of arXiv 2605.06206, section 5.3 and Fig. 4.

Shape letters: L layers, H groups or heads, N tokens, k choices per token and group, E experts of a group, P devices
that share the experts of a group, W all devices.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from flax import nnx

from foejax.models import LanguageModel
from foejax.models.language_model import Batch, RoutingTrace
from sharding.mesh import LayoutKind, MeshSizes


@dataclass(frozen=True)
class LoadBalance:
    """Routing of one forward pass on the devices of one data replica.

    Attributes:
      local_activation_rate: share of choices whose expert is on a device that holds the token already (LAR).
      token_discrepancy: most over median number of tokens that have work on a device, mean over the layers.
      row_discrepancy: most over median number of choices (rows of the expert matmuls), mean over the layers.
      most_row_discrepancy: the same of the worst layer.
      row_imbalance: most over mean number of choices, mean over the layers: the factor of the cost model.
      expert_discrepancy: most over median number of choices of an expert, over all of them, mean over the layers.
    """

    local_activation_rate: float
    token_discrepancy: float
    row_discrepancy: float
    most_row_discrepancy: float
    row_imbalance: float
    expert_discrepancy: float


def routing_of(model: LanguageModel, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Experts [L, H, N, k] that a model chooses for a batch (`LanguageModel.logits`), and which choices are valid."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def trace(state: nnx.State, batch: Batch) -> RoutingTrace:
        return nnx.merge(graphdef, state).logits(batch, record_routing=True)[1]

    found = trace(state, {name: batch[name] for name in ("tokens", "positions", "segment_ids")})
    return np.asarray(found.experts), np.asarray(found.weights) > 0


def load_balance(
    experts_LHNk: np.ndarray, valid_LHNk: np.ndarray, kind: LayoutKind, sizes: MeshSizes, num_experts: int
) -> LoadBalance:
    """What a layout's devices would get.

    Tokens are split over devices in the order of the trace. FoE's groups all see every token, and so do the heads of
    `hp` once sub-tokens are exchanged, so that they are in balance by construction; devices inside a group or head, and
    those of `ep`, `tp` and `tp_ep`, are not. In `hp` a choice stays at home where its head is on the token's own
    device, whatever the routing.

    Args:
      experts_LHNk: int, expert inside the group (`RoutingTrace.experts`).
      valid_LHNk: bool, False for padding (`RoutingTrace.weights > 0`).
      sizes: `data` is 1: give the tokens of one replica.
      num_experts: over all groups or heads.

    Raises:
      ValueError: a `data` axis, or groups and experts that do not divide over the devices.
    """
    groups, tokens = experts_LHNk.shape[1:3]
    splits_heads = kind in ("tp", "tp_ep")
    shards = sizes.group if splits_heads else sizes.expert
    group_parts = 1 if splits_heads else sizes.group
    if sizes.data != 1 or groups % group_parts or num_experts // groups % shards:
        raise ValueError(
            f"{groups} groups of {num_experts // groups} experts do not fit the {kind} mesh data={sizes.data} x "
            f"group={sizes.group} x expert={sizes.expert}: choose data=1 and sizes that divide them"
        )
    shard_LHNk = experts_LHNk // (num_experts // groups // shards)
    part_H = np.arange(groups) // (groups // group_parts)
    device_LHNk = part_H[None, :, None, None] * shards + shard_LHNk
    devices = group_parts * shards
    if kind == "hp":
        home_N = np.arange(tokens) * devices // tokens
        home_N = home_N % group_parts * shards + home_N // group_parts  # `group` is the inner one of the token axes
        at_home_LHNk = device_LHNk == home_N[None, None, :, None]
    else:
        home_N = np.arange(tokens) * shards // tokens
        at_home_LHNk = (shard_LHNk == home_N[None, None, :, None]) | (shards == 1) | (kind == "tp")
    rows_LW = _counts(np.where(valid_LHNk, device_LHNk, devices), devices)
    tokens_LW = np.stack([_with_work(*layer, devices) for layer in zip(device_LHNk, valid_LHNk, strict=True)])
    expert_LHNk = np.arange(groups)[None, :, None, None] * (num_experts // groups) + experts_LHNk
    experts_LA = _counts(np.where(valid_LHNk, expert_LHNk, num_experts), num_experts)
    row_L = _discrepancy(rows_LW)
    return LoadBalance(
        local_activation_rate=float(at_home_LHNk[valid_LHNk].mean()),
        token_discrepancy=float(_discrepancy(tokens_LW).mean()),
        row_discrepancy=float(row_L.mean()),
        most_row_discrepancy=float(row_L.max()),
        row_imbalance=float((rows_LW.max(axis=1) / rows_LW.mean(axis=1)).mean()),
        expert_discrepancy=float(_discrepancy(experts_LA).mean()),
    )


def _counts(index_LHNk: np.ndarray, count: int) -> np.ndarray:
    """[L, count], how often each index occurs in a layer; `count` itself is left out."""
    return np.stack([np.bincount(layer.ravel(), minlength=count + 1)[:count] for layer in index_LHNk])


def _with_work(device_HNk: np.ndarray, valid_HNk: np.ndarray, devices: int) -> np.ndarray:
    """[W], tokens of which a device has at least one choice."""
    device_NC = device_HNk.swapaxes(0, 1).reshape(device_HNk.shape[1], -1)
    valid_NC = valid_HNk.swapaxes(0, 1).reshape(device_NC.shape)
    return np.array([(valid_NC & (device_NC == device)).any(axis=1).sum() for device in range(devices)])


def _discrepancy(loads_LW: np.ndarray) -> np.ndarray:
    """[L], most over median; infinite where more than half of the devices have nothing."""
    median_L = np.median(loads_LW, axis=1)
    most_L = loads_LW.max(axis=1)
    return np.divide(most_L, median_L, out=np.full(most_L.shape, np.inf), where=median_L > 0)
