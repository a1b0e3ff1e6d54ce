"""What an operation brings to the bench, and the words all parts share.

A *step* is one computation of an operation ("forward", "dgrad", "wgrad"); a *race* is one step at one named shape;
*sizes* is a way of sharing the rows out among the experts, or of drawing the operands where there are no experts; a
*contender* is one way to compute the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Operands = tuple[Any, ...]
"""Of one call: arrays, or pytrees of arrays."""

Results = tuple[jax.Array, ...]
"""Of one call, also where it is one array only."""

Kind = Literal[
    "ours",  # a backend of pallas_kernels; held to the whole contract
    "peer",  # somebody else's kernel for the same work
    "bound",  # easier work of the same size, as an upper bound
]
Judge = Literal[
    "flops",  # products of matrices
    "weight_bytes",  # decoding: bytes of the weights of experts that have rows
    "bytes",  # what moves data and hardly computes
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
      step: which computation.
      dims: the operation's own description of the shape.
      sizes: the kinds of group sizes, the first one being the one that others are compared with.
      judged_by: the amount of work whose rate a second counts.
    """

    shape: str
    step: str
    dims: Any
    sizes: tuple[str, ...]
    judged_by: Judge = "flops"


@dataclass(frozen=True)
class Contender:
    """One way to compute an operation.

    Attributes:
      steps: function of each step it can do, of that step's operands (tensors if `framework` is "torch"), to an array
        or a tuple of arrays.
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
      expected: of each result: float64 from the same operands, or integers.
      zero: of each result: True where the contract promises exactly zero.
      ours_only: whether peers are left out, because it tests what only our contract promises (padding, sums above R)
        or one more of many shapes.
      slack: how many times the error of one rounded sum is allowed: more than one where sums are made of rounded sums,
        0 where results are selected from the operands.
    """

    name: str
    step: str
    dims: Any
    operands: Operands
    expected: tuple[np.ndarray, ...]
    zero: tuple[np.ndarray, ...]
    ours_only: bool
    slack: float = 1.0


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
      output: (step, dims) -> shapes and dtypes of a call's results.
      weight_bytes: (race) -> bytes of all expert weights among the operands, 0 if there are none.
      work: (race, operand sets) -> mean work of a call.
      wrong: (race, operands, results) -> why results of the right shapes are wrong, None if they are right; cheap at
        any shape.
      exact_cases: (tiny?) -> small cases with float64 references.
      tiles: what can be tuned, None if nothing; calling it may raise BenchError.
    """

    name: str
    parts: Mapping[str, tuple[Race, ...]]
    shrink: Callable[[Race], Race]
    contenders: Callable[[bool], tuple[Contender, ...]]
    operand_sets: Callable[[Race, str, int, int], list[Operands]]
    output: Callable[[str, Any], tuple[jax.ShapeDtypeStruct, ...]]
    weight_bytes: Callable[[Race], int]
    work: Callable[[Race, Sequence[Operands]], Work]
    wrong: Callable[[Race, Operands, Results], str | None]
    exact_cases: Callable[[bool], Sequence[ExactCase]]
    tiles: Callable[[], Tiles] | None = None

    def fault(self, race: Race, operands: Operands, results: Results) -> str | None:
        """Why the results of a call are wrong, their shapes and dtypes included; None if they are right."""
        found, wanted = _describe(results), _describe(self.output(race.step, race.dims))
        return self.wrong(race, operands, results) if found == wanted else f"result is {found}, not {wanted}"


def poison(result: jax.ShapeDtypeStruct) -> jax.Array:
    """An array that no result may be equal to in any element: NaN, or -1 for integers."""
    return jnp.full(result.shape, jnp.nan if jnp.issubdtype(result.dtype, jnp.floating) else -1, result.dtype)


def _describe(results: Sequence[jax.Array | jax.ShapeDtypeStruct]) -> str:
    return ", ".join(f"{result.dtype}{list(result.shape)}" for result in results)


def first_line(error: BaseException, limit: int = 240) -> str:
    """An error as one short line, for lists of who did not run and why."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return text if len(text) <= limit else text[: limit - 1] + "…"
