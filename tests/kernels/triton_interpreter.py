"""Runs a test module's function where jax-triton's kernels run in Triton's interpreter, on NumPy arrays for tensors.

    python -m kernels.triton_interpreter MODULE FUNCTION RESULT

calls the function without arguments and pickles what it returns, with `tests` and the repository on PYTHONPATH and
TRITON_INTERPRET=1. It is a process of its own, because Triton decides at its import whether kernels are interpreted.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import jax
import numpy as np

_GUARD = 1 << 15  # poisoned numbers before and after every array
Result = TypeVar("Result")


def run_interpreted(function: Callable[[], Result], folder: Path) -> Result:
    """What a module's `function` returns in a process of the interpreter; `folder` is for its files."""
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    command = [sys.executable, "-m", "kernels.triton_interpreter", function.__module__, function.__name__]
    environment = os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, str(folder / "result")], env=environment, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr
    return pickle.loads((folder / "result").read_bytes())


class NumpyTensor:
    """What the interpreter asks of a torch tensor and of its storage; both are this one object, already on the CPU."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    @property
    def dtype(self) -> str:
        return self.array.dtype.name

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> NumpyTensor:
        return self

    def cpu(self) -> NumpyTensor:
        return self

    def new_empty(self, size: int, device: str) -> NumpyTensor:
        return NumpyTensor(np.empty(size, self.array.dtype))

    def set_(self, storage: NumpyTensor, offset: int, size: Sequence[int], stride: Sequence[int]) -> None:
        self.array = storage.array

    def copy_(self, storage: NumpyTensor) -> None:
        assert storage.array is self.array, "the interpreter wrote to a copy"

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)


class Guarded:
    """An array between two poisoned stretches, where an access out of bounds shows."""

    def __init__(self, content: np.ndarray) -> None:
        self.whole = np.full(content.size + 2 * _GUARD, poison(content.dtype), content.dtype)
        self.array = self.whole[_GUARD:-_GUARD].reshape(content.shape)
        self.array[...] = content
        self.before = self.whole.tobytes()

    def written_around(self) -> bool:
        border = _GUARD * self.whole.itemsize
        after = self.whole.tobytes()
        return (after[:border], after[-border:]) != (self.before[:border], self.before[-border:])

    def written(self) -> bool:
        return self.whole.tobytes() != self.before


def poison(dtype: np.dtype) -> float:
    """NaN, or of integers one that is far out of range as an index."""
    return np.iinfo(dtype).min // 2 if dtype.kind == "i" else np.nan


def repair_loop_bounds() -> None:
    """Triton 3.6 turns one-element arrays into loop bounds in a way that NumPy 2.5 refuses."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index


def repair_bfloat16() -> None:
    """Triton 3.6 interprets bfloat16 as bit patterns: its `dot` multiplies those, and what it converts to them loses
    the carry of rounding (float32) or is taken for a pattern (integers)."""
    import ml_dtypes
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def decoded(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle(handle.data.view(ml_dtypes.bfloat16).astype(np.float32), tl.float32)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(self, decoded(a), decoded(b), *rest)

    def cast_impl(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        if target.scalar != tl.bfloat16 or not (source.dtype.scalar == tl.float32 or source.dtype.scalar.is_int()):
            return cast(self, source, target)
        return TensorHandle(source.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl


def interpreted_call(
    *operands: Any,
    kernel: Any,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    name: str,
    num_warps: int,
    num_stages: int | None,
    **constants: Any,
) -> list[jax.Array]:
    """In place of `jax_triton.triton_call`; what the kernel does not write is poison."""
    is_array = [isinstance(operand, jax.Array) for operand in operands]

    def run(*arrays: Any) -> list[np.ndarray]:
        guarded = [Guarded(np.asarray(array)) for array in arrays]
        remaining = iter(guarded)
        inputs = [
            NumpyTensor(next(remaining).array) if array else operand
            for array, operand in zip(is_array, operands, strict=True)
        ]
        outputs = [Guarded(np.full(shape.shape, poison(shape.dtype), shape.dtype)) for shape in out_shape]
        kernel[grid](*inputs, *(NumpyTensor(output.array) for output in outputs), **constants)
        assert not any(array.written() for array in guarded), f"{name} wrote to an operand"
        assert not any(output.written_around() for output in outputs), f"{name} wrote out of bounds"
        return [output.array.copy() for output in outputs]

    arrays = [operand for array, operand in zip(is_array, operands, strict=True) if array]
    return jax.pure_callback(run, list(out_shape), *arrays)


def main(module: str, function: str, result: str) -> None:
    sys.modules["jax_triton"] = ModuleType("jax_triton")
    sys.modules["jax_triton"].triton_call = interpreted_call  # type: ignore[attr-defined]
    repair_loop_bounds()
    repair_bfloat16()
    returned = getattr(importlib.import_module(module), function)()
    Path(result).write_bytes(pickle.dumps(jax.tree.map(_to_numpy, returned)))


def _to_numpy(leaf: Any) -> Any:
    return np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf


if __name__ == "__main__":
    main(*sys.argv[1:])
