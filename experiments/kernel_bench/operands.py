"""Random operands of computations on rows sorted by expert.

Shape letters: R rows sorted by expert, K contracted features, N output features, E experts.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernel_bench import group_sizes
from experiments.kernel_bench.operations import Race
from pallas_kernels.grouped_matmul.shapes import DecodeShape, GroupedMatmulShape

ITEM = 2  # bytes of a bfloat16

EXACT_ROWS = 1000
EXACT_SIZES = {
    "uneven": [31, 2, 130, 7, 350, 480],
    "one has all": [0, 0, 1000, 0, 0, 0],
    "ones": [1, 1, 995, 1, 1, 1],
    "padded": [17, 240, 0, 133, 200, 1],
    "only padding": [0, 0, 0, 0, 0, 0],
    "more than the rows": [300, 0, 400, 500, 600, 0],
}
"""Sizes of six experts for small exact cases with EXACT_ROWS rows."""


def generators(race: Race, kind: str) -> tuple[np.random.Generator, Iterator[jax.Array]]:
    """Random numbers on the host and keys for the device, the same in every run of the race with these sizes."""
    seed = zlib.crc32(f"{race.shape} {race.step} {kind}".encode())

    def keys() -> Iterator[jax.Array]:
        key = jax.random.key(seed)
        while True:
            key, own = jax.random.split(key)
            yield own

    return np.random.default_rng(seed), keys()


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(key: jax.Array, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    """bfloat16 normals times `scale`."""
    if len(shape) == 3:  # one matrix at a time: all experts' random bits together can pass 2**31 elements
        return jax.lax.map(lambda key: normal(key, shape[1:], scale), jax.random.split(key, shape[0]))
    return (jax.random.normal(key, shape, jnp.float32) * scale).astype(jnp.bfloat16)


def draw_sizes(dims: GroupedMatmulShape | DecodeShape, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Sizes [E] of this kind."""
    if isinstance(dims, DecodeShape):
        return group_sizes.routed(dims.tokens, dims.top_k, dims.experts, rng, skewed=kind == "zipf")
    if kind == "uniform":
        return group_sizes.uniform(dims.rows, dims.experts)
    return {"zipf": group_sizes.zipf, "half_empty": group_sizes.half_empty}[kind](dims.rows, dims.experts, rng)


def slices(sizes_E: np.ndarray, rows: int) -> list[slice]:
    """Each expert's rows; sizes that sum to more than there are rows are cut."""
    ends_E = np.minimum(np.cumsum(sizes_E), rows)
    return [slice(start, stop) for start, stop in zip([0, *ends_E[:-1]], ends_E, strict=True)]
