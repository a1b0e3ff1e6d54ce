"""Batches in a fixed order: the same global stream for any number of processes, resumable at any batch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain

from foejax.data.errors import DataError
from foejax.data.packing import Batch, PackedRows, empty_row, stack_rows

# Packing is numpy work of a millisecond or two a batch: one thread keeps ahead of any training step.
_READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


def local_rows(batch_size: int, process_index: int, process_count: int, accumulation: int = 1) -> list[int]:
    """Rows of a global batch that a process holds: the process_index-th contiguous slice of every micro-batch.

    Micro-batch a holds rows a B / A to (a + 1) B / A - 1, for any number of processes.

    Raises:
      DataError: the micro-batches do not divide over the processes.
    """
    if batch_size % (process_count * accumulation):
        raise DataError(
            f"data.batch_size={batch_size} does not divide over {process_count} processes and {accumulation} "
            f"micro-batches: choose a multiple of {process_count * accumulation}"
        )
    if not 0 <= process_index < process_count:
        raise DataError(f"process_index={process_index} is outside 0..{process_count - 1}")
    micro_batch = batch_size // accumulation
    share = micro_batch // process_count
    return [first + process_index * share + row for first in range(0, batch_size, micro_batch) for row in range(share)]


class _BatchSource:
    """One process's part of each global batch, as Grain's random-access source."""

    def __init__(self, rows: PackedRows, batch_size: int, local: Sequence[int]) -> None:
        self._rows, self._batch_size, self._local = rows, batch_size, local

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        first = index * self._batch_size
        return stack_rows([self._rows[first + row] for row in self._local])


class TrainIterator(Iterator[Batch]):
    """Endless training batches with a state that is small, exact and JSON-serialisable.

    Global batch i holds rows i B to (i + 1) B - 1 of `rows`, over epoch borders. The state names the next batch that
    will be delivered, however far the prefetch thread has gone, and does not depend on the number of processes.
    """

    def __init__(
        self,
        rows: PackedRows,
        batch_size: int,
        fingerprint: str,
        process_index: int = 0,
        process_count: int = 1,
        accumulation: int = 1,
    ) -> None:
        local = local_rows(batch_size, process_index, process_count, accumulation)
        source = _BatchSource(rows, batch_size, local)
        self._iterator = grain.MapDataset.source(source).to_iter_dataset(_READ_OPTIONS).__iter__()
        self._fingerprint = fingerprint

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """`{"next_batch": int, "stream": str}`."""
        return {"next_batch": self._iterator.get_state()["next_index"], "stream": self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue with the batch that `state` names.

        Raises:
          DataError: the state was taken from another stream of batches.
        """
        if state["stream"] != self._fingerprint:
            raise DataError(
                f"the data state belongs to stream {state['stream']}, not {self._fingerprint}: text, tokenizer, "
                "data.sequence_length, data.batch_size, data.validation_fraction and data.seed must stay as they were"
            )
        self._iterator.set_state({"next_index": state["next_batch"]})

    def close(self) -> None:
        """Stop the prefetch thread."""
        self._iterator.close()


def validation_batches(
    rows: PackedRows, batch_size: int, limit: int | None = None, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """One pass over unshuffled rows; the last batch is filled up with rows of weight 0.

    Args:
      limit: deliver at most so many batches.
    """
    local = local_rows(batch_size, process_index, process_count)
    num_batches = -(-rows.rows_per_epoch // batch_size)
    for index in range(num_batches if limit is None else min(limit, num_batches)):
        numbers = [index * batch_size + row for row in local]
        yield stack_rows([rows[n] if n < rows.rows_per_epoch else empty_row(rows.sequence_length) for n in numbers])
