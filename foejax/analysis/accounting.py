"""What a model weighs and costs, from shapes and shardings alone: nothing is allocated.

Shape letters: L layers, D width, Q query heads, G key/value heads, K head size, E experts, k chosen experts, F expert
hidden size, V vocabulary, H groups, T sequence length. Multi-Head LatentMoE: W size of a sub-token (D elsewhere), U all
sub-tokens of a token (0 elsewhere).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from foejax.config import ModelConfig, RunConfig
from foejax.evaluation.evaluate import split_model
from foejax.models import LanguageModel
from foejax.training.optimizer import make_optimizer, parameter_name
from foejax.training.step import abstract_train_state
from sharding import Layout


@dataclass(frozen=True)
class Flops:
    """Useful floating-point operations of the forward pass, per token and averaged over a sequence's positions.

    A matmul of m x n weights costs 2 m n per token. Recomputation (remat, the chunked cross-entropy) and the copies
    of the small router that all devices of a group axis compute are not counted.

    Attributes:
      projections: L * 2 D K (2 Q + 2 G), the four matrices of attention.
      attention: L * 4 Q K (T + 1) / 2, scores and weighted values, each query seeing (T + 1) / 2 keys on average.
      router: L * 2 W E.
      experts: L * k * 6 W F, the three matrices of each chosen expert; with GELU 4 W F, of two.
      head: 2 D V.
      sub_tokens: L * 4 D U, the projections to sub-tokens and back.
    """

    projections: float
    attention: float
    router: float
    experts: float
    head: float
    sub_tokens: float

    @property
    def forward(self) -> float:
        """The sum."""
        return self.projections + self.attention + self.router + self.experts + self.head + self.sub_tokens

    @property
    def training(self) -> float:
        """Forward and backward: the backward pass has two matmuls for each of the forward pass.

        So it is counted for routers of heads with topk_softmax too, whose backward pass needs the chosen columns alone.
        """
        return 3 * self.forward


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on the fullest device.

    Attributes:
      parameters: float32 weights, from their real shardings.
      optimizer: AdamW's two moments, which lie like the weights.
      gradients: like the weights.
      activations: estimate of what the backward pass keeps for one micro-batch; see `activation_bytes`.
    """

    parameters: int
    optimizer: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.parameters + self.optimizer + self.gradients + self.activations


@dataclass(frozen=True)
class Account:
    """A run's model in numbers.

    Attributes:
      parameters: trained parameters.
      active_parameters: those that take part in one token: all but the experts that it does not choose.
      parameters_by_part: embedding, attention, router, experts, norms, head, and for Multi-Head LatentMoE sub_tokens,
        the projections to sub-tokens and back.
      sequence_length: T of `flops`.
      flops: per token.
      step_tokens: tokens of an optimizer step.
      step_flops_per_device: training FLOPs of one device in one step, the router on every device included.
      memory: per device.
      mesh: devices along each axis.
    """

    parameters: int
    active_parameters: int
    parameters_by_part: dict[str, int]
    sequence_length: int
    flops: Flops
    step_tokens: int
    step_flops_per_device: float
    memory: DeviceMemory
    mesh: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, the derived sums included."""
        values = asdict(self)
        values["flops"] |= {"forward": self.flops.forward, "training": self.flops.training}
        values["memory"] |= {"total": self.memory.total}
        return values


def account(config: RunConfig, layout: Layout) -> Account:
    """Count parameters, FLOPs and memory of a run on a layout.

    Raises:
      ValueError: the layout does not fit the model.
    """
    model = LanguageModel.abstract(config.model, layout)
    parts = parameters_by_part(model)
    total = sum(parts.values())
    idle_share = 1 - config.model.experts_per_token / config.model.num_experts
    flops = flops_per_token(config.model, config.data.sequence_length)
    step_tokens = config.data.batch_size * config.data.sequence_length
    return Account(
        parameters=total,
        active_parameters=total - round(parts["experts"] * idle_share),
        parameters_by_part=parts,
        sequence_length=config.data.sequence_length,
        flops=flops,
        step_tokens=step_tokens,
        step_flops_per_device=_training_flops_per_device(flops, step_tokens, layout),
        memory=_device_memory(model, config, layout),
        mesh=layout.sizes._asdict(),
    )


def parameters_by_part(model: LanguageModel) -> dict[str, int]:
    """Number of parameters of each part of a (possibly abstract) model."""
    parts = dict.fromkeys(("embedding", "attention", "router", "experts", "norms", "head"), 0)
    parts |= {"sub_tokens": 0} if model.config.num_ffn_heads else {}
    params = nnx.state(model.transformer, nnx.Param)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        parts[_part_of(parameter_name(path))] += leaf.size
    return parts


def flops_per_token(config: ModelConfig, sequence_length: int) -> Flops:
    """FLOPs of the forward pass per token of sequences of one document each; see `Flops`."""
    layers, width, head = config.num_layers, config.hidden_size, config.head_dim
    heads = 2 * config.num_query_heads + 2 * config.num_kv_heads
    return Flops(
        projections=2.0 * layers * width * head * heads,
        attention=2.0 * layers * config.num_query_heads * head * (sequence_length + 1),
        router=2.0 * layers * config.expert_width * config.num_experts,
        experts=2.0 * layers * config.experts_per_token * config.expert_size,
        head=2.0 * width * config.vocab_size,
        sub_tokens=4.0 * layers * width * config.latent_width,
    )


def activation_bytes(config: RunConfig, layout: Layout) -> int:
    """Estimated bytes that one device keeps from the forward for the backward pass of one micro-batch.

    Per token and layer, in elements of the compute dtype, s = H / (devices on `group`) being the streams of a device
    and q, g, k its own query heads, key/value heads and chosen experts, m the matrices of an expert but the last. In tp
    every device has the one stream whole (s = 1); in tp_ep its share of it, and D more for the tokens that attention
    gathers; in hp, whose devices have tokens of their own, nothing is shared over `group`:

    - remat=full: (s + 2) D: the residual and s expert outputs at the layer's entry, and the merged residual. An FoE
      device with s groups thus keeps s + 2 arrays where the MoE keeps 3. In hp 2 U more, what two exchanges brought.
    - remat=dots adds every matmul's output: (q + 2 g) K + q K + s D + k (m F + W), and q T attention scores; for
      sub-tokens U + D.
    - remat=none adds what lies between: 2 s D normed streams, 2 (q + 2 g) K rotated heads, q T probabilities,
      2 D normed residual, k (W + m F) rows of the experts and E router scores (none of heads with topk_softmax), the
      wide copies of norms counted twice; for sub-tokens 2 U, laid out by head.

    To these come the logits of one chunk of the cross-entropy in float32, forward and backward. The compiler may fuse
    some of it away or (XLA on CPU) keep wider copies: expect the right order, not the last digit.
    """
    model, sharing = config.model, layout.num_token_slices
    sequence = config.data.sequence_length
    micro_batch = config.data.batch_size / config.training.gradient_accumulation
    tokens = micro_batch * sequence / layout.num_token_shards
    width, head, latent = model.hidden_size, model.head_dim, model.latent_width
    row = model.expert_size // model.expert_width - model.expert_hidden_size + model.expert_width  # m F + W
    streams = 1.0 if layout.splits_heads else model.num_groups / sharing
    carried = 1 / sharing if layout.slices_tokens else 1.0
    q, g, k = (n / sharing for n in (model.num_query_heads, model.num_kv_heads, model.experts_per_token))
    elements = carried * (streams + 2) * width + (width if layout.slices_tokens else 0)
    elements += 2 * latent if layout.num_head_exchangers > 1 else 0
    if config.training.remat != "full":
        elements += (2 * q + 2 * g) * head + streams * width + k * row + q * sequence
        elements += latent + width if latent else 0
    if config.training.remat == "none":
        elements += 4 * carried * (streams + 1) * width + 4 * (q + 2 * g) * head + q * sequence
        elements += k * row + 2 * latent + (0 if model.streams_scores else carried * model.num_experts)
    itemsize = {"bfloat16": 2, "float32": 4, "float64": 8}[model.dtype]
    chunk = min(2048, tokens / sharing)
    return round(tokens * model.num_layers * elements * itemsize + 2 * chunk * model.vocab_size * 4)


def shard_bytes(leaves: Iterable[Any]) -> int:
    """Bytes of abstract or real arrays on one device, as their shardings split them."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize for leaf in leaves
    )


def _device_memory(model: LanguageModel, config: RunConfig, layout: Layout) -> DeviceMemory:
    _, params, router_state = split_model(model)
    optimizer = make_optimizer(config.training)
    state = abstract_train_state(params, router_state, optimizer, layout.mesh)
    weights = shard_bytes(jax.tree.leaves(state.params))
    return DeviceMemory(
        parameters=weights + shard_bytes(jax.tree.leaves(state.router_state)),
        optimizer=shard_bytes(jax.tree.leaves(state.opt_state)),
        gradients=weights,
        activations=activation_bytes(config, layout),
    )


def _training_flops_per_device(flops: Flops, step_tokens: int, layout: Layout) -> float:
    """Devices that hold the same tokens do their share of each, and the whole router.

    Where they carry slices of the tokens, they route them alone; in hp every device has tokens of its own.
    """
    tokens, sharing = step_tokens / layout.num_token_shards, layout.num_token_slices
    shared = (flops.forward - flops.router) / sharing
    return 3 * tokens * (shared + flops.router / (sharing if layout.slices_tokens else 1))


def _part_of(name: str) -> str:
    for mark, part in (("norm", "norms"), ("embedding", "embedding"), ("head_DV", "head")):
        if mark in name:
            return part
    parts = (("attention", "attention"), ("router", "router"), ("experts", "experts"), ("heads", "sub_tokens"))
    return next(part for mark, part in parts if f".{mark}." in name)
