"""The Triton kernel of projected top-k: its numbers in Triton's interpreter, its code for an H200."""

from __future__ import annotations

import functools
import importlib
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
import test_projected_topk
from jax.sharding import PartitionSpec as P
from test_projected_topk import Case

from kernels.triton_compiler import Compiler, Kernel, assert_fits_registers_and_memory
from kernels.triton_interpreter import run_interpreted
from pallas_kernels.deviceless import compile_for_h200, h200_mesh
from pallas_kernels.projected_topk.api import ProjectedTopkError, projected_topk

pytestmark = pytest.mark.kernels

# Beside the cases of all backends: several tiles of experts, of features and of tokens.
STREAMED = {
    "three_tiles": Case(2, 6, 40, 300, 9, has_bias=True),
    "ties_across_tiles": Case(2, 70, 4, 140, 7, has_bias=True, values="ties"),
    "most_choices": Case(1, 5, 16, 40, 31),
}


def check(case: Case, x_dtype: str, widest_tile: int | None = None) -> None:
    if widest_tile is None:
        return test_projected_topk.assert_same_as_reference(case, x_dtype, "float32", "triton")
    backend = importlib.import_module("pallas_kernels.projected_topk.triton")
    jax.clear_caches()  # what is compiled for these shapes has the usual tiles
    with mock.patch.object(backend, "_WIDEST_TILE", widest_tile):
        test_projected_topk.assert_same_as_reference(case, x_dtype, "float32", "triton")
    jax.clear_caches()


def all_checks() -> dict[str, Callable[[], None]]:
    checks: dict[str, Callable[[], None]] = {}
    for name, case in (test_projected_topk.CASES | STREAMED).items():
        checks[f"{name}-float32"] = functools.partial(check, case, "float32")
        if name in ("biased", "special", "three_tiles"):
            checks[f"{name}-bfloat16"] = functools.partial(check, case, "bfloat16")
        if case.experts > 16:
            checks[f"{name}-narrow_tiles"] = functools.partial(check, case, "float32", 16)
    return checks


def run_checks() -> dict[str, str]:
    """What went wrong in each check."""
    outcomes = {}
    for name, run in all_checks().items():
        try:
            run()
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
    return outcomes


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_interpreted(run_checks, tmp_path_factory.mktemp("interpreter"))


@pytest.mark.xdist_group("projected_topk_interpreter")
@pytest.mark.parametrize("name", all_checks())
def test_results_and_gradients_equal_the_reference(interpreted: dict[str, str], name: str) -> None:
    assert not interpreted[name], interpreted[name]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Kernel]:
    """Kernels compiled during the test, for compute capability 9.0."""
    return Compiler(monkeypatch).compiled


def compile_step(case: Case, x_dtype: str, implementation: str = "triton") -> jax.stages.Compiled:
    """Choices and gradients for an H200."""
    stacks, tokens, features, experts, k, has_bias, _ = case
    x = jax.ShapeDtypeStruct((stacks, tokens, features), x_dtype)
    w, bias, cotangent = (
        jax.ShapeDtypeStruct(shape, "float32")
        for shape in ((stacks, features, experts), (stacks, experts), (stacks, tokens, k))
    )

    def run(x: jax.Array, w: jax.Array, bias: jax.Array | None, cotangent: jax.Array) -> Any:
        operands = test_projected_topk.Operands(x, w, bias, cotangent)
        return test_projected_topk.choices_and_gradients(operands, k=k, implementation=implementation)

    return compile_for_h200(run, x, w, bias if has_bias else None, cotangent)


@pytest.mark.parametrize("x_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "case",
    [
        Case(8, 4096, 64, 64, 4, has_bias=True),
        Case(4, 4096, 128, 256, 8, has_bias=True),
        Case(2, 4096, 256, 1024, 31),
        Case(3, 100, 100, 60, 5, has_bias=True),
        Case(16, 1, 64, 16, 1),
    ],
    ids=str,
)
def test_compiles_for_h200(compiled: list[Kernel], case: Case, x_dtype: str, tmp_path: Path) -> None:
    """Without tensor cores, atomics, spills or stack."""
    program = compile_step(case, x_dtype)
    assert (program.as_text() or "").count('custom_call_target="triton_kernel_call"') == 2
    choose, combine = compiled
    assert "fma.rn.f32" in choose.ptx
    for kernel in (choose, combine):
        assert not re.search(r"\b(atom|red)\.|mma", kernel.ptx)
        assert_fits_registers_and_memory(kernel, tmp_path)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_for_h200_no_array_holds_all_logits(compiled: list[Kernel], implementation: str) -> None:
    case = Case(4, 1 << 16, 64, 1024, 4, has_bias=True)
    logits_bytes = case.stacks * case.tokens * case.experts * 4
    program = compile_step(case, "bfloat16", implementation)
    assert program.memory_analysis().temp_size_in_bytes < logits_bytes / 8
    assert len(compiled) == (2 if implementation == "triton" else 0)


def test_inside_shard_map_results_vary_as_all_operands_together(compiled: list[Kernel]) -> None:
    """With the gradients; what is the same on all devices gets the sum over them."""
    mesh, axes = h200_mesh(("data", "group"), (2, 2)), {"data", "group"}

    def local(x: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
        def run(x: jax.Array, w: jax.Array) -> jax.Array:
            chosen = projected_topk(x, w, 2, implementation="triton")
            assert all(jax.typeof(array).manual_axis_type.varying == axes for array in chosen)
            return chosen.values_SNk

        values, transpose = jax.vjp(run, x, w)
        return transpose(values)

    specs = (P(None, "data"), P(None, None, "group"))
    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs))
    shapes = (jax.ShapeDtypeStruct(shape, "float32") for shape in ((2, 32, 16), (2, 16, 24)))
    assert (sharded.lower(*shapes).compile().as_text() or "").count("all-reduce") >= 2
    assert len(compiled) == 2


def test_a_cuda_gpu_gets_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """And XLA what Triton refuses."""
    device = SimpleNamespace(platform="gpu", compute_capability="8.0")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 8, 16), (2, 16, 64)))
    for k, starts in ((4, True), (40, False)):
        program = str(jax.make_jaxpr(functools.partial(projected_topk, k=k))(x, w))
        assert ("triton_kernel_call" in program) == starts


def test_refusals_name_the_reason_and_who_can() -> None:
    with pytest.raises(ProjectedTopkError, match="'triton': triton keeps .* not 40; these can: xla, reference"):
        projected_topk(jnp.ones((1, 4, 3)), jnp.ones((1, 3, 50)), 40, implementation="triton")
    with jax.enable_x64(True), pytest.raises(ProjectedTopkError, match="float32, not float64; these can: xla, ref"):
        projected_topk(jnp.ones((1, 4, 3)), jnp.ones((1, 3, 50)), 4, implementation="triton")
