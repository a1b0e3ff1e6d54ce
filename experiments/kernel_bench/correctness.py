"""Are the results right on this device? Asked before anything is timed, of every contender that is here.

Each small case runs with its result buffer poisoned: an array of NaN is donated to the program, so that the result is
written over it and an element that was never written is still NaN. Operands carry NaN in their padding rows. Each
element is compared with a float64 reference made on the host. Ours must also give exact zeros where the contract
promises them, and the same bits each time; peers are spared the cases that only our contract covers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernel_bench.operations import Contender, ExactCase, Operation, Watch, first_line
from experiments.kernel_bench.programs import TorchProgram, abstract, raise_if_lost
from experiments.kernel_bench.races import Settings

_REPEATS = 3
_RELATIVE, _OF_RMS = 2.0**-7, 2.0**-8
"""Allowed error: two bfloat16 roundings of the element, and a share of the result's typical size for cancellation."""


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
            records, reasons = _check_step(contender, own, settings, watch)
            checks += records
            not_run += [{"contender": contender.name, "step": step, "reason": reason} for reason in reasons]
    wrong = [record for record in checks if record["fault"]]
    named = [{"name": each.name, "kind": each.kind, "remark": each.remark} for each in contenders if not each.missing]
    return {"contenders": named, "checks": checks, "wrong": wrong, "not_run": not_run}


def _check_step(
    contender: Contender, cases: Sequence[ExactCase], settings: Settings, watch: Watch
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
    run = _poisoned_torch if contender.framework == "torch" else _poisoned_jax(taken, contender, settings)
    for case in taken:
        with watch(contender.name, case.step):
            try:
                results = [run(contender, case) for _ in range(_REPEATS if ours else 1)]
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


def compare(results: list[np.ndarray], case: ExactCase, ours: bool) -> tuple[float | None, str | None]:
    """The largest error over what is allowed, and what is wrong in words; None for each where there is none."""
    result = results[0]
    if result.shape != case.expected.shape:
        return None, f"shape {list(result.shape)}, not {list(case.expected.shape)}"
    unwritten = int(np.isnan(result).sum())
    if unwritten:
        return None, f"{unwritten} of {result.size} elements are NaN: never written, or padding leaked in"
    rms = float(np.sqrt(np.mean(np.square(case.expected))))
    allowed = _RELATIVE * np.abs(case.expected) + _OF_RMS * rms + 1e-30
    error = float(np.max(np.abs(result - case.expected) / allowed, initial=0.0))
    if error > 1:
        return error, f"off by {error:.3g} times what rounding allows"
    if ours and np.any(result[case.zero]):
        return error, "not exactly zero in padding rows or experts without rows"
    if any(other.tobytes() != result.tobytes() for other in results[1:]):
        return error, "different bits from the same operands: a race"
    return error, None


def _poisoned_jax(
    cases: Sequence[ExactCase], contender: Contender, settings: Settings
) -> Callable[[Contender, ExactCase], np.ndarray]:
    """Compiles the step for the shapes of all cases, several at a time; the result runs one over a buffer of NaN."""

    def key(case: ExactCase) -> tuple[Any, ...]:
        return tuple(array.shape for array in case.operands)

    waiting: dict[tuple[Any, ...], Future[jax.stages.Compiled]] = {}
    with ThreadPoolExecutor(settings.workers) as pool:
        for case in cases:
            if key(case) in waiting:
                continue
            function = contender.steps[case.step]
            # The unused donated array is kept so that XLA gives its memory to the result.
            over = jax.jit(
                lambda poison, *operands, function=function: function(*operands), donate_argnums=0, keep_unused=True
            )
            poison = jax.ShapeDtypeStruct(case.expected.shape, jnp.bfloat16)
            try:
                lowered = over.lower(poison, *abstract([case.operands])[0])
            except Exception as error:  # kept for the run, which reports it
                waiting[key(case)] = Future()
                waiting[key(case)].set_exception(error)
                continue
            waiting[key(case)] = pool.submit(lowered.compile)

    def run(contender: Contender, case: ExactCase) -> np.ndarray:
        compiled = waiting[key(case)].result()
        poison = jnp.full(case.expected.shape, jnp.nan, jnp.bfloat16)
        result = compiled(poison, *case.operands)
        if not poison.is_deleted():
            raise TypeError(
                f"the result is {result.dtype}{list(result.shape)}, not bfloat16{list(case.expected.shape)}"
            )
        return np.asarray(result, np.float64)

    return run


def _poisoned_torch(contender: Contender, case: ExactCase) -> np.ndarray:
    return np.asarray(TorchProgram(contender, case.step, [case.operands]).run()[0], np.float64)
