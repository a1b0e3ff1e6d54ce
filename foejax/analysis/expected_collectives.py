"""What the formulas of `sharding.forward_pass` say for a model on a layout."""

from __future__ import annotations

from typing import Literal

from foejax.config import ModelConfig
from foejax.models.expert_parallel import buffer_sizes
from sharding import Layout
from sharding.formulas import expected_destinations
from sharding.forward_pass import Rows, Sizes, exchange_rows, foe_rows, tp_ep_rows, tp_rows, vocab_row

_HLO_DTYPES = {"bfloat16": "bf16", "float32": "f32", "float64": "f64"}


def expected_collectives(
    model: ModelConfig, layout: Layout, num_tokens: int, *, logits_rows: int | None = None
) -> Rows:
    """Every collective of a forward pass with whole parameters on every data shard.

    Args:
      num_tokens: tokens on one device.
      logits_rows: tokens whose logits are computed, each device of a `group` axis its part of the vocabulary
        (decoding); None is all tokens, each device its slice of them (`LanguageModel.logits`).
    """
    devices = layout.sizes.group
    of_pass = Sizes(model.num_layers, num_tokens, model.hidden_size, _HLO_DTYPES[model.dtype])
    rows: Rows = []
    if devices > 1 and layout.kind == "tp":
        rows += tp_rows(of_pass, devices)
    elif devices > 1 and layout.kind == "tp_ep":
        rows += tp_ep_rows(of_pass, devices, last_tokens=logits_rows or 0)
    elif devices > 1:
        last: Literal["all-reduce", "reduce-scatter"] = "reduce-scatter" if logits_rows is None else "all-reduce"
        rows += foe_rows(of_pass, devices, last=last, last_tokens=logits_rows or num_tokens)
    if devices > 1 and logits_rows is None:
        rows += vocab_row(of_pass, devices, model.vocab_size)
    if layout.exchanges_tokens:
        carried = of_pass.slice_of(devices) if layout.slices_tokens else of_pass
        groups = 1 if layout.splits_heads else model.num_groups // devices
        rows += _exchanges(model, carried, layout.num_expert_shards, groups, layout.expert_axis)
    return rows


def _exchanges(model: ModelConfig, of_pass: Sizes, devices: int, groups: int, axis: str) -> Rows:
    experts, k = model.num_experts // model.num_groups, model.experts_per_token // model.num_groups
    destinations = expected_destinations(experts, k, devices)
    shared = devices * (1 - (1 - destinations / devices) ** groups)
    return exchange_rows(
        of_pass,
        devices,
        buffer_sizes(of_pass.tokens, k, experts, devices, groups),
        groups=groups,
        experts_per_token=k,
        axis=axis,
        needed=(shared, groups * destinations),
    )
