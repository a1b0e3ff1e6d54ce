"""Training runs that do not depend on each other, several at a time, each in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

Job = TypeVar("Job")
Found = TypeVar("Found")


def run_jobs(function: Callable[[Job], Found], jobs: Sequence[Job], workers: int) -> Iterator[Found]:
    """`function` of every job, as they finish.

    Args:
      function: of a module, so that another process can import it.
      workers: processes; 1 runs the jobs here, one after the other.
    """
    if workers == 1:
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(function, job) for job in jobs]):
            yield future.result()


def keep_compiled_programs(folder: Path) -> None:
    """Compile a program once for all processes and seeds."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
