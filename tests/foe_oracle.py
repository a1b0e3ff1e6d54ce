"""An FoE forward pass in NumPy, float64 and plain loops, written from the equations and not from our model.

Source: Federation of Experts, arXiv 2605.06206, Table 2 and section 3.1: every group attends on its own stream, the
groups' states are averaged, one router scores all experts, each group takes its best k/H among its own and adds their
output to its own stream only. It reads the tensors of an exported folder, so it checks their names and shapes too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

Array = np.ndarray


class Oracle:
    """The model of an exported FoE folder (one safetensors file)."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.weights = {name: x.astype(np.float64) for name, x in load_file(folder / "model.safetensors").items()}
        self.smallest_margin = np.inf
        """smallest gap between a chosen and a left-out score: a disagreement with a tiny one is a flipped tie"""

    def logits(self, tokens: Array) -> Array:
        """Logits [T, V] of one document."""
        config = self.config
        groups, last = config["num_groups"], config["num_hidden_layers"] - 1
        x = [config["embedding_scale"] * self.weights["model.embed_tokens.weight"][token] for token in tokens]
        embedding = np.stack(x)
        streams = [embedding for _ in range(groups)]
        shared = embedding
        for layer in range(last + 1):
            branches = [self._attention(layer, group, streams[group]) for group in range(groups)]
            if layer == 0:
                # one ordinary attention over all heads: the output projection adds up the heads of all groups
                shared = embedding + sum(branches)
            else:
                shared = self._merge(shared, [s + b for s, b in zip(streams, branches, strict=True)])
            streams = self._moe(layer, shared)
        out = self._merge(shared, streams)
        return self._norm(out, self.weights["model.norm.weight"]) @ self.weights["lm_head.weight"].T

    def _merge(self, before: Array, states: list[Array]) -> Array:
        """The average of the groups' states; or, for the other scales, what they added to `before`, rescaled."""
        kind, groups = self.config["merge_scale"], len(states)
        if kind == "mean":
            return sum(states) / groups
        added = sum(state - before for state in states)
        return before + added * {"rsqrt": groups**-0.5, "sum": 1.0}[kind]

    def _attention(self, layer: int, group: int, stream: Array) -> Array:
        config, length = self.config, len(stream)
        size, groups = config["head_dim"], config.get("num_groups", 1)
        queries, keys = config["num_attention_heads"] // groups, config["num_key_value_heads"] // groups
        own_queries = slice(group * queries * size, (group + 1) * queries * size)
        own_keys = slice(group * keys * size, (group + 1) * keys * size)
        name = f"model.layers.{layer}."
        h = self._norm(stream, self.weights[name + "input_layernorm.weight"].reshape(groups, -1)[group])
        name += "self_attn."
        q = h @ self.weights[name + "q_proj.weight"][own_queries].T
        k = h @ self.weights[name + "k_proj.weight"][own_keys].T
        v = h @ self.weights[name + "v_proj.weight"][own_keys].T
        q = self._norm(q, self.weights[name + "q_norm.weight"][own_queries])
        k = self._norm(k, self.weights[name + "k_norm.weight"][own_keys])
        heads = []
        for query in range(queries):
            key = query // (queries // keys)
            q_head = self._rotate(q[:, query * size : (query + 1) * size])
            k_head = self._rotate(k[:, key * size : (key + 1) * size])
            v_head = v[:, key * size : (key + 1) * size]
            head = np.zeros((length, size))
            for i in range(length):
                scores = k_head[: i + 1] @ q_head[i] / np.sqrt(size)
                weights = np.exp(scores - scores.max())
                head[i] = (weights / weights.sum()) @ v_head[: i + 1]
            heads.append(head)
        return np.concatenate(heads, axis=1) @ self.weights[name + "o_proj.weight"][:, own_queries].T

    def _rotate(self, x: Array) -> Array:
        """Rotary embedding: component c of the first half turns with component c of the second."""
        half = x.shape[1] // 2
        rotary = self.config["rope_parameters"]
        out = np.zeros_like(x)
        for position in range(len(x)):
            for c in range(half):
                angle = position / rotary.get("factor", 1.0) * rotary["rope_theta"] ** (-2 * c / x.shape[1])
                a, b = x[position, c], x[position, c + half]
                out[position, c] = a * np.cos(angle) - b * np.sin(angle)
                out[position, c + half] = a * np.sin(angle) + b * np.cos(angle)
        return out

    def _moe(self, layer: int, shared: Array) -> list[Array]:
        """Each group's stream after the experts."""
        config = self.config
        groups, experts = config["num_groups"], config["num_experts"]
        each, k = experts // groups, config["num_experts_per_tok"] // groups
        name = f"model.layers.{layer}."
        h = self._norm(shared, self.weights[name + "post_attention_layernorm.weight"])
        bias = self.weights.get(name + "mlp.gate.e_score_correction_bias", np.zeros(experts))
        streams = [shared.copy() for _ in range(groups)]
        for i, hidden in enumerate(h):
            scores = self._scores(self.weights[name + "mlp.gate.weight"] @ hidden)
            for group in range(groups):
                own = range(group * each, (group + 1) * each)
                for e, weight in self._choose(own, k, scores, bias):
                    streams[group][i] += weight * self._expert(f"{name}mlp.experts.{e}.", hidden)
        return streams

    def _choose(self, own: Sequence[int], k: int, scores: Array, bias: Array) -> list[tuple[int, float]]:
        """The k best of the experts `own`, each with its weight, in which the bias has no part."""
        ranked = sorted(own, key=lambda e: -(scores[e] + bias[e]))
        chosen = ranked[:k]
        if k < len(ranked):
            gap = scores[ranked[k - 1]] + bias[ranked[k - 1]] - scores[ranked[k]] - bias[ranked[k]]
            self.smallest_margin = min(self.smallest_margin, gap)
        if self.config["router_score"] != "topk_softmax":
            return [(e, scores[e]) for e in chosen]
        total = sum(np.exp(scores[e]) for e in chosen)
        return [(e, np.exp(scores[e]) / total) for e in chosen]

    def _scores(self, logits: Array) -> Array:
        """What experts are chosen by."""
        if self.config["router_score"] == "topk_softmax":
            return logits
        if self.config["router_score"] == "sigmoid":
            return 1 / (1 + np.exp(-logits))
        if self.config["router_scope"] == "global":
            return np.exp(logits) / np.exp(logits).sum()
        blocks = np.split(logits, self.config.get("num_groups", 1))
        return np.concatenate([np.exp(block) / np.exp(block).sum() for block in blocks])

    def _expert(self, name: str, hidden: Array) -> Array:
        up = self.weights[name + "up_proj.weight"] @ hidden
        if self.config["expert_activation"] == "gelu":
            gelu = np.array([x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in up])
            return self.weights[name + "down_proj.weight"] @ gelu
        gate = self.weights[name + "gate_proj.weight"] @ hidden
        return self.weights[name + "down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)

    def _norm(self, x: Array, weight: Array) -> Array:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.config["rms_norm_eps"]) * weight
