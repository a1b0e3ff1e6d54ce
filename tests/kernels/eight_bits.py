"""Weights in 8 bits for tests of kernels, made in plain NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np

_LARGEST = {"int8": 127, "float8_e4m3fn": 448}
EIGHT_BITS = tuple(_LARGEST)


def in_eight_bits(w_EKN: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Values [E, N, K] and scales float32 [E, N] near the weights, as `pallas_kernels.quantized` defines them."""
    w_ENK = w_EKN.astype(np.float64).swapaxes(1, 2)
    scales_EN = (np.abs(w_ENK).max(axis=2) / _LARGEST[dtype]).astype(np.float32)
    scaled_ENK = w_ENK / scales_EN[..., None]
    kind = np.int8 if dtype == "int8" else ml_dtypes.float8_e4m3fn
    return np.ascontiguousarray(np.rint(scaled_ENK) if dtype == "int8" else scaled_ENK).astype(kind), scales_EN


def out_of_eight_bits(values_ENK: np.ndarray, scales_EN: np.ndarray) -> np.ndarray:
    """The weights [E, K, N] that values and scales stand for, in float64; NaN scales, of unused experts, as zero."""
    return (values_ENK.astype(np.float64) * np.nan_to_num(scales_EN)[..., None]).swapaxes(1, 2)


def every_number(dtype: str) -> np.ndarray:
    """All finite numbers of the format, but for int8's -128, which is not used."""
    if dtype == "int8":
        return np.arange(-127, 128).astype(np.int8)
    numbers = np.arange(256).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    return numbers[np.isfinite(numbers.astype(np.float32))]
