"""What an operation brings to the bench, and the words all parts share.

A *step* is one product of an operation ("forward", "dgrad", "wgrad"); a *race* is one step at one named shape; *sizes*
is a way of sharing the rows out among the experts; a *contender* is one way to compute the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

Operands = tuple[Any, ...]
Kind = Literal[
    "ours",  # a backend of pallas_kernels; held to the whole contract
    "peer",  # somebody else's kernel for the same work
    "bound",  # easier work of the same size, as an upper bound
]


Watch = Callable[[str, str], AbstractContextManager[None]]
"""(contender, step) -> a context for its first run, which leaves a trace if the process or the device dies in it."""


class DeviceLost(RuntimeError):
    """The device answers no more; nothing later in this process can be trusted."""


class BenchError(ValueError):
    """An error of use; the message is one line that names the value and the way out."""


@dataclass(frozen=True)
class Race:
    """One step at one named shape: contenders compile once and meet every kind of sizes.

    Attributes:
      shape: its name, for reports.
      step: which product.
      dims: the operation's own description of the shape.
      sizes: the kinds of group sizes, the first one being the one that others are compared with.
      decode: judged by bytes of weights touched a second rather than by FLOP/s.
    """

    shape: str
    step: str
    dims: Any
    sizes: tuple[str, ...]
    decode: bool = False


@dataclass(frozen=True)
class Contender:
    """One way to compute an operation.

    Attributes:
      steps: function of each step it can do, of that step's operands (tensors if `framework` is "torch").
      missing: why it cannot run on this machine, None if it can.
      refuses: (step, dims) -> why it cannot take this shape, None if it can.
      remark: what a reader of its figures should know.
      sizes: the only kinds of group sizes it takes; None for all.
      prepare: (step, operands) -> its own form of the operands, made once outside the timed region.
      compiler_options: XLA's, for this contender alone.
    """

    name: str
    kind: Kind
    steps: Mapping[str, Callable[..., Any]]
    framework: Literal["jax", "torch"] = "jax"
    missing: str | None = None
    remark: str = ""
    refuses: Callable[[str, Any], str | None] = lambda step, dims: None
    sizes: tuple[str, ...] | None = None
    prepare: Callable[[str, Operands], Operands] = lambda step, operands: operands
    compiler_options: Mapping[str, bool | str] = field(default_factory=dict)

    def excuse(self, race: Race) -> str | None:
        """Why it does not take part in this race at all; None if it does."""
        if self.missing is not None:
            return self.missing
        if race.step not in self.steps:
            return f"has no {race.step}"
        return self.refuses(race.step, race.dims)


class Work(NamedTuple):
    """Least work of one call, a mean over the calls: what any implementation has to do."""

    flops: float
    bytes: float
    weight_bytes: float  # of the experts that have rows


class ExactCase(NamedTuple):
    """A small case compared element by element.

    Attributes:
      expected: float64, from the same bfloat16 operands.
      zero: True where the contract promises exactly zero.
      ours_only: whether peers are left out, because it tests what only our contract promises (padding, sums above R)
        or one more of many shapes.
    """

    name: str
    step: str
    dims: Any
    operands: Operands
    expected: np.ndarray
    zero: np.ndarray
    ours_only: bool


class Tiles(Protocol):
    """What `--tune` can choose for an operation, and the table that holds the choices."""

    path: Path

    def candidates(self, race: Race) -> Sequence[Any]:
        """Tuples of integers to try."""
        ...

    def step(self, race: Race, tiles: Any) -> Callable[..., Any]:
        """The race's step with these tiles."""
        ...

    def key(self, race: Race) -> str:
        """Under which the table holds the race's tiles."""
        ...


@dataclass(frozen=True)
class Operation:
    """One operation's entry.

    Attributes:
      parts: the races of each part, most telling part first.
      shrink: a race small enough for a CPU.
      contenders: (on a GPU?) -> everybody, the missing ones included.
      operand_sets: (race, sizes, calls, copies) -> operands of that many calls on random data; expert weights are
        drawn `copies` times and take turns.
      output: (race) -> shape of a call's result.
      weight_bytes: (race) -> bytes of all expert weights among the operands, 0 if there are none.
      work: (race, operand sets) -> mean work of a call.
      wrong: (race, operands, result) -> why the result is wrong, None if it is right; cheap at any shape.
      exact_cases: (tiny?) -> small cases with float64 references.
      tiles: what can be tuned, None if nothing; calling it may raise BenchError.
    """

    name: str
    parts: Mapping[str, tuple[Race, ...]]
    shrink: Callable[[Race], Race]
    contenders: Callable[[bool], tuple[Contender, ...]]
    operand_sets: Callable[[Race, str, int, int], list[Operands]]
    output: Callable[[Race], tuple[int, ...]]
    weight_bytes: Callable[[Race], int]
    work: Callable[[Race, Sequence[Operands]], Work]
    wrong: Callable[[Race, Operands, Any], str | None]
    exact_cases: Callable[[bool], Sequence[ExactCase]]
    tiles: Callable[[], Tiles] | None = None


def first_line(error: BaseException, limit: int = 240) -> str:
    """An error as one short line, for lists of who did not run and why."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return text if len(text) <= limit else text[: limit - 1] + "…"
