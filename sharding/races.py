"""Collectives whose order a CPU does not keep.

XLA's CPU backend (every jaxlib supported so far) starts collectives in program order, but a loop counts as started when
its first iteration is: a collective behind the loop that needs nothing from it runs beside the loop's own. All of them
carry one channel id, so a device in the one then meets a device in the other: wrong sums, or a crash. No flag prevents
it; a program is safe when every collective behind a loop that communicates depends on what the loop computes.

Other backends run collectives on a stream, in program order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from sharding import hlo


@dataclasses.dataclass(frozen=True)
class Race:
    """A collective, or loop of collectives, that may run beside a loop of collectives before it."""

    loop: str
    """instruction name of the loop"""
    collective: str
    """instruction name of what comes later"""
    op_name: str
    """its path of named scopes and primitive"""


def find_races(compiled_text: str) -> list[Race]:
    """The races of a compiled program (`compiled.as_text()`), in program order; none for a safe one.

    Raises:
      hlo.HloError: the text cannot be read.
    """
    module = hlo.parse_module(compiled_text)
    communicating = _communicating(module)
    return [
        race for computation in module.computations.values() for race in _races_in(module, computation, communicating)
    ]


def _races_in(module: hlo.Module, computation: hlo.Computation, communicating: frozenset[str]) -> Iterator[Race]:
    loops: list[str] = []
    needed: dict[str, frozenset[str]] = {}
    """by instruction, the loops among everything it is computed from"""
    for instruction in computation.values():
        from_loops = frozenset().union(*(needed.get(operand, ()) for operand in instruction.operands))
        calls_one = not communicating.isdisjoint(instruction.callees())
        if calls_one or _meets_others(module, instruction):
            for loop in loops:
                if loop not in from_loops:
                    yield Race(loop, instruction.name, instruction.op_name)
        if calls_one:
            loops.append(instruction.name)
            from_loops |= {instruction.name}
        needed[instruction.name] = from_loops


def _communicating(module: hlo.Module) -> frozenset[str]:
    """Computations that run a collective, themselves or through a computation they call."""
    found: set[str] = set()
    grown = True
    while grown:
        calling = {
            name
            for name, instruction in module.instructions()
            if _meets_others(module, instruction) or not found.isdisjoint(instruction.callees())
        }
        grown = not calling <= found
        found |= calling
    return frozenset(found)


def _meets_others(module: hlo.Module, instruction: hlo.Instruction) -> bool:
    """Whether it is a collective; one over an axis of size 1 has nobody to wait for."""
    if instruction.opcode not in hlo.COLLECTIVE_OPCODES:
        return False
    groups = hlo.device_groups(instruction, module.num_partitions, module.num_replicas)
    return max((len(group) for group in groups), default=1) > 1
