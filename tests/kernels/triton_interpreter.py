"""Runs Triton kernels in Triton's interpreter, on NumPy arrays in place of tensors.

    python tests/kernels/triton_interpreter.py REQUESTS RESULTS

reads a pickled list of `(name, operands, options)` and writes the pickled list of results. `name` is a function of
`pallas_kernels.grouped_matmul.triton` that returns a `KernelCall`. It is a process of its own, because Triton decides
at its import whether kernels are interpreted.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_TRITON_NAMES = {"bfloat16": "bf16", "float32": "fp32", "int32": "i32"}
_GUARD = 1 << 15  # poisoned numbers before and after every array


class NumpyTensor:
    """What the interpreter asks of a torch tensor and of its storage; both are this one object, already on the CPU."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    @property
    def dtype(self) -> str:
        return _TRITON_NAMES[self.array.dtype.name]

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
        poison = -(1 << 30) if content.dtype.kind == "i" else np.nan
        self.whole = np.full(content.size + 2 * _GUARD, poison, content.dtype)
        self.array = self.whole[_GUARD:-_GUARD].reshape(content.shape)
        self.array[...] = content
        self.before = self.whole.tobytes()

    def written_around(self) -> bool:
        border = _GUARD * self.whole.itemsize
        after = self.whole.tobytes()
        return (after[:border], after[-border:]) != (self.before[:border], self.before[-border:])

    def written(self) -> bool:
        return self.whole.tobytes() != self.before


def repair_loop_bounds() -> None:
    """Triton 3.6 turns one-element arrays into loop bounds in a way that NumPy 2.5 refuses."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index


def repair_bfloat16() -> None:
    """Triton 3.6 interprets bfloat16 as bit patterns: its `dot` multiplies those, its rounding loses the carry."""
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
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        return TensorHandle(source.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl


def interpret(call: Any) -> np.ndarray:
    """The result of a `KernelCall`; what the kernel does not write is NaN."""
    from pallas_kernels.grouped_matmul import triton_kernels

    operands = [Guarded(np.asarray(operand)) for operand in call.operands]
    result = Guarded(np.full(call.result.shape, np.nan, call.result.dtype))
    tensors = [NumpyTensor(guarded.array) for guarded in (*operands, result)]
    getattr(triton_kernels, call.kernel)[(call.num_programs,)](*tensors, **call.constants)
    assert not any(operand.written() for operand in operands), f"{call.kernel} wrote to an operand"
    assert not result.written_around(), f"{call.kernel} wrote out of bounds"
    return result.array.copy()


def main(requests: str, results: str) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    repair_loop_bounds()
    repair_bfloat16()
    import jax.numpy as jnp

    from pallas_kernels.grouped_matmul import triton as backend

    outcomes = [
        interpret(getattr(backend, name)(*map(jnp.asarray, operands), **options))
        for name, operands, options in pickle.loads(Path(requests).read_bytes())
    ]
    Path(results).write_bytes(pickle.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
