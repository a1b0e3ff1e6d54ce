"""Text generation: one prefill, then one compiled loop over tokens.

Shape letters: B sequences, T prompt tokens, M new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from foejax.decoding.sampling import RowSampling, Sampling, likeliest, sample
from foejax.decoding.steps import cache_specs, prefill, step_local
from foejax.models import LanguageModel
from foejax.models.cache import DenseCache
from foejax.models.language_model import run_on_mesh
from foejax.models.transformer import Transformer
from sharding import Layout

SMALLEST_LENGTH = 32
"""Prompts and caches are padded to this length times a power of two, so that few shapes are compiled."""


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] = (),
    key: jax.Array | None = None,
) -> list[list[int]]:
    """Continue every prompt by up to `max_new_tokens` tokens, all in one batch.

    A sequence ends at a stop token, which is its last token, or when the model's context is full. Row i draws with
    `fold_in(key, i)`: its tokens do not depend on what shares the batch.

    Args:
      prompts: token ids; lengths may differ.
      sampling: greedy by default.
      key: needed when sampling with a temperature.

    Returns:
      The new token ids of each prompt.

    Raises:
      ValueError: no prompt, an empty one, one with no room left in the context, an id outside the vocabulary, or a
        temperature without a key.
    """
    sampling = sampling or Sampling()
    _check_prompts(prompts, max_new_tokens, model)
    if sampling.temperature > 0 and key is None:
        raise ValueError(f"temperature={sampling.temperature} needs a random key: pass key=jax.random.key(seed)")
    if model.layout.gathers_params:
        model = model.with_layout(replace(model.layout, shard_params=False))
    layout, context = model.layout, model.config.max_seq_len
    batch = len(prompts) + -len(prompts) % layout.num_token_shards
    lengths = np.array([len(prompt) for prompt in prompts] + [1] * (batch - len(prompts)), np.int32)
    padded = np.zeros((batch, _bucket(int(lengths.max()), context)), np.int32)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = prompt
    slots = _bucket(min(max(int(lengths.max()) + max_new_tokens, padded.shape[1]), context), context)
    cache, logits = prefill(model, jnp.asarray(padded), jnp.asarray(lengths), slots=slots)
    base = jax.random.key(0) if key is None else key
    keys = jax.random.key_data(jax.vmap(partial(jax.random.fold_in, base))(jnp.arange(batch)))
    graphdef, state = nnx.split(model.transformer)
    real = np.arange(batch) < len(prompts)
    tokens, counts = _decode_loop(
        state,
        cache,
        logits,
        jnp.asarray(lengths),
        jnp.asarray(real),
        keys,
        graphdef=graphdef,
        layout=layout,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_tokens=tuple(int(token) for token in stop_tokens),
    )
    return [row[:count].tolist() for row, count in zip(np.asarray(tokens), np.asarray(counts), strict=True)][
        : len(prompts)
    ]


@partial(jax.jit, static_argnames=("graphdef", "layout", "max_new_tokens", "sampling", "stop_tokens"))
def _decode_loop(
    state: nnx.State,
    cache: DenseCache,
    logits_BV: jax.Array,
    lengths_B: jax.Array,
    live_B: jax.Array,
    keys_B2: jax.Array,
    *,
    graphdef: nnx.GraphDef[Transformer],
    layout: Layout,
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """New tokens [B, M] and how many of them count [B]; the loop ends when every sequence has."""
    rows = layout.batch_spec()

    def program(transformer: Transformer, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        cache, logits, lengths, live, keys = jax.tree.map(layout.vary_local, inputs)

        def draw(logits: jax.Array, step: jax.Array) -> jax.Array:
            logits = layout.gather_vocab_local(logits, dim=1)
            if sampling.temperature == 0:  # a program without random numbers compiles sooner
                return likeliest(logits)
            step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(jax.random.wrap_key_data(keys), step)
            return sample(logits, step_keys, RowSampling.alike(sampling, logits.shape[0], logits.dtype))

        def append(token: jax.Array, step: jax.Array, live: jax.Array, out: jax.Array, counts: jax.Array):  # type: ignore[no-untyped-def]
            out = out.at[:, step].set(jnp.where(live, token, 0))
            counts = counts + live.astype(jnp.int32)
            full = lengths + step + 1 >= transformer.config.max_seq_len
            live = live & ~full
            if stop_tokens:  # XLA on CPU crashes on a reduction over no stop tokens at all
                live &= jnp.all(token[:, None] != jnp.asarray(stop_tokens, jnp.int32)[None, :], axis=1)
            return live, out, counts, layout.max_over_all_local(jnp.any(live).astype(jnp.int32))

        def body(carry):  # type: ignore[no-untyped-def]
            step, token, live, out, counts, _, cache = carry
            position = jnp.where(live, lengths + step - 1, 0)
            cache, logits = step_local(transformer, cache, token, position, layout)
            token = draw(logits, step)
            live, out, counts, more = append(token, step, live, out, counts)
            return step + 1, token, live, out, counts, more, cache

        def unfinished(carry):  # type: ignore[no-untyped-def]
            return (carry[0] < max_new_tokens) & (carry[5] > 0)

        cache = cache.at(lengths[:, None])
        first = jnp.zeros((), jnp.int32)
        token = draw(logits, first)
        out = layout.vary_local(jnp.zeros((lengths.shape[0], max_new_tokens), jnp.int32))
        live, out, counts, more = append(token, first, live, out, jnp.zeros_like(lengths))
        final = jax.lax.while_loop(unfinished, body, (first + 1, token, live, out, counts, more, cache))
        return layout.agree_local(final[3]), layout.agree_local(final[4])

    in_specs = (cache_specs(layout), layout.logits_spec, rows, rows, layout.batch_spec(None))
    return run_on_mesh(nnx.merge(graphdef, state), layout, program, in_specs, (layout.batch_spec(None), rows))(
        (cache, logits_BV, lengths_B, live_B, keys_B2)
    )


def _bucket(length: int, limit: int) -> int:
    size = SMALLEST_LENGTH
    while size < length:
        size *= 2
    return min(size, limit)


def _check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int, model: LanguageModel) -> None:
    context, vocab = model.config.max_seq_len, model.config.vocab_size
    if not prompts:
        raise ValueError("prompts is empty: give at least one prompt")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} asks for nothing: choose 1 or more")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number} has no tokens: a prompt needs at least one")
        if len(prompt) >= context:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens and the model's context is max_seq_len={context}: "
                f"shorten it to at most {context - 1} tokens"
            )
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise ValueError(f"prompt {number} holds a token id outside the vocabulary of {vocab}: check the tokenizer")
