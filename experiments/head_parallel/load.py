"""Load inside the heads with the loss-free bias rule and without it, from an even and from a skewed start."""

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
from foejax.config import RunConfig

SKEW = 10.0
"""Factor on the router's weights of the first k experts of every head, in a skewed start."""


@dataclass(frozen=True)
class Settings:
    """What all runs have in common; `rate` is the bias rule's step where it is on."""

    steps: int = 150
    rate: float = 0.01
    quick: bool = False


QUICK = Settings(steps=4, quick=True)


@dataclass(frozen=True)
class Job:
    """One training run."""

    skewed: bool
    rule: bool
    settings: Settings
    runs: Path


def measure(out: Path, runs: Path, settings: Settings, workers: int, facts: Mapping[str, Any]) -> None:
    """Train what `load.json` does not hold yet."""
    found = open_part(out, "load", asdict(settings), facts)
    done = {(run["skewed"], run["rule"]) for run in found["runs"]}
    jobs = [Job(skewed, rule, settings, runs) for skewed in (False, True) for rule in (False, True)]
    for run in run_jobs(train_one, [job for job in jobs if (job.skewed, job.rule) not in done], workers):
        found["runs"].append(run)
        write_part(out, "load", found)
        print(f"skewed {run['skewed']}, rule {run['rule']}: {run['steps'][-1]:.2f}", flush=True)


def train_one(job: Job) -> dict[str, Any]:
    """Train from the beginning; the run as `load.json` holds it."""
    keep_compiled_programs(job.runs / "compiled")
    from foejax.data import open_dataset
    from foejax.evaluation.evaluate import evaluate
    from foejax.training.loop import train
    from foejax.training.run_folder import read_metrics

    settings = job.settings
    overrides = {
        "mesh.devices": 1,
        "training.num_steps": settings.steps,
        "training.router_bias_rate": settings.rate if job.rule else 0.0,
        "training.eval_every": 0,
        "training.checkpoint_every": 0,
    }
    config = model_config("mhlmoe", overrides, quick=settings.quick)
    folder = job.runs / f"load-{'skewed' if job.skewed else 'even'}-{'rule' if job.rule else 'none'}"
    shutil.rmtree(folder, ignore_errors=True)
    dataset = open_dataset(config.data, vocab_size=config.model.vocab_size)
    if job.skewed:
        save_skewed_start(config, folder)
    result = train(config, folder, progress=False, dataset=dataset)
    loads = heads_loads(evaluate(result.model, dataset).tokens_per_expert, config.model.num_ffn_heads)
    return {
        "skewed": job.skewed,
        "rule": job.rule,
        "validation_loss": result.validation_loss,
        "steps": [round(line["load_imbalance"], 4) for line in read_metrics(folder) if "load_imbalance" in line],
        "largest_over_mean": (loads.max(axis=-1) / loads.mean(axis=-1)).tolist(),
        "smallest_over_mean": (loads.min(axis=-1) / loads.mean(axis=-1)).tolist(),
    }


def heads_loads(tokens_per_expert_LE: np.ndarray, heads: int) -> np.ndarray:
    """Tokens of each expert, [layers, heads, experts of a head]."""
    return tokens_per_expert_LE.reshape(tokens_per_expert_LE.shape[0], heads, -1)


def save_skewed_start(config: RunConfig, folder: Path) -> None:
    """A run at step 0 whose routers prefer the first k experts of every head: their logits are SKEW times as wide."""
    import jax

    from foejax.api import build
    from foejax.evaluation.evaluate import split_model
    from foejax.training.checkpoint import CheckpointStore
    from foejax.training.optimizer import make_optimizer
    from foejax.training.run_folder import CHECKPOINTS
    from foejax.training.step import create_train_state

    model = build(config)
    _, params, router_state = split_model(model)
    params = widen_preferred(params, config.model.experts_per_stack)
    key = jax.random.split(jax.random.key(config.training.seed))[1]
    state = create_train_state(params, router_state, make_optimizer(config.training), key, model.layout.mesh)
    folder.mkdir(parents=True)
    store = CheckpointStore(folder / CHECKPOINTS)
    try:
        store.save(state, step=0, config=config, data_state=None)
    finally:
        store.close()


def widen_preferred(params: Any, preferred: int) -> Any:
    """Parameters whose routers [layers, heads, size, experts] have SKEW times the weights for the first experts."""
    import jax

    from foejax.training.optimizer import parameter_name

    def widen(path: Any, leaf: Any) -> Any:
        return leaf.at[..., :preferred].multiply(SKEW) if parameter_name(path).endswith("w_SKE") else leaf

    return jax.tree_util.tree_map_with_path(widen, params)
