"""An engine's figures for Prometheus."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from foejax.serving.engine_thread import EngineThread
from foejax.serving.expert_budget import ExpertReads
from foejax.serving.sequence import FinishReason
from foejax.serving.statistics import Histogram


class EngineCollector(Collector):
    """Reads an engine's figures whenever they are scraped."""

    def __init__(self, thread: EngineThread) -> None:
        self._thread = thread

    def collect(self) -> Iterator[Metric]:
        """All metrics, see docs/serving.md."""
        thread, scheduler, statistics = self._thread, self._thread.engine.scheduler, self._thread.statistics
        yield _histogram("time_to_first_token_seconds", "arrival to first token", statistics.time_to_first_token)
        yield _histogram("time_between_tokens_seconds", "of one continuation", statistics.time_between_tokens)
        yield _histogram("request_seconds", "arrival to end, aborted requests left out", statistics.request_time)
        yield _gauge("sequences_running", "continuations that run", thread.num_running)
        yield _gauge("sequences_waiting", "continuations that wait for a slot", thread.num_waiting)
        yield _gauge("kv_cache_used_ratio", "share of the cache's blocks that sequences hold", scheduler.held_share)
        yield _counter("prompt_tokens", "tokens of admitted prompts", scheduler.num_prompt_tokens)
        yield _counter("prefix_hit_tokens", "prompt tokens found in the cache", scheduler.num_prefix_tokens)
        yield _counter("generated_tokens", "tokens sampled", statistics.generated_tokens)
        yield _counter("preemptions", "sequences that gave their blocks back", scheduler.num_preemptions)
        reads = thread.engine.expert_reads
        if reads is not None:
            yield _gauge("expert_imbalance_ratio", "tokens of the busiest expert over the mean", _imbalance(reads))
        finished = CounterMetricFamily("foejax_finished", "continuations that ended", labels=["reason"])
        for reason in FinishReason:
            finished.add_metric([str(reason)], statistics.finished[reason])
        yield finished


def make_registry(thread: EngineThread) -> CollectorRegistry:
    """A registry with this engine's figures and nothing else."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(EngineCollector(thread))
    return registry


def _imbalance(reads: ExpertReads) -> float:
    """Mean over the layers and steps of a launch; 0 where no token came by."""
    tokens = reads.tokens_TCLA.reshape(-1, reads.tokens_TCLA.shape[-1])
    tokens = tokens[tokens.any(axis=-1)]
    return float((tokens.max(axis=-1) / tokens.mean(axis=-1)).mean()) if tokens.size else 0.0


def _gauge(name: str, what: str, value: float) -> Metric:
    return GaugeMetricFamily(f"foejax_{name}", what, value=value)


def _counter(name: str, what: str, value: float) -> Metric:
    return CounterMetricFamily(f"foejax_{name}", what, value=value)


def _histogram(name: str, what: str, histogram: Histogram) -> Metric:
    counts = list(itertools.accumulate(histogram.counts))
    bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
    return HistogramMetricFamily(
        f"foejax_{name}", what, buckets=list(zip(bounds, counts, strict=True)), sum_value=histogram.total
    )
