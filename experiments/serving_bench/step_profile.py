"""Where a step's time goes: on the host, phase by phase, and on the device, part of the model by part."""

from __future__ import annotations

import functools
import glob
import re
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax

from foejax.serving import runner as runner_module
from foejax.serving.llm import LLM
from foejax.serving.sampling_params import SamplingParams

_ON_DEVICE = ("launch", "wait")
"""Phases in which the host starts the program and waits for it; in the others it keeps the device waiting."""


@dataclass
class Step:
    """One step of the engine.

    Attributes:
      call: program and rows that ran: what `_Recorder` kept.
      seconds: wall-clock time of the step.
      phases: own time of each phase in seconds, what runs inside another one not counted twice.
    """

    call: Any = None
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def host_seconds(self) -> float:
        """Time in which the device has nothing to do."""
        return self.seconds - sum(self.phases[name] for name in _ON_DEVICE)


class _Recorder:
    """Times functions by phase and keeps what programs are called with."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._open: list[list[float]] = []

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function, updated=())
        def run(*arguments: Any, **options: Any) -> Any:
            if phase == "step":
                self.steps.append(Step())
            self._open.append([0.0])
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                seconds = time.perf_counter() - started
                inside = self._open.pop()[0]
                if self._open:
                    self._open[-1][0] += seconds
                if self.steps:
                    step = self.steps[-1]
                    step.phases[phase] += seconds - inside
                    if phase == "step":
                        step.seconds = seconds

        return run

    def program(self, shape: Any, compiled: Callable[..., Any]) -> Callable[..., Any]:
        launch = self.timed("launch", compiled)

        def run(params: Any, state: Any, settings: Any, *rest: Any) -> Any:
            self.steps[-1].call = (shape, compiled, rest)
            return launch(params, state, settings, *rest)

        return run


@contextmanager
def _recording(llm: LLM) -> Iterator[_Recorder]:
    """The engine with its phases timed."""
    recorder, runner = _Recorder(), llm.runner
    programs, get = dict(runner._programs), jax.device_get
    read = runner_module._read
    timed: tuple[tuple[Any, str, str], ...] = (
        (llm.engine, "step", "step"),
        (llm.engine.scheduler, "expire", "plan"),
        (llm.engine.scheduler, "plan", "plan"),
        (llm.engine.scheduler, "update", "update"),
        (llm.engine, "_emit", "update"),
        (runner, "_pack_loads", "loads"),
        (runner, "_pack_rows", "pack"),
        (runner, "_load", "loads"),
    )
    for owner, name, phase in timed:
        setattr(owner, name, recorder.timed(phase, getattr(owner, name)))
    try:
        runner._programs.update({shape: recorder.program(shape, run) for shape, run in programs.items()})  # type: ignore[misc]
        jax.device_get = recorder.timed("wait", get)
        runner_module._read = recorder.timed("read", read)
        yield recorder
    finally:
        jax.device_get, runner_module._read = get, read
        runner._programs.update(programs)
        for owner, name, _ in timed:
            if name == "_load":
                owner._load = owner._load.__wrapped__
            else:
                delattr(owner, name)


def profile_steps(llm: LLM, prompts: Sequence[Sequence[int]], output_tokens: int) -> dict[str, Any]:
    """Run the prompts, greedily, and say where the time of the steps went.

    Returns:
      kinds: of steps with prompt chunks, and of those that only decode, by the tokens that they decode: their number,
        median seconds, the median shares of each phase and of the host as a whole, and what `_device_time` says.
      steps, seconds, host_share: of all steps together.
    """
    params = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
    llm.generate(prompts, params)  # warm
    llm.engine = llm.make_engine()
    with _recording(llm) as recorder:
        llm.generate(prompts, params)
    steps = [step for step in recorder.steps if step.call is not None]
    kinds: dict[str, list[Step]] = {}
    for step in steps:
        shape = step.call[0]
        kind = "prompts" if shape.prefill_length else f"decode, {shape.decode_steps} tokens"
        kinds.setdefault(kind, []).append(step)
    found = {}
    for kind, own in kinds.items():
        found[kind] = _host_shares(own) | _device_time(llm, own[len(own) // 2].call)
    total, host = sum(step.seconds for step in steps), sum(step.host_seconds for step in steps)
    return {"kinds": found, "steps": len(steps), "seconds": total, "host_share": host / total}


def _host_shares(steps: Sequence[Step]) -> dict[str, Any]:
    names = sorted({name for step in steps for name in step.phases})
    return {
        "steps": len(steps),
        "seconds": statistics.median(step.seconds for step in steps),
        "host_share": statistics.median(step.host_seconds / step.seconds for step in steps),
        "phases": {name: statistics.median(step.phases[name] / step.seconds for step in steps) for name in names},
    }


def _device_time(llm: LLM, call: Any, turns: int = 3) -> dict[str, Any]:
    """Where a program's device time goes, from a trace of a few runs of it with a recorded step's rows.

    Returns:
      parts: share of each part of the model; operations: the largest ones as [instruction with its type, scope, share].
    """
    runner, (_, compiled, rest) = llm.runner, call

    def run() -> None:
        runner._state, out = compiled(runner._params, runner._state, runner._settings, *rest)
        jax.block_until_ready(out)

    run()
    text = compiled.as_text()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(turns):
                run()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        seconds: dict[str, float] = defaultdict(float)
        for plane in jax.profiler.ProfileData.from_file(path).planes:
            for line in plane.lines:
                for name, own in _own_times(line.events):
                    seconds[name] += own
    total, parts_of = sum(seconds.values()), parts_of_program(text)
    by_part: dict[str, float] = defaultdict(float)
    for name, own in seconds.items():
        by_part[parts_of.get(name, "other")] += own / total
    largest = sorted(seconds.items(), key=_second)[: -_LARGEST - 1 : -1]
    return {
        "parts": dict(sorted(by_part.items(), key=_second)[::-1]),
        "operations": [[*_describe(name, text), own / total] for name, own in largest],
    }


_LARGEST = 8


def _second(item: tuple[str, float]) -> float:
    return item[1]


def _describe(name: str, text: str) -> tuple[str, str]:
    """An instruction with its type, and its scope without what all share."""
    line = re.search(rf"^\s+(?:ROOT )?%?{re.escape(name)} = (\S+)[^\n]*", text, re.MULTILINE)
    scope = _OP_NAME.search(line[0]) if line else None
    return f"{name} {line[1] if line else ''}", scope[1].replace("/eval_jaxpr", "") if scope else ""


def _own_times(events: Any) -> Iterator[tuple[str, float]]:
    """Name and own time of the events of one thread or stream that are operations: those inside them taken off."""
    listed = sorted(
        ((event.start_ns, -event.duration_ns, _operation(event)) for event in events), key=lambda item: item[:2]
    )
    stack: list[list[Any]] = []
    for start, negative, name in (item for item in listed if item[2]):
        while stack and stack[-1][1] <= start:
            done = stack.pop()
            yield done[0], done[2]
        if stack:
            stack[-1][2] += negative
        stack.append([name, start - negative, -negative])
    yield from ((name, own) for name, _, own in stack)


def _operation(event: Any) -> str:
    """HLO instruction that an event is the run of, "" for events of another kind."""
    return next((str(value) for name, value in event.stats if name == "hlo_op"), "")


_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = ")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_NAMES = re.compile(r"%([\w.-]+)")
_OP_NAME, _CALLS = re.compile(r'op_name="([^"]*)"'), re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")


def parts_of_program(text: str) -> dict[str, str]:
    """Part of the model of every instruction of a compiled program, from the scopes in its metadata.

    An instruction without a scope counts for the computation that it calls, or else for the instructions that use it,
    or else for the computation that it stands in.
    """
    own: dict[str, str] = {}
    calls: dict[str, str] = {}
    inside: dict[str, list[str]] = {}
    users: dict[str, list[str]] = defaultdict(list)
    computation = ""
    for line in text.splitlines():
        if opened := _COMPUTATION.match(line):
            computation = opened[1]
        elif found := _INSTRUCTION.match(line):
            scope, called = _OP_NAME.search(line), _CALLS.search(line)
            inside.setdefault(computation, []).append(found[1])
            own[found[1]] = part_of_scope(scope[1]) if scope else ""
            if called:
                calls[found[1]] = called[1]
            for operand in _NAMES.findall(line[found.end() :]):
                users[operand].append(found[1])
    result = {}
    for names in inside.values():
        around = _most_common(own[name] for name in names)
        for name in names[::-1]:  # whoever uses an instruction comes after it
            called_part = _most_common(own[other] for other in inside.get(calls.get(name, ""), ()))
            used_for = _most_common(result.get(user, "") for user in users[name])
            result[name] = own[name] or called_part or used_for or around or "other"
    return result


def part_of_scope(scope: str) -> str:
    """Part of the model that an operation's scope names, as the step's code nests its scopes."""
    for marks, part in (
        (("grouped_swiglu", "grouped_matmul"), "expert matmuls"),
        (("experts",), "routing, row plan, combine"),
        (("paged_attention",), "attention over blocks"),
        (("attention", "merge"), "projections, rotary embedding, cache write, merge"),
        (("head",), "head"),
    ):
        if any(f"/{mark}/" in f"{scope}/" for mark in marks):
            return part
    return "sampling, embedding and the rest" if scope else ""


def _most_common(parts: Any) -> str:
    counted = Counter(part for part in parts if part)
    return counted.most_common(1)[0][0] if counted else ""
