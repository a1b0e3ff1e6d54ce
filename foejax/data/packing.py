"""Documents packed into rows of one length: concatenate, then split.

B rows of a batch, T tokens of a row, N tokens of a stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from foejax.data.encoding import TokenStream

Batch = dict[str, np.ndarray]

BATCH_DTYPES = {
    "tokens": np.int32,
    "targets": np.int32,
    "positions": np.int32,
    "segment_ids": np.int32,
    "loss_weights": np.float32,
}


class _Order(NamedTuple):
    documents: np.ndarray  # document of each place in the concatenation
    bounds: np.ndarray  # where each place begins in the concatenation, and the end of the last
    rows: np.ndarray  # row of the concatenation that is delivered at each place


class PackedRows:
    """An endless sequence of rows, any of which can be made without the ones before it.

    In an epoch the documents are concatenated in an order drawn from (seed, epoch), the concatenation is split into
    ceil(N / T) rows, and the rows are delivered in an order drawn likewise, so that one long document does not fill a
    batch. Only the last row of the concatenation is partial; it is padded. Without a seed nothing is shuffled.

    A row is a dict of [T] arrays. Positions start at 0 and segment_ids count from 1 with every document, and where a
    document goes on from an earlier row. The target of a token is the next token of its document, and `eos_id` after
    the last: no target belongs to another document, so that loss_weights are 1 but for padding.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, seed: int | None) -> None:
        self._stream = stream
        self.sequence_length = sequence_length
        self._seed = seed
        self.rows_per_epoch = -(-len(stream) // sequence_length)
        self._order = lru_cache(maxsize=4)(self._draw_order)

    def __getitem__(self, index: int) -> Batch:
        """Row `index` of the endless sequence."""
        epoch, place = divmod(index, self.rows_per_epoch)
        order = self._order(epoch)
        return self._make_row(order, int(order.rows[place]))

    def _draw_order(self, epoch: int) -> _Order:
        lengths = np.diff(self._stream.offsets)
        documents, rows = np.arange(len(lengths)), np.arange(self.rows_per_epoch)
        if self._seed is not None:
            generator = np.random.default_rng([self._seed, epoch])
            documents, rows = generator.permutation(documents), generator.permutation(rows)
        return _Order(documents, np.cumsum([0, *lengths[documents]], dtype=np.int64), rows)

    def _make_row(self, order: _Order, row: int) -> Batch:
        stream, length = self._stream, self.sequence_length
        result = empty_row(length)
        begin = row * length
        end = min(begin + length, len(stream))
        place, segment = int(np.searchsorted(order.bounds, begin, side="right")) - 1, 0
        while begin < end:
            segment += 1
            until = min(end, int(order.bounds[place + 1]))
            document = order.documents[place]
            first = int(stream.offsets[document] + begin - order.bounds[place])
            into = slice(begin - row * length, until - row * length)
            following = stream.tokens[first + 1 : first + 1 + until - begin]
            result["tokens"][into] = stream.tokens[first : first + until - begin]
            result["targets"][into] = stream.eos_id
            result["targets"][into][: len(following)] = following
            result["positions"][into] = np.arange(until - begin)
            result["segment_ids"][into] = segment
            result["loss_weights"][into] = 1.0
            begin, place = until, place + 1
        return result


def empty_row(length: int) -> Batch:
    """A row of padding: [length] zeros under every name."""
    return {name: np.zeros(length, dtype) for name, dtype in BATCH_DTYPES.items()}


def stack_rows(rows: Sequence[Batch]) -> Batch:
    """A batch of [B, T] arrays from B rows."""
    return {name: np.stack([row[name] for row in rows]) for name in BATCH_DTYPES}
