"""Expert weights in 8 bits, for inference: half the bytes of bfloat16, which is what bounds decoding.

Shape letters: E experts, K contracted features, N output features.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

QuantizedDtype = Literal["int8", "float8_e4m3fn"]

_LARGEST: dict[str, float] = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""int8 leaves -128 out, so that the grid is symmetric; e4m3 ends at 448 (arXiv 2209.05433, table 1)."""


class QuantizedWeights(NamedTuple):
    """w[e, k, n] = scales[e, n] * values[e, n, k]: one scale for each output feature of each expert.

    The contracted axis is stored last, as the kernels read it.

    Attributes:
      values_ENK: int8 in [-127, 127] or float8_e4m3fn.
      scales_EN: float32.
    """

    values_ENK: jax.Array
    scales_EN: jax.Array

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, K, N), the shape of the weights that these stand for."""
        experts, features, contracted = self.values_ENK.shape
        return experts, contracted, features


Weights = jax.Array | QuantizedWeights


def quantize(w_EKN: jax.Array, dtype: QuantizedDtype) -> QuantizedWeights:
    """The nearest weights of 8 bits, scaled so that the largest of each output feature is the format's largest number.

    The error of a weight is at most 1/254 of the largest of its output feature in int8; in e4m3 1/16 of the weight
    itself, or 2^-10 times the scale where that is more. Features of zeros stay exactly zero.

    Args:
      w_EKN: [E, K, N] bfloat16, float32 or float64, finite.
      dtype: "int8" or "float8_e4m3fn".

    Raises:
      ValueError: another dtype or another number of axes.
    """
    if dtype not in _LARGEST:
        raise ValueError(f"dtype={dtype!r}: choose one of {tuple(_LARGEST)}")
    if w_EKN.ndim != 3:
        raise ValueError(f"w_EKN has shape {w_EKN.shape}: give it the axes [E, K, N]")
    w_ENK = w_EKN.swapaxes(1, 2).astype(np.promote_types(w_EKN.dtype, np.float32))
    largest = jnp.asarray(_LARGEST[dtype], w_ENK.dtype)
    peak_EN = jnp.abs(w_ENK).max(axis=2, initial=0)
    scales_EN = jnp.where(peak_EN > 0, peak_EN / largest, 1).astype(jnp.float32)
    scaled_ENK = jnp.clip(w_ENK / scales_EN.astype(w_ENK.dtype)[..., None], -largest, largest)
    if dtype == "int8":
        scaled_ENK = jnp.round(scaled_ENK)
    return QuantizedWeights(scaled_ENK.astype(dtype), scales_EN)


def dequantize(weights: QuantizedWeights, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """The weights [E, K, N] that `weights` stand for, multiplied in at least float32 and rounded once to `dtype`."""
    wide = np.promote_types(dtype, np.float32)
    w_ENK = weights.values_ENK.astype(wide) * weights.scales_EN.astype(wide)[..., None]
    return w_ENK.swapaxes(1, 2).astype(dtype)
