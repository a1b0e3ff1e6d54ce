"""A Multi-Head LatentMoE forward pass in NumPy, float64 and plain loops, written from the equations.

Source: arXiv 2602.04870 with its authors' code. A token is projected and cut into sub-tokens; every head is an MoE of
its own, with its own router, experts and selection bias; the heads' outputs are put together and projected back:

    u = x W_in;  s_j = u_j R_j;  I_j = the k best of s_j + b_j;  p_j = softmax of s_j over I_j
    y_j = sum over e in I_j of p_je GELU(u_j K_je^T) V_je;  out = concat_j(y_j) W_out

It reads the tensors of an exported folder, so it checks their names and shapes too. Attention, norms and rotary
embedding are those of one FoE group.
"""

from __future__ import annotations

import foe_oracle
import numpy as np
from foe_oracle import Array


class Oracle(foe_oracle.Oracle):
    """The model of an exported folder of Multi-Head LatentMoE (one safetensors file)."""

    def logits(self, tokens: Array) -> Array:
        """Logits [T, V] of one document."""
        x = self.config["embedding_scale"] * self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(self.config["num_hidden_layers"]):
            x = x + self._attention(layer, 0, x)
            x = x + self._heads(layer, x)
        return self._norm(x, self.weights["model.norm.weight"]) @ self.weights["lm_head.weight"].T

    def _heads(self, layer: int, x: Array) -> Array:
        config, name = self.config, f"model.layers.{layer}."
        heads, size, experts = config["num_ffn_heads"], config["ffn_head_dim"], config["num_experts"]
        each, k = experts // heads, config["num_experts_per_tok"] // heads
        into, out = (self.weights[f"{name}mlp.{side}_proj.weight"] for side in ("in", "out"))
        routers = self.weights[name + "mlp.gate.weight"]
        biases = self.weights.get(name + "mlp.gate.e_score_correction_bias", np.zeros(experts))
        branch = np.zeros_like(x)
        for i, normed in enumerate(self._norm(x, self.weights[name + "post_attention_layernorm.weight"])):
            u = into @ normed
            y = np.zeros(heads * size)
            for head in range(heads):
                part, first = slice(head * size, (head + 1) * size), head * each
                scores = self._scores(routers[first : first + each] @ u[part])
                for e, weight in self._choose(range(each), k, scores, biases[first : first + each]):
                    y[part] += weight * self._expert(f"{name}mlp.experts.{first + e}.", u[part])
            branch[i] = out @ y
        return branch
