"""Named shapes of the combine, shared by benchmarks and tests: the training steps of `grouped_matmul/shapes.py`."""

from __future__ import annotations

from typing import NamedTuple

from pallas_kernels.grouped_matmul.shapes import MODELS


class CombineShape(NamedTuple):
    """Each of `tokens` adds up `top_k` rows of `width`; every row has one token."""

    tokens: int
    top_k: int
    width: int

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k


SHAPES: dict[str, CombineShape] = {
    **{name: CombineShape(4096, model.top_k, model.model_size) for name, model in MODELS.items()},
    # FoE: Table 8 of the paper, one expert a token in each of 8 groups that one device holds.
    "foe_7b_stacked": CombineShape(6 * 2048, 8, 2048),
    "foe_1b_stacked": CombineShape(16 * 2048, 8, 768),
}
