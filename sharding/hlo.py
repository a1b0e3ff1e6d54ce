"""Reads the text of a compiled XLA program as far as collectives need it: instructions, calls, replica groups.

Both printed styles are read (names with and without `%`), and every way XLA has of writing a grouping of devices:
`{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)`, `mesh['a'=2,'b'=4] {'b'}` and `source_target_pairs={{0,1},{1,0}}`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

Groups = tuple[tuple[int, ...], ...]

_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
COLLECTIVE_OPCODES = {op + ending: op for op in _COLLECTIVES for ending in ("", "-start")} | {
    "send": "collective-permute"
}
"""The collective that each opcode is; of an asynchronous pair only the start."""

_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*(?:\(.*)?\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT\s+)?%?([\w.\-]+)\s*=\s*(.*)$")
_OPCODE = re.compile(r"\s*([a-z][a-z0-9\-]*)\(")
_COMMENT = re.compile(r"/\*index=\d+\*/")
_CALLEES = re.compile(r"\b(?:calls|to_apply|body|condition|called_computations|branch_computations|true_computation"
                      r"|false_computation)=(\{[^{}]*\}|%?[\w.\-]+)")  # fmt: skip
_TRIP_COUNT = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:,\s*device_ids=\((.*?)\)(?=\s*\{))?\s*\{([^}]*)\}")
_MESH_AXIS = re.compile(r"'([^']*)'(?:=(\d+))?(?::\((\d+)\)(\d+))?")


class HloError(ValueError):
    """The text is not what this reader knows as HLO."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array shape: HLO dtype name ("bf16") and dimensions; `token[]` and `opaque[]` have no bytes."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return num_bytes(self.dtype, self.elements)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO; `shapes` are the leaves of the result, `attributes` the text after the operands."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def op_name(self) -> str:
        """The path of named scopes and JAX primitive that the instruction came from; "" where XLA kept none."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def trip_count(self) -> int | None:
        """How often a `while` runs, where XLA proved it."""
        found = _TRIP_COUNT.search(self.attributes)
        return int(found.group(1)) if found else None

    def callees(self, *keys: str) -> tuple[str, ...]:
        """Computations named by the attributes `keys` (all calling attributes when none is given)."""
        names: list[str] = []
        for found in _CALLEES.finditer(self.attributes):
            if not keys or found.group(0).partition("=")[0] in keys:
                names += [name.strip().lstrip("%") for name in found.group(1).strip("{}").split(",") if name.strip()]
        return tuple(names)


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: computations by name (instructions by name, in order), its entry and its device counts."""

    computations: dict[str, Computation]
    entry: str
    num_partitions: int
    num_replicas: int

    def instructions(self) -> Iterator[tuple[str, Instruction]]:
        """Every instruction with the name of its computation, in program text order."""
        for computation, instructions in self.computations.items():
            for instruction in instructions.values():
                yield computation, instruction


def num_bytes(dtype: str, elements: int) -> int:
    """Bytes of `elements` values of an HLO dtype (`pred`, `bf16`, `s4`, `f8e4m3fn`, ...)."""
    return (elements * dtype_bits(dtype) + 7) // 8


def dtype_bits(dtype: str) -> int:
    """Bits of one value of an HLO dtype; 0 for tokens and opaque values.

    Raises:
      HloError: unknown dtype.
    """
    if dtype in ("token", "opaque"):
        return 0
    if dtype == "pred":
        return 8
    found = re.match(r"(?:bf|[sufc])(\d+)", dtype)
    if not found:
        raise HloError(f"dtype {dtype!r} is not one of HLO's: pred, or s, u, f, bf, c and a width")
    return int(found.group(1))


def parse_module(text: str) -> Module:
    """Parse the text of a (compiled) HLO module.

    Raises:
      HloError: no entry computation is found.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if not line[:1].isspace():
            header = _HEADER.match(line)
            current = None
            if header and not line.startswith("HloModule"):
                current = computations.setdefault(header.group(2), {})
                entry = header.group(2) if header.group(1) else entry
        elif current is not None:
            instruction = parse_instruction(line)
            if instruction:
                current[instruction.name] = instruction
    if not entry:
        raise HloError("no line starts with ENTRY: give the text of compiled.as_text()")
    header_line = text.lstrip().split("\n", 1)[0]
    return Module(
        computations,
        entry,
        num_partitions=_header_number(header_line, "num_partitions"),
        num_replicas=_header_number(header_line, "replica_count"),
    )


def parse_instruction(line: str) -> Instruction | None:
    """Parse one line `%name = type opcode(operands), attributes`; None for anything else."""
    found = _INSTRUCTION.match(_COMMENT.sub("", line))
    if not found:
        return None
    name, rest = found.groups()
    type_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = _OPCODE.match(rest, max(type_end, 0))
    if not opcode:
        return None
    operands_end = _closing(rest, opcode.end() - 1)
    return Instruction(
        name=name,
        opcode=opcode.group(1),
        shapes=parse_shapes(rest[:type_end]),
        operands=tuple(_operand_names(rest[opcode.end() : operands_end])),
        attributes=rest[operands_end + 1 :],
    )


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """The array shapes in a type such as `(f32[8,16]{1,0}, u32[])`, flattened; bounded dimensions count in full."""
    return tuple(
        Shape(dtype, tuple(int(dim.lstrip("<=")) for dim in dims.split(",") if dim))
        for dtype, dims in _SHAPE.findall(text)
    )


def device_groups(instruction: Instruction, num_partitions: int, num_replicas: int = 1) -> Groups:
    """Which devices exchange data: groups of positions in the program's device assignment.

    A device's position is `replica * num_partitions + partition`. For permutes and sends the groups are the
    (source, target) pairs, pairs of a device with itself left out.
    """
    devices = np.arange(num_replicas * num_partitions).reshape(num_replicas, num_partitions)
    has_channel = "channel_id=" in instruction.attributes
    pairs = re.search(r'source_target_pairs="?\{(\{.*?\})?\}', instruction.attributes)
    if pairs or instruction.opcode.startswith(("collective-permute", "send")):
        found = _explicit_groups(pairs.group(1) or "") if pairs else ()
        expanded = found if has_channel else _replica_groups(found, devices, with_all_partitions=False)
        return tuple(pair for pair in expanded if pair[0] != pair[1])
    groups = parse_replica_groups(instruction.attributes)
    if "use_global_device_ids=true" in instruction.attributes:
        return groups or (tuple(devices.ravel().tolist()),)
    if has_channel and instruction.opcode.startswith(("all-to-all", "ragged-all-to-all", "collective-broadcast")):
        return groups or (tuple(range(num_partitions)),)
    return _replica_groups(groups or (tuple(range(num_replicas)),), devices, with_all_partitions=has_channel)


def parse_replica_groups(attributes: str) -> Groups:
    """The groups of a `replica_groups=` attribute as ids; () where it is missing or empty (all devices).

    Raises:
      HloError: an unknown syntax.
    """
    _, found, text = attributes.partition("replica_groups=")
    if not found or text.startswith("{}"):
        return ()
    if text.startswith("{"):
        return _explicit_groups(text[1 : _closing(text, 0)])
    iota = _IOTA.match(text)
    if iota:
        return tuple(map(tuple, _iota(iota).tolist()))
    mesh = _MESH.match(text)
    if mesh:
        return _mesh_groups(*mesh.groups())
    raise HloError(f"replica_groups={text[:60]!r} is in no syntax this reader knows")


def _explicit_groups(text: str) -> Groups:
    groups = re.findall(r"\{([\d,\s]*)\}", text)
    return tuple(tuple(int(device) for device in group.split(",")) for group in groups if group.strip())


def _iota(found: re.Match[str]) -> np.ndarray:
    """`[target]<=[source]T(permutation)`: counts up in the source shape, transposes, reshapes to the target."""
    target, source, permutation = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
    assert target is not None and source is not None
    ids = np.arange(math.prod(source)).reshape(source)
    return (ids if permutation is None else ids.transpose(permutation)).reshape(target)


def _mesh_groups(axes_text: str, device_ids: str | None, grouped_text: str) -> Groups:
    """`mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(2)2}`: the devices that differ in the named axes only.

    `'b':(2)2` is the part of axis b of size 2 that lies inside a part of size 2: b = 4 reads as 2 x 2.
    """
    sizes = {name: int(size) for name, size, _, _ in _MESH_AXIS.findall(axes_text)}
    order = np.arange(math.prod(sizes.values()))
    if device_ids:
        iota = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids)
        if iota:
            order = order.reshape([int(n) for n in iota.group(1).split(",")])
            order = order.transpose([int(n) for n in iota.group(2).split(",")]) if iota.group(2) else order
        else:
            order = np.array([int(n) for n in device_ids.split(",")])
    wanted = [(name, int(before or 1), int(size or sizes[name])) for name, _, before, size
              in _MESH_AXIS.findall(grouped_text)]  # fmt: skip
    cuts = {name: {1, size} for name, size in sizes.items()}
    for name, before, size in wanted:
        cuts[name] |= {before, before * size}
    dims: list[int] = []
    pieces: list[tuple[str, int]] = []
    for name in sizes:
        bounds = sorted(cuts[name])
        for low, high in zip(bounds, bounds[1:], strict=False):
            dims.append(high // low)
            pieces.append((name, low))
    grouped = [pieces.index(piece) for name, before, size in wanted for piece in pieces
               if piece[0] == name and before <= piece[1] < before * size]  # fmt: skip
    kept = [dim for dim in range(len(dims)) if dim not in grouped]
    group_size = math.prod(dims[dim] for dim in grouped)
    table = order.reshape(dims).transpose(kept + grouped).reshape(-1, group_size)
    return tuple(map(tuple, table.tolist()))


def _replica_groups(groups: Groups, devices: np.ndarray, *, with_all_partitions: bool) -> Groups:
    """Groups of replica ids as device positions: one group over all partitions, or one group a partition."""
    if with_all_partitions:
        return tuple(tuple(devices[list(group)].ravel().tolist()) for group in groups)
    return tuple(tuple(devices[list(group), partition].tolist()) for group in groups
                 for partition in range(devices.shape[1]))  # fmt: skip


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`, quoted text skipped."""
    depth, quoted = 0, False
    for index in range(start, len(text)):
        character = text[index]
        if character == '"' and text[index - 1] != "\\":
            quoted = not quoted
        elif not quoted and character in "({[":
            depth += 1
        elif not quoted and character in ")}]":
            depth -= 1
            if depth == 0:
                return index
    return len(text)


def _operand_names(text: str) -> Iterator[str]:
    """Names of the operands in `f32[2]{0} %a, %b` at the outermost level."""
    depth, start = 0, 0
    for index, character in enumerate(text + ","):
        if character in "({[":
            depth += 1
        elif character in ")}]":
            depth -= 1
        elif character == "," and depth == 0:
            words = text[start:index].split()
            if words:
                yield words[-1].lstrip("%")
            start = index + 1


def _header_number(header: str, key: str) -> int:
    found = re.search(rf"\b{key}=(\d+)", header)
    return int(found.group(1)) if found else 1
