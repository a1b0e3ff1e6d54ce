"""What a notebook needs around a model: build one, load one from a folder, and talk to it in text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from foejax.config import (
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
    load_config,
    override_config,
)
from foejax.data import Tokenizer, open_dataset
from foejax.evaluation.evaluate import EvalResult, evaluate, split_model
from foejax.interop import ModelType, export_model, import_config, import_model, import_tokenizer_path
from foejax.models import LanguageModel
from foejax.training.checkpoint import CheckpointStore, check_architecture
from foejax.training.optimizer import make_optimizer
from foejax.training.run import make_layout
from foejax.training.run_folder import CHECKPOINTS, CONFIG, TOKENIZER, write_run_files
from foejax.training.step import create_train_state
from sharding import Layout

_EXPORTED_CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer, from a run folder or an exported folder.

    Attributes:
      model: parameters on its layout's mesh.
      tokenizer: None where an exported folder has none; then only token ids work.
      config: the run's config; for an exported folder its model section and the default of everything else.
      step: training steps taken; None for an exported folder.
    """

    model: LanguageModel
    tokenizer: Tokenizer | None
    config: RunConfig
    folder: Path
    step: int | None = None

    def generate(
        self,
        prompts: str | Sequence[str],
        max_new_tokens: int = 100,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Continuations of one or several texts, without the prompts; each ends early at the end of its document.

        Args:
          temperature: 0 takes the most likely token; above it tokens are drawn, after `top_k` (0: all) and `top_p`.

        Raises:
          ValueError: no tokenizer, or a prompt longer than the model's context.
        """
        tokenizer = self._tokenizer()
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        tokens = [tokenizer.encode(text, start_of_document=True) for text in texts]
        new_tokens = self.model.generate(
            tokens,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_tokens=(tokenizer.eos_id,),
            key=jax.random.key(seed),
        )
        return [tokenizer.decode(row) for row in new_tokens]

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits after every token of one sequence, [T, V].

        Raises:
          ValueError: no token, an id outside the vocabulary, or more tokens than the model's context.
        """
        config, row = self.model.config, np.asarray(tokens, np.int64).reshape(1, -1)
        if not 1 <= row.size <= config.max_seq_len:
            raise ValueError(
                f"{row.size} tokens do not fit the model's context of {config.max_seq_len}: "
                f"give between 1 and {config.max_seq_len} tokens"
            )
        outside = row[(row < 0) | (row >= config.vocab_size)]
        if outside.size:
            raise ValueError(
                f"token {outside[0]} is outside the vocabulary: choose ids from 0 to {config.vocab_size - 1}"
            )
        row = row.astype(np.int32)
        positions = np.arange(row.size, dtype=np.int32).reshape(1, -1)
        batch = {"tokens": row, "positions": positions, "segment_ids": np.ones_like(row)}
        return np.asarray(jax.jit(self.model.logits)(batch))

    def evaluate(self, limit: int | None = None) -> EvalResult:
        """Loss on the validation split of `config.data`, read with the model's own tokenizer.

        Args:
          limit: number of validation batches; None takes all.
        """
        self._tokenizer()
        data = self.config.data.model_copy(update={"tokenizer": str(self.folder / TOKENIZER)})
        return evaluate(self.model, open_dataset(data, vocab_size=self.model.config.vocab_size), limit)

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"{self.folder} has no {TOKENIZER}: put the model's tokenizer there to work with text")
        return self.tokenizer


def build(config: RunConfig, key: jax.Array | None = None, *, devices: int = 0) -> LanguageModel:
    """A freshly initialised model on the mesh that `config.mesh` asks for.

    Args:
      key: None gives the weights that `train` starts from.
      devices: overrides `mesh.devices`; 0 leaves it.

    Raises:
      ConfigError: the mesh does not fit the devices or the model.
    """
    mesh = config.mesh.model_copy(update={"devices": devices}) if devices else config.mesh
    key = jax.random.split(jax.random.key(config.training.seed))[0] if key is None else key
    return LanguageModel.create(config.model, make_layout(config.model, mesh), key)


def load(
    folder: str | Path,
    *,
    devices: int = 0,
    dtype: str | None = None,
    overrides: dict[str, Any] | None = None,
) -> LoadedModel:
    """A model from a run folder (its newest good checkpoint) or from an exported folder.

    Args:
      folder: written by `train`, `import_folder` or `export`, or any OLMoE folder in Hugging Face format.
      devices: how many to use; 0 takes all there are. The mesh need not be the one of the training.
      dtype: compute dtype in place of the model's own.
      overrides: dotted fields of the sections `mesh` and `data`.

    Raises:
      ConfigError: no model in the folder, or a mesh that does not fit.
      CheckpointError: there are checkpoints and none is good.
    """
    folder, overrides = Path(folder), overrides or {}
    refused = [name for name in overrides if name.partition(".")[0] not in ("mesh", "data")]
    if refused:
        raise ConfigError(f"{refused[0]} cannot change for a trained model: only mesh.* and data.* can")
    saved = read_folder_config(folder)
    # The devices are those of this machine, not those of the training; the kind of layout stays.
    mesh = {"mesh.layout": saved.mesh.layout, "mesh.devices": devices}
    config = override_config(saved.model_copy(update={"mesh": MeshConfig()}), mesh | overrides)
    layout = dataclasses.replace(make_layout(config.model, config.mesh), shard_params=False)
    if (folder / CONFIG).is_file():
        model, step = _restore(folder, config.model, layout)
        model = _with_dtype(model, dtype or config.model.dtype)
    else:
        model, step = import_model(folder, layout, dtype=dtype), None
    tokenizer = Tokenizer.from_file(folder / TOKENIZER) if (folder / TOKENIZER).is_file() else None
    return LoadedModel(model, tokenizer, config, folder, step)


def export(
    run_dir: str | Path,
    out: str | Path,
    *,
    devices: int = 0,
    model_type: ModelType | None = None,
    dtype: str | None = None,
) -> Path:
    """Write a run as a Hugging Face folder: config.json, safetensors, tokenizer.json.

    Args:
      out: does not exist or is empty.
      model_type: `olmoe`, which transformers loads as it is, `foe` or `mhlmoe`; None takes the one that fits, olmoe
        before foe.
      dtype: dtype of the stored tensors; None keeps float32, so that nothing is lost.

    Raises:
      ExportError: the model type cannot express the model, or `out` cannot be written.
    """
    loaded = load(run_dir, devices=devices)
    return export_model(loaded.model, out, tokenizer=loaded.tokenizer, model_type=model_type, dtype=dtype)


def import_folder(source: str | Path, run_dir: str | Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Make a run, at step 0, of a Hugging Face folder (`model_type` olmoe, foe or mhlmoe), to train it on.

    To evaluate, generate or compute logits there is no need to import: `load` reads such folders as they are.

    Args:
      run_dir: must not exist or be empty. Its config.yaml has the model of `source`, the tokenizer copied along, and
        defaults or `overrides` for the rest.

    Raises:
      ConfigError: `run_dir` is in use, or an override does not fit.
      ModelFolderError: `source` is not a complete folder of such a model.
    """
    source, run_dir = Path(source), Path(run_dir)
    if run_dir.exists() and any(run_dir.iterdir()):
        raise ConfigError(f"{run_dir} is not empty: choose another folder for the imported run")
    tokenizer = Tokenizer.from_file(import_tokenizer_path(source))
    config = override_config(
        _read_exported(source), {"data.tokenizer": str((run_dir / TOKENIZER).absolute()), **(overrides or {})}
    )
    check_architecture(import_config(source).model_dump(), config.model, source)
    model = import_model(source, make_layout(config.model, config.mesh))
    run_dir.mkdir(parents=True, exist_ok=True)
    _, params, router_state = split_model(model)
    key = jax.random.split(jax.random.key(config.training.seed))[1]
    state = create_train_state(params, router_state, make_optimizer(config.training), key, model.layout.mesh)
    store = CheckpointStore(run_dir / CHECKPOINTS)
    try:
        store.save(state, step=0, config=config, data_state=None)
    finally:
        store.close()
    write_run_files(config, tokenizer, run_dir)
    return config


def read_folder_config(folder: Path) -> RunConfig:
    """The config of a run folder, or of an exported folder with defaults for all but the model.

    Raises:
      ConfigError: neither of the two.
    """
    if (folder / CONFIG).is_file():
        return load_config(folder / CONFIG)
    if (folder / _EXPORTED_CONFIG).is_file():
        return _read_exported(folder)
    state = "holds neither" if folder.is_dir() else "does not exist and so has neither"
    raise ConfigError(
        f"{folder} {state} {CONFIG} (a run) nor {_EXPORTED_CONFIG} (an exported model): give the folder of one"
    )


def _read_exported(folder: Path) -> RunConfig:
    model = import_config(folder)
    length = min(model.max_seq_len, DataConfig().sequence_length)
    data = DataConfig(tokenizer=str(folder / TOKENIZER), sequence_length=length, batch_size=8)
    coefs = {"load_balance_coef": 0.0, "z_loss_coef": 0.0} if model.streams_scores else {}
    return RunConfig(model=model, data=data, training=TrainingConfig.model_validate(coefs))


def _restore(folder: Path, config: ModelConfig, layout: Layout) -> tuple[LanguageModel, int]:
    graphdef, params, router_state = split_model(LanguageModel.abstract(config, layout))
    store = CheckpointStore(folder / CHECKPOINTS)
    try:
        params, router_state, step = store.restore_model(params, router_state, config)
    finally:
        store.close()
    return nnx.merge(graphdef, params, router_state), step


def _with_dtype(model: LanguageModel, dtype: str) -> LanguageModel:
    """The same parameters used in another compute dtype."""
    if dtype == model.config.dtype:
        return model
    config = ModelConfig.model_validate(model.config.model_dump() | {"dtype": dtype})
    target = LanguageModel.abstract(config, model.layout)
    graphdef, template = nnx.split(target.transformer)
    values = jax.tree.leaves(nnx.state(model.transformer))
    cast = [value.astype(leaf.dtype) for value, leaf in zip(values, jax.tree.leaves(template), strict=True)]
    transformer = nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(template), cast))
    return LanguageModel(transformer, config, model.layout)
