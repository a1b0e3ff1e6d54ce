"""What the device can do at most, measured in the same run: FLOP/s of a large matmul, bytes a second of a copy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.kernel_bench.operations import BenchError, Contender, Operands, first_line
from experiments.kernel_bench.programs import Program, build, compile_all
from experiments.kernel_bench.races import Settings
from experiments.kernel_bench.timing import Measurement, take_turns

_SIDE, _COPIED = 8192, 2**30  # elements of a matmul's side, bfloat16 elements copied
_TINY_SIDE, _TINY_COPIED = 128, 2**16
_CALLS = 3


def measure(settings: Settings) -> dict[str, Any]:
    """The ceilings, each the best of several ways to reach it, and how the clocks compare on them.

    Returns:
      matmul_flops: FLOP/s of the best bfloat16 product; copy_bytes: bytes read and written a second by the best copy;
      matmul_by_way and copy_by_way: of every way; clocks: time by CUPTI over time by the main clock, where CUPTI
      answers; not_run: ways and why.

    Raises:
      BenchError: no way to measure a ceiling works.
    """
    side, copied = (_TINY_SIDE, _TINY_COPIED) if settings.tiny else (_SIDE, _COPIED)
    keys = iter(jax.random.split(jax.random.key(0), 3 * _CALLS))

    def random(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.bfloat16)

    products: list[Operands] = [(random(side, side), random(side, side)) for _ in range(_CALLS)]
    matmul = _rates("matmul", _matmuls(settings.on_gpu), products, 2.0 * side**3, settings)
    del products
    copies: list[Operands] = [(random(copied),) for _ in range(_CALLS)]
    copy = _rates("copy", _copies(settings.on_gpu), copies, 2.0 * 2 * copied, settings)
    return {
        "matmul_flops": max(matmul["rates"].values()),
        "copy_bytes": max(copy["rates"].values()),
        "matmul_by_way": matmul["rates"],
        "copy_by_way": copy["rates"],
        "clocks": matmul["clocks"] | copy["clocks"],
        "not_run": matmul["not_run"] | copy["not_run"],
    }


def _rates(
    step: str, contenders: Sequence[Contender], sets: Sequence[Operands], amount: float, settings: Settings
) -> dict[str, Any]:
    """Amount of work a second of each way, with the ways that do not run and the comparison of clocks."""
    in_jax = [contender for contender in contenders if contender.framework == "jax"]
    compiled, not_run = compile_all(in_jax, step, sets, settings.on_gpu, settings.workers)
    programs: dict[str, Program] = {}
    for contender in contenders:
        if contender.name not in not_run:
            try:
                programs[contender.name] = build(contender, step, sets, compiled, settings.clock, settings.cupti)
            except Exception as error:  # torch may be missing or see no GPU
                not_run[contender.name] = first_line(error)
    measured = take_turns(programs, settings.turns, not_run.__setitem__)
    if not measured:
        raise BenchError(f"no way to measure the {step} ceiling works: {not_run}")
    rates = {name: amount / value.median for name, value in measured.items()}
    return {"rates": rates, "not_run": not_run, "clocks": _compare_clocks(programs, measured)}


def _compare_clocks(programs: Mapping[str, Program], measured: Mapping[str, Measurement]) -> dict[str, float]:
    ratios = {}
    for name, value in measured.items():
        try:
            seconds = programs[name].kernel_seconds()
        except Exception:  # CUPTI serves one user at a time, and some machines keep it shut
            continue
        if seconds is not None:
            ratios[name] = seconds / value.median
    return ratios


def _matmuls(on_gpu: bool) -> list[Contender]:
    cublas = Contender(
        "jax matmul, cuBLAS", "bound", {"matmul": jnp.matmul}, compiler_options={"xla_gpu_enable_triton_gemm": False}
    )
    return [
        Contender("jax matmul", "bound", {"matmul": jnp.matmul}),
        *([cublas, _torch("torch.matmul", "matmul", lambda left, right: left @ right)] if on_gpu else []),
    ]


def _copies(on_gpu: bool) -> list[Contender]:
    return [
        Contender("jax copy", "bound", {"copy": jnp.copy}),
        Contender("jax add", "bound", {"copy": functools.partial(jnp.add, jnp.bfloat16(1))}),
        *([_torch("torch.clone", "copy", lambda array: array.clone())] if on_gpu else []),
    ]


def _torch(name: str, step: str, function: Callable[..., Any]) -> Contender:
    return Contender(name, "bound", {step: function}, framework="torch")
