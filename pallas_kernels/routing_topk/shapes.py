"""Named shapes of routing, shared by benchmarks and tests: as many experts as OLMoE has to four times DeepSeek-V3's."""

from __future__ import annotations

from typing import NamedTuple


class RoutingShape(NamedTuple):
    """The scores of E experts for each of `tokens`, of which `top_k` are chosen."""

    tokens: int
    experts: int
    top_k: int


SHAPES: dict[str, RoutingShape] = {
    f"tokens_{tokens}/experts_{experts}": RoutingShape(tokens, experts, 8)
    for tokens in (4096, 65536)
    for experts in (64, 128, 256, 1024)
}
