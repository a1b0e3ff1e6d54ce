"""The C++ grouped matmul: shapes that do not fit its lines and panels, with and without the newest instructions.

`test_grouped_matmul.py` runs it through the cases of all backends.
"""

from __future__ import annotations

import ctypes
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench_cpu_kernels
from pallas_kernels import grouped_matmul, host_compiler, host_kernel
from pallas_kernels.grouped_matmul import cpu

Multiply = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

SHAPES = {
    "lines_cut_off": (40, 64, 33),
    "odd_depth": (40, 35, 64),
    "odd_and_cut_off": (40, 67, 50),
    "several_panels": (40, 16, 2 * 1024 + 5),
    "several_tasks_of_rows": (300, 34, 40),
    "less_than_a_line": (40, 1, 3),
}


@pytest.fixture(scope="module", params=["native", "portable"])
def multiply(request: pytest.FixtureRequest) -> Multiply:
    """The kernel as it is used here, and compiled without the newest vector instructions."""
    if request.param == "native":
        return jax.jit(lambda x_RK, w_EKN, sizes_E: grouped_matmul(x_RK, w_EKN, sizes_E, implementation="cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", f"{host_compiler._find_compiler()[0]} -DFOEJAX_PORTABLE")
        library = ctypes.cdll.LoadLibrary(str(host_compiler._compile(cpu.KERNEL.source)))
    jax.ffi.register_ffi_target("portable", jax.ffi.pycapsule(library.foejax_grouped_matmul), platform="cpu")

    def call(x_RK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array) -> jax.Array:
        result = jax.ShapeDtypeStruct((x_RK.shape[0], w_EKN.shape[2]), x_RK.dtype)
        return jax.ffi.ffi_call("portable", result)(x_RK, w_EKN, sizes_E)

    return jax.jit(call)


def make_operands(shape: tuple[int, int, int], dtype: str) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Positive rows and weights, so that errors are relative to the result; sizes that leave two rows over."""
    rows, contracted, features = shape
    random = np.random.default_rng(0)
    x_RK = jnp.asarray(random.uniform(0.5, 1.5, size=(rows, contracted)), dtype)
    w_EKN = jnp.asarray(random.uniform(0.5, 1.5, size=(4, contracted, features)), dtype)
    return x_RK, w_EKN, np.asarray([1, 0, rows - 3 - 13, 13], np.int32)


def in_float64(x_RK: jax.Array, w_EKN: jax.Array, sizes_E: np.ndarray) -> np.ndarray:
    x, w = np.asarray(x_RK, np.float64), np.asarray(w_EKN, np.float64)
    y_RN, start = np.zeros((x.shape[0], w.shape[2])), 0
    for expert, size in enumerate(sizes_E):
        y_RN[start : start + size] = x[start : start + size] @ w[expert]
        start += size
    return y_RN


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_product(multiply: Multiply, shape: tuple[int, int, int], dtype: str) -> None:
    x_RK, w_EKN, sizes_E = make_operands(shape, dtype)
    y_RN = multiply(x_RK, w_EKN, jnp.asarray(sizes_E))
    assert y_RN.dtype == dtype
    rtol = {"bfloat16": 2.0**-8, "float32": 1e-5}[dtype]
    np.testing.assert_allclose(np.asarray(y_RN, np.float64), in_float64(x_RK, w_EKN, sizes_E), rtol=rtol)
    assert not np.any(y_RN[sizes_E.sum() :])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_row_does_not_depend_on_the_rows_beside_it(multiply: Multiply, dtype: str) -> None:
    """Nor on how many there are, NaN among them, nor on the weights of an expert without rows."""
    x_RK, w_EKN, _ = make_operands((97, 35, 70), dtype)
    alone = multiply(x_RK[50:51], w_EKN, jnp.asarray([0, 0, 1, 0], jnp.int32))
    x_RK = x_RK.at[49].set(jnp.nan)
    among = multiply(x_RK, w_EKN.at[3].set(jnp.nan), jnp.asarray([2, 0, 95, 0], jnp.int32))
    np.testing.assert_array_equal(among[50], alone[0])
    assert np.isnan(among[49]).all() and not np.isnan(among[50:]).any()


def test_sizes_beyond_the_rows_are_cut_off(multiply: Multiply) -> None:
    x_RK, w_EKN, _ = make_operands((20, 16, 16), "float32")
    y_RN = multiply(x_RK, w_EKN, jnp.asarray([5, 90, 1, 7], jnp.int32))
    np.testing.assert_allclose(y_RN, in_float64(x_RK, w_EKN, np.asarray([5, 15, 0, 0])), rtol=1e-5)


HANDLER = """
#include "xla/ffi/api/ffi.h"
namespace ffi = xla::ffi;
static ffi::Error Fill(ffi::ResultBuffer<ffi::F32> y) { y->typed_data()[0] = 7.0f; return ffi::Error::Success(); }
XLA_FFI_DEFINE_HANDLER_SYMBOL(fill_with_seven, Fill, ffi::Ffi::Bind().Ret<ffi::Buffer<ffi::F32>>());
"""


def test_a_source_is_compiled_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FOEJAX_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "handler.cc"
    source.write_text(HANDLER, encoding="utf-8")
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        assert host_compiler.register(source, "fill_with_seven") is None
        first = host_compiler._compile(source)
        assert host_compiler._compile(source) == first
        source.write_text(HANDLER.replace("7.0f", "8.0f"), encoding="utf-8")
        assert host_compiler._compile(source) != first
    assert len(caplog.records) == 2
    filled = jax.ffi.ffi_call("fill_with_seven", jax.ShapeDtypeStruct((1,), jnp.float32))()
    assert filled[0] == 7.0
    assert sorted(path.suffix for path in (tmp_path / "cache" / "compiled").iterdir()) == [".so", ".so"]


def test_what_cannot_be_compiled_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOEJAX_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "broken.cc"
    broken.write_text("int x = y;\n", encoding="utf-8")
    reason = host_compiler.register(broken, "broken")
    assert reason is not None and "could not compile broken.cc" in reason and "error" in reason

    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    missing = "no C++ compiler (c++, g++ or clang++): install one, or set CXX"
    assert host_compiler.register(broken, "missing") == missing


def test_without_a_compiler_xla_serves(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(host_kernel, "register", lambda source, name: "no C++ compiler")
    x_RK, w_EKN, sizes_E = make_operands((23, 5, 7), "float32")
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        y_RN = grouped_matmul(x_RK, w_EKN, jnp.asarray(sizes_E))
    np.testing.assert_allclose(y_RN, in_float64(x_RK, w_EKN, sizes_E), rtol=1e-5)
    assert caplog.records[0].message.endswith(": xla; cpu has no kernel here (no C++ compiler)")
    with pytest.raises(ValueError, match=r"no kernel here \(no C\+\+ compiler\); these can: .*xla"):
        grouped_matmul(x_RK, w_EKN, jnp.asarray(sizes_E), implementation="cpu")


def test_the_benchmark_compares_and_races(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--tokens",
        "3",
        "--experts",
        "4",
        "--width",
        "64",
        "--turns",
        "1",
        "--json",
        str(tmp_path / "out.json"),
    ]
    assert bench_cpu_kernels.main(arguments) == 0
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result["race"].split(",")[0] for result in results] == [
        "grouped_matmul",
        "stacked_matmul",
        *["paged_attention"] * 3,
    ]
    assert all(result["xla_over_cpu"] > 0 for result in results)
    assert capsys.readouterr().out.count("times as long") == 5
    with pytest.raises(AssertionError, match="results differ"):
        bench_cpu_kernels._compare("x", [[jnp.ones(3)], [jnp.ones(3) * 1.1]])
