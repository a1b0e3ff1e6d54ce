"""What a person sees while training: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class ProgressDisplay:
    """Shows loss, tokens per second, load imbalance and time left.

    Args:
      total: last step of the run.
      first: steps already done.
      enabled: False shows nothing.
    """

    def __init__(self, total: int, first: int, *, enabled: bool = True) -> None:
        self._enabled, self._total, self._first = enabled, total, first
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if enabled and rich.get_console().is_terminal:
            figures = "loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tok/s  {task.fields[imbalance]:.2f}x load"
            self._bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn(figures), TimeRemainingColumn()
            )
            self._task = self._bar.add_task(
                "training", total=total, completed=first, loss=float("nan"), rate=0.0, imbalance=1.0
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show the figures of a step (loss, tokens_per_second, load_imbalance)."""
        loss, rate, imbalance = (values[name] for name in ("loss", "tokens_per_second", "load_imbalance"))
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=loss, rate=rate, imbalance=imbalance)
        elif self._enabled and (now - self._last_line > SECONDS_BETWEEN_LINES or step == self._total):
            self._last_line = now
            left = (now - self._started) / max(step - self._first, 1) * (self._total - step)
            logger.info(
                "step %d/%d  loss %.3f  %s tok/s  %.2fx load  %d s left",
                step, self._total, loss, f"{rate:,.0f}", imbalance, left,
            )  # fmt: skip
