"""What an engine's requests waited for and got, counted in plain Python while it runs."""

from __future__ import annotations

import bisect
from collections import Counter
from dataclasses import dataclass, field

from foejax.serving.sequence import FinishReason

_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 5)
_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120)
_REQUEST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)


class Histogram:
    """Counts of values up to each bound, and their sum.

    Attributes:
      bounds: ascending; a further bucket takes what lies above.
      counts: one for each bucket, values of other buckets not included.
      total: sum of the values.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, several times where it came so often."""
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.total += value * times


@dataclass
class Statistics:
    """Times in seconds. One thread writes; another one that reads may see figures that are a step apart.

    Attributes:
      time_to_first_token: from a request's arrival to the first token of any of its continuations.
      time_between_tokens: of one continuation; tokens that arrive together share the time since those before.
      request_time: from a request's arrival to the end of its last continuation; not of aborted ones.
      generated_tokens: stop tokens included.
      finished: continuations by why they ended.
    """

    time_to_first_token: Histogram = field(default_factory=lambda: Histogram(_FIRST_TOKEN))
    time_between_tokens: Histogram = field(default_factory=lambda: Histogram(_BETWEEN_TOKENS))
    request_time: Histogram = field(default_factory=lambda: Histogram(_REQUEST))
    generated_tokens: int = 0
    finished: Counter[FinishReason] = field(default_factory=Counter)
