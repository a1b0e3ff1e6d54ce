"""The speeds that the kernels are to reach on an H200, held against a run's own figures.

A figure is the best of ours; where a target names several races, it is the worst of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pallas_kernels.grouped_matmul.shapes import EXPERT_MLP_SHAPES

NOT_MEASURED = "not measured"

_ACCEPTANCE = ("acceptance_gpu/up", "acceptance_gpu/down")
_DECODE = tuple(name for name, dims in EXPERT_MLP_SHAPES.items() if dims.tokens in (32, 128))

Figure = Callable[[Mapping[str, Any]], float | None]
"""Of a judged race; None where it was not measured."""


@dataclass(frozen=True)
class Target:
    """One figure of some races and its limit.

    Attributes:
      races: (operation, step, shapes).
      limit: at least this much, or at most if `at_most`.
      unit: of the figure, which is divided by `scale` for it.
    """

    name: str
    races: tuple[str, str, tuple[str, ...]]
    figure: Figure
    limit: float
    unit: str
    scale: float = 1.0
    at_most: bool = False


def best_of_ours(race: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Our fastest cell with each kind of sizes."""
    best: dict[str, Mapping[str, Any]] = {}
    for cell in race["cells"]:
        if cell["kind"] == "ours" and (cell["sizes"] not in best or cell["time"] < best[cell["sizes"]]["time"]):
            best[cell["sizes"]] = cell
    return best


def _of_first_sizes(read: Figure) -> Figure:
    def figure(race: Mapping[str, Any]) -> float | None:
        cell = best_of_ours(race).get(race["sizes"][0])
        return None if cell is None else read(cell)

    return figure


_flops = _of_first_sizes(lambda cell: cell["flops"] / cell["time"])
_weight_bytes = _of_first_sizes(lambda cell: cell["weight_bytes"] / cell["time"])
_seconds = _of_first_sizes(lambda cell: cell["time"])
_over_peer = _of_first_sizes(lambda cell: cell["times_best_peer"])
_of_bound = _of_first_sizes(lambda cell: cell["share_of_bound"])


def _skewed(race: Mapping[str, Any]) -> float | None:
    best = best_of_ours(race)
    return best["uniform"]["time"] / best["zipf"]["time"] if {"uniform", "zipf"} <= best.keys() else None


def _of_step(step: str) -> tuple[Target, ...]:
    races = ("grouped_matmul", step, _ACCEPTANCE)
    if step == "wgrad":
        return (Target("wgrad at 64 experts, 65,536 rows", races, _flops, 550, "TFLOP/s", 1e12),)
    return (
        Target(f"{step} at 64 experts, 65,536 rows", races, _flops, 600, "TFLOP/s", 1e12),
        Target(f"{step} there, of the even-group bound", races, _of_bound, 85, "%", 0.01),
        Target(f"{step} there, over the best peer", races, _over_peer, 1.1, "x"),
    )


TARGETS: tuple[Target, ...] = (
    *(target for step in ("forward", "dgrad", "wgrad") for target in _of_step(step)),
    *(
        Target(f"{step} with Zipf-skewed sizes, of its speed with uniform ones", ("grouped_matmul", step, _ACCEPTANCE),
               _skewed, 90, "%", 0.01)
        for step in ("forward", "dgrad", "wgrad")
    ),
    *(
        Target(f"fused SwiGLU, {step}, over the unfused best", ("grouped_swiglu", step, ("acceptance_gpu/up",)),
               _over_peer, 1.15, "x")
        for step in ("forward", "forward+backward")
    ),
    *(
        Target(f"expert MLP of {model} at 32 and 128 tokens, bfloat16 weights touched", ("expert_mlp", "bfloat16",
               tuple(name for name in _DECODE if name.startswith(f"{model}/"))), _weight_bytes, 3.7, "TB/s", 1e12)
        for model in dict.fromkeys(name.partition("/")[0] for name in _DECODE)
    ),
    Target("expert MLP of OLMoE's shape at 1 token", ("expert_mlp", "bfloat16", ("olmoe_1b_7b/decode_1",)),
           _seconds, 60, "us", 1e-6, at_most=True),
)  # fmt: skip


def judge_targets(races: Sequence[Mapping[str, Any]], targets: Sequence[Target] = TARGETS) -> list[dict[str, str]]:
    """target, wanted, measured and met ("yes", "no" or "not measured") of each target.

    One race that misses the limit is a miss; a hit needs all races of the target.

    Args:
      races: judged; see `report.judged`.
    """
    known = {(race["operation"], race["step"], race["shape"]): race for race in races}
    judgements = []
    for target in targets:
        operation, step, shapes = target.races
        found = [known[operation, step, shape] for shape in shapes if (operation, step, shape) in known]
        figures = [figure / target.scale for race in found if (figure := target.figure(race)) is not None]
        judgements.append(
            {
                "target": target.name,
                "wanted": f"{'at most' if target.at_most else 'at least'} {_text(target.limit, target.unit)}",
                **_judge(target, figures, len(shapes)),
            }
        )
    return judgements


def _judge(target: Target, figures: Sequence[float], wanted: int) -> dict[str, str]:
    if not figures:
        return {"measured": NOT_MEASURED, "met": NOT_MEASURED}
    worst = max(figures) if target.at_most else min(figures)
    measured = _text(worst, target.unit)
    if worst > target.limit if target.at_most else worst < target.limit:
        return {"measured": measured, "met": "no"}
    if len(figures) < wanted:
        return {"measured": f"{measured} in {len(figures)} of {wanted} races", "met": NOT_MEASURED}
    return {"measured": measured, "met": "yes"}


def _text(value: float, unit: str) -> str:
    return f"{value:.4g}{'' if unit in ('%', 'x') else ' '}{unit}"
