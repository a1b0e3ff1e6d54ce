"""Prefill and single decoding steps, jitted over the mesh with a key/value cache split by group.

Shape letters: B sequences, T prompt tokens, C cache slots, V vocabulary, L layers, H groups, G key/value heads of a
group, K head size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from foejax.models import LanguageModel
from foejax.models.cache import DenseCache
from foejax.models.language_model import run_on_mesh
from foejax.models.transformer import Transformer, logits_of
from sharding import Layout


def prefill(
    model: LanguageModel, tokens_BT: jax.Array, lengths_B: jax.Array, *, slots: int
) -> tuple[DenseCache, jax.Array]:
    """Run prompts of different lengths, right-padded to T.

    Args:
      tokens_BT: int32; B must be a multiple of the layout's token shards.
      lengths_B: int32, tokens of each prompt, at least 1.
      slots: cache slots per sequence; T at least.

    Returns:
      The cache and the logits [B, V] of each prompt's last token.
    """
    graphdef, state = nnx.split(model.transformer)
    return _prefill(state, tokens_BT, lengths_B, graphdef=graphdef, layout=model.layout, slots=slots)


def decode_step(
    model: LanguageModel, cache: DenseCache, tokens_B: jax.Array, positions_B: jax.Array
) -> tuple[DenseCache, jax.Array]:
    """One token per sequence at its position; returns the cache and the logits [B, V] of the token after it."""
    graphdef, state = nnx.split(model.transformer)
    return _decode_step(state, cache, tokens_B, positions_B, graphdef=graphdef, layout=model.layout)


def lower_decode_step(model: LanguageModel, batch_size: int, *, slots: int | None = None) -> jax.stages.Lowered:
    """The decoding step lowered for `batch_size` sequences; the model may be abstract."""
    graphdef, state = nnx.split(model.transformer)
    cache, tokens_B = abstract_decode_inputs(model, batch_size, slots or model.config.max_seq_len)
    return _decode_step.lower(state, cache, tokens_B, tokens_B, graphdef=graphdef, layout=model.layout)


def abstract_decode_inputs(
    model: LanguageModel, batch_size: int, slots: int
) -> tuple[DenseCache, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of the cache and of the tokens (and positions) [B] of a decoding step."""
    config, layout = model.config, model.layout
    shape = (
        config.num_layers,
        batch_size,
        slots,
        config.num_groups,
        config.num_kv_heads // config.num_groups,
        config.head_dim,
    )
    specs = cache_specs(layout)

    def abstract(shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(spec))

    cache = DenseCache(
        abstract(shape, config.dtype, specs.k_LBCSGK),
        abstract(shape, config.dtype, specs.v_LBCSGK),
        abstract((batch_size, 1), jnp.int32, specs.positions_BT),
    )
    return cache, abstract((batch_size,), jnp.int32, layout.batch_spec())


def cache_specs(layout: Layout) -> Any:
    """Partitions of a cache, as a DenseCache: sequences over the token shards, heads over the groups."""
    kv: Any = PartitionSpec(None, layout.token_axes, None, *layout.head_axes)
    positions: Any = layout.batch_spec(None)
    return DenseCache(kv, kv, positions)


@partial(jax.jit, static_argnames=("graphdef", "layout", "slots"))
def _prefill(
    state: nnx.State,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    *,
    graphdef: nnx.GraphDef[Transformer],
    layout: Layout,
    slots: int,
) -> tuple[DenseCache, jax.Array]:
    def program(transformer: Transformer, inputs: tuple[jax.Array, jax.Array]) -> tuple[DenseCache, jax.Array]:
        tokens, lengths = (layout.vary_local(x) for x in inputs)
        config = transformer.config
        batch, length = tokens.shape
        groups, heads = transformer.local_heads
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], tokens.shape)
        cache = DenseCache.empty(
            num_layers=config.num_layers,
            batch=batch,
            slots=slots,
            groups=groups,
            kv_heads=heads,
            head_dim=config.head_dim,
            dtype=config.dtype,
        )
        cache = jax.tree.map(layout.vary_local, cache.at(positions))
        active = positions < lengths[:, None]
        rows = jnp.arange(batch, dtype=jnp.int32) * length + lengths - 1
        cache, logits = run_cached_local(
            transformer, tokens, layout.vary_local(positions), cache, layout, active=active, rows=rows
        )
        return cache.at(positions), logits

    return run_on_mesh(
        nnx.merge(graphdef, state),
        layout,
        program,
        (layout.batch_spec(None), layout.batch_spec()),
        (cache_specs(layout), layout.logits_spec),
    )((tokens_BT, lengths_B))


@partial(jax.jit, static_argnames=("graphdef", "layout"), donate_argnames=("cache",))
def _decode_step(
    state: nnx.State,
    cache: DenseCache,
    tokens_B: jax.Array,
    positions_B: jax.Array,
    *,
    graphdef: nnx.GraphDef[Transformer],
    layout: Layout,
) -> tuple[DenseCache, jax.Array]:
    def program(
        transformer: Transformer, inputs: tuple[DenseCache, jax.Array, jax.Array]
    ) -> tuple[DenseCache, jax.Array]:
        cache, tokens, positions = jax.tree.map(layout.vary_local, inputs)
        cache, logits = step_local(transformer, cache, tokens, positions, layout)
        return cache.at(inputs[2][:, None]), logits

    return run_on_mesh(
        nnx.merge(graphdef, state),
        layout,
        program,
        (cache_specs(layout), layout.batch_spec(), layout.batch_spec()),
        (cache_specs(layout), layout.logits_spec),
    )((cache, tokens_B, positions_B))


def step_local(
    transformer: Transformer, cache: DenseCache, tokens_B: jax.Array, positions_B: jax.Array, layout: Layout
) -> tuple[DenseCache, jax.Array]:
    """One token per local sequence: the cache with it written, and this device's part of the logits after it."""
    positions = positions_B[:, None]
    rows = jnp.arange(tokens_B.shape[0], dtype=jnp.int32)
    return run_cached_local(
        transformer,
        tokens_B[:, None],
        positions,
        cache.at(positions),
        layout,
        active=jnp.ones_like(positions, bool),
        rows=rows,
    )


def run_cached_local(
    transformer: Transformer,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    cache: DenseCache,
    layout: Layout,
    *,
    active: jax.Array,
    rows: jax.Array,
) -> tuple[DenseCache, jax.Array]:
    """Run tokens through the stack against a cache; logits at the flat rows asked for.

    Each device of a group axis computes its part of the vocabulary.
    """
    output = transformer.run_stack_local(
        tokens_BT.reshape(-1), positions_BT.reshape(-1), cache, layout, active_tokens=active.reshape(-1)
    )
    hidden = transformer.hidden_rows_local(output.streams, rows, layout)
    assert isinstance(output.cache, DenseCache)
    return output.cache, logits_of(hidden, transformer.head_local(layout, whole_vocab=False))
