"""The Triton kernels of routing top-k and combine: their numbers in Triton's interpreter, their code for an H200."""

from __future__ import annotations

import functools
import importlib
import logging
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
import test_combine
import test_routing_topk
from jax.sharding import PartitionSpec as P

from kernels.triton_compiler import Compiler, Kernel, assert_fits_registers_and_memory
from kernels.triton_interpreter import run_interpreted
from pallas_kernels.combine.api import CombineError, combine
from pallas_kernels.deviceless import compile_for_h200, h200_mesh
from pallas_kernels.routing_topk.api import RoutingTopkError, routing_topk

pytestmark = pytest.mark.kernels

Topk, Combine = test_routing_topk.Case, test_combine.Case
# Beside the cases of all backends: several tiles of experts, or of columns.
STREAMED = {
    "two_tiles": Topk(9, 600, 31, biases=3),
    "ties_across_tiles": Topk(6, 1100, 16, biases=1, values="ties"),
    "special_across_tiles": Topk(6, 1030, 9, values="special"),
}
WIDE = {
    "three_tiles_of_columns": Combine(7, 2, 768, 14, 0.8),
    "odd_tiles_of_columns": Combine(5, 3, 1029, 15, 0.8),
}


def check_topk(case: Topk, dtype: str, widest_tile: int | None = None) -> None:
    if widest_tile is None:
        return test_routing_topk.assert_same_as_reference(case, dtype, "triton")
    backend = importlib.import_module("pallas_kernels.routing_topk.triton")
    jax.clear_caches()  # what is compiled for these shapes has the usual tiles
    with mock.patch.object(backend, "_WIDEST_TILE", widest_tile):
        test_routing_topk.assert_same_as_reference(case, dtype, "triton")
    jax.clear_caches()


def check_combine(case: Combine, dtype: str, weights_dtype: str) -> None:
    test_combine.assert_same_as_reference(case, dtype, "triton", weights_dtype=weights_dtype)


def all_checks() -> dict[str, Callable[[], None]]:
    checks: dict[str, Callable[[], None]] = {}
    for name, case in (test_routing_topk.CASES | STREAMED).items():
        some = name in test_routing_topk.OTHER_DTYPES or name in STREAMED
        for dtype in ("float32", "float64", "bfloat16") if some else ("float32",):
            checks[f"topk-{name}-{dtype}"] = functools.partial(check_topk, case, dtype)
        if name not in STREAMED:
            checks[f"topk-{name}-narrow_tiles"] = functools.partial(check_topk, case, "float32", 4)
    for name, case in (test_combine.CASES | WIDE).items():
        some = name in test_combine.OTHER_DTYPES or name in WIDE
        pairs = [("float32", "float32")]
        pairs += [("float64", "float64"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")] if some else []
        for pair in pairs:
            checks[f"combine-{name}-{'-'.join(pair)}"] = functools.partial(check_combine, case, *pair)
    return checks


def run_checks() -> dict[str, str]:
    """What went wrong in each check."""
    outcomes = {}
    for name, check in all_checks().items():
        try:
            with jax.enable_x64("float64" in name):
                check()
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
    return outcomes


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_interpreted(run_checks, tmp_path_factory.mktemp("interpreter"))


@pytest.mark.xdist_group("routing_interpreter")
@pytest.mark.parametrize("name", all_checks())
def test_results_and_gradients_equal_the_reference(interpreted: dict[str, str], name: str) -> None:
    assert not interpreted[name], interpreted[name]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Kernel]:
    """Kernels compiled during the test, for compute capability 9.0."""
    return Compiler(monkeypatch).compiled


def assert_compiles_well(kernels: list[Kernel], count: int, folder: Path) -> None:
    """No spills, no stack, within shared memory, and no atomics."""
    assert len(kernels) == count
    for kernel in kernels:
        assert_fits_registers_and_memory(kernel, folder)
        assert not re.search(r"\b(atom|red)\.", kernel.ptx)


def shapes_of(*pairs: tuple[tuple[int, ...], str]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in pairs]


# (tokens, experts, k, rows of the bias): the paper's 1B in 8 groups, OLMoE, Qwen3-30B-A3B, DeepSeek-V3 and one beyond
# a tile; the last two are decode.
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(
    "shape",
    [(8 * 16_384, 8, 1, 8), (4096, 64, 8, 1), (4096, 128, 8, 1), (4096, 256, 8, 1), (4096, 512, 16, 1)]
    + [(4096, 2048, 31, 0), (1, 128, 8, 0), (30, 60, 4, 30)],
)
def test_topk_compiles_for_h200(
    compiled: list[Kernel], shape: tuple[int, int, int, int], dtype: str, tmp_path: Path
) -> None:
    tokens, experts, k, biases = shape

    def run(scores: jax.Array, bias: jax.Array | None, cotangent: jax.Array) -> Any:
        operands = test_routing_topk.Operands(scores, bias, cotangent)
        return test_routing_topk.choices_and_gradients(operands, k, "triton")

    with jax.enable_x64(dtype == "float64"):
        scores, bias, cotangent = shapes_of(
            ((tokens, experts), dtype), ((max(biases, 1), experts), dtype), ((tokens, k), dtype)
        )
        text = compile_for_h200(run, scores, bias if biases else None, cotangent).as_text() or ""
    assert text.count('custom_call_target="triton_kernel_call"') == 2
    assert_compiles_well(compiled, 2, tmp_path)


# (tokens, k, width): the paper's 1B in 8 groups, OLMoE, DeepSeek-V3, the most choices, an odd width, decode.
@pytest.mark.parametrize(
    ("dtype", "weights_dtype"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
@pytest.mark.parametrize(
    "shape", [(8 * 32_768, 1, 768), (4096, 8, 2048), (4096, 8, 7168), (500, 64, 1024), (100, 3, 77), (1, 8, 2048)]
)
def test_combine_compiles_for_h200(
    compiled: list[Kernel], shape: tuple[int, int, int], dtype: str, weights_dtype: str, tmp_path: Path
) -> None:
    tokens, k, width = shape
    pairs = (((tokens * k, width), dtype), ((tokens, k), "int32"), ((tokens, k), weights_dtype))
    operands = shapes_of(*pairs, ((tokens * k,), "int32"), ((tokens, width), dtype))

    def run(*operands: jax.Array) -> Any:
        return test_combine.sums_and_gradients(test_combine.Operands(*operands), implementation="triton")

    with jax.enable_x64(dtype == "float64"):
        text = compile_for_h200(run, *operands).as_text() or ""
    assert text.count('custom_call_target="triton_kernel_call"') == 2
    assert_compiles_well(compiled, 2, tmp_path)
    if width % 256 == 0:
        assert all(re.search(r"ld\.global\S*\.v[24]\.b(32|64)", kernel.ptx) for kernel in compiled)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_combine_for_h200_holds_no_array_beside_operands_and_results(
    compiled: list[Kernel], implementation: str
) -> None:
    tokens, k, width = 4096, 8, 2048
    pairs = (((tokens * k, width), "bfloat16"), ((tokens, k), "int32"), ((tokens, k), "float32"))
    operands = shapes_of(*pairs, ((tokens * k,), "int32"), ((tokens, width), "bfloat16"))

    def run(*operands: jax.Array) -> Any:
        return test_combine.sums_and_gradients(test_combine.Operands(*operands), implementation=implementation)

    analysis = compile_for_h200(run, *operands).memory_analysis()
    assert analysis.temp_size_in_bytes < 2 * tokens * width // 4


def test_inside_shard_map_results_vary_as_all_operands_together(compiled: list[Kernel]) -> None:
    """With the gradients of the public functions; what is the same on all devices gets the sum over them."""
    mesh, axes = h200_mesh(("data", "group"), (2, 2)), {"data", "group"}

    def local(scores: jax.Array, bias: jax.Array, rows: jax.Array) -> tuple[jax.Array, ...]:
        def run(scores: jax.Array, rows: jax.Array) -> jax.Array:
            chosen = routing_topk(scores, 2, selection_bias=bias[0], implementation="triton")
            assert all(jax.typeof(array).manual_axis_type.varying == axes for array in chosen)
            flat = jnp.arange(32, dtype=jnp.int32)
            return combine(rows, flat.reshape(16, 2), chosen.values_Nk, flat, implementation="triton")

        out, transpose = jax.vjp(run, scores, rows)
        assert jax.typeof(out).manual_axis_type.varying == axes
        return transpose(out)

    specs = (P("data"), P("group"), P())
    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P("data"), P())))
    text = sharded.lower(*shapes_of(((32, 8), "float32"), ((2, 8), "float32"), ((32, 64), "float32"))).compile()
    assert (text.as_text() or "").count("all-reduce") >= 2
    assert len(compiled) == 4


def test_a_cuda_gpu_gets_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """By the default device; k beyond the registers goes to XLA, and the log says why."""
    for capability, kind in (("9.0", "hopper"), ("8.0", "cuda")):
        device = SimpleNamespace(platform="gpu", compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        scores = jax.ShapeDtypeStruct((64, 129), jnp.float32)
        with caplog.at_level(logging.INFO, logger="pallas_kernels"):
            program = str(jax.make_jaxpr(lambda scores: routing_topk(scores, 4))(scores))
            other = str(jax.make_jaxpr(lambda scores: routing_topk(scores, 40))(scores))
        assert "triton_kernel_call" in program and "triton_kernel_call" not in other
        first, second = (record.message for record in caplog.records[-2:])
        assert first == f"routing_topk of float32 scores (64, 129) with k=4 on {kind}: triton"
        assert re.search(f"k=40 on {kind}: xla; triton keeps the best in registers .* up to 31, not 40", second)


def test_refusals_name_the_reason_and_who_can() -> None:
    with pytest.raises(RoutingTopkError, match="'triton': triton keeps .* not 40; these can: xla, reference"):
        routing_topk(jnp.ones((4, 50)), 40, implementation="triton")
    flat = jnp.arange(65, dtype=jnp.int32)
    with pytest.raises(CombineError, match="'triton': triton unrolls .* not 65; these can: xla, reference"):
        combine(jnp.ones((65, 8)), flat[None], jnp.ones((1, 65)), flat, implementation="triton")
