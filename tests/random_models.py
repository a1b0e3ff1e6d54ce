"""Models whose every parameter is random, norms and biases included, so that one left out or swapped shows."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from foejax.config import ModelConfig
from foejax.models import LanguageModel
from sharding import Layout


def random_model(
    config: ModelConfig, seed: int, *, layout: Layout | None = None, selection_bias: bool = False
) -> LanguageModel:
    """Filled by NumPy, without compiling; matrices are large enough that every part shows in the logits.

    Args:
      selection_bias: whether the routers' selection biases are random; otherwise they are zero.
    """
    rng = np.random.default_rng(seed)
    abstract = LanguageModel.abstract(
        config, layout or Layout.single_device("foe" if config.num_groups > 1 else "fsdp")
    )
    graphdef, state = nnx.split(abstract.transformer)

    def fill(path: str, shape: tuple[int, ...]) -> np.ndarray:
        if "norm" in path:
            return rng.uniform(0.5, 1.5, shape)
        if path.startswith("selection_bias"):
            return rng.normal(0.0, 0.1, shape) if selection_bias else np.zeros(shape)
        return rng.normal(0.0, 1.0 if path.startswith("embedding") else 0.25, shape)

    leaves = []
    for path, variable in nnx.to_flat_state(state):
        place = variable.get_value()
        value = fill(path[-1], place.shape).astype(place.dtype)
        leaves.append((path, variable.replace(jax.device_put(value, place.sharding))))
    return LanguageModel(nnx.merge(graphdef, nnx.from_flat_state(leaves)), config, abstract.layout)
