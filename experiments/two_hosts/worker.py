"""One of the two processes: four simulated devices that compile a case's programs and run them on command.

Started by `experiments.two_hosts.measure` with FOEJAX_COORDINATOR, FOEJAX_NUM_PROCESSES and FOEJAX_PROCESS_ID set.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.serving_bench.line_protocol import answer_commands
from experiments.two_hosts.cases import Case, Sizes, run_config
from foejax.analysis.accounting import account
from foejax.analysis.comms import lower_forward, lower_train_step
from foejax.config import RunConfig, override_config
from foejax.decoding.steps import abstract_decode_inputs, lower_decode_step
from foejax.devices import avoid_broken_reductions
from foejax.evaluation.evaluate import split_model
from foejax.models import LanguageModel
from foejax.training.batches import Batch, data_shard, place_batch
from foejax.training.optimizer import make_optimizer
from foejax.training.run import make_layout
from foejax.training.step import create_train_state
from sharding import Layout, hosts
from sharding.audit import Collective, audit
from sharding.crossing import host_egress_bytes
from sharding.races import find_races


@dataclass
class Prepared:
    """A compiled program and what it runs on.

    Attributes:
      step: from what the last run returned, or `carry` at first, to what this one returns.
    """

    lowered: jax.stages.Lowered
    compiled: jax.stages.Compiled
    step: Callable[[Any], Any]
    carry: Any


class Worker:
    """Answers commands; see `answer_commands`."""

    def __init__(self, case: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
        avoid_broken_reductions()
        hosts.start()
        self._sizes = Sizes(**sizes)
        self._config = run_config(Case(**case), self._sizes)
        self._layout = make_layout(self._config.model, self._config.mesh)
        self._programs: dict[str, Prepared] = {}

    def facts(self) -> dict[str, str]:
        """Versions."""
        return {"python": platform.python_version(), "jax": jax.__version__}

    def prepare(self, program: str) -> dict[str, Any]:
        """Compile a program; what its collectives send, by the audit of this very program.

        Raises:
          ValueError: a program whose bytes are not known before it runs, or that may race.
        """
        make = {"forward": _forward, "train_step": _train_step, "decode_step": _decode_step}[program]
        prepared = self._programs[program] = make(self._config, self._layout, self._sizes)
        races = find_races(prepared.compiled.as_text() or "")
        if races:
            raise ValueError(f"{program} may return wrong sums on simulated devices: {races[0]}")
        collectives = audit(prepared.lowered, self._layout.mesh, compiled=prepared.compiled)
        rows = [_row(each, self._layout, self._host_of_device()) for each in collectives]
        return {"collectives": _merged(rows), "flops": _flops(self._config, self._sizes, self._layout, program)}

    def run(self, program: str) -> tuple[float, float]:
        """Run a step and say when it began and ended, by the clock that all processes of a machine share."""
        prepared = self._programs[program]
        started = time.monotonic()
        prepared.carry = jax.block_until_ready(prepared.step(prepared.carry))
        return started, time.monotonic()

    def _host_of_device(self) -> list[str]:
        names = hosts.host_names()
        return [names[device.process_index] for device in self._layout.mesh.devices.flat]


def _forward(config: RunConfig, layout: Layout, sizes: Sizes) -> Prepared:
    """Logits of all tokens, every data shard with whole parameters."""
    model = LanguageModel.create(config.model, _serving(layout), jax.random.key(0))
    lowered = lower_forward(model, (sizes.rows, sizes.length))
    compiled, state = lowered.compile(), nnx.split(model)[1]
    batch = _batch(config, layout, ("tokens", "positions", "segment_ids"))
    return Prepared(lowered, compiled, lambda _: compiled(state, batch), None)


def _train_step(config: RunConfig, layout: Layout, sizes: Sizes) -> Prepared:
    """An optimizer step, parameters split over `data`."""
    lowered = lower_train_step(config, layout)
    compiled = lowered.compile()
    _, params, router_state = split_model(LanguageModel.create(config.model, layout, jax.random.key(0)))
    optimizer = make_optimizer(config.training)
    state = create_train_state(params, router_state, optimizer, jax.random.key(1), layout.mesh)
    batch = _batch(config, layout, ("tokens", "targets", "positions", "segment_ids", "loss_weights"))
    return Prepared(lowered, compiled, lambda state: compiled(state, batch)[0], state)


def _decode_step(config: RunConfig, layout: Layout, sizes: Sizes) -> Prepared:
    """The last token of every sequence's context; each step writes it anew."""
    model = LanguageModel.create(config.model, _serving(layout), jax.random.key(0))
    lowered = lower_decode_step(model, sizes.sequences, slots=sizes.context)
    compiled, state = lowered.compile(), nnx.split(model.transformer)[1]
    cache, like_B = abstract_decode_inputs(model, sizes.sequences, sizes.context)
    random = np.random.default_rng(0)
    tokens_B = _place(random.integers(0, sizes.vocab_size, like_B.shape).astype(np.int32), like_B)
    positions_B = _place(np.full(like_B.shape, sizes.context - 1, np.int32), like_B)
    cache = jax.tree.map(lambda leaf: _place(np.zeros(leaf.shape, leaf.dtype), leaf), cache)
    return Prepared(lowered, compiled, lambda cache: compiled(state, cache, tokens_B, positions_B)[0], cache)


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


def _row(collective: Collective, layout: Layout, host_of_device: list[str]) -> dict[str, Any]:
    """What one collective sends; with `branch` where it is one of the sizes that an exchange of tokens may take.

    `payload_bytes` and `egress_bytes` are those of all its `arrays`, which the compiler may have put together.

    Raises:
      ValueError: how often it runs is decided while it runs, or it does not travel in the dtype that was written.
    """
    if collective.in_loop_of_unknown_length:
        raise ValueError(f"{collective.op} at {collective.op_name} runs as often as the tokens have it")
    if collective.dtype != collective.compiled_dtype:
        raise ValueError(f"{collective.op} at {collective.op_name} travels as {collective.compiled_dtype}: use float32")
    return {
        "op": collective.op,
        "axes": list(collective.axes),
        "group_size": collective.group_size,
        "count": collective.count,
        "arrays": len(collective.shapes),
        "payload_bytes": collective.payload_bytes,
        "dtype": collective.dtype,
        "egress_bytes": host_egress_bytes(collective, layout.mesh, host_of_device),
    } | ({"branch": int(collective.branches[-1].rpartition(":")[2])} if collective.branches else {})


def _merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Equal rows as one, their counts added."""
    merged: dict[str, dict[str, Any]] = {}
    for row in rows:
        key = str({name: value for name, value in row.items() if name != "count"})
        merged[key] = row | {"count": row["count"] + merged.get(key, {"count": 0})["count"]}
    return list(merged.values())


def _flops(config: RunConfig, sizes: Sizes, layout: Layout, program: str) -> float:
    """Useful floating-point operations of one device in one step; see `foejax.analysis.accounting.Flops`."""
    if program != "decode_step":
        return account(config, layout).step_flops_per_device / (1 if program == "train_step" else 3)
    # A token that sees the whole context costs what the mean one of a sequence of almost twice its length does.
    length = 2 * sizes.context - 1
    changes = {"data.sequence_length": length, "data.batch_size": sizes.sequences, "model.max_seq_len": length}
    return account(override_config(config, changes), layout).step_flops_per_device / (3 * length)


if __name__ == "__main__":
    answer_commands(Worker)
