"""Which Hugging Face tensor holds which of our parameters, in one table that serves both directions.

Shape letters, as in the parameters' own names: S (or H) groups, D width, Q query heads and G key/value heads of a
group, K head size, E experts of a group, F expert hidden size, V vocabulary. In Multi-Head LatentMoE heads of experts
stand for groups, K is the size of a sub-token, and so is the D of an expert.

Groups come first wherever they are merged with heads or experts, so group h is the h-th contiguous slice of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from foejax.config import ModelConfig

ModelType = Literal["foe", "olmoe", "mhlmoe"]
Shape = tuple[int, ...]
Index = tuple[slice, ...]
ParamPath = tuple[Any, ...]
"""Key of a parameter in a flat nnx state."""


@dataclass(frozen=True)
class TensorRule:
    """One parameter and the tensor, or the tensors per layer and expert, that hold it.

    Attributes:
      param: path of the parameter inside `Transformer`; its suffix names its dimensions.
      name: name of the tensor, with `{layer}` and `{expert}` where there is one per layer or expert.
      dims: dimensions of the tensor, each a word of the parameter's letters, merged in row-major order. With
        `{expert}` the first word runs over the tensors.
    """

    param: str
    name: str
    dims: str

    @property
    def path(self) -> ParamPath:
        """Key of the parameter in a flat nnx state."""
        return tuple(self.param.split("."))

    @property
    def per_layer(self) -> bool:
        """Whether the parameter has a leading layer dimension, which `shape` and `index` below do not count."""
        return "{layer}" in self.name

    @property
    def _per_expert(self) -> bool:
        return "{expert}" in self.name

    @property
    def _letters(self) -> str:
        return self.param.rpartition("_")[2]

    @property
    def _order(self) -> list[int]:
        """Our dimensions in the order of the tensor's."""
        return [self._letters.index(letter) for letter in self.dims.replace(" ", "")]

    def tensors(self, shape: Shape, layer: int) -> Iterator[tuple[str, Shape]]:
        """Name and shape of every tensor that holds one layer's parameter of this shape."""
        size = dict(zip(self._letters, shape, strict=True))
        merged = tuple(int(np.prod([size[letter] for letter in word])) for word in self.dims.split())
        if not self._per_expert:
            yield self.name.format(layer=layer), merged
            return
        for expert in range(merged[0]):
            yield self.name.format(layer=layer, expert=expert), merged[1:]

    def split(self, param: np.ndarray, layer: int) -> list[np.ndarray]:
        """One layer's parameter as its tensors, in the order of `tensors`; views where the order of memory allows."""
        turned = param.transpose(self._order)
        shapes = [shape for _, shape in self.tensors(param.shape, layer)]
        if not self._per_expert:
            return [turned.reshape(shapes[0])]
        return list(turned.reshape(len(shapes), *shapes[0]))

    def join(self, tensors: dict[str, np.ndarray], shape: Shape, layer: int, index: Index) -> np.ndarray:
        """The part `index` of one layer's parameter; of the tensors only what that part needs is read."""
        order = self._order
        back = np.argsort(order)
        names = [name for name, _ in self.tensors(shape, layer)]
        if not self._per_expert:
            whole = tensors[names[0]].reshape([shape[dim] for dim in order])
            return whole.transpose(back)[index]
        stack = np.array(names).reshape(shape[:2])[index[:2]]
        inner = order[2:]
        parts = [
            tensors[name].transpose([inner.index(dim) for dim in range(2, len(shape))])[index[2:]]
            for name in stack.flat
        ]
        return np.stack(parts).reshape(*stack.shape, *parts[0].shape)


_LAYER = "model.layers.{layer}."
_EXPERT = _LAYER + "mlp.experts.{expert}."

_INPUT_NORM = TensorRule("layers.attention_norm_SD", _LAYER + "input_layernorm.weight", "S D")
_EXPERT_GATE = TensorRule("layers.experts.gate_SEDF", _EXPERT + "gate_proj.weight", "SE F D")

_AROUND_EXPERTS: tuple[TensorRule, ...] = (
    TensorRule("embedding_VD", "model.embed_tokens.weight", "V D"),
    _INPUT_NORM,
    TensorRule("layers.attention.q_SDQK", _LAYER + "self_attn.q_proj.weight", "SQK D"),
    TensorRule("layers.attention.k_SDGK", _LAYER + "self_attn.k_proj.weight", "SGK D"),
    TensorRule("layers.attention.v_SDGK", _LAYER + "self_attn.v_proj.weight", "SGK D"),
    TensorRule("layers.attention.o_SQKD", _LAYER + "self_attn.o_proj.weight", "D SQK"),
    TensorRule("layers.attention.q_norm_SQK", _LAYER + "self_attn.q_norm.weight", "SQK"),
    TensorRule("layers.attention.k_norm_SGK", _LAYER + "self_attn.k_norm.weight", "SGK"),
    TensorRule("layers.expert_norm_D", _LAYER + "post_attention_layernorm.weight", "D"),
    TensorRule("final_norm_D", "model.norm.weight", "D"),
    TensorRule("head_DV", "lm_head.weight", "V D"),
)

_ROUTER: tuple[TensorRule, ...] = (TensorRule("layers.router.w_DHE", _LAYER + "mlp.gate.weight", "HE D"),)

_HEADS_AND_ROUTERS: tuple[TensorRule, ...] = (
    TensorRule("layers.heads.in_DHK", _LAYER + "mlp.in_proj.weight", "HK D"),
    TensorRule("layers.heads.out_HKD", _LAYER + "mlp.out_proj.weight", "D HK"),
    TensorRule("layers.heads.router.w_SKE", _LAYER + "mlp.gate.weight", "SE K"),
)

_EXPERTS: tuple[TensorRule, ...] = (
    _EXPERT_GATE,
    TensorRule("layers.experts.up_SEDF", _EXPERT + "up_proj.weight", "SE F D"),
    TensorRule("layers.experts.down_SEFD", _EXPERT + "down_proj.weight", "SE D F"),
)

_SELECTION_BIAS = TensorRule("layers.router.selection_bias_SE", _LAYER + "mlp.gate.e_score_correction_bias", "SE")


def selection_bias_rule(config: ModelConfig) -> TensorRule:
    """The routers' selection bias, written only where it is not zero and named as DeepSeek-V3 names it."""
    return _of_heads(_SELECTION_BIAS) if config.num_ffn_heads else _SELECTION_BIAS


def tensor_rules(model_type: ModelType, config: ModelConfig, *, selection_bias: bool) -> tuple[TensorRule, ...]:
    """The table for one model in one kind of folder.

    Where there is one group for sure (olmoe, mhlmoe) it has no dimension of its own in the input norm.
    """
    around, experts = _AROUND_EXPERTS, _EXPERTS
    if model_type != "foe":
        around = tuple(replace(rule, dims="SD") if rule is _INPUT_NORM else rule for rule in around)
    if config.expert_activation == "gelu":
        experts = tuple(rule for rule in experts if rule is not _EXPERT_GATE)
    if config.num_ffn_heads:
        rules = (*around, *_HEADS_AND_ROUTERS, *map(_of_heads, experts))
    else:
        rules = (*around, *_ROUTER, *experts)
    return (*rules, selection_bias_rule(config)) if selection_bias else rules


def _of_heads(rule: TensorRule) -> TensorRule:
    """The rule of a router's or an expert's parameter where heads own it."""
    return replace(rule, param=rule.param.replace("layers.", "layers.heads.", 1))
