"""Writing a model as a Hugging Face folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from foejax.data import Tokenizer
from foejax.interop.config_json import CONFIG_FILE, choose_model_type, to_config_json
from foejax.interop.errors import ExportError
from foejax.interop.safetensors_file import DTYPES, TensorSpec, write_safetensors
from foejax.interop.tensor_names import ModelType, ParamPath, TensorRule, selection_bias_rule, tensor_rules
from foejax.models import LanguageModel
from foejax.models.block import Block
from foejax.models.layers import high_precision

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILE = "tokenizer.json"

FlatState = Mapping[ParamPath, jax.Array]


def export_model(
    model: LanguageModel,
    folder: str | Path,
    tokenizer: Tokenizer | str | Path | None = None,
    *,
    model_type: ModelType | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write a model as a Hugging Face folder: config.json, safetensors and, where given, the tokenizer.

    The folder appears whole or not at all. Tensors leave the devices one layer of one parameter at a time.

    Args:
      folder: does not exist or is empty.
      tokenizer: a tokenizer, or the path of a tokenizer.json.
      model_type: `olmoe`, which transformers loads as it is, `foe` or `mhlmoe`; None takes the one that fits, olmoe
        before foe.
      dtype: dtype of the stored tensors; None keeps the parameters' own, so that nothing is lost.
      max_shard_bytes: tensors beyond this go into further files, listed in an index.

    Returns:
      The folder.

    Raises:
      ExportError: the folder is not empty or cannot be written, the model does not fit the model type, the tokenizer
        does not fit the model, an unknown dtype, a model made by `for_inference`, or parameters that other processes
        hold.
    """
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(f"{target} is there already and not an empty folder: remove it or choose another name")
    if not isinstance(model.transformer.layers, Block):
        raise ExportError("the model was made by for_inference: export the one that it was made from")
    dtype = dtype or str(high_precision(model.config.dtype))
    if dtype not in DTYPES:
        raise ExportError(f"dtype={dtype!r} cannot be stored: choose one of {', '.join(DTYPES)}")
    state = nnx.to_flat_state(nnx.state(model.transformer))
    params: FlatState = {path: variable.get_value() for path, variable in state}
    if not all(value.is_fully_addressable for value in params.values()):
        raise ExportError("the parameters are spread over several processes: export from one process that holds all")
    has_bias = bool(np.any(np.asarray(params[selection_bias_rule(model.config).path])))
    kind = choose_model_type(model.config, model_type, selection_bias=has_bias)
    vocabulary = _open_tokenizer(tokenizer, model.config.vocab_size)
    eos_id = vocabulary.eos_id if vocabulary else None
    with _whole_folder(target) as unfinished:
        _write_json(unfinished / CONFIG_FILE, to_config_json(model.config, kind, dtype, eos_id))
        if vocabulary:
            _write_tokenizer(vocabulary, unfinished, model.config.max_seq_len)
        rules = tensor_rules(kind, model.config, selection_bias=has_bias)
        _write_tensors(params, rules, model.config.num_layers, unfinished, dtype, max_shard_bytes)
    return target


def _write_tensors(
    params: FlatState, rules: tuple[TensorRule, ...], num_layers: int, folder: Path, dtype: str, max_shard_bytes: int
) -> None:
    blocks = _in_file_order(rules, num_layers)
    itemsize = DTYPES[dtype][1].itemsize
    specs = []
    for rule, layer in blocks:
        shape = params[rule.path].shape[1 if rule.per_layer else 0 :]
        for name, tensor_shape in rule.tensors(shape, layer):
            specs.append(TensorSpec(name, tensor_shape, int(np.prod(tensor_shape)) * itemsize))
    shards = _fill_shards(specs, max_shard_bytes)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE_FILE]
    arrays = _stream(params, blocks)
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, arrays, dtype)
    if len(shards) > 1:
        files = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        total = sum(spec.num_bytes for spec in specs)
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": files})


def _in_file_order(rules: tuple[TensorRule, ...], num_layers: int) -> list[tuple[TensorRule, int]]:
    """What is written after what: embedding, layer by layer, final norm and head; layer 0 where there is none."""
    per_layer = [rule for rule in rules if rule.per_layer]
    others = [(rule, 0) for rule in rules if not rule.per_layer]
    return others[:1] + [(rule, layer) for layer in range(num_layers) for rule in per_layer] + others[1:]


def _fill_shards(specs: list[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.num_bytes
    return shards


def _stream(params: FlatState, blocks: list[tuple[TensorRule, int]]) -> Iterator[np.ndarray]:
    for rule, layer in blocks:
        param = params[rule.path]
        yield from rule.split(np.asarray(param[layer] if rule.per_layer else param), layer)


def _open_tokenizer(tokenizer: Tokenizer | str | Path | None, vocab_size: int) -> Tokenizer | None:
    if isinstance(tokenizer, (str, Path)):
        tokenizer = Tokenizer.from_file(tokenizer)
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise ExportError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model vocab_size={vocab_size}: "
            "give the tokenizer that the model was trained with"
        )
    return tokenizer


def _write_tokenizer(tokenizer: Tokenizer, folder: Path, max_seq_len: int) -> None:
    """tokenizer.json, and the two small files by which transformers finds the end-of-text token."""
    path = folder / TOKENIZER_FILE
    tokenizer.to_file(path)
    added = json.loads(path.read_text(encoding="utf-8"))["added_tokens"]
    end = next((entry["content"] for entry in added if entry["id"] == tokenizer.eos_id), None)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "generation_config.json", {"eos_token_id": tokenizer.eos_id})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that becomes `target` at the end and goes away on an error."""
    unfinished = target.with_name(f".{target.name}.unfinished-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        os.replace(unfinished, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExportError(f"the disk of {target} is full: free space or choose a folder on another disk") from error
        raise ExportError(f"{target} cannot be written ({error.strerror or error}): choose another folder") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
