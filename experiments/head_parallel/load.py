"""Load inside the heads under the loss-free bias rule, at several step sizes of it and without it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.head_parallel.jobs import keep_compiled_programs, run_jobs
from experiments.head_parallel.models import model_config
from experiments.head_parallel.results import open_part, write_part


@dataclass(frozen=True)
class Settings:
    """What is trained.

    Attributes:
      learning_rate: so high that routers without the rule soon send all tokens to the same experts.
      rates: step sizes of the bias rule, a run each; 0 is without it.
    """

    steps: int = 200
    learning_rate: float = 0.01
    rates: tuple[float, ...] = (0.0, 0.01, 0.1, 0.5)
    quick: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self) | {"rates": list(self.rates)}


QUICK = Settings(steps=4, rates=(0.0, 0.1), quick=True)


@dataclass(frozen=True)
class Job:
    """One training run, which differs from the others in the rate of the bias rule alone."""

    rate: float
    settings: Settings
    runs: Path


def measure(out: Path, runs: Path, settings: Settings, workers: int, facts: Mapping[str, Any]) -> None:
    """Train what `load.json` does not hold yet."""
    found = open_part(out, "load", settings.as_dict(), facts)
    done = {run["rate"] for run in found["runs"]}
    jobs = [Job(rate, settings, runs) for rate in settings.rates if rate not in done]
    for run in run_jobs(train_one, jobs, workers):
        found["runs"].append(run)
        write_part(out, "load", found)
        print(f"bias rate {run['rate']:g}: largest over mean {run['steps'][-1]:.2f}", flush=True)


def train_one(job: Job) -> dict[str, Any]:
    """Train from the beginning; the run as `load.json` holds it."""
    keep_compiled_programs(job.runs / "compiled")
    from foejax.data import open_dataset
    from foejax.evaluation.evaluate import evaluate
    from foejax.training.loop import train
    from foejax.training.run_folder import read_metrics

    overrides = {
        "mesh.devices": 1,
        "training.num_steps": job.settings.steps,
        "training.learning_rate": job.settings.learning_rate,
        "training.router_bias_rate": job.rate,
        "training.eval_every": 0,
        "training.checkpoint_every": 0,
    }
    config = model_config("mhlmoe", overrides, quick=job.settings.quick)
    folder = job.runs / f"load-{job.rate:g}"
    shutil.rmtree(folder, ignore_errors=True)
    dataset = open_dataset(config.data, vocab_size=config.model.vocab_size)
    result = train(config, folder, progress=False, dataset=dataset)
    found = evaluate(result.model, dataset)
    shares_LSE = shares_of_heads(found.tokens_per_expert, config.model.num_ffn_heads)
    return {
        "rate": job.rate,
        "most": config.model.num_experts / config.model.experts_per_token,
        "validation_loss": found.loss,
        "steps": [round(line["load_imbalance"], 4) for line in read_metrics(folder) if "load_imbalance" in line],
        "largest": shares_LSE.max(axis=-1).tolist(),
        "smallest": shares_LSE.min(axis=-1).tolist(),
    }


def shares_of_heads(tokens_per_expert_LE: np.ndarray, heads: int) -> np.ndarray:
    """Tokens of each expert over the mean of its head, [layers, heads, experts of a head]."""
    tokens_LSE = tokens_per_expert_LE.reshape(tokens_per_expert_LE.shape[0], heads, -1)
    shares_LSE: np.ndarray = tokens_LSE / tokens_LSE.mean(axis=-1, keepdims=True)
    return shares_LSE
