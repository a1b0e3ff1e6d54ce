"""How many rows each expert gets, in the kinds of sizes that races run with. All sums are fixed.

Shape letters: E experts.
"""

from __future__ import annotations

import numpy as np

ZIPF_EXPONENT = 1.0
"""Rows of the expert of rank r are proportional to 1 / r^ZIPF_EXPONENT."""


def uniform(rows: int, experts: int) -> np.ndarray:
    """Equal sizes [E]; the first `rows % experts` experts get one row more."""
    sizes_E = np.full(experts, rows // experts, np.int32)
    sizes_E[: rows % experts] += 1
    return sizes_E


def zipf(rows: int, experts: int, rng: np.random.Generator) -> np.ndarray:
    """Zipf-skewed sizes [E] that sum to `rows`, the ranks in random order; remainders go to the largest fractions."""
    ideal_E = rows * _popularity(experts)
    sizes_E = np.floor(ideal_E).astype(np.int32)
    by_fraction = np.argsort(sizes_E - ideal_E, kind="stable")
    sizes_E[by_fraction[: rows - int(sizes_E.sum())]] += 1
    return rng.permutation(sizes_E)


def half_empty(rows: int, experts: int, rng: np.random.Generator) -> np.ndarray:
    """Sizes [E] of which half, at random, are zero and the others equal."""
    busy = rng.permutation(experts)[: (experts + 1) // 2]
    sizes_E = np.zeros(experts, np.int32)
    sizes_E[np.sort(busy)] = uniform(rows, len(busy))
    return sizes_E


def chosen(tokens: int, top_k: int, experts: int, rng: np.random.Generator, *, skewed: bool) -> np.ndarray:
    """The `top_k` different experts [tokens, top_k] of each token, equally likely or with Zipf popularity."""
    popularity_E = rng.permutation(_popularity(experts)) if skewed else np.full(experts, 1 / experts)
    # Adding Gumbel noise and taking the largest draws without replacement in proportion to the popularity.
    scores = np.log(popularity_E) + rng.gumbel(size=(tokens, experts))
    return np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k].astype(np.int32)


def routed(tokens: int, top_k: int, experts: int, rng: np.random.Generator, *, skewed: bool) -> np.ndarray:
    """Sizes [E] after each token chose its experts."""
    indices = chosen(tokens, top_k, experts, rng, skewed=skewed)
    return np.bincount(indices.ravel(), minlength=experts).astype(np.int32)


def _popularity(experts: int) -> np.ndarray:
    weights_E = 1.0 / np.arange(1, experts + 1) ** ZIPF_EXPONENT
    return weights_E / weights_E.sum()
