"""Logits of an exported folder's model, on any mesh, against a NumPy program that reads the same folder."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from foe_oracle import Oracle

from foejax.interop import import_model
from sharding import Layout

TOLERANCE = 1e-5
"""Largest |difference| over largest |logit|; float32 against float64 gives about 1e-6."""


def check_logits(folder: Path, layout: Layout, oracle: Oracle) -> None:
    """Two packed documents through the model read onto `layout`, and one by one through the oracle."""
    model = import_model(folder, layout)
    rng = np.random.default_rng(6)
    lengths = (9, 7)
    tokens = rng.integers(0, model.config.vocab_size, sum(lengths)).astype(np.int32)
    batch = {
        "tokens": tokens[None],
        "positions": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None],
        "segment_ids": np.repeat(np.array([1, 2], np.int32), lengths)[None],
    }
    actual = np.asarray(jax.jit(model.logits)(batch))
    expected = np.concatenate([oracle.logits(document) for document in np.split(tokens, lengths[:1])])
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    print(f"relative error {error:.1e}, smallest router margin {oracle.smallest_margin:.1e}")
    assert np.std(expected) > 0.3, "the model says next to nothing"
    assert error < TOLERANCE, f"smallest router margin {oracle.smallest_margin:.1e}"
