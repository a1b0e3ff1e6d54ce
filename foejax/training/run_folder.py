"""The files of a run that are not checkpoints: config.yaml, tokenizer.json, metrics.jsonl, TensorBoard events."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from tensorboardX import SummaryWriter

from foejax.config import RunConfig, save_config
from foejax.data import Tokenizer
from foejax.training.checkpoint import check_architecture

logger = logging.getLogger(__name__)

CONFIG, TOKENIZER, METRICS, CHECKPOINTS = "config.yaml", "tokenizer.json", "metrics.jsonl", "checkpoints"
TENSORBOARD, PROFILE = "tensorboard", "profile"


class MetricsLog:
    """One JSON line per step in metrics.jsonl, and the same figures for TensorBoard.

    Args:
      run_dir: folder of the run.
      last_step: step of the checkpoint that the run goes on from; lines of later steps and a torn last line are
        dropped, because these steps run again.
      enabled: False on every process but the first, which alone writes.
    """

    def __init__(self, run_dir: Path, last_step: int, *, enabled: bool = True) -> None:
        self._enabled = enabled
        if not enabled:
            return
        path = run_dir / METRICS
        kept = [json.dumps(line) + "\n" for line in read_metrics(run_dir) if line["step"] <= last_step]
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_text("".join(kept), encoding="utf-8")
        os.replace(unfinished, path)
        self._file = open(path, "a", encoding="utf-8")
        self._events = SummaryWriter(logdir=str(run_dir / TENSORBOARD), purge_step=last_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append the figures of a step; a process that is killed afterwards does not lose them."""
        if self._enabled:
            self._file.write(json.dumps({"step": step} | dict(values)) + "\n")
            self._file.flush()
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def sync(self) -> None:
        """Bring every line to the disk, so that no checkpoint is newer than the lines before it."""
        if self._enabled:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._events.flush()

    def close(self) -> None:
        """Flush and close the files."""
        if self._enabled:
            self._file.close()
            self._events.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Lines of a run's metrics.jsonl in order; lines that were cut off are left out."""
    path, lines = Path(run_dir) / METRICS, []
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def check_same_run(config: RunConfig, run_dir: Path) -> None:
    """Refuse to go on with a run of another architecture; tell what else has changed.

    A changed stream of training data is found by the data iterator, whose state names the stream.

    Raises:
      ConfigError: names the first field of the model section that differs.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        return
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
        sections = {name: dict(saved[name]) for name in ("model", "mesh", "data", "training")}
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, ValueError):
        logger.warning("%s is not readable and is written anew", path)
        return
    check_architecture(sections.pop("model"), config.model, run_dir)
    for name, section in sections.items():
        for field, value in getattr(config, name).model_dump().items():
            if section.get(field, value) != value:
                logger.warning("%s.%s changes from %r to %r", name, field, section[field], value)


def write_run_files(config: RunConfig, tokenizer: Tokenizer, run_dir: Path) -> None:
    """Write config.yaml and tokenizer.json, so that the folder describes itself."""
    for name, write in ((CONFIG, lambda path: save_config(config, path)), (TOKENIZER, tokenizer.to_file)):
        unfinished = run_dir / f"{name}.unfinished"
        write(unfinished)
        os.replace(unfinished, run_dir / name)
