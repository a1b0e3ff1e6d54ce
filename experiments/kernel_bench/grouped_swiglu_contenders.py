"""Who races in the grouped SwiGLU: our backends, and two grouped matmuls of each of ours and of the peers, unfused.

Shape letters: R rows sorted by expert, K width, F expert hidden size, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.kernel_bench.contenders import Steps, own_backend, torch_peer
from experiments.kernel_bench.operations import Contender, Operands
from pallas_kernels import grouped_matmul, grouped_swiglu

_BACKENDS = ("mosaic_gpu", "triton", "xla")


def contenders(on_gpu: bool) -> tuple[Contender, ...]:
    """Everybody; who cannot run here says why."""
    return (
        *(_ours(name, on_gpu) for name in _BACKENDS),
        *(_unfused_ours(name, on_gpu) for name in _BACKENDS),
        _torch(on_gpu),
        Contender("jax.lax.ragged_dot twice", "peer", _steps(_unfused(jax.lax.ragged_dot))),
    )


def _steps(swiglu: Callable[..., jax.Array]) -> Steps:
    def forward_and_backward(
        x_RK: jax.Array, gate_EKF: jax.Array, up_EKF: jax.Array, sizes_E: jax.Array, grad_RF: jax.Array
    ) -> tuple[jax.Array, ...]:
        hidden_RF, transpose = jax.vjp(lambda *operands: swiglu(*operands, sizes_E), x_RK, gate_EKF, up_EKF)
        return (hidden_RF, *transpose(grad_RF))

    return {"forward": swiglu, "forward+backward": forward_and_backward}


def _ours(name: str, on_gpu: bool) -> Contender:
    swiglu = functools.partial(grouped_swiglu, implementation=name)  # type: ignore[call-arg, arg-type, unused-ignore]
    return own_backend("grouped_swiglu", name, on_gpu, lambda module: _steps(swiglu))


def _unfused(product: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def swiglu(x_RK: jax.Array, gate_EKF: jax.Array, up_EKF: jax.Array, sizes_E: jax.Array) -> jax.Array:
        gate_RF, up_RF = product(x_RK, gate_EKF, sizes_E), product(x_RK, up_EKF, sizes_E)
        hidden_RF = jax.nn.silu(gate_RF.astype(jnp.float32)) * up_RF.astype(jnp.float32)
        return hidden_RF.astype(x_RK.dtype)

    return swiglu


def _unfused_ours(name: str, on_gpu: bool) -> Contender:
    product = functools.partial(grouped_matmul, implementation=name)  # type: ignore[call-arg, arg-type, unused-ignore]
    own = own_backend("grouped_matmul", name, on_gpu, lambda module: _steps(_unfused(product)))
    return Contender(f"{name}, unfused", "peer", own.steps, missing=own.missing, remark="two of our grouped matmuls")


def _torch(on_gpu: bool) -> Contender:
    def prepare(torch: Any, step: str, operands: Operands) -> Operands:
        return (*operands[:3], operands[3].cumsum(0, dtype=torch.int32), *operands[4:])

    return torch_peer(
        "torch._grouped_mm twice",
        on_gpu,
        _torch_steps,
        needs="_grouped_mm",
        prepare=prepare,
        remark="eager activation; group ends are summed up outside the timed region",
    )


def _torch_steps(torch: Any) -> Steps:
    multiply, silu = torch._grouped_mm, torch.nn.functional.silu

    def forward(x_RK: Any, gate_EKF: Any, up_EKF: Any, ends_E: Any) -> Any:
        return silu(multiply(x_RK, gate_EKF, offs=ends_E)) * multiply(x_RK, up_EKF, offs=ends_E)

    def forward_and_backward(x_RK: Any, gate_EKF: Any, up_EKF: Any, ends_E: Any, grad_RF: Any) -> tuple[Any, ...]:
        gate_RF, up_RF = multiply(x_RK, gate_EKF, offs=ends_E), multiply(x_RK, up_EKF, offs=ends_E)
        activated_RF = silu(gate_RF)
        d_gate_RF = torch.ops.aten.silu_backward(grad_RF * up_RF, gate_RF)
        d_up_RF = grad_RF * activated_RF
        dx_RK = multiply(d_gate_RF, gate_EKF.transpose(-2, -1), offs=ends_E)
        dx_RK += multiply(d_up_RF, up_EKF.transpose(-2, -1), offs=ends_E)
        d_weights = (multiply(x_RK.t(), d_RF, offs=ends_E) for d_RF in (d_gate_RF, d_up_RF))
        return (activated_RF * up_RF, dx_RK, *d_weights)

    return {"forward": forward, "forward+backward": forward_and_backward}
