"""Races the C++ kernels of the CPU against the same operations in XLA, on the shapes of a serving step.

Usage:
    python -m experiments.bench_cpu_kernels --json out.json
    python -m experiments.bench_cpu_kernels --experts 4 --width 64 --turns 3   # a small machine, or a try

The model is OLMoE-shaped: experts half as wide as the model, 8 of them for each token, heads of 64. Both contenders
multiply four different weights a turn, so that none stays in a cache, and take turns within one run. Before the race
their results are compared.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench_grouped_matmul import fastest
from pallas_kernels import grouped_matmul, paged_attention
from pallas_kernels.stacked_matmul import stacked_matmul

_COPIES, _HEAD, _BLOCK, _CONTEXT = 4, 64, 16, 320
_DTYPE = jnp.bfloat16
_TOLERANCE = 2.0**-6  # of the largest magnitude; both round their results to bfloat16

Operands = tuple[jax.Array, ...]
Race = tuple[str, dict[str, Callable[..., list[jax.Array]]], Operands]
"""Name, contenders and operands."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    machine = {"jax": jax.__version__, "python": platform.python_version(), "device": jax.devices()[0].device_kind}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    records: list[dict[str, Any]] = []
    for name, contenders, operands in _races(arguments):
        jitted = {key: jax.jit(contender) for key, contender in contenders.items()}
        _compare(name, [contender(*operands) for contender in jitted.values()])
        best = fastest({key: (contender, operands) for key, contender in jitted.items()}, arguments.turns)
        records.append({"race": name, "xla_over_cpu": round(best["xla"] / best["cpu"], 2)})
        print(f"{name:<44} XLA takes {records[-1]['xla_over_cpu']:.2f} times as long", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "results": records}, indent=1) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 256, 2048], help="of a step")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--width", type=int, default=1024, help="of the model, a multiple of 64")
    parser.add_argument("--turns", type=int, default=11, help="how often each contender is timed")
    parser.add_argument("--json", type=Path, help="also write the ratios to this file")
    return parser


def _races(arguments: argparse.Namespace) -> Iterator[Race]:
    random = np.random.default_rng(0)
    for tokens in arguments.tokens:
        yield _experts_race(random, tokens, arguments.experts, arguments.width)
    for tokens in arguments.tokens:
        if tokens <= 64:
            yield _projection_race(random, tokens, arguments.width)
    for rows, length in ((1, 1), (32, 1), (16, 128)):
        yield _attention_race(random, rows, length, arguments.width // _HEAD)


def _normal(random: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(random.normal(size=shape).astype(np.float32), _DTYPE)


def _experts_race(random: np.random.Generator, tokens: int, experts: int, width: int) -> Race:
    rows = tokens * min(8, experts)
    sizes = np.bincount(random.integers(0, experts, rows), minlength=experts)
    weights = [_normal(random, experts, width, width // 2) for _ in range(_COPIES)]

    def contender(name: Any) -> Callable[..., list[jax.Array]]:
        return lambda x, sizes, *weights: [grouped_matmul(x, w, sizes, implementation=name) for w in weights]

    operands = (_normal(random, rows, width), jnp.asarray(sizes, jnp.int32), *weights)
    return f"grouped_matmul, {tokens} tokens", {name: contender(name) for name in ("xla", "cpu")}, operands


def _projection_race(random: np.random.Generator, tokens: int, width: int) -> Race:
    weights = [_normal(random, 1, width, 8 * width) for _ in range(_COPIES)]
    contenders: dict[str, Callable[..., list[jax.Array]]] = {
        "xla": lambda x, *weights: [jnp.einsum("snk,skf->snf", x, w) for w in weights],
        "cpu": lambda x, *weights: [stacked_matmul(x, w) for w in weights],
    }
    return f"stacked_matmul, {tokens} tokens", contenders, (_normal(random, 1, tokens, width), *weights)


def _attention_race(random: np.random.Generator, rows: int, length: int, heads: int) -> Race:
    blocks = _CONTEXT // _BLOCK
    caches = [_normal(random, rows * blocks, 1, heads, _BLOCK, _HEAD) for _ in range(2 * _COPIES)]
    table = jnp.asarray(random.permutation(rows * blocks).reshape(rows, blocks), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(_CONTEXT - length, _CONTEXT, dtype=jnp.int32), (rows, length))

    def contender(name: Any) -> Callable[..., list[jax.Array]]:
        def attend(q: jax.Array, table: jax.Array, positions: jax.Array, *caches: jax.Array) -> list[jax.Array]:
            return [
                paged_attention(q, k, v, table, positions, first_block=jnp.int32(0), implementation=name)
                for k, v in zip(caches[::2], caches[1::2], strict=True)
            ]

        return attend

    operands = (_normal(random, rows, length, 1, heads, _HEAD), table, positions, *caches)
    name = f"paged_attention, {rows} x {length} tokens of {_CONTEXT}"
    return name, {backend: contender(backend) for backend in ("xla", "cpu")}, operands


def _compare(name: str, results: list[list[jax.Array]]) -> None:
    for one, other in zip(*results, strict=True):
        wide, other_wide = (np.asarray(array, np.float32) for array in (one, other))
        if np.abs(wide - other_wide).max() > _TOLERANCE * np.abs(wide).max():
            raise AssertionError(f"{name}: the contenders' results differ")


if __name__ == "__main__":
    raise SystemExit(main())
