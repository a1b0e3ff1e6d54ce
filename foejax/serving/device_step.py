"""One step of the engine as the program of one device, and the state that it keeps there.

The tokens of every slot live on the device: a step reads what it needs, samples, and appends, so that several decoding
steps can follow each other without the host.

Shape letters: Z copies on devices with the same tokens, M slots of this device's shard, H longest sequence,
R rows of a section, D decode rows, P prompt rows, T tokens of a prompt row, B blocks of a sequence, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from foejax.decoding.sampling import RowSampling, sample
from foejax.models.router import SelectFn
from foejax.models.transformer import Transformer, logits_of
from foejax.serving.expert_budget import ExpertSums
from foejax.serving.paged_cache import PagedCache, Section
from foejax.serving.sampling_params import LARGEST_TOP_LOGPROBS
from foejax.serving.token_logprobs import logprobs_of
from sharding import Layout


@struct.dataclass
class DeviceState:
    """What every step changes.

    Attributes:
      k_XSGCK, v_XSGCK: the cache, see `PagedCache`.
      history_ZMH: int32, tokens of the sequence in every slot; each of the devices that hold the same tokens
        keeps its own copy.
    """

    k_XSGCK: jax.Array
    v_XSGCK: jax.Array
    history_ZMH: jax.Array


@struct.dataclass
class SlotSettings:
    """How the sequence in each slot samples.

    Attributes:
      sampling: see `RowSampling`.
      repetition_penalty: 1 is none.
      seed: int32.
    """

    sampling: RowSampling
    repetition_penalty: jax.Array
    seed: jax.Array


class Rows(NamedTuple):
    """Rows of a section as the host sends them; see `step_plan.Row`. A row of length 0 is padding.

    Attributes:
      slot, start, length: int32 [R].
      samples: bool [R].
      table_RB: int32, blocks.
    """

    slot: jax.Array
    start: jax.Array
    length: jax.Array
    samples: jax.Array
    table_RB: jax.Array

    @classmethod
    def unpack(cls, packed_RI: jax.Array) -> Rows:
        """From one array, [R, 4 + B]: so that a step sends one array a section."""
        slot, start, length, samples = (packed_RI[:, column] for column in range(4))
        return cls(slot, start, length, samples != 0, packed_RI[:, 4:])


class Sampled(NamedTuple):
    """What rows sampled; the log-probabilities are those of the model and zeros where nobody asked.

    Attributes:
      tokens: int32 [R].
      logprobs: float32 [R], of the tokens.
      top_tokens, top_logprobs: [R, 20], of the likeliest tokens, best first.
    """

    tokens: jax.Array
    logprobs: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array


class StepOutput(NamedTuple):
    """What a step leaves for the host.

    Attributes:
      sampled: of every row.
      experts: which experts it read.
    """

    sampled: Sampled
    experts: ExpertSums


def decode_local(
    transformer: Transformer,
    state: DeviceState,
    settings: SlotSettings,
    decode: Rows,
    want_logprobs: jax.Array,
    layout: Layout,
    *,
    num_steps: int,
    select_fn: SelectFn | None = None,
) -> tuple[DeviceState, StepOutput]:
    """`num_steps` tokens of every decode row, fields [num_steps, D]; row r takes part in `length[r]` of the steps.

    `select_fn` may take experts out of the choice; see `expert_budget`.
    """

    def step(state: DeviceState, index: jax.Array) -> tuple[DeviceState, StepOutput]:
        rows = _one_token(decode, index)
        return _advance_local(transformer, state, settings, rows, None, want_logprobs, layout, select_fn)

    return jax.lax.scan(step, state, jnp.arange(num_steps, dtype=jnp.int32))


def mixed_local(
    transformer: Transformer,
    state: DeviceState,
    settings: SlotSettings,
    decode: Rows,
    prefill: Rows,
    want_logprobs: jax.Array,
    layout: Layout,
    *,
    prefill_length: int,
) -> tuple[DeviceState, StepOutput]:
    """One token of every decode row and a chunk of every prompt row; fields [1, D + P]."""
    rows, chunks = _one_token(decode, jnp.zeros((), jnp.int32)), (prefill, prefill_length)
    state, output = _advance_local(transformer, state, settings, rows, chunks, want_logprobs, layout)
    return state, jax.tree.map(lambda field: field[None], output)


def _one_token(rows: Rows, step: jax.Array) -> Rows:
    """The rows that take part in a step, each with the token it computes there."""
    return rows._replace(start=rows.start + step, length=(step < rows.length).astype(jnp.int32))


def _advance_local(
    transformer: Transformer,
    state: DeviceState,
    settings: SlotSettings,
    decode: Rows,
    chunks: tuple[Rows, int] | None,
    want_logprobs: jax.Array,
    layout: Layout,
    select_fn: SelectFn | None = None,
) -> tuple[DeviceState, StepOutput]:
    """Run one batch of tokens through the model, sample where rows ask for it, and append to the slots."""
    history_MH = state.history_ZMH[0]
    parts = [(decode, 1)] if chunks is None else [(decode, 1), chunks]
    sections = [_section(rows, length) for rows, length in parts]
    position_N = jnp.concatenate([section.positions_RT.reshape(-1) for section in sections])
    slot_N = jnp.concatenate([jnp.repeat(rows.slot, length) for rows, length in parts])
    rows = jax.tree.map(lambda *fields: jnp.concatenate(fields), *(rows for rows, _ in parts))
    active_N = position_N >= 0
    position_N = jnp.maximum(position_N, 0)
    cache = PagedCache(state.k_XSGCK, state.v_XSGCK, tuple(sections), transformer.config.num_layers)
    output = transformer.run_stack_local(
        history_MH[slot_N, position_N],
        position_N,
        cache,
        layout,
        active_tokens=active_N,
        record_routing=select_fn is not None,
        select_fn=select_fn,
    )
    hidden_RD = transformer.hidden_rows_local(output.streams, _last_tokens(sections, rows), layout)
    logits_RV = layout.gather_vocab_local(
        logits_of(hidden_RD, transformer.head_local(layout, whole_vocab=False)), dim=1
    )
    sampled = _sample(logits_RV, history_MH, settings, rows, want_logprobs)
    end_R = rows.start + rows.length
    slot_R = jnp.where(rows.samples & (rows.length > 0), rows.slot, history_MH.shape[0])
    history_MH = history_MH.at[slot_R, end_R].set(sampled.tokens, mode="drop")
    assert isinstance(output.cache, PagedCache)
    state = DeviceState(output.cache.k_XSGCK, output.cache.v_XSGCK, history_MH[None])
    return state, StepOutput(sampled, ExpertSums.of(output.stats.tokens_SE, output.routing))


def _section(rows: Rows, length: int) -> Section:
    offsets_T = jnp.arange(length, dtype=jnp.int32)[None]
    positions_RT = jnp.where(offsets_T < rows.length[:, None], rows.start[:, None] + offsets_T, -1)
    return Section(positions_RT, rows.table_RB)


def _last_tokens(sections: list[Section], rows: Rows) -> jax.Array:
    """Flat index of the last token of every row."""
    first, firsts = 0, []
    for section in sections:
        count, length = section.positions_RT.shape
        firsts.append(first + length * jnp.arange(count, dtype=jnp.int32))
        first += count * length
    return jnp.concatenate(firsts) + jnp.maximum(rows.length - 1, 0)


def _sample(
    logits_RV: jax.Array, history_MH: jax.Array, settings: SlotSettings, rows: Rows, want_logprobs: jax.Array
) -> Sampled:
    own = jax.tree.map(lambda field_M: field_M[rows.slot], settings)
    end_R = rows.start + rows.length

    def penalised() -> jax.Array:
        history_RH = history_MH[rows.slot]
        inside_RH = jnp.arange(history_RH.shape[1], dtype=jnp.int32)[None] < end_R[:, None]
        row_R1 = jnp.arange(rows.slot.size, dtype=jnp.int32)[:, None]
        nowhere = logits_RV.shape[1]
        seen_RV = jnp.zeros(logits_RV.shape, bool)
        seen_RV = seen_RV.at[row_R1, jnp.where(inside_RH, history_RH, nowhere)].set(True, mode="drop")
        penalty_R1 = own.repetition_penalty[:, None]
        factor_RV = jnp.where(logits_RV > 0, 1 / penalty_R1, penalty_R1)
        return jnp.where(seen_RV, logits_RV * factor_RV, logits_RV)

    chosen_from_RV = jax.lax.cond(jnp.any(own.repetition_penalty != 1), penalised, lambda: logits_RV)
    keys_R = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(own.seed, end_R)
    tokens_R = sample(chosen_from_RV, keys_R, own.sampling)
    return Sampled(tokens_R, *_logprobs(logits_RV, tokens_R, want_logprobs))


def _logprobs(logits_RV: jax.Array, tokens_R: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    count = min(LARGEST_TOP_LOGPROBS, logits_RV.shape[1])

    def nothing() -> tuple[jax.Array, jax.Array, jax.Array]:
        zeros_RV = jnp.zeros_like(logits_RV)
        return zeros_RV[:, 0], jnp.zeros_like(tokens_R, shape=(tokens_R.size, count)), zeros_RV[:, :count]

    return jax.lax.cond(wanted, lambda: logprobs_of(logits_RV, tokens_R, count), nothing)


class SlotLoads(NamedTuple):
    """Sequences that enter slots, as the host sends them to all devices; see `step_plan.SlotLoad`.

    Attributes:
      place: int32 [W], shard * slots of a shard + slot; beyond the last one for none.
      tokens_WH: int32, what the sequence holds so far.
      settings: fields [W].
    """

    place: jax.Array
    tokens_WH: jax.Array
    settings: SlotSettings


def load_local(
    history_ZMH: jax.Array, settings: SlotSettings, loads: SlotLoads, layout: Layout
) -> tuple[jax.Array, SlotSettings]:
    """History and settings with this shard's part of the loads in their slots."""
    slots = history_ZMH.shape[1]
    slot_W = loads.place - slots * layout.token_shard_index_local()
    slot_W = jnp.where((slot_W >= 0) & (slot_W < slots), slot_W, slots)

    def put(field_M: jax.Array, new_W: jax.Array) -> jax.Array:
        return field_M.at[slot_W].set(new_W, mode="drop")

    return put(history_ZMH[0], loads.tokens_WH)[None], jax.tree.map(put, settings, loads.settings)


def state_specs(layout: Layout) -> DeviceState:
    """Partitions of the state: blocks and slots over the token shards, heads as the layout splits them."""
    cache, history = layout.batch_spec(*layout.head_axes), PartitionSpec(layout.copies_axis, layout.token_axes)
    return DeviceState(cache, cache, history)  # type: ignore[arg-type]


def settings_specs(layout: Layout) -> SlotSettings:
    """Partitions of the settings: slots over the token shards."""
    rows = layout.batch_spec()
    return SlotSettings(RowSampling(rows, rows, rows, rows), rows, rows)  # type: ignore[arg-type]
