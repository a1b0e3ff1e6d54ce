"""Writes to the cache that are whole or absent, and a bar that shows how far they are."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from foejax.data.errors import DataError
from pallas_kernels.disk_cache import CACHE_VARIABLE


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A fresh folder that becomes `path` when the block ends, and disappears when the block raises.

    Several processes may build the same folder at once: the first to finish wins, the others drop theirs, so what
    a path holds must follow from its name.

    Raises:
      DataError: the disk is full or the cache cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise DataError(
                f"{path.parent} cannot be written ({os.strerror(error.errno)}): "
                f"free some space, or set {CACHE_VARIABLE} to a folder elsewhere"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def progress_bar() -> Progress:
    """A bar on stderr that leaves nothing behind; used for steps of more than a few seconds."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
