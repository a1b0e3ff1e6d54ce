"""Asynchronous, atomic checkpoints that are verified before they are used.

DIR/00000010/          one checkpoint, complete by construction: the folder is renamed into place
  state/               orbax: params, router_state, training (optimizer, step, random key)
  data_state.json      position in the data, the same for any number of processes
  info.json            step, validation loss, run config
  manifest.json        size and SHA-256 of every file above
DIR/00000020.saving/   a save under way, or one that was cut off
DIR/00000030.damaged/  a checkpoint that failed its manifest when a run resumed
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from foejax.config import ConfigError, ModelConfig, RunConfig
from foejax.training.errors import CheckpointError, is_disk_full
from foejax.training.manifest import find_damage, sync_folder, write_json, write_manifest
from foejax.training.optimizer import path_names
from foejax.training.step import TrainState

logger = logging.getLogger(__name__)

SAVING, DAMAGED = ".saving", ".damaged"


@dataclass(frozen=True)
class Restored:
    """A training state read back from disk, with the position in the data."""

    step: int
    state: TrainState
    data_state: Any
    validation_loss: float | None


class CheckpointStore:
    """The checkpoints of one run.

    Every process of a run makes the same calls; the folder is shared between them.

    Args:
      directory: folder of the checkpoints; made at the first save.
      keep_last: newest checkpoints that stay.
      keep_best: checkpoints with the lowest validation loss that stay besides.
    """

    def __init__(self, directory: str | Path, *, keep_last: int = 3, keep_best: int = 1) -> None:
        _silence_orbax()
        self.directory = Path(directory).absolute()
        self._keep_last, self._keep_best = keep_last, keep_best
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._finisher: threading.Thread | None = None
        self._failure: Exception | None = None

    def steps(self) -> list[int]:
        """Steps of the checkpoints whose save has finished, oldest first."""
        if not self.directory.is_dir():
            return []
        return sorted(int(entry.name) for entry in self.directory.iterdir() if entry.name.isdecimal())

    def save(
        self,
        state: TrainState,
        *,
        step: int,
        config: RunConfig,
        data_state: Any,
        validation_loss: float | None = None,
    ) -> None:
        """Start a save and return once the state is copied off the devices; a step saved before is left as it is.

        Args:
          state: the state after `step` steps; may be donated to the next step right away.
          step: `int(state.step)`.
          config: the run's config, stored next to the state.
          data_state: JSON-serialisable position in the data.
          validation_loss: for `keep_best`; None when this step was not evaluated.

        Raises:
          CheckpointError: this save could not start, or the one before it failed (full disk, ...).
        """
        self.wait()
        if step in self.steps():
            return
        saving = self.directory / f"{step:08d}{SAVING}"
        info = {
            "step": step,
            "validation_loss": validation_loss,
            "config": config.model_dump(),
        }
        try:
            self._check_space(state)
            self._prepare(saving, {"info.json": info, "data_state.json": data_state})
            items = {name: ocp.args.StandardSave(named) for name, named in _items(state).items()}
            self._checkpointer.save(saving / "state", args=ocp.args.Composite(**items))
        except Exception as error:
            raise self._explain(error, saving) from error
        self._finisher = threading.Thread(target=self._finish, args=(saving,), name="finish_checkpoint")
        self._finisher.start()

    def wait(self) -> None:
        """Wait until the save under way is on disk.

        Raises:
          CheckpointError: it failed; older checkpoints are untouched.
        """
        if self._finisher is not None:
            self._finisher.join()
            self._finisher = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Wait for the save under way and give orbax's threads back."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def restore(self, template: TrainState, config: RunConfig) -> Restored | None:
        """The newest good checkpoint; None when there is no checkpoint at all.

        Args:
          template: a state (arrays or `jax.ShapeDtypeStruct`s with shardings) that says how to place the result; its
            mesh may differ from the one that wrote the checkpoint.
          config: its model section must be the checkpoint's.

        Raises:
          ConfigError: the checkpoint holds another architecture.
          CheckpointError: there are checkpoints but none is good.
        """
        step = self.newest_good_step()
        if step is None:
            return None
        folder = self._folder(step)
        info = _read_json(folder / "info.json")
        check_architecture(info["config"]["model"], config.model, folder)
        state = self._read(folder, template)
        data_state = _read_json(folder / "data_state.json")
        return Restored(step, state, data_state, info["validation_loss"])

    def restore_model(self, params: Any, router_state: Any, config: ModelConfig) -> tuple[Any, Any, int]:
        """Parameters, router state and step of the newest good checkpoint, placed like the templates.

        Raises:
          ConfigError: the checkpoint holds another architecture.
          CheckpointError: there is no good checkpoint.
        """
        step = self.newest_good_step()
        if step is None:
            raise CheckpointError(f"{self.directory} holds no checkpoint: train first, or name another folder")
        folder = self._folder(step)
        check_architecture(_read_json(folder / "info.json")["config"]["model"], config, folder)
        model = self._read(folder, {"params": params, "router_state": router_state})
        return model["params"], model["router_state"], step

    def newest_good_step(self) -> int | None:
        """Step of the newest checkpoint that passes its manifest; says in one line which ones do not.

        Raises:
          CheckpointError: there are checkpoints but none is good.
        """
        if jax.process_count() == 1:
            return self._find_newest_good_step()
        found = -2
        if jax.process_index() == 0:
            try:
                found = -1 if (step := self._find_newest_good_step()) is None else step
            except CheckpointError as error:
                logger.error("%s", error)
        found = int(multihost_utils.broadcast_one_to_all(found))
        if found == -2:
            raise CheckpointError(f"no good checkpoint in {self.directory}: see the log of process 0")
        return None if found == -1 else found

    def set_aside_after(self, step: int) -> None:
        """Rename damaged checkpoints newer than `step` and remove saves that were cut off, before a run goes on."""
        if jax.process_index() == 0 and self.directory.is_dir():
            for newer in [saved for saved in self.steps() if saved > step]:
                damaged = self.directory / f"{newer:08d}{DAMAGED}"
                shutil.rmtree(damaged, ignore_errors=True)
                os.replace(self._folder(newer), damaged)
            for unfinished in self.directory.glob(f"*{SAVING}"):
                shutil.rmtree(unfinished, ignore_errors=True)
        _barrier("set_aside_checkpoints")

    def _folder(self, step: int) -> Path:
        return self.directory / f"{step:08d}"

    def _find_newest_good_step(self) -> int | None:
        steps = self.steps()
        damage = ""
        for step in reversed(steps):
            found = find_damage(self._folder(step))
            if found is None:
                if damage:
                    logger.warning("%s; falling back to step %d", damage, step)
                return step
            damage = damage or f"checkpoint of step {step} is damaged ({found})"
        if not steps:
            return None
        raise CheckpointError(
            f"{damage} and no older checkpoint in {self.directory} is good: move the folder away to start anew"
        )

    def _check_space(self, state: TrainState) -> None:
        """Find a full disk before orbax has half written to it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            reason = f"No space left on device: {needed:,} bytes needed, {free:,} free"
            raise OSError(errno.ENOSPC, reason)

    def _prepare(self, saving: Path, files: dict[str, Any]) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(saving, ignore_errors=True)
            saving.mkdir(parents=True)
            for name, content in files.items():
                write_json(saving / name, content)
        _barrier("prepare_checkpoint")

    def _finish(self, saving: Path) -> None:
        """Runs in a thread of its own: seal the checkpoint once orbax has written it, then apply the retention."""
        try:
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                write_manifest(saving)
                os.replace(saving, saving.with_suffix(""))
                sync_folder(self.directory)
                self._drop_old()
        except Exception as error:  # handed to the training thread by wait()
            self._failure = self._explain(error, saving)

    def _explain(self, error: Exception, saving: Path) -> CheckpointError:
        shutil.rmtree(saving, ignore_errors=True)
        steps = self.steps()
        kept = f"the checkpoint of step {steps[-1]} is intact" if steps else "there is no older one"
        step = int(saving.stem)
        if is_disk_full(error):
            detail = f" ({error.strerror})" if isinstance(error, OSError) else ""  # tensorstore's is a page of paths
            return CheckpointError(
                f"the disk is full{detail}: the checkpoint of step {step} was not saved under "
                f"{self.directory}; {kept}: free some space and start the same command again"
            )
        return CheckpointError(
            f"the checkpoint of step {step} was not saved under {self.directory}: {_one_line(error)}; {kept}"
        )

    def _drop_old(self) -> None:
        steps = self.steps()
        losses = {step: loss for step in steps if (loss := self._validation_loss(step)) is not None}
        best = sorted(losses, key=lambda step: (losses[step], step))[: self._keep_best]
        for step in set(steps[: -self._keep_last]) - set(best):
            # Renamed first: a removal that is cut off must not leave half a checkpoint under a good name.
            doomed = self.directory / f"{step:08d}{SAVING}"
            os.replace(self._folder(step), doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _validation_loss(self, step: int) -> float | None:
        try:
            return _read_json(self._folder(step) / "info.json")["validation_loss"]
        except CheckpointError:
            return None

    def _read(self, folder: Path, template: Any) -> Any:
        """The leaves of `template` (a TrainState, or a dict of some of its fields) as they were saved."""
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), template
        )
        arguments = {name: ocp.args.StandardRestore(item) for name, item in _items(abstract).items()}
        try:
            found = self._checkpointer.restore(folder / "state", args=ocp.args.Composite(**arguments))
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"checkpoint {folder} cannot be read: {_one_line(error)}") from error
        return _from_items(template, {name: found[name] for name in arguments})


def check_architecture(saved: dict[str, Any], model: ModelConfig, source: str | Path) -> None:
    """Refuse a checkpoint or run of another architecture.

    Raises:
      ConfigError: names the first field of the model section that differs, with both values.
    """
    missing = object()
    current = model.model_dump()
    for field in [*current, *(name for name in saved if name not in current)]:
        if saved.get(field, missing) != current.get(field, missing):
            here = f"model.{field}={current[field]!r}" if field in current else f"no model.{field}"
            there = f"model.{field}={saved[field]!r}" if field in saved else f"no model.{field}"
            raise ConfigError(
                f"{source} was trained with {there} and this config has {here}: "
                "use the run's own config, or another --run-dir"
            )


def _items(state: Any) -> dict[str, Any]:
    """What orbax stores as separate items, so that a reader of the model need not read the optimizer."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        *folders, last = path_names(path)
        entry = named
        for name in folders:
            entry = entry.setdefault(name, {})
        entry[last] = leaf
    items = {name: named.pop(name) for name in ("params", "router_state") if name in named}
    return items | ({"training": named} if named else {})


def _from_items(template: Any, items: dict[str, Any]) -> Any:
    """The inverse of `_items`: a tree built like `template`."""
    named = items | items.get("training", {})

    def find(path: tuple[Any, ...], _: Any) -> Any:
        entry = named
        for name in path_names(path):
            entry = entry[name]
        return entry

    return jax.tree_util.tree_map_with_path(find, template)


def _one_line(error: Exception) -> str:
    """The reason of an error in at most 200 characters; tensorstore writes pages."""
    text = " ".join(str(error.strerror if isinstance(error, OSError) else error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"...{text[-200:]}"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _silence_orbax() -> None:
    """Keep orbax's own log out of ours: what goes wrong reaches us as an exception and is told in one line."""
    absl_logger = logging.getLogger("absl")
    if _is_not_orbax not in absl_logger.filters:
        absl_logger.addFilter(_is_not_orbax)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts
