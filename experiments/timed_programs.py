"""The three programs whose steps experiments time, compiled with arguments that do not matter to the time.

They run on any layout, in one process or several, and each step goes on from what the one before returned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import numpy as np
from flax import nnx

from foejax.analysis.comms import lower_forward, lower_train_step
from foejax.config import RunConfig
from foejax.decoding.steps import abstract_decode_inputs, lower_decode_step
from foejax.evaluation.evaluate import split_model
from foejax.models import LanguageModel
from foejax.training.batches import Batch, data_shard, place_batch
from foejax.training.optimizer import make_optimizer
from foejax.training.step import create_train_state
from sharding import Layout
from sharding.races import find_races

Program = Literal["forward", "train_step", "decode_step"]
PROGRAMS: tuple[Program, ...] = get_args(Program)


@dataclass
class TimedProgram:
    """A compiled program and what it runs on.

    Attributes:
      next_carry: from what the last run returned, or `carry` at first, to what this one returns.
    """

    lowered: jax.stages.Lowered
    compiled: jax.stages.Compiled
    next_carry: Callable[[Any], Any]
    carry: Any

    def step(self) -> None:
        """Run once, to the end."""
        self.carry = jax.block_until_ready(self.next_carry(self.carry))


def make_program(program: Program, config: RunConfig, layout: Layout, *, sequences: int, context: int) -> TimedProgram:
    """Compile a program and place its arguments.

    Args:
      program: the logits of a batch of the config, a training step of it, or a decoding step.
      sequences: that decode a token in one step, over all devices.
      context: cache slots of each; a step attends to all of them.

    Raises:
      ValueError: a program that may return wrong sums on simulated devices.
    """
    if program == "forward":
        made = _forward(config, layout)
    elif program == "train_step":
        made = _train_step(config, layout)
    else:
        made = _decode_step(config, layout, sequences, context)
    races = find_races(made.compiled.as_text() or "") if layout.mesh.size > 1 else []
    if races:
        raise ValueError(f"{program} may return wrong sums on simulated devices: {races[0]}")
    return made


def _forward(config: RunConfig, layout: Layout) -> TimedProgram:
    """Logits of all tokens, every data shard with whole parameters."""
    model = LanguageModel.create(config.model, _serving(layout), jax.random.key(0))
    lowered = lower_forward(model, (config.data.batch_size, config.data.sequence_length))
    compiled, state = lowered.compile(), nnx.split(model)[1]
    batch = _batch(config, layout, ("tokens", "positions", "segment_ids"))
    return TimedProgram(lowered, compiled, lambda _: compiled(state, batch), None)


def _train_step(config: RunConfig, layout: Layout) -> TimedProgram:
    """An optimizer step, parameters split over `data`."""
    lowered = lower_train_step(config, layout)
    compiled = lowered.compile()
    _, params, router_state = split_model(LanguageModel.create(config.model, layout, jax.random.key(0)))
    optimizer = make_optimizer(config.training)
    state = create_train_state(params, router_state, optimizer, jax.random.key(1), layout.mesh)
    batch = _batch(config, layout, ("tokens", "targets", "positions", "segment_ids", "loss_weights"))
    return TimedProgram(lowered, compiled, lambda state: compiled(state, batch)[0], state)


def _decode_step(config: RunConfig, layout: Layout, sequences: int, context: int) -> TimedProgram:
    """The last token of every sequence's context; each step writes it anew."""
    model = LanguageModel.create(config.model, _serving(layout), jax.random.key(0))
    lowered = lower_decode_step(model, sequences, slots=context)
    compiled, state = lowered.compile(), nnx.split(model.transformer)[1]
    cache, like_B = abstract_decode_inputs(model, sequences, context)
    random = np.random.default_rng(0)
    tokens_B = _place(random.integers(0, config.model.vocab_size, like_B.shape).astype(np.int32), like_B)
    positions_B = _place(np.full(like_B.shape, context - 1, np.int32), like_B)
    cache = jax.tree.map(lambda leaf: _place(np.zeros(leaf.shape, leaf.dtype), leaf), cache)
    return TimedProgram(lowered, compiled, lambda cache: compiled(state, cache, tokens_B, positions_B)[0], cache)


def _serving(layout: Layout) -> Layout:
    return dataclasses.replace(layout, shard_params=False)


def _place(values: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    """The same values in every process, laid out as `like`."""
    return jax.make_array_from_callback(values.shape, like.sharding, lambda index: values[index])


def _batch(config: RunConfig, layout: Layout, names: tuple[str, ...]) -> Batch:
    """Random tokens, one document a row; of them the rows of this process."""
    shape = config.data.batch_size, config.data.sequence_length
    random = np.random.default_rng(0)
    fields = {
        "tokens": random.integers(0, config.model.vocab_size, shape).astype(np.int32),
        "targets": random.integers(0, config.model.vocab_size, shape).astype(np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        "segment_ids": np.ones(shape, np.int32),
        "loss_weights": np.ones(shape, np.float32),
    }
    sharding = layout.sharding(layout.batch_spec())
    index, count = data_shard(sharding, shape[0])
    own = slice(index * shape[0] // count, (index + 1) * shape[0] // count)
    return place_batch({name: fields[name][own] for name in names}, sharding)
