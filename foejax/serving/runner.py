"""Carries plans out on the devices: a few programs, all compiled at the start and none later.

Shape letters: see `device_step.py`; W slot loads of one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from foejax.decoding.sampling import RowSampling
from foejax.models import LanguageModel
from foejax.models.language_model import run_on_mesh
from foejax.models.layers import high_precision
from foejax.models.transformer import Transformer
from foejax.serving.device_step import (
    DeviceState,
    Rows,
    Sampled,
    SlotLoads,
    SlotSettings,
    StepOutput,
    decode_local,
    load_local,
    mixed_local,
    settings_specs,
    state_specs,
)
from foejax.serving.expert_budget import ExpertBudget, ExpertReads, ExpertSums, make_select_fn, read_expert_sums
from foejax.serving.scheduler import SchedulerLimits, StepTokens
from foejax.serving.step_plan import SlotLoad, StepPlan
from foejax.serving.token_logprobs import TokenLogprobs
from sharding import to_host

LOADS = 8
"""Sequences that enter slots in one launch."""


class StepResult(NamedTuple):
    """What a plan's step sampled.

    Attributes:
      tokens: see `StepTokens`.
      logprobs: in the order of `tokens`, those of the decode rows and those of the prompt rows; None where the plan did
        not ask for them.
      experts: which experts the step read; None where the runner was not told to report them.
    """

    tokens: StepTokens
    logprobs: tuple[list[list[list[TokenLogprobs]]], list[list[TokenLogprobs]]] | None
    experts: ExpertReads | None = None


_Output = tuple[Sampled, ExpertSums | None]
"""What a program hands to the host."""


class _Shape(NamedTuple):
    """What is static of a plan, each for one shard."""

    decode_rows: int
    decode_steps: int
    prefill_rows: int
    prefill_length: int


class ModelRunner:
    """A model, its cache and its slots on a mesh."""

    def __init__(
        self,
        model: LanguageModel,
        limits: SchedulerLimits,
        *,
        context: int,
        expert_budget: ExpertBudget | None = None,
        report_experts: bool = False,
    ) -> None:
        """Place the cache; `compile` comes next.

        Args:
          model: its layout has no parameters to gather.
          context: longest sequence, prompt and output.
          expert_budget: of steps that only decode; None reads all experts that tokens choose.
          report_experts: say of every step which experts it read; with a budget it is always said.
        """
        self.layout, self.config, self.limits, self.context = model.layout, model.config, limits, context
        self._select_fn = make_select_fn(expert_budget, model.layout) if expert_budget else None
        self._report_experts = report_experts or expert_budget is not None
        self._graphdef, self._params = nnx.split(model.transformer)
        self._programs: dict[_Shape, jax.stages.Compiled] = {}
        self._load: jax.stages.Compiled | None = None
        self._state, self._settings = self._place()

    @property
    def num_programs(self) -> int:
        """Programs that `compile` makes."""
        return 1 + len(self._shapes())

    def compile(self) -> Iterator[str]:
        """Compile every program a plan can ask for, telling after each which one it was."""
        self._load = self._lower_load().compile()
        yield "slots"
        for shape in self._shapes():
            self._programs[shape] = self._lower(shape).compile()
            chunks = f" and {shape.prefill_rows} x {shape.prefill_length} prompt tokens" if shape.prefill_rows else ""
            yield f"{shape.decode_rows} sequences x {shape.decode_steps} tokens{chunks}"

    def run(self, plan: StepPlan) -> StepResult:
        """Carry a plan out and wait for what it sampled."""
        assert self._load is not None, "compile first"
        for start in range(0, len(plan.loads), LOADS):
            loads = self._pack_loads(plan.loads[start : start + LOADS])
            history, self._settings = self._load(self._state.history_ZMH, self._settings, loads)
            self._state = replace(self._state, history_ZMH=history)
        shape = self._shape_of(plan)
        packed = self._pack_rows(plan, shape)
        self._state, output = self._programs[shape](
            self._params, self._state, self._settings, packed, np.asarray(plan.logprobs)
        )
        sampled, sums = to_host.read(output)
        experts = read_expert_sums(sums, self.layout.num_token_shards_of_experts) if sums is not None else None
        return _read(plan, shape, sampled)._replace(experts=experts)

    def _shapes(self) -> list[_Shape]:
        """Decoding with few and with all slots, each with every number of steps; prompts beside all slots."""
        most = self.limits.max_sequences
        decode = [_Shape(rows, steps, 0, 0) for rows in _row_counts(most) for steps in self.limits.decode_steps]
        return [*decode, *(_Shape(most, 1, rows, length) for rows, length in self.limits.prefill_shapes)]

    def _shape_of(self, plan: StepPlan) -> _Shape:
        if plan.prefill_length:
            widest = max(len(rows) for rows in plan.prefill)
            fitting = (shape for shape in self._shapes() if shape.prefill_length == plan.prefill_length)
            return min(shape for shape in fitting if shape.prefill_rows >= widest)
        widest = max(len(rows) for rows in plan.decode)
        rows = next(count for count in _row_counts(self.limits.max_sequences) if count >= widest)
        return _Shape(rows, plan.decode_steps, 0, 0)

    def _place(self) -> tuple[DeviceState, SlotSettings]:
        """Zeros where the cache and the slots are."""
        config, limits, wide = self.config, self.limits, high_precision(self.config.dtype)
        shards, slots = limits.num_shards, limits.num_shards * limits.max_sequences
        heads = config.num_groups, config.num_kv_heads // config.num_groups
        blocks = shards * config.num_layers * limits.num_blocks, *heads, limits.block_size, config.head_dim
        copies = self.layout.num_token_slices

        def make() -> tuple[DeviceState, SlotSettings]:
            keys = jnp.zeros(blocks, config.dtype)
            return DeviceState(keys, keys, jnp.zeros((copies, slots, self.context + 1), jnp.int32)), _settings(
                (), slots, wide
            )

        specs = state_specs(self.layout), settings_specs(self.layout)
        shardings = jax.tree.map(self.layout.sharding, specs, is_leaf=lambda node: isinstance(node, PartitionSpec))
        placed: tuple[DeviceState, SlotSettings] = jax.jit(make, out_shardings=shardings)()
        return placed

    def _lower_load(self) -> jax.stages.Lowered:
        layout = self.layout
        history, settings = state_specs(layout).history_ZMH, settings_specs(layout)
        mapped = layout.shard_map(
            partial(load_local, layout=layout),
            in_specs=(history, settings, PartitionSpec()),
            out_specs=(history, settings),
        )
        return jax.jit(mapped, donate_argnums=(0, 1)).lower(
            self._state.history_ZMH, self._settings, self._pack_loads(())
        )

    def _lower(self, shape: _Shape) -> jax.stages.Lowered:
        layout, graphdef, states = self.layout, self._graphdef, state_specs(self.layout)
        rows = layout.batch_spec(None)
        in_specs = (states, settings_specs(layout), rows, PartitionSpec())

        def program(transformer: Transformer, inputs: Any) -> tuple[DeviceState, _Output]:
            state, settings, packed, want_logprobs = jax.tree.map(layout.vary_local, inputs)
            decode, prefill = Rows.unpack(packed[: shape.decode_rows]), Rows.unpack(packed[shape.decode_rows :])
            if shape.prefill_length:
                state, output = mixed_local(
                    transformer,
                    state,
                    settings,
                    decode,
                    prefill,
                    want_logprobs,
                    layout,
                    prefill_length=shape.prefill_length,
                )
            else:
                state, output = decode_local(
                    transformer,
                    state,
                    settings,
                    decode,
                    want_logprobs,
                    layout,
                    num_steps=shape.decode_steps,
                    select_fn=self._select_fn,
                )
            return state, self._reported(output)

        def run(params: nnx.State, *inputs: Any) -> tuple[DeviceState, _Output]:
            out_specs = (states, tuple(map(to_host.readable_spec, self._output_specs())))
            mapped = run_on_mesh(nnx.merge(graphdef, params), layout, program, in_specs, out_specs)
            done: tuple[DeviceState, _Output] = mapped(inputs)
            return done

        packed = np.zeros(
            (self.limits.num_shards * (shape.decode_rows + shape.prefill_rows), self._row_width), np.int32
        )
        return jax.jit(run, donate_argnums=1).lower(
            self._params, self._state, self._settings, packed, np.asarray(False)
        )

    def _output_specs(self) -> tuple[PartitionSpec, PartitionSpec]:
        """Partitions of the fields of an `_Output`: [Z, steps, shards * rows, ...] and [parts, steps, layers, H, ...].

        Parts are those of the routed tokens.

        Devices with the same tokens sample alike; where results are gathered, one copy is enough.
        """
        layout = self.layout
        copies = layout.copies_axis if jax.process_count() == 1 else None
        experts = PartitionSpec(layout.routed_token_axes, *layout.group_spec(2))
        return PartitionSpec(copies, None, layout.token_axes), experts

    def _reported(self, output: StepOutput) -> _Output:
        """What leaves the program of one device."""
        sampled_spec, experts_spec = self._output_specs()
        sampled = jax.tree.map(lambda field: to_host.readable_local(field[None], sampled_spec), output.sampled)
        if not self._report_experts:
            return sampled, None
        return sampled, jax.tree.map(
            lambda sums: to_host.readable_local(self.layout.sum_over_group_tokens_local(sums)[None], experts_spec),
            output.experts,
        )

    @property
    def _row_width(self) -> int:
        return 4 + -(-self.context // self.limits.block_size)

    def _pack_rows(self, plan: StepPlan, shape: _Shape) -> np.ndarray:
        """Of every shard the decode rows and then the prompt rows; see `Rows.unpack`."""
        packed = np.zeros((self.limits.num_shards, shape.decode_rows + shape.prefill_rows, self._row_width), np.int32)
        for first, shards in ((0, plan.decode), (shape.decode_rows, plan.prefill)):
            for shard, rows in enumerate(shards):
                for index, row in enumerate(rows, first):
                    packed[shard, index, :4] = row.slot, row.start, row.length, row.samples
                    packed[shard, index, 4 : 4 + len(row.blocks)] = row.blocks
        return packed.reshape(-1, self._row_width)

    def _pack_loads(self, loads: Sequence[SlotLoad]) -> SlotLoads:
        slots = self.limits.max_sequences
        place: Any = np.full(LOADS, self.limits.num_shards * slots, np.int32)
        tokens: Any = np.zeros((LOADS, self.context + 1), np.int32)
        for index, load in enumerate(loads):
            place[index] = load.shard * slots + load.slot
            tokens[index, : len(load.tokens)] = load.tokens
        return SlotLoads(place, tokens, _settings(loads, LOADS, high_precision(self.config.dtype)))


def _settings(loads: Sequence[SlotLoad], count: int, dtype: Any) -> SlotSettings:
    """The settings of `loads`, filled up to `count` with greedy ones."""

    def field(name: str, neutral: float, dtype: Any) -> Any:
        values = [getattr(load, name) for load in loads]
        return np.asarray(values + [neutral] * (count - len(values)), dtype)

    sampling = RowSampling(
        field("temperature", 0, dtype), field("top_k", 0, np.int32), field("top_p", 1, dtype), field("min_p", 0, dtype)
    )
    return SlotSettings(sampling, field("repetition_penalty", 1, dtype), field("seed", 0, np.int32))


def _row_counts(most: int) -> list[int]:
    """Decode rows that programs are compiled for: a few, and all."""
    few = max(most // 8, 1)
    return [few, most] if few < most else [most]


def _read(plan: StepPlan, shape: _Shape, sampled: Sampled) -> StepResult:
    """Sort what came back, fields [Z, steps, shards * rows, ...] with all copies Z alike, by shard and row."""
    width = shape.decode_rows + shape.prefill_rows

    def of_first_copy(field: Any) -> Any:
        return field[0].reshape(field.shape[1], len(plan.decode), width, *field.shape[3:]).tolist()

    def sort(read: Callable[[int, int, int], Any]) -> tuple[Any, Any]:
        decode = [
            [[read(step, shard, index) for step in range(row.length)] for index, row in enumerate(rows)]
            for shard, rows in enumerate(plan.decode)
        ]
        prefill = [
            [read(0, shard, shape.decode_rows + index) for index in range(len(rows))]
            for shard, rows in enumerate(plan.prefill)
        ]
        return decode, prefill

    tokens = of_first_copy(sampled.tokens)
    result = StepTokens(*sort(lambda step, shard, row: tokens[step][shard][row]))
    if not plan.logprobs:
        return StepResult(result, None)
    own, top_tokens, top_logprobs = map(of_first_copy, sampled[1:])

    def read_logprobs(step: int, shard: int, row: int) -> TokenLogprobs:
        top = top_tokens[step][shard][row], top_logprobs[step][shard][row]
        return TokenLogprobs(own[step][shard][row], *map(tuple, top))

    return StepResult(result, sort(read_logprobs))
