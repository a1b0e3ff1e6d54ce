"""Rows of an expert layer that are copies of tokens: which token each row is, and which rows each token has.

Shape letters: N tokens, R rows, D width, A rows at most of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class GatheredRows(NamedTuple):
    """Both directions of a gather, so that its gradient is a gather too. An index out of range means: none.

    Attributes:
      token_R: int32, token of each row.
      row_AN: int32, the rows of each token; every row in range stands once, at its token.
    """

    token_R: jax.Array
    row_AN: jax.Array


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index] along the first axis for an index array of any shape; zeros where it is at or past the end."""
    if x.shape[0] == 0:
        return jnp.zeros_like(x, shape=(*index.shape, *x.shape[1:]))
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)
