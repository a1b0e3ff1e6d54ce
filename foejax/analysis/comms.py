"""Which collectives a run's programs need: forward pass, decoding step, training step.

The programs are lowered and compiled from shapes; no parameter is allocated and nothing runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from foejax.analysis.expected_collectives import expected_collectives
from foejax.config import RunConfig
from foejax.decoding import lower_decode_step
from foejax.evaluation.evaluate import split_model
from foejax.models import LanguageModel
from foejax.training.optimizer import make_optimizer
from foejax.training.run import make_layout, train_step_of
from foejax.training.step import abstract_train_state
from sharding import Layout
from sharding.audit import audit, summarize
from sharding.forward_pass import compare_with_audit

DECODE_SEQUENCES = 8
"""Sequences of the audited decoding step on every token shard."""

Rows = list[dict[str, Any]]


Program = Literal["forward", "decode_step", "train_step"]
PROGRAMS: tuple[Program, ...] = ("forward", "decode_step", "train_step")


def communication_report(
    config: RunConfig, devices: int = 0, *, programs: Sequence[Program] = PROGRAMS
) -> dict[str, Rows]:
    """Collectives of a run's programs, as rows of `sharding.audit.summarize`.

    - `forward`: logits of one micro-batch (`data.batch_size / training.gradient_accumulation` sequences of
      `data.sequence_length`), with whole parameters on every data shard, as in evaluation and prefill.
    - `decode_step`: one new token for DECODE_SEQUENCES sequences on every token shard.
    - `train_step`: one optimizer step, micro-batches and parameter shards as `train` has them.

    Args:
      devices: overrides `mesh.devices`; 0 leaves it.
      programs: which of them to compile.

    Raises:
      ConfigError: the mesh does not fit the devices or the model.
    """
    layout = _layout(config, devices)
    serving = dataclasses.replace(layout, shard_params=False)
    model = LanguageModel.abstract(config.model, serving)
    lower: dict[str, Callable[[], jax.stages.Lowered]] = {
        "forward": lambda: lower_forward(model, _micro_batch(config)),
        "decode_step": lambda: _lower_decode_step(config, model),
        "train_step": lambda: lower_train_step(config, layout),
    }
    return {name: summarize(audit(lower[name](), layout.mesh)) for name in programs}


def compare_with_formulas(config: RunConfig, report: Mapping[str, Rows], devices: int = 0) -> dict[str, Rows]:
    """The audited forward pass and decoding step beside the closed formulas of `sharding.forward_pass`.

    Returns:
      Rows of `compare_with_audit` for both programs; none for a layout without collectives (fsdp, or one device).
    """
    layout = _layout(config, devices)
    rows, length = _micro_batch(config)
    tokens = -(-rows // layout.num_token_shards) * length
    expected = {
        "forward": expected_collectives(config.model, layout, tokens),
        "decode_step": expected_collectives(config.model, layout, DECODE_SEQUENCES, logits_rows=DECODE_SEQUENCES),
    }
    return {name: compare_with_audit(formulas, report[name]) for name, formulas in expected.items()}


def lower_forward(model: LanguageModel, shape: tuple[int, int]) -> jax.stages.Lowered:
    """The forward pass to the logits, lowered for a batch of this shape [B, T]; the model may be abstract."""
    graphdef, state = nnx.split(model)

    def forward(state: nnx.State, batch: dict[str, jax.Array]) -> jax.Array:
        return nnx.merge(graphdef, state).logits(batch)

    names = ("tokens", "positions", "segment_ids")
    return jax.jit(forward).lower(state, _abstract_batch(names, shape, model.layout))


def lower_train_step(config: RunConfig, layout: Layout) -> jax.stages.Lowered:
    """One optimizer step as `train` compiles it, lowered from shapes."""
    model = LanguageModel.abstract(config.model, layout)
    graphdef, params, router_state = split_model(model)
    optimizer = make_optimizer(config.training)
    state = abstract_train_state(params, router_state, optimizer, layout.mesh)
    step = train_step_of(config, graphdef, optimizer, state, layout)
    names = ("tokens", "targets", "positions", "segment_ids", "loss_weights")
    batch = _abstract_batch(names, _micro_batch(config), layout, config.training.gradient_accumulation)
    return step.lower(state, batch)  # type: ignore[attr-defined]


def count_by_op(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Executions of each operation in one run of a program."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["op"]] = counts.get(row["op"], 0) + row["count"]
    return counts


def _layout(config: RunConfig, devices: int) -> Layout:
    mesh = config.mesh.model_copy(update={"devices": devices}) if devices else config.mesh
    return make_layout(config.model, mesh)


def _micro_batch(config: RunConfig) -> tuple[int, int]:
    return config.data.batch_size // config.training.gradient_accumulation, config.data.sequence_length


def _lower_decode_step(config: RunConfig, model: LanguageModel) -> jax.stages.Lowered:
    sequences = DECODE_SEQUENCES * model.layout.num_token_shards
    return lower_decode_step(model, sequences, slots=config.data.sequence_length)


def _abstract_batch(
    names: Sequence[str], shape: tuple[int, int], layout: Layout, accumulation: int = 1
) -> dict[str, jax.ShapeDtypeStruct]:
    """Batch fields [B, T], or [A, B, T] with gradient accumulation, rounded up to whole rows for every token shard."""
    rows, length = shape
    rows += -rows % layout.num_token_shards
    leading = (accumulation,) if accumulation > 1 else ()
    spec = jax.sharding.PartitionSpec(*(None for _ in leading), *layout.batch_spec())
    sharding = layout.sharding(spec)
    return {
        name: jax.ShapeDtypeStruct(
            (*leading, rows, length), jnp.float32 if name == "loss_weights" else jnp.int32, sharding=sharding
        )
        for name in names
    }
