"""The training loop: build or resume, step, log, evaluate, save, stop when asked."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from foejax.config import RunConfig
from foejax.data import Dataset
from foejax.models import LanguageModel
from foejax.training.batches import HostBatch
from foejax.training.errors import NonFiniteLoss, Preempted, TrainingError, is_disk_full
from foejax.training.progress import ProgressDisplay
from foejax.training.run import Run, open_run
from foejax.training.run_folder import PROFILE, read_metrics
from foejax.training.stopping import StopRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """A run that has reached its last step.

    Attributes:
      model: the trained model on its mesh.
      run_dir: folder of the run.
      step: last step.
      resumed_from: step of the checkpoint that this call went on from; 0 for a fresh start.
      train_loss: cross-entropy of the last step, nats per token.
      validation_loss, validation_bits_per_byte: of the last evaluation.
      tokens_per_second: median over the logged steps.
    """

    model: LanguageModel = field(repr=False)
    run_dir: Path
    step: int
    resumed_from: int
    train_loss: float
    validation_loss: float
    validation_bits_per_byte: float
    tokens_per_second: float


def train(
    config: RunConfig,
    run_dir: str | Path,
    *,
    progress: bool = True,
    dataset: Dataset | None = None,
    after_step: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train into `run_dir`, going on from its newest good checkpoint when it holds one.

    Args:
      config: the whole run; `training.num_steps` counts from the beginning of the run.
      run_dir: made when missing; gets config.yaml, tokenizer.json, metrics.jsonl, tensorboard/ and checkpoints/.
      progress: show a bar (in a terminal) or a line now and then.
      dataset: an open dataset; None opens the one that the config names.
      after_step: called at every step border with the number of steps taken, after evaluation and checkpoint.

    Raises:
      ConfigError: the config does not fit the devices, or `run_dir` holds a run of another architecture.
      DataError: see `foejax.data.open_dataset`.
      Preempted: SIGTERM or SIGINT; the state is saved.
      NonFiniteLoss: NaN or infinite loss or gradient norm; the batch of the step is written to `run_dir`.
      CheckpointError: a checkpoint could not be written (full disk) or none of those there can be read.
    """
    run_dir = Path(run_dir)
    try:
        run = open_run(config, run_dir, dataset)
        try:
            return _run_steps(run, progress=progress, after_step=after_step or (lambda step: None))
        finally:
            run.iterator.close()
            run.log.close()
            run.store.close()
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise TrainingError(
            f"the disk is full while writing to {run_dir}; its checkpoints are intact: "
            "free some space and start the same command again"
        ) from error


class _Reporter:
    """Reads the figures of a step while the next one runs, so that logging never waits for the device."""

    def __init__(self, run: Run, display: ProgressDisplay) -> None:
        self._run, self._display = run, display
        self._pending: tuple[int, Any, HostBatch] | None = None
        self._clock = time.monotonic()

    def add(self, step: int, metrics: Any, rows: HostBatch) -> None:
        """Take the figures of a step, log those of the step before, and these too if the device has finished."""
        self.flush()
        self._pending = (step, metrics, rows)
        if metrics["loss"].is_ready():
            self.flush()

    def flush(self) -> None:
        """Wait for the last step and log it."""
        if self._pending is not None:
            previous, self._pending = self._pending, None
            self._log(*previous)

    def restart_clock(self) -> None:
        """Leave out the time since the last step (evaluation, checkpoint) from the next step's tokens per second."""
        self._clock = time.monotonic()

    def _log(self, step: int, metrics: Any, rows: HostBatch) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.monotonic()
        values["tokens_per_second"] = values.pop("num_tokens") / max(now - self._clock, 1e-9)
        self._clock = now
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise NonFiniteLoss(_dump_batch(self._run.run_dir, step, name, values[name], rows))
        self._run.log.write(step, values)
        self._display.update(step, values)


def _dump_batch(run_dir: Path, step: int, name: str, value: float, rows: HostBatch) -> str:
    process = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
    path = run_dir / f"nonfinite_step_{step}{process}.npz"
    np.savez(path, **dict(rows))  # type: ignore[arg-type]
    return (
        f"{name} is {value} at step {step}: the batch is in {path}; lower training.learning_rate or "
        "training.clip_norm, or look at the batch, and start again from the last checkpoint"
    )


def _run_steps(run: Run, *, progress: bool, after_step: Callable[[int], None]) -> TrainResult:
    training = run.config.training
    last, step = training.num_steps, run.start
    if step >= last:
        logger.warning("%s is at step %d of %d already: nothing to do", run.run_dir, step, last)
        return _result(run)
    show = progress and jax.process_index() == 0
    with StopRequest() as stop, ProgressDisplay(last, step, enabled=show) as display, _Profiler(run) as profiler:
        reporter = _Reporter(run, display)
        for step in range(run.start + 1, last + 1):
            profiler.before_step(step)
            rows = next(run.iterator)
            run.state, metrics = run.train_step(run.state, run.place(rows))
            reporter.add(step, metrics, rows)
            is_last, signal_name = step == last, stop.received(step)
            profiler.after_step(step, metrics)
            validation_loss = None
            if is_last or _is_due(step, training.eval_every):
                reporter.flush()
                validation_loss = _evaluate(run, step)
            if is_last or signal_name or _is_due(step, training.checkpoint_every):
                reporter.flush()
                run.save(step, validation_loss)
                reporter.restart_clock()
            elif validation_loss is not None:
                reporter.restart_clock()
            if signal_name and not is_last:
                _finish_writing(run)
                raise Preempted(
                    f"{signal_name} after step {step}: the checkpoint is saved; the same command goes on from there"
                )
            after_step(step)
        _finish_writing(run)
    return _result(run)


def _finish_writing(run: Run) -> None:
    """Return once the last checkpoint and every line of the log is on disk, in every process alike."""
    run.store.wait()
    run.log.sync()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("run_written")


def _evaluate(run: Run, step: int) -> float:
    found = run.evaluate()
    run.log.write(step, {"val_loss": found.loss, "val_bits_per_byte": found.bits_per_byte})
    logger.info("step %d: validation loss %.4f nats/token, %.4f bits per byte", step, found.loss, found.bits_per_byte)
    return found.loss


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Profiler:
    """Traces the steps after `training.profile_start`, `training.profile_steps` of them, into RUN/profile.

    Of several processes the first one is traced.
    """

    def __init__(self, run: Run) -> None:
        training = run.config.training
        self._window = range(training.profile_start + 1, training.profile_start + training.profile_steps + 1)
        self._folder, self._tracing = run.run_dir / PROFILE, False
        if jax.process_index() != 0:
            self._window = range(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop()

    def before_step(self, step: int) -> None:
        """Start the trace at the first step of the window that this process runs."""
        if step in self._window and not self._tracing:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True

    def after_step(self, step: int, metrics: Any) -> None:
        """Stop after the last step of the window, once the device has finished it."""
        if self._tracing and step == self._window[-1]:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            logger.info("profile of steps %d to %d in %s", self._window[0], self._window[-1], self._folder)


def _result(run: Run) -> TrainResult:
    lines = read_metrics(run.run_dir)
    steps = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "val_loss" in line]
    if not steps or not evaluations:
        raise TrainingError(f"{run.run_dir} has a finished checkpoint and no metrics.jsonl to match: restore it")
    return TrainResult(
        model=nnx.merge(run.graphdef, run.state.params, run.state.router_state),
        run_dir=run.run_dir,
        step=steps[-1]["step"],
        resumed_from=run.start,
        train_loss=steps[-1]["loss"],
        validation_loss=evaluations[-1]["val_loss"],
        validation_bits_per_byte=evaluations[-1]["val_bits_per_byte"],
        tokens_per_second=float(np.median([line["tokens_per_second"] for line in steps])),
    )
