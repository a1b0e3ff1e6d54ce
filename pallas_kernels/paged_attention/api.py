"""The public paged attention: picks a backend.

Shape letters: R rows (sequences), T tokens of each, B blocks of a sequence, X blocks of the cache, C tokens of a block,
S groups, Q query heads and G key/value heads of a group, K head size.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.backends import load_backend, pick_backend, require_backend

Implementation = Literal[
    "cpu",  # bfloat16 and float32, where there is a C++ compiler
    "xla",  # a loop over blocks with a running softmax; runs on every device
]

_PREFERRED: dict[str, tuple[Implementation, ...]] = {"cpu": ("cpu",)}


class PagedAttentionError(ValueError):
    """An implementation that does not exist or cannot take the operands; the message names the way out."""


def paged_attention(
    q_RTSQK: jax.Array,
    k_XSGCK: jax.Array,
    v_XSGCK: jax.Array,
    table_RB: jax.Array,
    positions_RT: jax.Array,
    *,
    first_block: jax.Array,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Attention of every token to its own sequence up to itself, over keys and values in blocks (arXiv 2309.06180).

    Logits are scaled by K ** -0.5; they and the sums are formed in at least float32. Not differentiable.

    Args:
      q_RTSQK: [R, T, S, Q, K] bfloat16, float32 or float64; Q is a multiple of G, and query heads are in the order of
        their key/value heads.
      k_XSGCK, v_XSGCK: [X, S, G, C, K], same dtype.
      table_RB: int32 [R, B], the blocks of each row in order; entries beyond its positions may hold anything.
      positions_RT: int32 [R, T], position of each token in its sequence; -1 for padding.
      first_block: int32 scalar, added to the table's entries.
      implementation: the backend; None picks one and logs it once.

    Returns:
      [R, T, S, Q, K], zeros for padding.

    Raises:
      PagedAttentionError: an unknown implementation, or one that cannot take these operands.
    """

    def refuse(backend: ModuleType) -> str | None:
        return backend.refusal(q_RTSQK.dtype) if hasattr(backend, "refusal") else None

    name = "paged_attention"
    if implementation is not None:
        backend = require_backend(name, implementation, get_args(Implementation), refuse, PagedAttentionError)
    else:
        operands = f"{q_RTSQK.dtype} queries {q_RTSQK.shape} over blocks {k_XSGCK.shape}"
        backend = pick_backend(name, _PREFERRED, refuse, operands)
    with jax.named_scope(name):
        return load_backend(name, backend).attention(
            q_RTSQK, k_XSGCK, v_XSGCK, table_RB, positions_RT, jnp.asarray(first_block, jnp.int32)
        )
