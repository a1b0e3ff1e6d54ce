"""What the formulas of `sharding.forward_pass` say for a model on a layout."""

from __future__ import annotations

from typing import Literal, NamedTuple

from foejax.config import ModelConfig
from foejax.models.expert_parallel import buffer_sizes
from sharding import Layout
from sharding.formulas import expected_destinations
from sharding.forward_pass import Rows, Sizes, exchange_rows, foe_rows, hp_rows, tp_ep_rows, tp_rows, vocab_row

_HLO_DTYPES = {"bfloat16": "bf16", "float32": "f32", "float64": "f64"}


class Exchanged(NamedTuple):
    """What a device has for the experts of a layer that other devices share, before any token travels.

    Attributes:
      tokens: tokens, or sub-tokens, that it routes.
      width: size of each.
      groups: stacks of experts that it routes them in.
      experts, choices: of each stack.
    """

    tokens: int
    width: int
    groups: int
    experts: int
    choices: int

    @classmethod
    def of(cls, model: ModelConfig, layout: Layout, num_tokens: int) -> Exchanged:
        """Of a device with `num_tokens` tokens in attention."""
        stacks = model.num_stacks
        return cls(
            -(-num_tokens // (layout.num_token_slices if layout.slices_tokens else 1)) * layout.num_head_exchangers,
            model.expert_width,
            1 if layout.splits_heads else stacks // layout.sizes.group,
            model.num_experts // stacks,
            model.experts_per_stack,
        )


def expected_collectives(
    model: ModelConfig, layout: Layout, num_tokens: int, *, logits_rows: int | None = None
) -> Rows:
    """Every collective of a forward pass with whole parameters on every data shard.

    Args:
      num_tokens: tokens on one device.
      logits_rows: tokens whose logits are computed, each device of a `group` axis its part of the vocabulary
        (decoding; of all tokens: one new token a sequence, none of them padding); None is all tokens, each device its
        slice of them (`LanguageModel.logits`).
    """
    devices = layout.sizes.group
    of_pass = Sizes(model.num_layers, num_tokens, model.hidden_size, _HLO_DTYPES[model.dtype])
    rows: Rows = []
    if devices > 1 and layout.exchanges_heads:
        rows += hp_rows(of_pass, devices, latent_width=model.latent_width, masked=logits_rows != num_tokens)
    elif devices > 1 and layout.kind == "tp":
        rows += tp_rows(of_pass, devices)
    elif devices > 1 and layout.kind == "tp_ep":
        rows += tp_ep_rows(of_pass, devices, last_tokens=logits_rows or 0)
    elif devices > 1:
        last: Literal["all-reduce", "reduce-scatter"] = "reduce-scatter" if logits_rows is None else "all-reduce"
        rows += foe_rows(of_pass, devices, last=last, last_tokens=logits_rows or num_tokens)
    if layout.num_token_slices > 1 and logits_rows is None:
        rows += vocab_row(of_pass, devices, model.vocab_size)
    if layout.exchanges_tokens:
        rows += _exchanges(of_pass, Exchanged.of(model, layout, num_tokens), layout)
    return rows


def _exchanges(of_pass: Sizes, here: Exchanged, layout: Layout) -> Rows:
    devices = layout.num_expert_shards
    destinations = expected_destinations(here.experts, here.choices, devices)
    shared = devices * (1 - (1 - destinations / devices) ** here.groups)
    return exchange_rows(
        of_pass._replace(tokens=here.tokens, width=here.width),
        devices,
        buffer_sizes(here.tokens, here.choices, here.experts, devices, here.groups),
        groups=here.groups,
        experts_per_token=here.choices,
        axis=layout.expert_axis,
        needed=(shared, here.groups * destinations),
    )
