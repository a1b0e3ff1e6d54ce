"""Are the results right on this device? Asked before anything is timed, of every contender that is here.

Each small case runs with its result buffers poisoned: arrays of NaN are donated to the program, so that the results are
written over them and an element that was never written is still NaN. Operands carry NaN in their padding rows. Each
element is compared with a float64 reference made on the host. Ours must also give exact zeros where the contract
promises them, and the same bits each time; peers are spared the cases that only our contract covers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from experiments.kernel_bench.operations import Contender, ExactCase, Operation, Watch, first_line, poison
from experiments.kernel_bench.programs import TorchProgram, abstract, raise_if_lost
from experiments.kernel_bench.races import Settings

_REPEATS = 3
_RELATIVE, _OF_RMS = 2.0**-7, 2.0**-8
"""Allowed error: two bfloat16 roundings of the element, and for cancellation a share of the typical size of the result,
or of the element's row if that is larger."""


def check(
    operation: Operation, settings: Settings, excluded: Mapping[tuple[str, str], str], watch: Watch
) -> dict[str, Any]:
    """Runs every case on every contender.

    Args:
      excluded: (contender, step) -> why it is not to be run.
      watch: around the runs of a contender.

    Returns:
      {"contenders": [...], "checks": [...], "wrong": [...], "not_run": [...]}, lists of records for JSON.
    """
    checks: list[dict[str, Any]] = []
    not_run: list[dict[str, str]] = []
    cases = operation.exact_cases(settings.tiny)
    contenders = operation.contenders(settings.on_gpu)
    for contender in contenders:
        if contender.kind == "bound":
            continue
        if contender.missing is not None:
            not_run.append({"contender": contender.name, "step": "all", "reason": contender.missing})
            continue
        for step in dict.fromkeys(case.step for case in cases):
            reason = excluded.get((contender.name, step), None if step in contender.steps else f"has no {step}")
            if reason is not None:
                not_run.append({"contender": contender.name, "step": step, "reason": reason})
                continue
            own = [case for case in cases if case.step == step and not (case.ours_only and contender.kind != "ours")]
            records, reasons = _check_step(operation, contender, own, settings, watch)
            checks += records
            not_run += [{"contender": contender.name, "step": step, "reason": reason} for reason in reasons]
    wrong = [record for record in checks if record["fault"]]
    named = [{"name": each.name, "kind": each.kind, "remark": each.remark} for each in contenders if not each.missing]
    return {
        "operation": operation.name,
        "contenders": named,
        "checks": checks,
        "wrong": wrong,
        "not_run": not_run,
    }  # fmt: skip


_Run = Callable[[ExactCase], tuple[np.ndarray, ...]]


def _check_step(
    operation: Operation, contender: Contender, cases: Sequence[ExactCase], settings: Settings, watch: Watch
) -> tuple[list[dict[str, Any]], list[str]]:
    """The records of the cases that ran, and why others did not."""
    ours = contender.kind == "ours"
    records: list[dict[str, Any]] = []
    reasons: dict[str, None] = {}
    taken = []
    for case in cases:
        if (reason := contender.refuses(case.step, case.dims)) is None:
            taken.append(case)
        else:
            reasons[f"{case.name}: {reason}"] = None
    run: _Run
    if contender.framework == "torch":
        run = functools.partial(_poisoned_torch, contender)
    else:
        run = _poisoned_jax(operation, contender, taken, settings)
    for case in taken:
        with watch(contender.name, case.step):
            try:
                results = [run(case) for _ in range(_REPEATS if ours else 1)]
            except Exception as error:  # contenders are foreign code: whatever they raise is their reason
                reasons[first_line(error)] = None
                raise_if_lost(contender.name, first_line(error))
                continue
        worst, fault = compare(results, case, ours)
        records.append(
            {"contender": contender.name, "kind": contender.kind, "step": case.step, "case": case.name,
             "error": worst, "fault": fault}
        )  # fmt: skip
    return records, list(reasons)


def compare(results: Sequence[tuple[np.ndarray, ...]], case: ExactCase, ours: bool) -> tuple[float | None, str | None]:
    """The largest error over what is allowed, and what is wrong in words; None for each where there is none.

    Args:
      results: of the repeated calls.
    """
    errors: list[float] = []
    for index, (expected, zero) in enumerate(zip(case.expected, case.zero, strict=True)):
        place = f"result {index}: " if len(case.expected) > 1 else ""
        error, fault = _compare_one([each[index] for each in results], expected, zero if ours else None, case.slack)
        errors += [] if error is None else [error]
        if fault is not None:
            return error, place + fault
    return max(errors, default=None), None


def _compare_one(
    results: Sequence[np.ndarray], expected: np.ndarray, zero: np.ndarray | None, slack: float
) -> tuple[float | None, str | None]:
    result = results[0]
    if result.shape != expected.shape:
        return None, f"shape {list(result.shape)}, not {list(expected.shape)}"
    unwritten = int(np.isnan(result).sum())
    if unwritten:
        return None, f"{unwritten} of {result.size} elements are NaN: never written, or padding leaked in"
    off = np.abs(result - expected)
    if not slack:
        different = max(int(np.count_nonzero(each != expected)) for each in results)
        return None, f"{different} of {result.size} elements are not exactly right" if different else None
    squares = np.square(expected)
    rms = np.sqrt(np.maximum(squares.mean(), squares.mean(axis=-1, keepdims=True)))
    allowed = slack * (_RELATIVE * np.abs(expected) + _OF_RMS * rms) + 1e-30
    error = float(np.max(off / allowed, initial=0.0))
    if error > 1:
        return error, f"off by {error:.3g} times what rounding allows"
    if zero is not None and np.any(result[zero]):
        return error, "not exactly zero in padding rows or experts without rows"
    if any(other.tobytes() != result.tobytes() for other in results[1:]):
        return error, "different bits from the same operands: a race"
    return error, None


def _poisoned_jax(operation: Operation, contender: Contender, cases: Sequence[ExactCase], settings: Settings) -> _Run:
    """Compiles the step for the shapes of all cases, several at a time; the results of a run lie over NaN."""

    def key(case: ExactCase) -> str:
        return str(abstract([case.operands]))

    waiting: dict[str, Future[jax.stages.Compiled]] = {}
    with ThreadPoolExecutor(settings.workers) as pool:
        for case in cases:
            if key(case) in waiting:
                continue
            function = contender.steps[case.step]
            # The unused donated arrays are kept so that XLA gives their memory to the results.
            over = jax.jit(
                lambda poisons, *operands, function=function: function(*operands), donate_argnums=0, keep_unused=True
            )
            try:
                lowered = over.lower(operation.output(case.step, case.dims), *abstract([case.operands])[0])
            except Exception as error:  # kept for the run, which reports it
                waiting[key(case)] = Future()
                waiting[key(case)].set_exception(error)
                continue
            waiting[key(case)] = pool.submit(lowered.compile)

    def run(case: ExactCase) -> tuple[np.ndarray, ...]:
        compiled = waiting[key(case)].result()
        poisons = tuple(map(poison, operation.output(case.step, case.dims)))
        results = jax.tree.leaves(compiled(poisons, *case.operands))
        for result, poisoned in zip(results, poisons, strict=True):
            if not poisoned.is_deleted():
                raise TypeError(
                    f"a result is {result.dtype}{list(result.shape)}, not {poisoned.dtype}{list(poisoned.shape)}"
                )
        return tuple(np.asarray(result, np.float64) for result in results)

    return run


def _poisoned_torch(contender: Contender, case: ExactCase) -> tuple[np.ndarray, ...]:
    [results] = TorchProgram(contender, case.step, [case.operands]).run()
    return tuple(np.asarray(result, np.float64) for result in results)
