"""What ends a training run before its last step; each carries the exit code of the command line."""

from __future__ import annotations

import errno


class TrainingError(RuntimeError):
    """A run that cannot go on; the message is one sentence with the way out."""

    exit_code = 1


class CheckpointError(TrainingError):
    """A checkpoint that could not be written or read."""


class NonFiniteLoss(TrainingError):
    """The loss or the gradient norm became NaN or infinite."""


class Preempted(TrainingError):
    """The run was asked to stop (SIGTERM, SIGINT); a checkpoint is saved and the same command goes on from there."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: schedulers requeue on it


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of the operating system or of tensorstore means that the disk is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error) or "Disk quota exceeded" in str(error)
