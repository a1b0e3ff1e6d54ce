"""Safetensors files written one tensor at a time and read as views of the file.

The safetensors package writes only what is in memory as a whole and reads only whole tensors or copies of slices; an
export streams from the devices and an import takes each device's part. The format is eight bytes of header length, a
JSON header and the raw tensors; the package validates every file before it is read here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from foejax.interop.errors import ModelFolderError

DTYPES = {
    "float64": ("F64", np.dtype(np.float64)),
    "float32": ("F32", np.dtype(np.float32)),
    "float16": ("F16", np.dtype(np.float16)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
"""Name in config.json -> name in safetensors, numpy dtype."""

_NUMPY_OF = dict(DTYPES.values())


class TensorSpec(NamedTuple):
    """Name, shape and size of a tensor about to be written."""

    name: str
    shape: tuple[int, ...]
    num_bytes: int


def write_safetensors(path: Path, specs: Sequence[TensorSpec], arrays: Iterator[np.ndarray], dtype: str) -> None:
    """Write the tensors of `specs`, taking as many arrays, one at a time, in the same order.

    Args:
      arrays: cast to `dtype` on the way.
      dtype: a key of `DTYPES`, the same for all tensors.
    """
    code, numpy_dtype = DTYPES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for spec in specs:
        header[spec.name] = {"dtype": code, "shape": spec.shape, "data_offsets": [start, start + spec.num_bytes]}
        start += spec.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the tensors start aligned
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for spec in specs:
            array = np.ascontiguousarray(next(arrays), dtype=numpy_dtype)
            assert array.shape == spec.shape and array.nbytes == spec.num_bytes, (spec, array.shape)
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def open_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file as a read-only view of it: nothing is read before it is used.

    Raises:
      ModelFolderError: missing, damaged or truncated file, or a dtype that is not a float.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass
    except FileNotFoundError:
        raise ModelFolderError(f"{path} is missing: copy the folder again") from None
    except (SafetensorError, OSError) as error:
        raise ModelFolderError(f"{path} is not a whole safetensors file ({error}): copy it again") from error
    data = np.memmap(path, dtype=np.uint8, mode="r")
    header_size = int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8 : 8 + header_size].tobytes())
    header.pop("__metadata__", None)
    body = data[8 + header_size :]
    return {name: _view(path, name, entry, body) for name, entry in header.items()}


def _view(path: Path, name: str, entry: dict[str, Any], body: np.ndarray) -> np.ndarray:
    if entry["dtype"] not in _NUMPY_OF:
        raise ModelFolderError(
            f"{path.name}: {name} has dtype {entry['dtype']}: convert it to one of {', '.join(_NUMPY_OF)}"
        )
    start, end = entry["data_offsets"]
    return body[start:end].view(_NUMPY_OF[entry["dtype"]]).reshape(entry["shape"])
