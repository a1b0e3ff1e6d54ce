"""The auditor: every collective of a compiled program, which mesh axes it spans, how often it runs, what it sends.

Bytes are per device and per execution of the collective, in the dtype that the program was written in; `payload_bytes`
is the operand, `wire_bytes` what a device sends in a ring (`sharding.formulas.ring_egress`). Multiply by `count` (or
take the `total_*` properties) for one run of the program. Host transfers and transfers inside custom kernels are not
seen. See `docs/communication.md`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sharding import hlo
from sharding.formulas import ring_egress
from sharding.stablehlo import DtypeMatcher, parse_collectives

UNKNOWN_AXES = ("?",)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program."""

    op: str
    """`all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all`, `collective-permute`, ..."""
    axes: tuple[str, ...]
    """mesh axes it spans, in mesh order; ("?",) when its groups follow no set of axes"""
    group_size: int
    """devices that exchange data with each other; 2 for a permute, its source and target"""
    count: int
    """executions in one run of the program, known loop lengths multiplied out"""
    payload_bytes: int
    """operand bytes on one device, one execution, dtype as written"""
    wire_bytes: int
    """bytes a device sends in a ring, one execution, dtype as written"""
    dtype: str
    """as written in the program; parts of a combined collective are joined by `+`"""
    compiled_dtype: str
    """as XLA runs it"""
    shapes: tuple[tuple[int, ...], ...]
    """shape of each operand on one device"""
    op_name: str
    """path of named scopes and primitive, e.g. `jit(f)/while/body/merge/psum_invariant`"""
    written: bool = True
    """False when the compiler put it in: the program as written has no such collective"""
    in_loop_of_unknown_length: bool = False
    """some surrounding loop has no length known to the compiler: `count` is for one iteration of that loop"""
    branches: tuple[str, ...] = ()
    """branches of conditionals around it, outermost first, as `conditional:branch`; `count` assumes they are taken"""

    @property
    def elements(self) -> int:
        """Operand elements on one device."""
        return sum(int(np.prod(shape)) for shape in self.shapes)

    @property
    def total_payload_bytes(self) -> int:
        """Payload of all `count` executions."""
        return self.count * self.payload_bytes

    @property
    def total_wire_bytes(self) -> int:
        """Wire bytes of all `count` executions."""
        return self.count * self.wire_bytes


@dataclasses.dataclass(frozen=True)
class _Path:
    """How the entry reaches a computation."""

    count: int = 1
    unknown: bool = False
    branches: tuple[str, ...] = ()


def audit(lowered: jax.stages.Lowered, mesh: Mesh, *, compiled: jax.stages.Compiled | None = None) -> list[Collective]:
    """List the collectives of a program, in the order in which it reaches them.

    Args:
      lowered: `jax.jit(f).lower(...)`; its text says in which dtypes the collectives were written.
      mesh: the mesh that the program runs on; gives the axes their names.
      compiled: the compiled program, if there is one already; otherwise `lowered` is compiled.

    Returns:
      One entry per collective instruction and way to reach it. Collectives of groups of one device are left out, and an
      asynchronous start and done are one.

    Raises:
      ValueError: the program runs on another number of devices than the mesh has.
      hlo.HloError: the compiled text cannot be read.
    """
    compiled = lowered.compile() if compiled is None else compiled
    return audit_text(compiled.as_text() or "", mesh, written_text=lowered.as_text(debug_info=True))


def audit_text(compiled_text: str, mesh: Mesh, *, written_text: str | None = None) -> list[Collective]:
    """`audit` from text: an HLO dump of any machine and, for the dtypes as written, the StableHLO before it.

    Without `written_text` the dtypes as written are taken to be the compiled ones.
    """
    module = hlo.parse_module(compiled_text)
    num_devices = module.num_partitions * module.num_replicas
    if num_devices not in (1, mesh.size):
        raise ValueError(
            f"the program runs on {num_devices} devices and the mesh {dict(mesh.shape)} has {mesh.size}: "
            "give the mesh that it was lowered for"
        )
    facts = _describe_all(module, mesh, written_text)
    return [
        dataclasses.replace(fact, count=path.count, in_loop_of_unknown_length=path.unknown, branches=path.branches)
        for key, path in _reached(module, module.entry, _Path())
        if (fact := facts.get(key)) is not None
    ]


def summarize(collectives: Iterable[Collective]) -> list[dict[str, Any]]:
    """Merge equal collectives into rows that serialise to JSON.

    A row has the keys op, axes, count, payload_bytes, wire_bytes (both of one execution), dtype and compiled_dtype.
    Only where it applies it also has `per_iteration: true` (count is for one iteration of a loop of unknown length) and
    `branch` (runs only when that branch of a conditional is taken). Rows are sorted by op, axes and falling payload.
    """
    counts: dict[tuple[Any, ...], int] = {}
    for c in collectives:
        key = (
            c.op,
            c.axes,
            -c.payload_bytes,
            c.wire_bytes,
            c.dtype,
            c.compiled_dtype,
            c.in_loop_of_unknown_length,
            c.branches,
        )
        counts[key] = counts.get(key, 0) + c.count
    rows = []
    for key, count in sorted(counts.items()):
        op, axes, payload, wire, dtype, compiled_dtype, unknown, branches = key
        row = {
            "op": op,
            "axes": list(axes),
            "count": count,
            "payload_bytes": -payload,
            "wire_bytes": wire,
            "dtype": dtype,
            "compiled_dtype": compiled_dtype,
        }
        row |= {"per_iteration": True} if unknown else {}
        row |= {"branch": " > ".join(branches)} if branches else {}
        rows.append(row)
    return rows


def is_token_sized(collective: Collective, num_tokens: int, width: int) -> bool:
    """Whether a collective moves at least one activation of `num_tokens` x `width`.

    The larger of operand and result counts, so that a reduce-scatter of the activation and the all-gather that is its
    transpose are both token-sized; of several operands combined into one reduction, the largest. Scalars, counts,
    router statistics and norm gradients are not token-sized. Gathered parameters and their gradients can be as large:
    tell them apart by op, axes and `op_name`.
    """
    sizes = [int(np.prod(shape)) for shape in collective.shapes]
    if collective.op == "all-to-all":
        return sum(sizes) >= num_tokens * width  # its tuple form holds one array cut into a part for each device
    grown = collective.group_size if collective.op == "all-gather" else 1
    return max(sizes, default=0) * grown >= num_tokens * width


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table of `summarize` rows, with a last line that adds up the wire bytes of one run per device."""
    header = ["op", "axes", "count", "payload", "wire", "wire x count", "dtype", "compiled", "note"]
    lines = [_cells(row) for row in rows]
    total = sum(row["count"] * row["wire_bytes"] for row in rows)
    lines.append(["total", "", f"{sum(row['count'] for row in rows):,}", "", "", format_bytes(total), "", "", ""])
    if not any(line[-1] for line in lines):
        header, lines = header[:-1], [line[:-1] for line in lines]
    widths = [max(len(line[column]) for line in (header, *lines)) for column in range(len(header))]
    numbers = range(2, 6)
    rule = ["-" * (width - 1) + (":" if column in numbers else "-") for column, width in enumerate(widths)]

    def text(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    return "\n".join([text(header), text(rule), *map(text, lines)])


def _cells(row: Mapping[str, Any]) -> list[str]:
    note = [str(row["branch"])] if "branch" in row else []
    note += ["count per iteration"] if row.get("per_iteration") else []
    return [
        row["op"],
        " ".join(row["axes"]),
        f"{row['count']:,}",
        format_bytes(row["payload_bytes"]),
        format_bytes(row["wire_bytes"]),
        format_bytes(row["count"] * row["wire_bytes"]),
        row["dtype"],
        row["compiled_dtype"],
        "; ".join(note),
    ]


def format_bytes(count: int) -> str:
    """`1536` as `1.5 KiB`."""
    if count < 1024:
        return f"{count} B"
    size = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def axes_of_groups(groups: hlo.Groups, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes that groups of device positions span, axes of size 1 left out; ("?",) if no set of axes fits."""
    sizes = list(mesh.shape.values())
    candidates = [axis for axis, size in enumerate(sizes) if size > 1]
    wanted = {frozenset(group) for group in groups}
    positions = np.arange(mesh.size).reshape(sizes)
    for length in range(1, len(candidates) + 1):
        for grouped in itertools.combinations(candidates, length):
            kept = [axis for axis in range(len(sizes)) if axis not in grouped]
            table = positions.transpose([*kept, *grouped]).reshape(-1, int(np.prod([sizes[axis] for axis in grouped])))
            if {frozenset(group) for group in table.tolist()} == wanted:
                return tuple(mesh.axis_names[axis] for axis in grouped)
    return UNKNOWN_AXES


def axes_of_pairs(pairs: hlo.Groups, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the source and the target of some pair differ."""
    sizes = tuple(mesh.shape.values())
    source, target = (np.array(np.unravel_index(ends, sizes)) for ends in zip(*pairs, strict=True))
    moved = (source != target).any(axis=1)
    return tuple(name for name, differs in zip(mesh.axis_names, moved, strict=True) if differs)


def _reached(module: hlo.Module, computation: str, path: _Path) -> Iterator[tuple[tuple[str, str], _Path]]:
    """Every instruction that a run of `computation` reaches, with the path to it, calls and loops followed."""
    for instruction in module.computations.get(computation, {}).values():
        if instruction.opcode in hlo.COLLECTIVE_OPCODES:
            yield (computation, instruction.name), path
            continue
        for callee, inner in _calls(instruction, path):
            yield from _reached(module, callee, inner)


def _calls(instruction: hlo.Instruction, path: _Path) -> Iterator[tuple[str, _Path]]:
    if instruction.opcode in ("async-update", "async-done"):
        return  # some printers repeat the computation that async-start names
    if instruction.opcode == "while":
        trips = instruction.trip_count
        unknown = path.unknown or trips is None
        for key, runs in (("condition", 1 if trips is None else trips + 1), ("body", 1 if trips is None else trips)):
            for callee in instruction.callees(key):
                if runs:
                    yield callee, dataclasses.replace(path, count=path.count * runs, unknown=unknown)
    elif instruction.opcode == "conditional":
        for label, callee in enumerate(_branches(instruction)):
            branch = f"{instruction.name}:{label}"
            yield callee, dataclasses.replace(path, branches=(*path.branches, branch))
    else:
        for callee in instruction.callees():
            yield callee, path


def _branches(instruction: hlo.Instruction) -> tuple[str, ...]:
    """Computations of a conditional by branch number; a predicate's false is branch 0, as in `jax.lax.cond`."""
    numbered = instruction.callees("branch_computations")
    return numbered or instruction.callees("false_computation") + instruction.callees("true_computation")


def _describe_all(module: hlo.Module, mesh: Mesh, written_text: str | None) -> dict[tuple[str, str], Collective | None]:
    """What each collective instruction is, by computation and name; None for groups of one device."""
    matcher = None if written_text is None else DtypeMatcher(parse_collectives(written_text))
    facts: dict[tuple[str, str], Collective | None] = {}
    for computation, instruction in module.instructions():
        if instruction.opcode in hlo.COLLECTIVE_OPCODES:
            facts[computation, instruction.name] = _describe(module, computation, instruction, mesh, matcher)
    return facts


def _describe(
    module: hlo.Module, computation: str, instruction: hlo.Instruction, mesh: Mesh, matcher: DtypeMatcher | None
) -> Collective | None:
    op = hlo.COLLECTIVE_OPCODES[instruction.opcode]
    groups = hlo.device_groups(instruction, module.num_partitions, module.num_replicas)
    group_size = max((len(group) for group in groups), default=1)
    if group_size < 2:
        return None
    axes = axes_of_pairs(groups, mesh) if op == "collective-permute" else axes_of_groups(groups, mesh)
    operands = _operand_shapes(module.computations[computation], instruction, op)
    dtypes = _written_dtypes(op, operands, instruction, matcher)
    payload = sum(
        hlo.num_bytes(dtype or shape.dtype, shape.elements) for dtype, shape in zip(dtypes, operands, strict=True)
    )
    return Collective(
        op=op,
        axes=axes,
        group_size=group_size,
        count=1,
        payload_bytes=payload,
        wire_bytes=round(ring_egress(op, payload, group_size)),
        dtype=_joined(dtype or shape.dtype for dtype, shape in zip(dtypes, operands, strict=True)),
        compiled_dtype=_joined(shape.dtype for shape in operands),
        shapes=tuple(shape.dims for shape in operands),
        op_name=instruction.op_name,
        written=matcher is None or None not in dtypes,
    )


def _operand_shapes(computation: hlo.Computation, instruction: hlo.Instruction, op: str) -> tuple[hlo.Shape, ...]:
    """Shapes of the operands that travel, looked up where they are defined (compiled text names operands only)."""
    names = instruction.operands
    if op == "ragged-all-to-all" or instruction.opcode == "send":
        names = names[:1]  # the rest are the output buffer, offsets and sizes; a send's token
    shapes = [shape for name in names if name in computation for shape in computation[name].shapes]
    return tuple(shapes)


def _written_dtypes(
    op: str, operands: Sequence[hlo.Shape], instruction: hlo.Instruction, matcher: DtypeMatcher | None
) -> list[str | None]:
    """Dtype as written of each operand; None where the program wrote no such collective."""
    if matcher is None:
        return [shape.dtype for shape in operands]
    name = instruction.op_name
    if op == "all-to-all" and operands:  # the tuple form sends one written array cut into a part for each device
        elements = sum(shape.elements for shape in operands)
        return [matcher.dtype(op, elements, operands[0].dtype, name)] * len(operands)
    reducer = re.search(r"to_apply=%?([\w.\-]+)", instruction.attributes)
    # XLA names the reducer of a widened reduction so; after combining several the name tells nothing.
    promoted = "_promoted" in reducer.group(1) if reducer and len(operands) == 1 else None
    return [matcher.dtype(op, shape.elements, shape.dtype, name, promoted=promoted) for shape in operands]


def _joined(dtypes: Iterable[str]) -> str:
    return "+".join(sorted(set(dtypes)))
