"""Paged attention for the CPU: a C++ kernel (`cpu_kernel.cc`), compiled for the machine and called by XLA.

XLA converts and transposes every block that it gathers before it multiplies; the kernel reads blocks where they are.
"""

from __future__ import annotations

from pathlib import Path

import jax

from pallas_kernels.host_kernel import HostKernel

KERNEL = HostKernel(Path(__file__).with_name("cpu_kernel.cc"), "foejax_paged_attention")
refusal = KERNEL.refusal


@jax.jit
def attention(
    q_RTSQK: jax.Array,
    k_XSGCK: jax.Array,
    v_XSGCK: jax.Array,
    table_RB: jax.Array,
    positions_RT: jax.Array,
    first_block: jax.Array,
) -> jax.Array:
    """[R, T, S, Q, K]; contract as in `api.paged_attention`."""
    result = jax.ShapeDtypeStruct(q_RTSQK.shape, q_RTSQK.dtype)
    return KERNEL.call(result, q_RTSQK, k_XSGCK, v_XSGCK, table_RB, positions_RT, first_block)
