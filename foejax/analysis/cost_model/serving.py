"""Latencies of requests in simulated time: the real engine, scheduler and block manager, with predicted step times.

No model is there: the devices are a clock that advances by what a step is predicted to take. Steps are padded as
`foejax.serving.runner` pads them.
"""

from __future__ import annotations

from dataclasses import replace

from foejax.analysis.cost_model.cluster import Cluster
from foejax.analysis.cost_model.matched import Candidate
from foejax.analysis.cost_model.step import Row, Step
from foejax.analysis.cost_model.work import ITEMSIZE, weight_bytes
from foejax.config import ConfigError
from foejax.serving.engine import Engine
from foejax.serving.engine_config import EngineConfig
from foejax.serving.load.in_process import run_in_process
from foejax.serving.load.latency import Summary, summarise
from foejax.serving.load.trace import Trace
from foejax.serving.runner import StepResult
from foejax.serving.scheduler import Scheduler, SchedulerLimits, StepTokens
from foejax.serving.step_plan import StepPlan

MEMORY_FOR_CACHE = 0.8
"""Of what the weights leave free; the rest is for activations, as in `foejax.serving.engine_config`."""


class SimulatedClock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


class SimulatedDevices:
    """Carries out plans by letting their predicted time pass; every token that it samples is 0."""

    def __init__(self, candidate: Candidate, cluster: Cluster, limits: SchedulerLimits, clock: SimulatedClock) -> None:
        self._candidate, self._cluster, self._limits, self._clock = candidate, cluster, limits, clock

    def run(self, plan: StepPlan) -> StepResult:
        """What the plan's step would sample, once it is over."""
        step = step_of(plan, self._limits)
        self._clock.sleep(plan.decode_steps * self._candidate.predict(step, self._cluster).seconds)
        decode = [[[0] * row.length for row in rows] for rows in plan.decode]
        return StepResult(StepTokens(decode, [[0] * len(rows) for rows in plan.prefill]), None)


def step_of(plan: StepPlan, limits: SchedulerLimits) -> Step:
    """One step of a plan as the cost model sees it, padding included; of several, the one in their middle."""
    shards = tuple(
        (
            *(Row(1, row.start + row.length // 2) for row in decode),
            *(Row(row.length, row.start) for row in prefill),
        )
        for decode, prefill in zip(plan.decode, plan.prefill, strict=True)
    )
    slots, prompt_rows = limits.max_sequences, 0
    if plan.prefill_length:
        widest = max(map(len, plan.prefill))
        shapes = (rows for rows, length in limits.prefill_shapes if length == plan.prefill_length and rows >= widest)
        prompt_rows = min(shapes)
    else:
        few = max(slots // 8, 1)  # programs are compiled for few sequences and for all
        slots = few if max(map(len, plan.decode)) <= few else slots
    return Step(shards, slots + prompt_rows, slots + prompt_rows * plan.prefill_length)


def simulate_serving(candidate: Candidate, cluster: Cluster, trace: Trace, config: EngineConfig) -> Summary:
    """Latencies of a trace's requests.

    Args:
      config: `prefill_tokens` are of a step over all devices: where token shards have prompts of their own, they share
        them. Its context and cache are replaced by the trace's longest request and by what the memory holds.

    Raises:
      ConfigError: the weights or one request do not fit the devices' memory.
    """
    model, layout = candidate.model, candidate.layout
    shards = layout.num_token_shards
    context = max(len(request.prompt) + request.output_tokens for request in trace.requests)
    most = -(-min(config.max_sequences, len(trace.requests)) // shards)  # blocks that nobody can fill need not be there
    sized = replace(
        config,
        context=context,
        prefill_tokens=max(config.prefill_tokens // shards, 1),
        cache_tokens=min(_cache_tokens(candidate, cluster), shards * most * (context + config.block_size)),
    )
    limits, clock = sized.limits(model, layout), SimulatedClock()
    devices = SimulatedDevices(candidate, cluster, limits, clock)
    engine = Engine(devices, Scheduler(limits), context=context, vocab_size=model.vocab_size, clock=clock)
    return summarise(run_in_process(engine, trace, clock=clock, sleep=clock.sleep))


def _cache_tokens(candidate: Candidate, cluster: Cluster) -> int:
    """Tokens whose keys and values fit beside the weights, over all token shards."""
    model, layout = candidate.model, candidate.layout
    free = cluster.accelerator.memory - weight_bytes(model, layout)
    if free <= 0:
        raise ConfigError(
            f"{candidate.name}: weights of {weight_bytes(model, layout) / 1e9:.1f} GB a device do not fit the "
            f"{cluster.accelerator.memory / 1e9:.0f} GB of {cluster.accelerator.name}: choose more devices"
        )
    heads = model.num_kv_heads // layout.num_token_slices
    token_bytes = 2 * model.num_layers * heads * model.head_dim * ITEMSIZE[model.dtype]
    return int(MEMORY_FOR_CACHE * free / token_bytes) * layout.num_token_shards
