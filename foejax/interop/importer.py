"""Reading a Hugging Face folder, OLMoE's or our own, straight into its place on the mesh."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from foejax.config import ModelConfig
from foejax.interop.config_json import from_config_json, read_config_json
from foejax.interop.errors import ModelFolderError
from foejax.interop.exporter import INDEX_FILE, SINGLE_FILE, TOKENIZER_FILE
from foejax.interop.safetensors_file import open_safetensors
from foejax.interop.tensor_names import (
    Index,
    ModelType,
    ParamPath,
    Shape,
    TensorRule,
    selection_bias_rule,
    tensor_rules,
)
from foejax.models import LanguageModel
from sharding import Layout


def import_config(folder: str | Path, *, dtype: str | None = None) -> ModelConfig:
    """The configuration of the model in a folder.

    Args:
      dtype: compute dtype in place of the one the folder names.

    Raises:
      ModelFolderError: not a folder of a model type that we read, or one with options that our models do not have.
    """
    return from_config_json(Path(folder), dtype)


def import_tokenizer_path(folder: str | Path) -> Path:
    """Path of the folder's tokenizer.json.

    Raises:
      ModelFolderError: there is none.
    """
    path = Path(folder) / TOKENIZER_FILE
    if not path.is_file():
        raise ModelFolderError(f"{path} is missing: put the model's tokenizer.json there")
    return path


def import_model(folder: str | Path, layout: Layout, *, dtype: str | None = None) -> LanguageModel:
    """The model in a folder, of one file or several; every device reads its own part of each tensor.

    Args:
      layout: where the model goes.
      dtype: compute dtype in place of the one the folder names; parameters are kept in float32 (float64 for float64).

    Raises:
      ModelFolderError: as for `import_config`, or a tensor that is missing, unexpected or of another shape.
      ValueError: the layout does not fit the model.
    """
    folder = Path(folder)
    config = import_config(folder, dtype=dtype)
    model_type, _ = read_config_json(folder)
    tensors = _open_tensors(folder)
    abstract = LanguageModel.abstract(config, layout)
    graphdef, state = nnx.split(abstract.transformer)
    flat = nnx.to_flat_state(state)
    places = {path: variable.get_value() for path, variable in flat}
    rules = {rule.path: rule for rule in _rules_of(tensors, places, model_type, config)}
    leaves = []
    for path, variable in flat:
        place = places[path]
        value = _place(rules[path], tensors, place) if path in rules else _zeros(place)
        leaves.append((path, variable.replace(value)))
    transformer = nnx.merge(graphdef, nnx.from_flat_state(leaves))
    return LanguageModel(transformer, config, layout)


def _open_tensors(folder: Path) -> dict[str, np.ndarray]:
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file() or not index.is_file():
        return open_safetensors(folder / SINGLE_FILE)
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFolderError(f"{index} is not a safetensors index ({error!r}): copy the folder again") from error
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        tensors |= open_safetensors(folder / Path(name).name)
    return tensors


def _rules_of(
    tensors: dict[str, np.ndarray],
    places: Mapping[ParamPath, jax.ShapeDtypeStruct],
    model_type: ModelType,
    config: ModelConfig,
) -> tuple[TensorRule, ...]:
    """The table for a folder, after checking that its tensors are exactly those of the table."""
    layers, bias = range(config.num_layers), selection_bias_rule(config)
    has_bias = model_type != "olmoe" and any(bias.name.format(layer=n) in tensors for n in layers)
    rules = tensor_rules(model_type, config, selection_bias=has_bias)
    expected: dict[str, Shape] = {}
    for rule in rules:
        shape = places[rule.path].shape
        for layer in layers if rule.per_layer else (0,):
            expected.update(rule.tensors(shape[1:] if rule.per_layer else shape, layer))
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ModelFolderError(f"{_some(missing)} missing: copy the folder again, or correct its config.json")
    unexpected = [name for name in tensors if name not in expected]
    if unexpected:
        raise ModelFolderError(
            f"{_some(unexpected)} not part of the {model_type} model of this config.json: remove them or correct it"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ModelFolderError(
                f"{name} has shape {tensors[name].shape} and config.json asks for {shape}: correct the config.json"
            )
    return rules


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensors {', '.join(names[:3])}{more} are"


def _place(rule: TensorRule, tensors: dict[str, np.ndarray], place: jax.ShapeDtypeStruct) -> jax.Array:
    def read(index: Index | None) -> np.ndarray:
        assert index is not None
        part = np.empty([len(range(size)[cut]) for size, cut in zip(place.shape, index, strict=True)], place.dtype)
        if not rule.per_layer:
            part[...] = rule.join(tensors, place.shape, 0, index)
            return part
        for row, layer in enumerate(range(place.shape[0])[index[0]]):
            part[row] = rule.join(tensors, place.shape[1:], layer, index[1:])
        return part

    return jax.make_array_from_callback(place.shape, place.sharding, read)


def _zeros(place: jax.ShapeDtypeStruct) -> jax.Array:
    zeros = np.zeros(place.shape, place.dtype)
    return jax.make_array_from_callback(place.shape, place.sharding, lambda index: zeros[index])
