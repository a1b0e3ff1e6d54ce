"""Step times relative to FoE's, on one and on eight simulated devices; contenders take turns in one process."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.head_parallel.models import model_config
from experiments.head_parallel.results import open_part, write_part
from foejax.analysis.comms import lower_forward, lower_train_step
from foejax.config import RunConfig
from foejax.decoding.steps import abstract_decode_inputs, lower_decode_step
from foejax.evaluation.evaluate import split_model
from foejax.models import LanguageModel
from foejax.training.batches import Batch, place_batch
from foejax.training.optimizer import make_optimizer
from foejax.training.run import make_layout
from foejax.training.step import create_train_state
from sharding import Layout
from sharding.races import find_races

DEVICES = (1, 8)
BASELINE = "foe"


@dataclass(frozen=True)
class Settings:
    """How much is run.

    Attributes:
      turns: steps of each contender, after one more.
      sequences: that decode a token in one step, over all devices.
      context: cache slots of each; a step attends to all of them.
    """

    turns: int = 15
    sequences: int = 512
    context: int = 64
    quick: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)


QUICK = Settings(turns=2, sequences=16, context=8, quick=True)


@dataclass(frozen=True)
class Contender:
    """A model on a layout; `axis` is the mesh axis of all devices."""

    name: str
    model: str
    layout: str
    axis: str


CONTENDERS = (
    Contender("foe", "foe", "foe", "group"),
    Contender("ep", "moe", "ep", "expert"),
    Contender("hp", "mhlmoe", "hp", "group"),
    Contender("fsdp", "mhlmoe", "fsdp", "data"),
)

Step = Callable[[], Any]
"""Runs one step and returns what must be waited for."""


def measure(out: Path, settings: Settings, facts: Mapping[str, Any], devices: tuple[int, ...] = DEVICES) -> None:
    """Race every program that `speed.json` does not hold yet."""
    found = open_part(out, "speed", settings.as_dict(), facts)
    for count in devices:
        # On one device hp and fsdp are the same program.
        contenders = CONTENDERS if count > 1 else CONTENDERS[:3]
        for program in PROGRAMS:
            if any(run["devices"] == count and run["program"] == program for run in found["runs"]):
                continue
            ratios = race({each.name: _prepare(program, each, count, settings) for each in contenders}, settings.turns)
            found["runs"].append({"devices": count, "program": program, "ratios": ratios})
            write_part(out, "speed", found)
            shown = ", ".join(f"{name} {np.median(values):.2f}" for name, values in ratios.items())
            print(f"{program} on {count}: {shown}", flush=True)


def race(steps: Mapping[str, Step], turns: int) -> dict[str, list[float]]:
    """Seconds of each contender over the baseline's in the same turn, turn by turn."""
    for step in steps.values():
        jax.block_until_ready(step())
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        seconds = {}
        for name, step in steps.items():
            started = time.perf_counter()
            jax.block_until_ready(step())
            seconds[name] = time.perf_counter() - started
        for name in steps:
            ratios[name].append(seconds[name] / seconds[BASELINE])
    return ratios


def _prepare(program: str, contender: Contender, devices: int, settings: Settings) -> Step:
    """A compiled program with its arguments, in float32: bfloat16 is emulated on a CPU.

    Raises:
      ValueError: a program that may return wrong sums on simulated devices.
    """
    mesh = {"mesh.layout": contender.layout, f"mesh.{contender.axis}": devices, "mesh.devices": devices}
    config = model_config(contender.model, {"model.dtype": "float32", **mesh}, quick=settings.quick)
    layout = make_layout(config.model, config.mesh)
    compiled, step = PROGRAMS[program](config, layout, settings)
    if devices > 1 and (races := find_races(compiled.as_text() or "")):
        raise ValueError(f"{program} of {contender.name} may return wrong sums on simulated devices: {races[0]}")
    return step


def _forward(config: RunConfig, layout: Layout, settings: Settings) -> tuple[jax.stages.Compiled, Step]:
    """Logits of all tokens of a batch."""
    model = LanguageModel.create(config.model, _serving(layout), jax.random.key(0))
    compiled = lower_forward(model, (config.data.batch_size, config.data.sequence_length)).compile()
    state, batch = nnx.split(model)[1], _batch(config, layout, ("tokens", "positions", "segment_ids"))
    return compiled, lambda: compiled(state, batch)


def _train_step(config: RunConfig, layout: Layout, settings: Settings) -> tuple[jax.stages.Compiled, Step]:
    """An optimizer step; each goes on from the one before."""
    compiled = lower_train_step(config, layout).compile()
    _, params, router_state = split_model(LanguageModel.create(config.model, layout, jax.random.key(0)))
    state = create_train_state(params, router_state, make_optimizer(config.training), jax.random.key(1), layout.mesh)
    batch = _batch(config, layout, ("tokens", "targets", "positions", "segment_ids", "loss_weights"))
    carried = [state]

    def step() -> Any:
        carried[0], metrics = compiled(carried[0], batch)
        return carried[0], metrics

    return compiled, step


def _decode_step(config: RunConfig, layout: Layout, settings: Settings) -> tuple[jax.stages.Compiled, Step]:
    """The last token of every sequence's context; each step writes it anew."""
    model = LanguageModel.create(config.model, _serving(layout), jax.random.key(0))
    compiled = lower_decode_step(model, settings.sequences, slots=settings.context).compile()
    state = nnx.split(model.transformer)[1]
    cache, like_B = abstract_decode_inputs(model, settings.sequences, settings.context)
    drawn_B = np.random.default_rng(0).integers(0, config.model.vocab_size, like_B.shape, np.int32)
    tokens_B = jax.device_put(drawn_B, like_B.sharding)
    positions_B = jax.device_put(np.full(like_B.shape, settings.context - 1, np.int32), like_B.sharding)
    carried = [jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), cache)]

    def step() -> Any:
        carried[0], *rest = compiled(state, carried[0], tokens_B, positions_B)
        return carried[0], rest

    return compiled, step


PROGRAMS = {"forward": _forward, "train_step": _train_step, "decode_step": _decode_step}


def _serving(layout: Layout) -> Layout:
    return dataclasses.replace(layout, shard_params=False)


def _batch(config: RunConfig, layout: Layout, names: tuple[str, ...]) -> Batch:
    """Random tokens, one document a row."""
    shape = config.data.batch_size, config.data.sequence_length
    random = np.random.default_rng(0)
    fields = {
        "tokens": random.integers(0, config.model.vocab_size, shape, np.int32),
        "targets": random.integers(0, config.model.vocab_size, shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "segment_ids": np.ones(shape, np.int32),
        "loss_weights": np.ones(shape, np.float32),
    }
    return place_batch({name: fields[name] for name in names}, layout.sharding(layout.batch_spec()))
