"""Times grouped matmuls against one plain matmul of the same useful FLOPs, and against `jax.lax.ragged_dot`.

Usage:
    python experiments/bench_grouped_matmul.py                                    # acceptance and demo shapes, float32
    python experiments/bench_grouped_matmul.py --shape acceptance demo_moe/up --dtype float32 bfloat16 --json out.json
    python experiments/bench_grouped_matmul.py --list                             # the named shapes

All contenders take equally many turns within one run, so that they share whatever else the machine does; each is judged
by its fastest turn. "forward+backward" is the product and both gradients for a given cotangent. On CPU only ratios are
reported, because absolute times there say more about the machine than about the code; on GPU the useful TFLOP/s too.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul.shapes import SHAPES, GroupedMatmulShape

DEFAULT_SHAPES = ("acceptance", "demo_foe/up", "demo_moe/up")
CONTENDERS: dict[str, Callable[..., jax.Array]] = {
    "grouped_matmul": grouped_matmul,
    "ragged_dot": jax.lax.ragged_dot,
}


def group_sizes_of(shape: GroupedMatmulShape, rng: np.random.Generator) -> np.ndarray:
    """Random sizes that sum to all rows; the largest expert of 64 gets about twice the mean."""
    return rng.multinomial(shape.rows, rng.dirichlet([8.0] * shape.experts)).astype(np.int32)


def with_gradients(multiply: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    """The product and its gradients in both operands, for a given cotangent."""

    def run(x_RK: jax.Array, w: jax.Array, dy_RN: jax.Array, *sizes: jax.Array) -> tuple[jax.Array, ...]:
        y_RN, transpose = jax.vjp(lambda x_RK, w: multiply(x_RK, w, *sizes), x_RK, w)
        return y_RN, *transpose(dy_RN)

    return run


def seconds(function: Callable[..., object], arguments: tuple[jax.Array, ...]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start


def fastest(runs: dict[str, tuple[Callable[..., object], tuple[jax.Array, ...]]], turns: int) -> dict[str, float]:
    """Seconds of each run's fastest turn, the runs taking turns; compilation and first call are not counted."""
    best: dict[str, float] = {}
    for name, (function, arguments) in runs.items():
        jax.block_until_ready(function(*arguments))
        best[name] = float("inf")
    for _ in range(turns):
        for name, run in runs.items():
            best[name] = min(best[name], seconds(*run))
    return best


def measure(name: str, dtype: str, turns: int) -> list[dict[str, object]]:
    """One record per contender and pass: its time over the plain matmul's, and on GPU the useful TFLOP/s."""
    shape = SHAPES[name]
    rng = np.random.default_rng(0)
    key_x, key_w, key_dy = jax.random.split(jax.random.key(0), 3)
    x_RK = jax.random.normal(key_x, (shape.rows, shape.contracted), dtype)
    w_EKN = jax.random.normal(key_w, (shape.experts, shape.contracted, shape.features), dtype)
    dy_RN = jax.random.normal(key_dy, (shape.rows, shape.features), dtype)
    sizes_E = jnp.asarray(group_sizes_of(shape, rng))
    w_KN = w_EKN[0]

    records: list[dict[str, object]] = []
    for step, work in (("forward", shape.flops), ("forward+backward", 3 * shape.flops)):
        runs: dict[str, tuple[Callable[..., object], tuple[jax.Array, ...]]] = {}
        if step == "forward":
            runs["plain"] = (jax.jit(jnp.matmul), (x_RK, w_KN))
            runs |= {key: (jax.jit(multiply), (x_RK, w_EKN, sizes_E)) for key, multiply in CONTENDERS.items()}
        else:
            runs["plain"] = (jax.jit(with_gradients(jnp.matmul)), (x_RK, w_KN, dy_RN))
            for key, multiply in CONTENDERS.items():
                runs[key] = (jax.jit(with_gradients(multiply)), (x_RK, w_EKN, dy_RN, sizes_E))
        best = fastest(runs, turns)
        for contender in CONTENDERS:
            record: dict[str, object] = {
                "shape": name, **shape._asdict(), "dtype": dtype, "pass": step, "contender": contender,
                "largest_group": int(sizes_E.max()), "times_plain_matmul": round(best[contender] / best["plain"], 2),
            }  # fmt: skip
            if jax.default_backend() == "gpu":
                record["tflops"] = round(work / best[contender] / 1e12, 1)
                record["plain_tflops"] = round(work / best["plain"] / 1e12, 1)
            records.append(record)
    return records


def print_records(records: list[dict[str, object]]) -> None:
    for record in records:
        absolute = f"   {record['tflops']} TFLOP/s, plain {record['plain_tflops']}" if "tflops" in record else ""
        print(
            f"{record['shape']:<18} R={record['rows']} E={record['experts']} K={record['contracted']} "
            f"N={record['features']} {record['dtype']:<9} {record['pass']:<17} {record['contender']:<15} "
            f"{record['times_plain_matmul']:>7}x plain matmul{absolute}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=DEFAULT_SHAPES, choices=sorted(SHAPES), metavar="NAME")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=["float32", "bfloat16"])
    parser.add_argument("--turns", type=int, default=7, help="how often each contender is timed")
    parser.add_argument("--json", type=Path, help="also write the records to this file")
    parser.add_argument("--list", action="store_true", help="print the named shapes and stop")
    arguments = parser.parse_args()
    if arguments.turns < 1:
        parser.error(f"--turns={arguments.turns}: give at least 1")
    if arguments.list:
        for name, shape in SHAPES.items():
            print(name, shape._asdict())
        return
    device = jax.devices()[0]
    machine = {"jax": jax.__version__, "python": platform.python_version(), "device": device.device_kind}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    records = []
    for dtype in arguments.dtype:
        for name in arguments.shape:
            new = measure(name, dtype, arguments.turns)
            print_records(new)
            records += new
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "results": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
