"""How every C++ kernel for the CPU is refused or called: through XLA's FFI, its result typed as its operands vary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.backends import device_kind
from pallas_kernels.host_compiler import register
from pallas_kernels.varying import cast_to_varying, varying_axes


@dataclass(frozen=True)
class HostKernel:
    """A kernel for bfloat16 and float32.

    Attributes:
      source: its C++ file.
      name: of the handler that the file defines, and of the custom call.
    """

    source: Path
    name: str

    def refusal(self, dtype: DTypeLike) -> str | None:
        """Why operands of this dtype or this machine are not for the kernel, as a clause; None if they are."""
        if device_kind() != "cpu":
            return f"cpu runs on CPUs, the default device is {device_kind()}"
        if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
            return f"cpu takes bfloat16 and float32, not {jnp.dtype(dtype)}"
        reason = register(self.source, self.name)
        return None if reason is None else f"cpu has no kernel here ({reason})"

    def call(self, result: jax.ShapeDtypeStruct, *operands: jax.Array) -> jax.Array:
        """What the kernel writes. Under `jax.jit`: an eager `shard_map` would keep the result of one device only."""
        written = jax.ffi.ffi_call(self.name, result, vmap_method="sequential")(*operands)
        # JAX types the result as equal on all devices, but it varies as the operands do.
        return cast_to_varying(written, varying_axes(*operands))
