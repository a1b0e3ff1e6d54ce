"""Loss at matched parameters and tokens: the same small sweep of learning rates for each model, then several seeds."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.head_parallel.jobs import keep_compiled_programs, run_jobs
from experiments.head_parallel.models import CONFIGS, model_config
from experiments.head_parallel.paired import best_rates
from experiments.head_parallel.results import open_part, write_part

SWEEP_SEED = 0
EVALUATIONS = 4
"""Evaluations of a run, the last one at its end."""
WHOLE_SPLIT = 1_000_000
"""More validation batches than there are."""


@dataclass(frozen=True)
class Settings:
    """What all runs have in common.

    Attributes:
      rates: learning rates of the sweep, each one run with SWEEP_SEED.
      seeds: of initial weights, held-out split and order of the data, at the best rate.
    """

    steps: int = 200
    rates: tuple[float, ...] = (0.002, 0.004, 0.008, 0.016)
    seeds: tuple[int, ...] = (1, 2, 3)
    quick: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"steps": self.steps, "rates": list(self.rates), "seeds": list(self.seeds), "quick": self.quick}


QUICK = Settings(steps=4, rates=(0.01, 0.02), seeds=(1, 2), quick=True)


@dataclass(frozen=True)
class Job:
    """One training run."""

    model: str
    rate: float
    seed: int
    settings: Settings
    runs: Path

    @property
    def overrides(self) -> dict[str, Any]:
        """Of the model's config: one device, and nothing that only this run has but rate and seed."""
        return {
            "mesh.devices": 1,
            "data.seed": self.seed,
            "training.seed": self.seed,
            "training.num_steps": self.settings.steps,
            "training.learning_rate": self.rate,
            "training.eval_every": max(1, self.settings.steps // EVALUATIONS),
            "training.eval_batches": WHOLE_SPLIT,
            "training.checkpoint_every": 0,
        }


def measure(out: Path, runs: Path, settings: Settings, workers: int, facts: Mapping[str, Any]) -> None:
    """Train what `loss.json` does not hold yet: the sweep of every model, then its seeds."""
    from foejax.data import open_dataset

    found = open_part(out, "loss", settings.as_dict(), facts)
    for seed in (SWEEP_SEED, *settings.seeds):  # corpus and tokenizer are made once, before processes ask for them
        config = model_config("moe", {"data.seed": seed}, quick=settings.quick)
        open_dataset(config.data, vocab_size=config.model.vocab_size)
    first = Job("", 0.0, SWEEP_SEED, settings, runs)
    _train_missing(
        [replace(first, model=model, rate=rate) for rate in settings.rates for model in CONFIGS], found, out, workers
    )
    best = best_rates(found["runs"], SWEEP_SEED)
    seeds = [replace(first, model=model, rate=best[model], seed=seed) for seed in settings.seeds for model in CONFIGS]
    _train_missing(seeds, found, out, workers)


def _train_missing(jobs: Sequence[Job], found: dict[str, Any], out: Path, workers: int) -> None:
    done = {(run["model"], run["rate"], run["seed"]) for run in found["runs"]}
    missing = [job for job in jobs if (job.model, job.rate, job.seed) not in done]
    for run in run_jobs(train_one, missing, workers):
        found["runs"].append(run)
        write_part(out, "loss", found)
        print(f"{run['model']}, rate {run['rate']:g}, seed {run['seed']}: {run['validation_loss']:.4f}", flush=True)


def train_one(job: Job) -> dict[str, Any]:
    """Train from the beginning; the run as `loss.json` holds it."""
    keep_compiled_programs(job.runs / "compiled")
    from foejax.analysis.accounting import account
    from foejax.training.loop import train
    from foejax.training.run_folder import read_metrics

    config = model_config(job.model, job.overrides, quick=job.settings.quick)
    folder = job.runs / f"{job.model}-{job.rate:g}-{job.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    result = train(config, folder, progress=False)
    counted, lines = account(config, result.model.layout), read_metrics(folder)
    return {
        "model": job.model,
        "rate": job.rate,
        "seed": job.seed,
        "parameters": counted.parameters,
        "active_parameters": counted.active_parameters,
        "tokens": result.step * config.data.batch_size * config.data.sequence_length,
        "validation_loss": result.validation_loss,
        "validation_bits_per_byte": result.validation_bits_per_byte,
        "train_losses": [round(line["loss"], 4) for line in lines if "loss" in line],
        "validation_curve": [[line["step"], round(line["val_loss"], 4)] for line in lines if "val_loss" in line],
    }
