"""Named shapes of routing by several routers, shared by benchmarks and tests: 1024 features cut into heads.

The sizes of a head are those that the code of Multi-Head LatentMoE has tiles for (arXiv 2602.04870).
"""

from __future__ import annotations

from typing import NamedTuple


class ProjectedShape(NamedTuple):
    """In each of `stacks`, `tokens` of so many features choose `top_k` of its own experts."""

    stacks: int
    tokens: int
    features: int
    experts: int
    top_k: int


SHAPES: dict[str, ProjectedShape] = {
    f"experts_{experts}/features_{features}": ProjectedShape(1024 // features, 16384, features, experts, 4)
    for experts in (256, 64)
    for features in (64, 128, 256)
}
