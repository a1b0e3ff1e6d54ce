"""What joins gate and up where no kernel does it in passing.

Shape letters: R rows, F expert hidden size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def activate(gate_RF: jax.Array, up_RF: jax.Array, weights_R: jax.Array | None) -> jax.Array:
    """weight * silu(gate) * up, computed in at least float32 and rounded once."""
    wide = jnp.float64 if gate_RF.dtype == jnp.float64 else jnp.float32
    hidden_RF = jax.nn.silu(gate_RF.astype(wide)) * up_RF.astype(wide)
    if weights_R is not None:
        hidden_RF = hidden_RF * weights_R.astype(wide)[:, None]
    return hidden_RF.astype(gate_RF.dtype)
