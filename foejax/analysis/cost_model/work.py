"""What one device computes in a step: FLOPs and bytes of each part of a layer, from sizes alone.

Shape letters: N tokens on the device, n those that it carries outside attention (its slice of them in tp_ep), D width,
q and g query and key/value heads of the device, K head size, F expert hidden size, s streams (groups) of the device, R
rows that its experts get, E experts, k choices of a token, V vocabulary. Multi-Head LatentMoE: W size of a sub-token (D
elsewhere), U all sub-tokens of a token (0 elsewhere). All figures are of the fullest device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from foejax.analysis.cost_model.cluster import Cluster
from foejax.analysis.cost_model.step import Step
from foejax.config import ModelConfig
from sharding import Layout

Unit = Literal["matmul", "attention", "float32"]
ITEMSIZE = {"bfloat16": 2, "float32": 4, "float64": 8}
"""Bytes of an activation or weight."""


@dataclass(frozen=True)
class Part:
    """Some of a device's work.

    Attributes:
      flops: of matmuls.
      bytes: read and written, weights and activations each once.
      unit: what computes it.
    """

    name: str
    flops: float
    bytes: float
    unit: Unit = "matmul"

    def seconds(self, cluster: Cluster) -> tuple[float, str]:
        """Roofline: the longer of computing and of moving bytes, and which of the two it is."""
        device = cluster.accelerator
        rate = {
            "matmul": device.matmul_flops * cluster.matmul_fraction,
            "attention": device.matmul_flops * cluster.attention_fraction,
            "float32": device.float32_flops * cluster.matmul_fraction,
        }[self.unit]
        computing, moving = self.flops / rate, self.bytes / (device.memory_bandwidth * cluster.memory_fraction)
        return (computing, "compute") if computing >= moving else (moving, "memory")


def layer_parts(model: ModelConfig, layout: Layout, step: Step, imbalance: float = 1.0) -> list[Part]:
    """One layer of a step on one device.

    - projections: 2 D K (2 q + 2 g) N FLOPs; the weights, s N D in and out, 2 N K (q + g) between.
    - attention: 4 q K FLOPs a query-key pair (causal ones alone); keys and values of every row once, queries, outputs.
    - router: 2 W E n FLOPs in float32; its weight and the scores, which heads with topk_softmax do not write. An FoE
      device routes for all groups; one of hp for its own heads alone, but sub-tokens of all devices that exchange them.
    - experts: 6 W F R FLOPs, with GELU 4 W F R; the weights of experts that are touched, and (4 W + 2 F) R for rows
      gathered, computed, written and combined.
    - norms and sums: no FLOPs counted; (4 s + 5) n D for streams formed, normed and merged, and 4 U n where sub-tokens
      are laid out by head and back.
    - sub-tokens: 4 D U n FLOPs, the projections to them and back; the weights, and 2 (D + U) n.

    Args:
      imbalance: rows of the fullest device over their mean, where devices share experts.
    """
    item, sharing = ITEMSIZE[model.dtype], layout.num_token_slices
    width, head, latent = model.hidden_size, model.head_dim, model.latent_width
    tokens = step.device_tokens
    carried = -(-tokens // sharing) if layout.slices_tokens else tokens
    q, g = model.num_query_heads // sharing, model.num_kv_heads // sharing
    streams = 1 if layout.splits_heads else model.num_groups // sharing
    weights = width * head * (2 * q + 2 * g)
    rows, touched = _expert_rows(model, layout, step)
    rows *= imbalance if layout.num_expert_shards > 1 else 1.0
    scores = 0 if model.streams_scores else model.num_experts * carried
    row_elements = 4 * model.expert_width + 2 * model.expert_hidden_size
    parts = [
        Part(
            "projections",
            2.0 * weights * tokens,
            item * (weights + 2 * streams * tokens * width + 2 * tokens * head * (q + g)),
        ),
        Part(
            "attention",
            4.0 * q * head * step.most_pairs,
            item * head * (2 * g * step.most_keys + 2 * q * tokens),
            "attention",
        ),
        Part(
            "router",
            2.0 * model.expert_width * model.num_experts * carried,
            4 * (_router_weights(model, layout) + scores),
            "float32",
        ),
        Part("experts", 2.0 * model.expert_size * rows, item * (touched * model.expert_size + rows * row_elements)),
        Part("norms and sums", 0.0, item * ((4 * streams + 5) * width + 4 * latent) * carried),
    ]
    if latent:
        flops, elements = 4.0 * width * latent * tokens, 2 * width * latent + 2 * (width + latent) * tokens
        parts.append(Part("sub-tokens", flops, item * elements))
    return parts


def head_part(model: ModelConfig, layout: Layout, step: Step) -> Part:
    """The head of one device: all of the vocabulary for its slice of the tokens, or its part of it for the rows asked.

    2 D V FLOPs a row; its weights and float32 logits.
    """
    share = layout.num_token_slices
    if step.logits_rows is None:
        rows, columns = -(-step.device_tokens // share), model.vocab_size
    else:
        rows, columns = step.logits_rows, model.vocab_size // share
    flops = 2.0 * model.hidden_size * columns * rows
    return Part("head", flops, ITEMSIZE[model.dtype] * model.hidden_size * columns + 4 * rows * columns)


def weight_bytes(model: ModelConfig, layout: Layout) -> int:
    """Bytes of the weights on one device, whole on every data shard, in the dtypes of their use."""
    item, sizes, sharing = ITEMSIZE[model.dtype], layout.sizes, layout.num_token_slices
    width, head = model.hidden_size, model.head_dim
    attention = width * head * (2 * model.num_query_heads + 2 * model.num_kv_heads) // sharing
    experts = model.num_experts * model.expert_size // (sizes.group * sizes.expert)
    layer = item * (attention + experts + 2 * width * model.latent_width) + 4 * _router_weights(model, layout)
    vocabulary = (4 + item / sharing) * width * model.vocab_size  # embedding in float32, head split over groups
    return round(model.num_layers * layer + vocabulary)


def _router_weights(model: ModelConfig, layout: Layout) -> int:
    """Of a layer on one device: for all groups, but for its own heads alone."""
    return model.expert_width * model.num_experts // layout.num_head_exchangers


def _expert_rows(model: ModelConfig, layout: Layout, step: Step) -> tuple[float, float]:
    """Rows that a device's experts get under uniform routing, and how many of its experts are touched."""
    sizes = layout.sizes
    tokens = step.most_tokens(sizes.expert * layout.num_head_exchangers)  # those that meet in the same experts
    holders = sizes.group * sizes.expert
    missed = (1 - model.experts_per_token / model.num_experts) ** tokens
    return tokens * model.experts_per_token / holders, model.num_experts / holders * (1 - missed)
