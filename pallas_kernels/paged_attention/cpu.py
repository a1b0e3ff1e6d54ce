"""Paged attention for the CPU: a C++ kernel (`cpu_kernel.cc`), compiled for the machine and called by XLA.

XLA converts and transposes every block that it gathers before it multiplies; the kernel reads blocks where they are.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.backends import device_kind
from pallas_kernels.host_compiler import register
from pallas_kernels.varying import cast_to_varying, varying_axes

_SOURCE, _NAME = Path(__file__).with_name("cpu_kernel.cc"), "foejax_paged_attention"


@jax.jit  # because an eager `shard_map` would keep the result of one device only
def attention(
    q_RTSQK: jax.Array,
    k_XSGCK: jax.Array,
    v_XSGCK: jax.Array,
    table_RB: jax.Array,
    positions_RT: jax.Array,
    first_block: jax.Array,
) -> jax.Array:
    """[R, T, S, Q, K]; contract as in `api.paged_attention`."""
    operands = (q_RTSQK, k_XSGCK, v_XSGCK, table_RB, positions_RT, first_block)
    call = jax.ffi.ffi_call(_NAME, jax.ShapeDtypeStruct(q_RTSQK.shape, q_RTSQK.dtype))
    # JAX types the result as equal on all devices, but it varies as the operands do.
    return cast_to_varying(call(*operands), varying_axes(*operands))


def refusal(dtype: DTypeLike) -> str | None:
    """Why these operands or this machine are not for the kernel, or None."""
    if device_kind() != "cpu":
        return f"cpu runs on CPUs, the default device is {device_kind()}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"cpu takes bfloat16 and float32, the queries are {jnp.dtype(dtype)}"
    reason = register(_SOURCE, _NAME)
    return None if reason is None else f"cpu has no kernel here ({reason})"
