"""Who races in the expert MLP: the model's own calls on each of our backends, torch, and a copy of the chosen weights.

Shape letters: N tokens, k choices of a token, E experts, D width, F expert hidden size, R = N * k rows.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from experiments.kernel_bench.contenders import Steps, own_backend, torch_peer
from experiments.kernel_bench.operations import Contender
from foejax.models.rows import plan_rows
from pallas_kernels import combine, grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul.api import Implementation
from pallas_kernels.quantized import QuantizedWeights, Weights

_MOST_COPIED = 8e9  # bytes of chosen weights that the peer without a kernel may copy
_DTYPES = ("bfloat16", "int8", "float8_e4m3fn")


def contenders(on_gpu: bool) -> tuple[Contender, ...]:
    """Everybody; who cannot run here says why."""
    chosen = Contender(
        "as chosen",
        "ours",
        _steps(None),
        missing=None if on_gpu else "chooses xla here",
        remark="implementation=None, as the model calls it",
    )
    return (
        chosen,
        *(_ours("mosaic_gpu", on_gpu), _ours("triton", on_gpu), _ours("xla", on_gpu)),
        torch_peer("torch._grouped_mm", on_gpu, _torch_steps, needs="_grouped_mm", remark="sort and index_add"),
        _copied_weights(),
    )


def _steps(implementation: Implementation | None) -> Steps:
    return dict.fromkeys(_DTYPES, functools.partial(_expert_mlp, implementation=implementation))


def _ours(name: Implementation, on_gpu: bool) -> Contender:
    return own_backend("grouped_matmul", name, on_gpu, lambda module: _steps(name), remark="both expert matmuls")


def _expert_mlp(
    x_ND: jax.Array,
    indices_Nk: jax.Array,
    router_Nk: jax.Array,
    gate: Weights,
    up: Weights,
    down: Weights,
    *,
    implementation: Implementation | None,
) -> jax.Array:
    """The calls of `foejax.models.experts` with one group; who combines is left to the device."""
    num_experts = gate.shape[0]
    plan = plan_rows(indices_Nk[None], jnp.ones((1, *indices_Nk.shape), bool), num_experts)
    hidden_RF = grouped_swiglu(x_ND, gate, up, plan.group_sizes, rows=plan.gathered(), implementation=implementation)
    y_RD = grouped_matmul(hidden_RF, down, plan.group_sizes, implementation=implementation)
    return combine(y_RD, plan.row_SNk[0], router_Nk, plan.choice_R)


def _torch_steps(torch: Any) -> Steps:
    multiply, silu = torch._grouped_mm, torch.nn.functional.silu

    def step(x_ND: Any, indices_Nk: Any, router_Nk: Any, gate_EDF: Any, up_EDF: Any, down_EFD: Any) -> Any:
        k = indices_Nk.shape[1]
        experts = torch.arange(gate_EDF.shape[0], dtype=indices_Nk.dtype, device=indices_Nk.device)
        expert_R, choice_R = indices_Nk.flatten().sort()
        ends_E = torch.searchsorted(expert_R, experts, right=True, out_int32=True)
        token_R = choice_R // k
        x_RD = x_ND.index_select(0, token_R)
        hidden_RF = silu(multiply(x_RD, gate_EDF, offs=ends_E)) * multiply(x_RD, up_EDF, offs=ends_E)
        y_RD = multiply(hidden_RF, down_EFD, offs=ends_E)
        y_RD *= router_Nk.flatten().index_select(0, choice_R)[:, None].to(y_RD.dtype)
        return torch.zeros_like(x_ND).index_add_(0, token_R, y_RD)

    return {"bfloat16": step}


def _copied_weights() -> Contender:
    """No kernel at all: XLA gathers each choice's matrices and multiplies them in a batch."""

    def step(
        x_ND: jax.Array, indices_Nk: jax.Array, router_Nk: jax.Array, gate: Weights, up: Weights, down: Weights
    ) -> jax.Array:
        gate_NkF = _meet(x_ND[:, None, :], gate, indices_Nk)
        up_NkF = _meet(x_ND[:, None, :], up, indices_Nk)
        y_NkD = _meet((jax.nn.silu(gate_NkF) * up_NkF).astype(x_ND.dtype), down, indices_Nk)
        return jnp.einsum("nkd,nk->nd", y_NkD, router_Nk).astype(x_ND.dtype)

    def refuses(step: str, dims: Any) -> str | None:
        copied = 3 * dims.tokens * dims.top_k * dims.model_size * dims.expert_hidden * 2
        return f"would copy {copied / 1e9:.0f} GB of weights" if copied > _MOST_COPIED else None

    return Contender("xla, weights copied", "peer", dict.fromkeys(_DTYPES, step), refuses=refuses)


def _meet(x_NkK: jax.Array, weights: Weights, indices_Nk: jax.Array) -> jax.Array:
    """[N, k, N of the weights] in float32: each choice's row, or the one of all choices, times its expert's matrix."""
    if isinstance(weights, QuantizedWeights):
        w_NkFK = weights.values_ENK[indices_Nk].astype(x_NkK.dtype)
        y_NkF = _batched("nkc,nkfc->nkf", x_NkK, w_NkFK)
        return y_NkF * weights.scales_EN[indices_Nk]
    return _batched("nkc,nkcf->nkf", x_NkK, weights[indices_Nk])


def _batched(subscripts: str, x_NkK: jax.Array, w: jax.Array) -> jax.Array:
    x_NkK = jnp.broadcast_to(x_NkK, (*w.shape[:2], x_NkK.shape[2]))
    return jnp.einsum(subscripts, x_NkK, w, preferred_element_type=jnp.float32)
