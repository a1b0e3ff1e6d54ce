"""Latency of one forward pass of the whole model over prompts, as the serving engine runs it.

Each pass computes all tokens of some sequences from their first one on, writes the paged cache, and ends with logits
after each sequence's last token. Models and layouts take turns, so that they share whatever else the machine does, and
each is judged by its fastest turn.

Shape letters: R sequences, T tokens of each, B cache blocks of a sequence, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from foejax.models import LanguageModel
from foejax.models.language_model import run_on_mesh
from foejax.models.transformer import Transformer, logits_of
from foejax.serving.paged_cache import PagedCache, Section

_BLOCK_SIZE = 16
Caches = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class ForwardShape:
    """Tokens of one pass: `sequences` of `length` tokens each."""

    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.sequences * self.length


def shapes_by_tokens(most: int) -> list[ForwardShape]:
    """One sequence of 1, 2, 8, 128, ... tokens: those of arXiv 2605.06206, table 9, up to `most`, and `most`."""
    paper = (1, 2, 8, 128, 512, 1024, 2048, 4096, 8192, 12288, 16384, 20480, 24576)
    return [ForwardShape(1, length) for length in sorted({*(size for size in paper if size < most), most})]


def shapes_by_length(tokens: int) -> list[ForwardShape]:
    """`tokens` tokens as one sequence, as two, four, ... down to sequences of 128 tokens."""
    shapes = [ForwardShape(1, tokens)]
    while shapes[-1].length % 2 == 0 and shapes[-1].length > 128:
        shapes.append(ForwardShape(shapes[-1].sequences * 2, shapes[-1].length // 2))
    return shapes[::-1]


class ForwardPass:
    """The compiled pass of one model over one shape. Its mesh runs each data shard's part of the sequences.

    Where sequences are fewer than data shards, some devices compute padding: one sequence is one device's.
    """

    def __init__(self, model: LanguageModel, shape: ForwardShape) -> None:
        """
        Args:
          model: made by `for_inference`.
        """
        layout, config = model.layout, model.config
        shards = layout.num_token_shards
        rows = -(-shape.sequences // shards)
        blocks = -(-shape.length // _BLOCK_SIZE)
        heads = config.num_groups, config.num_kv_heads // config.num_groups
        cache_shape = (shards * config.num_layers * rows * blocks, *heads, _BLOCK_SIZE, config.head_dim)
        self._graphdef, self._params = nnx.split(model.transformer)

        def program(transformer: Transformer, inputs: Any) -> tuple[Caches, jax.Array]:
            (keys, values), tokens_RT, positions_RT, table_RB = jax.tree.map(layout.vary_local, inputs)
            cache = PagedCache(keys, values, (Section(positions_RT, table_RB),), config.num_layers)
            position_N = positions_RT.reshape(-1)
            output = transformer.run_stack_local(
                tokens_RT.reshape(-1), jnp.maximum(position_N, 0), cache, layout, active_tokens=position_N >= 0
            )
            last_R = jnp.arange(1, rows + 1, dtype=jnp.int32) * shape.length - 1
            hidden_RD = transformer.hidden_rows_local(output.streams, last_R, layout)
            logits_RV = logits_of(hidden_RD, transformer.head_local(layout, whole_vocab=False))
            assert isinstance(output.cache, PagedCache)
            return (output.cache.k_XSGCK, output.cache.v_XSGCK), logits_RV

        cache_spec, row_spec = layout.batch_spec(*layout.head_axes), layout.batch_spec(None)
        in_specs = ((cache_spec, cache_spec), row_spec, row_spec, PartitionSpec())
        out_specs = ((cache_spec, cache_spec), layout.logits_spec)

        def run(params: nnx.State, *inputs: Any) -> tuple[Caches, jax.Array]:
            mapped = run_on_mesh(nnx.merge(self._graphdef, params), layout, program, in_specs, out_specs)
            done: tuple[Caches, jax.Array] = mapped(inputs)
            return done

        make = jax.jit(lambda: jnp.zeros(cache_shape, config.dtype), out_shardings=layout.sharding(cache_spec))
        self._caches = make(), make()
        arrays = _sequences(shape, shards, config.vocab_size), _positions(shape, shards), _table(rows, blocks)
        self._inputs = tuple(
            jax.device_put(array, layout.sharding(spec)) for array, spec in zip(arrays, in_specs[1:], strict=True)
        )
        self._compiled = jax.jit(run, donate_argnums=1).lower(self._params, self._caches, *self._inputs).compile()

    def __call__(self) -> jax.Array:
        """Logits [R, V] after the sequences' last tokens, those of padding included."""
        self._caches, logits = self._compiled(self._params, self._caches, *self._inputs)
        return logits


def _sequences(shape: ForwardShape, shards: int, vocab_size: int) -> np.ndarray:
    rows = -(-shape.sequences // shards) * shards
    return np.random.default_rng(0).integers(0, vocab_size, (rows, shape.length), np.int32)


def _positions(shape: ForwardShape, shards: int) -> np.ndarray:
    """Of every token; -1 in rows of padding, which are the last ones of each shard."""
    rows = -(-shape.sequences // shards)
    shard, row = np.divmod(np.arange(rows * shards), rows)
    is_real = row * shards + shard < shape.sequences
    return np.where(is_real[:, None], np.arange(shape.length), -1).astype(np.int32)


def _table(rows: int, blocks: int) -> np.ndarray:
    """Of every shard alike."""
    return np.arange(rows * blocks, dtype=np.int32).reshape(rows, blocks)


def race_forwards(
    models: Mapping[str, LanguageModel],
    shapes: Sequence[ForwardShape],
    *,
    turns: int,
    on_done: Callable[[ForwardShape, dict[str, float]], None] = lambda shape, seconds: None,
) -> list[tuple[ForwardShape, dict[str, float]]]:
    """Seconds of each model's fastest turn at each shape, by name.

    Args:
      on_done: called after each shape.
    """
    found = []
    for shape in shapes:
        passes = {name: ForwardPass(model, shape) for name, model in models.items()}
        best = dict.fromkeys(passes, float("inf"))
        for run in passes.values():
            jax.block_until_ready(run())  # warm
        for _ in range(turns):
            for name, run in passes.items():
                started = time.perf_counter()
                jax.block_until_ready(run())
                best[name] = min(best[name], time.perf_counter() - started)
        found.append((shape, best))
        on_done(shape, best)
    return found
