"""The predicted time of an optimizer step: compute a multiple of the forward pass's, collectives approximate.

Of the forward pass every collective is stated exactly; that the backward pass repeats each in the other direction, and
what gradients and parameters send, is a formula that nothing is held against: `foejax comms` audits the real step.
"""

from __future__ import annotations

from dataclasses import replace

from foejax.analysis.cost_model.cluster import Cluster
from foejax.analysis.cost_model.predict import Exchange, Item, Prediction, communicated, computed, predict_step
from foejax.analysis.cost_model.step import forward_step
from foejax.analysis.cost_model.work import ITEMSIZE, Part, weight_bytes
from foejax.config import ModelConfig, RunConfig
from sharding import Layout
from sharding.forward_pass import Rows

_OPTIMIZER_BYTES = 28
"""A float32 parameter, its two moments and its gradient read, the first three written."""


def predict_training_step(
    config: RunConfig, layout: Layout, cluster: Cluster, *, imbalance: float = 1.0, exchange: Exchange = "buffers"
) -> Prediction:
    """One optimizer step: `training.gradient_accumulation` micro-batches forward and backward, then AdamW.

    - Compute: 3 times the forward pass, 4 times with remat=full, which runs the layers' forward pass again.
    - The forward pass's collectives twice: the transpose of each sends the same bytes.
    - Over `data`, where parameters are split: two gathers of a layer in the compute dtype, one reduce-scatter of its
      float32 gradient. Over `expert`: an all-reduce of the gradients of what is whole on its devices. Over `group`: one
      of the embedding's, and of each layer's router; in hp, of all that devices with tokens of their own hold alike.

    Args:
      layout: parameters are split over `data`, as `train` has them (`shard_params` is not looked at).

    Raises:
      ValueError: see `predict_step`.
    """
    model, accumulation = config.model, config.training.gradient_accumulation
    sequences = config.data.batch_size // accumulation
    step = forward_step(sequences, config.data.sequence_length, layout.num_token_shards)
    forward = predict_step(model, layout, step, cluster, imbalance=imbalance, exchange=exchange)
    times = 4 if config.training.remat == "full" else 3
    per_layer, once = _gradient_rows(model, layout)
    layer = [_repeated(item, 2 if item.communicates else times) for item in forward.layer]
    rest = [_repeated(item, 2 if item.communicates else 3) for item in forward.once]
    layer += communicated(per_layer, layout, cluster)
    rest += communicated(once, layout, cluster)
    updated = weight_bytes(model, layout) / ITEMSIZE[model.dtype] / layout.sizes.data * _OPTIMIZER_BYTES
    rest = [_repeated(item, accumulation) for item in rest] + [computed(Part("optimizer", 0.0, updated), cluster)]
    # Micro-batches are so many more layers in a row.
    return Prediction(
        model.num_layers * accumulation, tuple(layer), tuple(rest), times * cluster.layer_floor, cluster.overlap
    )


def _gradient_rows(model: ModelConfig, layout: Layout) -> tuple[Rows, Rows]:
    """Collectives of parameters and gradients of one micro-batch: of a layer, and once."""
    sizes, width, sharing, share = layout.sizes, model.hidden_size, layout.num_token_slices, layout.sizes.data
    whole = width * model.head_dim * (2 * model.num_query_heads + 2 * model.num_kv_heads) // sharing
    whole += 2 * width * model.latent_width
    router = model.expert_width * model.num_experts // layout.num_head_exchangers
    experts = model.expert_size * model.num_experts // (sizes.group * sizes.expert)
    embedding, head = width * model.vocab_size, width * model.vocab_size // sharing
    layer, once = _data_rows(whole + router + experts, model, layout), _data_rows(embedding + head, model, layout)
    if layout.exchanges_heads:
        axes = [axis for axis in ("group", "expert") if getattr(sizes, axis) > 1]
        if axes:
            layer.append(_row("gradients of attention and sub-tokens", "all-reduce", axes, 4 * whole // share))
            once.append(_row("gradients of embedding and head", "all-reduce", axes, 4 * (embedding + head) // share))
        if sizes.expert > 1:
            layer.append(_row("gradient of the router", "all-reduce", ["expert"], 4 * router // share))
        return layer, once
    if sizes.expert > 1:
        layer.append(_row("gradients of attention", "all-reduce", ["expert"], 4 * (whole + router) // share))
        once.append(_row("gradients of embedding and head", "all-reduce", ["expert"], 4 * (embedding + head) // share))
    if sizes.group > 1:
        layer.append(_row("gradient of the router", "all-reduce", ["group"], 4 * router // share))
        once.append(_row("gradient of the embedding", "all-reduce", ["group"], 4 * embedding // share))
    return layer, once


def _data_rows(elements: int, model: ModelConfig, layout: Layout) -> Rows:
    if layout.sizes.data == 1:
        return []
    gathered = _row("parameters", "all-gather", ["data"], ITEMSIZE[model.dtype] * elements // layout.sizes.data)
    return [gathered | {"count": 2}, _row("gradients", "reduce-scatter", ["data"], 4 * elements)]


def _row(what: str, op: str, axes: list[str], payload: int) -> dict[str, object]:
    return {"what": what, "op": op, "axes": axes, "count": 1, "payload_bytes": payload}


def _repeated(item: Item, times: int) -> Item:
    return replace(item, seconds=item.seconds * times, flops=item.flops * times, bytes=item.bytes * times)
