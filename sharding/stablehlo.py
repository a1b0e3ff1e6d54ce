"""Reads the collectives of a lowered (not yet compiled) program and finds the dtype in which each was written.

XLA may run a collective in another dtype than the program asked for: its CPU backend promotes bf16 to f32, reductions
and data movement alike. What the program asked for stands in the StableHLO text.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable

from sharding.hlo import dtype_bits

_OP = re.compile(
    r'"?(?:stablehlo\.(all_reduce|all_gather|reduce_scatter|all_to_all|collective_permute|collective_broadcast)"?\('
    r"|stablehlo\.custom_call\"?\s*@(ragged_all_to_all)\()"
)
_SIGNATURE = re.compile(r":\s*\(([^()]*)\)\s*->")
_TENSOR = re.compile(r"tensor<((?:\d+x)*)([A-Za-z]\w*)")
_LOCATION = re.compile(r'loc\((#loc\d*|"(?:[^"\\]|\\.)*")[^)]*\)+\s*$')
_ALIAS = re.compile(r"^(#loc\d*) = loc\((.*)\)\s*$")
_INTEGER = re.compile(r"^(u?)i(\d+)$")


@dataclasses.dataclass(frozen=True)
class Written:
    """One operand of one collective as the program wrote it; `op_name` is the inner part of its path of scopes."""

    op: str
    elements: int
    dtype: str
    op_name: str


def parse_collectives(text: str) -> list[Written]:
    """Every operand of every collective in StableHLO text (`lowered.as_text(debug_info=True)`), in text order.

    Without debug info the names are empty, and dtypes are matched by size and order alone.
    """
    lines = text.splitlines()
    names = _location_names(lines)
    found: list[Written] = []
    for index, line in enumerate(lines):
        op = _OP.search(line)
        if not op:
            continue
        last = _last_line(lines, index)
        signature = _SIGNATURE.search(last)
        location = _LOCATION.search(last)
        name = location.group(1) if location else ""
        op_name = names.get(name, "") if name.startswith("#") else name.strip('"')
        operands = _TENSOR.findall(signature.group(1)) if signature else []
        if op.group(2):  # only the first operand of a ragged all-to-all travels; the others are offsets and sizes
            operands = operands[:1]
        for dims, element in operands:
            elements = math.prod(int(dim) for dim in dims.split("x") if dim)
            kind = (op.group(1) or op.group(2)).replace("_", "-")
            found.append(Written(kind, elements, _hlo_dtype(element), op_name))
    return found


class DtypeMatcher:
    """Finds, for each compiled collective, the dtype as written.

    A compiled operand and a written one belong together when their op and element count agree and the written dtype
    can have become the compiled one. Where several dtypes remain, the longest common end of their scope paths decides,
    then the order of the program (each written operand is used once before any is used again).
    """

    def __init__(self, written: Iterable[Written]) -> None:
        self._by_size: dict[tuple[str, int], list[Written]] = defaultdict(list)
        for entry in written:
            self._by_size[entry.op, entry.elements].append(entry)
        self._uses: dict[int, int] = defaultdict(int)

    def dtype(
        self, op: str, elements: int, compiled_dtype: str, op_name: str, *, promoted: bool | None = None
    ) -> str | None:
        """The dtype as written, or None when the program wrote no such collective (the compiler put it in).

        Args:
          promoted: whether XLA says that it widened this collective; None when it says nothing.
        """
        for kind, fits in itertools.product(_written_forms(op), (_is_widened, _has_same_width)):
            candidates = [
                entry for entry in self._by_size.get((kind, elements), ()) if fits(entry.dtype, compiled_dtype)
            ]
            if promoted is not None:
                told = [entry for entry in candidates if (entry.dtype != compiled_dtype) == promoted]
                candidates = told or candidates
            if candidates:
                closest = max(_closeness(entry.op_name, op_name) for entry in candidates)
                candidates = [entry for entry in candidates if _closeness(entry.op_name, op_name) == closest]
                chosen = min(candidates, key=lambda entry: self._uses[id(entry)])
                self._uses[id(chosen)] += 1
                return chosen.dtype
        return None


def _written_forms(op: str) -> tuple[str, ...]:
    """Ops that XLA may have rewritten into `op`, the op itself first."""
    rewritten = {
        "reduce-scatter": ("all-reduce",),  # all-reduce followed by a slice
        "all-reduce": ("reduce-scatter",),  # where a backend has no reduce-scatter
    }
    return (op, *rewritten.get(op, ()))


def _is_widened(written: str, compiled: str) -> bool:
    """Whether `compiled` is `written` or a wider dtype of the same class."""
    floats = ("bf", "f")
    same_class = written.startswith(floats) == compiled.startswith(floats)
    return written == compiled or (same_class and dtype_bits(written) < dtype_bits(compiled))


def _has_same_width(written: str, compiled: str) -> bool:
    """Whether `compiled` may be the bits of `written` under another name, as some backends move them."""
    return dtype_bits(written) == dtype_bits(compiled)


def _closeness(written: str, compiled: str) -> tuple[int, bool]:
    """Length of the common end of two scope paths, and whether it is all of the written one."""
    ours, theirs = written.split("/")[::-1], compiled.split("/")[::-1]
    common = 0
    for a, b in zip(ours, theirs, strict=False):
        if a != b:
            break
        common += 1
    return common, common == len(ours)


def _last_line(lines: list[str], index: int) -> str:
    """The line with the type and location of the op that starts at `index`; behind its reducer if it has one."""
    line = lines[index]
    if not line.rstrip().endswith("({"):
        return line
    indent = line[: len(line) - len(line.lstrip())]
    for later in lines[index + 1 :]:
        if later.startswith(indent + "})"):
            return later
    return line


def _location_names(lines: Iterable[str]) -> dict[str, str]:
    """Name of each `#locN` alias; an unnamed call site stands for its callee."""
    definitions = {}
    for line in lines:
        alias = _ALIAS.match(line)
        if alias:
            definitions[alias.group(1)] = alias.group(2)

    def name_of(alias: str) -> str:
        for _ in range(len(definitions)):
            body = definitions.get(alias, "")
            named = re.match(r'"((?:[^"\\]|\\.)*)"(?!:\d)', body)
            if named:
                return named.group(1)
            nested = re.search(r"#loc\d*", body)
            if not nested:
                return ""
            alias = nested.group(0)
        return ""

    return {alias: name_of(alias) for alias in definitions}


def _hlo_dtype(element: str) -> str:
    """HLO's name of an MLIR element type: `i32` is `s32`, `ui8` is `u8`, `i1` is `pred`, `f8E4M3FN` is `f8e4m3fn`."""
    if element == "i1":
        return "pred"
    integer = _INTEGER.match(element)
    if integer:
        return ("u" if integer.group(1) else "s") + integer.group(2)
    return element.lower()
