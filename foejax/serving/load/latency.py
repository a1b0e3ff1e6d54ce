"""What users of a loaded engine saw, as numbers.

Every time is counted from the request's arrival in the trace, not from when the client got round to sending it.

  TTFT  time to first token: first token - arrival.
  TBT   time between tokens of a request: (last token - first token) / (output tokens - 1), a mean over its output, as
        in arXiv 2605.06206 (its tables hold E2E - TTFT = TBT * 255 for 256 tokens). Requests of one token have none.
  gap   time between two consecutive tokens, over all tokens of all requests. Tokens that arrive together in a burst of
        m, at time t after the burst before it at time s, count as m gaps of (t - s) / m. Where the first burst holds
        more than one token, those after the first count as gaps of 0. So a request's gaps sum to last - first token,
        and its TBT is their mean.
  stall longest time between two consecutive bursts of a request: what someone who reads along waits at most.
  E2E   end to end: last token - arrival.

Quantiles are interpolated linearly. Failed requests are in no figure but their own count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass
class RequestRecord:
    """What happened to one request; times in seconds after the trace's start.

    Attributes:
      arrival: when the trace has it.
      wanted_tokens: output tokens that it asked for.
      prompt_tokens: 0 where nobody knows.
      sent: when it was handed over.
      bursts: (time, tokens that arrived then), in order.
      finished: when its end was known.
      failure: why it did not end well; "" if it did.
    """

    arrival: float
    wanted_tokens: int
    prompt_tokens: int = 0
    sent: float = math.nan
    bursts: list[tuple[float, int]] = field(default_factory=list)
    finished: float = math.nan
    failure: str = ""

    @property
    def output_tokens(self) -> int:
        """Tokens that arrived."""
        return sum(count for _, count in self.bursts)

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.bursts[0][0] - self.arrival

    @property
    def e2e(self) -> float:
        """Seconds to the last token."""
        return self.bursts[-1][0] - self.arrival

    @property
    def tbt(self) -> float | None:
        """Mean seconds between tokens; None for a single token."""
        gaps = self.output_tokens - 1
        return (self.bursts[-1][0] - self.bursts[0][0]) / gaps if gaps else None

    def gaps(self) -> list[float]:
        """Seconds between consecutive tokens."""
        found = [0.0] * (self.bursts[0][1] - 1)
        for (before, _), (time, count) in zip(self.bursts, self.bursts[1:], strict=False):
            found += [(time - before) / count] * count
        return found

    def stall(self) -> float | None:
        """Longest time between bursts; None for a single burst."""
        times = [time for time, _ in self.bursts]
        return max((after - before for before, after in zip(times, times[1:], strict=False)), default=None)


@dataclass(frozen=True)
class Spread:
    """Mean and quantiles, in seconds; NaN where there is nothing."""

    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of these values."""
        if not len(values):
            return cls(math.nan, math.nan, math.nan)
        return cls(float(np.mean(values)), *(float(value) for value in np.quantile(values, (0.5, 0.99))))


@dataclass(frozen=True)
class Limits:
    """What a request must keep to count as good, in seconds; infinity asks nothing."""

    ttft: float = math.inf
    tbt: float = math.inf

    def keeps(self, record: RequestRecord) -> bool:
        """Whether a request that ended well kept them."""
        return record.ttft <= self.ttft and (record.tbt or 0.0) <= self.tbt


@dataclass(frozen=True)
class Summary:
    """Figures of one run of a trace.

    Attributes:
      requests, completed, failed: counts; completed requests ended well.
      short: completed ones that got fewer tokens than they asked for (the server ends texts, or cuts them).
      failures: how often each reason came.
      ttft, tbt, gap, stall, e2e: see the module.
      seconds: from the first arrival to the end of the last request, completed or failed.
      output_tokens_per_second, requests_per_second: of completed requests.
      good_share: of all requests, failed ones too, those that kept the limits.
      goodput: such requests a second.
      most_late: seconds by which the client handed a request over later than the trace has it, at most. An in-process
        run hands over between two steps of the engine.
    """

    requests: int
    completed: int
    failed: int
    short: int
    failures: dict[str, int]
    ttft: Spread
    tbt: Spread
    gap: Spread
    stall: Spread
    e2e: Spread
    seconds: float
    output_tokens_per_second: float
    requests_per_second: float
    good_share: float
    goodput: float
    most_late: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values; None for what is not a number."""
        return _without_nan(asdict(self))


def summarise(records: Sequence[RequestRecord], limits: Limits = Limits()) -> Summary:
    """The figures of a run."""
    done = [record for record in records if not record.failure]
    ends = [record.finished for record in records if math.isfinite(record.finished)]
    seconds = max(ends, default=math.nan) - min((record.arrival for record in records), default=math.nan)
    failures: dict[str, int] = {}
    for record in records:
        if record.failure:
            failures[record.failure] = failures.get(record.failure, 0) + 1
    good = sum(limits.keeps(record) for record in done)
    return Summary(
        requests=len(records),
        completed=len(done),
        failed=len(records) - len(done),
        short=sum(record.output_tokens < record.wanted_tokens for record in done),
        failures=failures,
        ttft=Spread.of([record.ttft for record in done]),
        tbt=Spread.of([record.tbt for record in done if record.tbt is not None]),
        gap=Spread.of([gap for record in done for gap in record.gaps()]),
        stall=Spread.of([stall for record in done if (stall := record.stall()) is not None]),
        e2e=Spread.of([record.e2e for record in done]),
        seconds=seconds,
        output_tokens_per_second=_rate(sum(record.output_tokens for record in done), seconds),
        requests_per_second=_rate(len(done), seconds),
        good_share=good / len(records) if records else math.nan,
        goodput=_rate(good, seconds),
        most_late=max((record.sent - record.arrival for record in records if math.isfinite(record.sent)), default=0.0),
    )


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else math.nan


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
