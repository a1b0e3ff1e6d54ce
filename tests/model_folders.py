"""Exported folders in tests: their models compared to the bit, and their files edited."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from foejax.models import LanguageModel


def arrays_of(model: LanguageModel) -> dict[str, np.ndarray]:
    state = nnx.to_flat_state(nnx.state(model.transformer))
    return {".".join(path): np.asarray(variable.get_value()) for path, variable in state}


def assert_same(actual: LanguageModel, expected: LanguageModel) -> None:
    left, right = arrays_of(actual), arrays_of(expected)
    assert left.keys() == right.keys()
    for name, value in right.items():
        assert left[name].dtype == value.dtype
        np.testing.assert_array_equal(left[name], value, err_msg=name)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
