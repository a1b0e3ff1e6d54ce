"""A config on a cluster that is not here: what each layout's steps take, beside what the paper measured.

Everything is predicted from sizes (`foejax.analysis.cost_model`); nothing is compiled and no model runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from foejax.analysis.cost_model.cluster import Cluster
from foejax.analysis.cost_model.matched import PAPER_IMBALANCE, Candidate, candidates, matched_models
from foejax.analysis.cost_model.paper import (
    FORWARD_SECONDS,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    SERVING,
    Latency,
    fit_paper_engine,
)
from foejax.analysis.cost_model.predict import Prediction
from foejax.analysis.cost_model.serving import simulate_serving
from foejax.analysis.cost_model.step import decode_step, prefill_step
from foejax.analysis.cost_model.training import predict_training_step
from foejax.config import ConfigError, ModelConfig, RunConfig, load_config
from foejax.serving.engine_config import EngineConfig
from foejax.serving.load.latency import Summary
from foejax.serving.load.trace import Lengths, make_trace
from sharding import Layout
from sharding.mesh import MeshSizes


@dataclass(frozen=True)
class Workload:
    """What is predicted.

    Attributes:
      tokens: prompt tokens of the broken-down forward pass, one prompt.
      sequences, context: of the broken-down decoding step.
      imbalance: tokens of the fullest device over their mean, where devices share experts.
      interarrival: mean seconds between requests, each a run of the scheduler.
      requests: of each run; 0 predicts no serving.
      prompts: lengths of the prompts in tokens.
      engine: sizes of the engine; `prefill_tokens` are of a step over all devices.
    """

    tokens: int = 8192
    sequences: int = 64
    context: int = PROMPT_TOKENS
    imbalance: float = PAPER_IMBALANCE
    interarrival: tuple[float, ...] = (0.5, 0.75, 1.5)
    requests: int = 50
    prompts: Lengths = Lengths("uniform", PROMPT_TOKENS - 5000, PROMPT_TOKENS + 5000)
    engine: EngineConfig = EngineConfig(max_sequences=256)


@dataclass(frozen=True)
class Steps:
    """A candidate's predicted steps: one prompt, one token of many sequences, one optimizer step."""

    candidate: Candidate
    prefill: Prediction
    decode: Prediction
    training: Prediction


@dataclass(frozen=True)
class Ratio:
    """How much longer the MoE with expert parallelism takes than FoE, as a product.

    Attributes:
      imbalance: expert parallelism over all devices (`ep`) as it is, over itself in balance.
      spread: that over `ep` among as many devices as `tp_ep` splits heads over, `data` between them; 1 for all of them.
      attention: that over the MoE with its heads split and experts exchanged (`tp_ep`), in balance.
      collectives: that over FoE: all-to-alls, gathers and scatters against all-reduces.
    """

    imbalance: float
    spread: float
    attention: float
    collectives: float

    @property
    def whole(self) -> float:
        """The product."""
        return self.imbalance * self.spread * self.attention * self.collectives


@dataclass(frozen=True)
class ForwardRow:
    """A forward pass of prompts, the last token's logits of each.

    Attributes:
      seconds: predicted, by candidate.
      ratio: None where a layout for it does not fit.
      measured: of the paper, MoE and FoE; None for another model or number of tokens.
    """

    tokens: int
    seconds: dict[str, float]
    ratio: Ratio | None
    measured: tuple[float, float] | None


@dataclass(frozen=True)
class ServingRow:
    """A run of the scheduler: `paper` is mean TTFT, TBT and E2E of the paper, if it has them."""

    interarrival: float
    candidate: str
    engine: str
    summary: Summary
    paper: Latency | None


@dataclass(frozen=True)
class Plan:
    """All that `foejax plan` prints.

    Attributes:
      steps: the config's own layout first.
      left_out: layouts that do not fit, and why.
      forward: tables by title, over tokens.
      paper_cluster: the cluster with the floor and attention of the paper's engine; None for another model.
    """

    config: RunConfig
    cluster: Cluster
    workload: Workload
    steps: list[Steps]
    left_out: dict[str, str]
    forward: dict[str, list[ForwardRow]]
    serving: list[ServingRow] = field(default_factory=list)
    paper_cluster: Cluster | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "model": self.config.model.model_dump(),
            "cluster": self.cluster.model_dump(),
            "imbalance": self.workload.imbalance,
            "paper_cluster": self.paper_cluster and self.paper_cluster.model_dump(),
            "left_out": self.left_out,
            "steps": {
                steps.candidate.name: {
                    "prefill": steps.prefill.as_dict(),
                    "decode": steps.decode.as_dict(),
                    "training": steps.training.as_dict(),
                }
                for steps in self.steps
            },
            "forward": {
                title: [
                    vars(row) | {"ratio": row.ratio and vars(row.ratio) | {"whole": row.ratio.whole}} for row in rows
                ]
                for title, rows in self.forward.items()
            },
            "serving": [vars(row) | {"summary": row.summary.as_dict()} for row in self.serving],
        }


ONE_PROMPT, MANY_PROMPTS, PAPER_ENGINE = "one prompt", "prompts of 2,048 tokens", "one prompt, the paper's engine"
GIVEN, PAPERS = "as given", "the paper's"
"""Engines: the cluster's shares of its peaks, or those that the paper's figures imply."""
_PROMPT_LENGTHS = {ONE_PROMPT: 0, MANY_PROMPTS: 2048, PAPER_ENGINE: 0}


def make_plan(config: RunConfig, cluster: Cluster, workload: Workload = Workload()) -> Plan:
    """Predict everything.

    Raises:
      ValueError: the config's layout does not fit the cluster; a model that does not fit its memory.
    """
    if workload.tokens > config.model.max_seq_len:
        raise ConfigError(
            f"a prompt of {workload.tokens} tokens is longer than model.max_seq_len={config.model.max_seq_len}: choose "
            "fewer tokens, or a longer context"
        )
    found, left_out = candidates(config, cluster, workload.imbalance)
    paper_cluster = None
    if is_papers_model(config.model) and (moe := find(found, "ep")) is not None:
        paper_cluster = fit_paper_engine(cluster, moe)
    forward = {title: _forward_table(found, cluster, config, title) for title in (ONE_PROMPT, MANY_PROMPTS)}
    if paper_cluster is not None:
        forward[PAPER_ENGINE] = _forward_table(found, paper_cluster, config, PAPER_ENGINE)
    plan = Plan(
        config,
        cluster,
        workload,
        [_steps(candidate, config, cluster, workload) for candidate in found],
        left_out,
        forward,
        paper_cluster=paper_cluster,
    )
    if workload.requests:
        clusters = {GIVEN: cluster} | ({PAPERS: paper_cluster} if paper_cluster else {})
        _predict_serving(plan, found, clusters)
    return plan


def is_papers_model(model: ModelConfig) -> bool:
    """Whether it is one of the two models whose latencies the paper gives."""
    return model in matched_models(load_config("foe_7b").model)


def find(found: Sequence[Candidate], kind: str) -> Candidate | None:
    """What stands for a layout in comparisons: of several meshes the first with least of `data`, so that FoE splits a
    single prompt furthest; of expert parallelism the exchange of a copy per expert."""
    fitting = [candidate for candidate in found if candidate.layout.kind == kind]
    if kind in ("ep", "tp", "tp_ep"):
        fitting = [candidate for candidate in fitting if candidate.layout.num_expert_shards > 1]
    if kind == "ep":
        fitting = [candidate for candidate in fitting if candidate.exchange == "copies"]
    return min(fitting, key=lambda candidate: candidate.layout.sizes.data, default=None)


def ratio_parts(found: Sequence[Candidate], cluster: Cluster, tokens: int, length: int) -> Ratio | None:
    """What the ratio of MoE to FoE comes from; None where one of the three layouts is missing."""
    ep, tp_ep, foe = (find(found, kind) for kind in ("ep", "tp_ep", "foe"))
    if ep is None or tp_ep is None or foe is None:
        return None

    def seconds(candidate: Candidate, imbalance: float | None = None) -> float:
        step = prefill_step(tokens, candidate.layout.num_token_shards, length=length)
        return candidate.predict(step, cluster, imbalance=imbalance).seconds

    inner = replace(ep, layout=Layout.abstract("ep", MeshSizes(tp_ep.layout.sizes.data, 1, tp_ep.layout.sizes.group)))
    balanced, near, split = seconds(ep, 1.0), seconds(inner, 1.0), seconds(tp_ep, 1.0)
    return Ratio(seconds(ep) / balanced, balanced / near, near / split, split / seconds(foe))


def _steps(candidate: Candidate, config: RunConfig, cluster: Cluster, workload: Workload) -> Steps:
    shards = candidate.layout.num_token_shards
    trained = config.model_copy(update={"model": candidate.model})
    return Steps(
        candidate,
        candidate.predict(prefill_step(workload.tokens, shards), cluster),
        candidate.predict(decode_step(workload.sequences, workload.context, shards), cluster),
        predict_training_step(
            trained, candidate.layout, cluster, imbalance=candidate.imbalance, exchange=candidate.exchange
        ),
    )


def _forward_table(found: Sequence[Candidate], cluster: Cluster, config: RunConfig, title: str) -> list[ForwardRow]:
    length = _PROMPT_LENGTHS[title]
    of_paper = is_papers_model(config.model)
    rows = []
    for tokens, measured in FORWARD_SECONDS.items():
        if (length and tokens < 2 * length) or max(length, tokens * (not length)) > config.model.max_seq_len:
            continue
        seconds = {}
        for candidate in found:
            step = prefill_step(tokens, candidate.layout.num_token_shards, length=length)
            seconds[candidate.name] = candidate.predict(step, cluster).seconds
        ratio = ratio_parts(found, cluster, tokens, length)
        rows.append(ForwardRow(tokens, seconds, ratio, measured if of_paper else None))
    return rows


def _predict_serving(plan: Plan, found: Sequence[Candidate], clusters: dict[str, Cluster]) -> None:
    """Add a row for every scale, engine and layout worth serving with; or say why requests do not fit the model."""
    model, workload = plan.config.model, plan.workload
    output = Lengths("fixed", OUTPUT_TOKENS)
    traces = [
        make_trace(workload.requests, scale, output, seed=0, prompt=workload.prompts, vocab_size=model.vocab_size)
        for scale in workload.interarrival
    ]
    longest = max(len(request.prompt) + OUTPUT_TOKENS for trace in traces for request in trace.requests)
    if longest > model.max_seq_len:
        plan.left_out["serving"] = (
            f"requests of up to {longest:,} tokens are longer than model.max_seq_len={model.max_seq_len}: choose "
            "shorter prompts"
        )
        return
    raced = [candidate for kind in ("ep", "tp_ep") if (candidate := find(found, kind)) is not None]
    raced += [candidate for candidate in found if candidate.layout.kind in ("foe", "hp")]
    for trace, (engine, cluster), candidate in itertools.product(traces, clusters.items(), raced):
        summary = simulate_serving(candidate, cluster, trace, workload.engine)
        paper = _paper_latency(cluster.hosts, trace.interarrival, candidate) if PAPERS in clusters else None
        plan.serving.append(ServingRow(trace.interarrival, candidate.name, engine, summary, paper))


def _paper_latency(hosts: int, scale: float, candidate: Candidate) -> Latency | None:
    column = {"ep": 0, "foe": 1}.get(candidate.layout.kind)
    measured = SERVING.get((hosts, scale))
    return None if measured is None or column is None else measured[column]
