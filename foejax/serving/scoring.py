"""Log-probabilities of prompts: what a model thinks of a text that somebody else wrote.

A prompt goes through the model as a whole, beside the engine's steps and without its cache: one program, compiled at
the start, for prompts of every length.

Shape letters: P prompts on this device, T tokens of a prompt, N = P * T, M rows of logits at a time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from foejax.models import LanguageModel
from foejax.models.cache import PackedSequences
from foejax.models.language_model import run_on_mesh
from foejax.models.transformer import Transformer, logits_of
from foejax.serving.sampling_params import LARGEST_TOP_LOGPROBS
from foejax.serving.token_logprobs import TokenLogprobs, logprobs_of
from sharding import Layout, to_host

_ROWS_AT_A_TIME = 64
"""Logits of a whole prompt would be larger than the model."""


class PromptScorer:
    """Scores prompts, as many at once as there are parts of the devices that hold sequences of their own."""

    def __init__(self, model: LanguageModel, *, context: int) -> None:
        """`compile` comes next; `context` is the longest prompt."""
        self._layout, self._context = model.layout, context
        self._graphdef, self._params = nnx.split(model.transformer)
        self._length = -(-context // _ROWS_AT_A_TIME) * _ROWS_AT_A_TIME
        self._program: jax.stages.Compiled | None = None

    def compile(self) -> None:
        """Compile the one program."""
        layout, graphdef = self._layout, self._graphdef
        # Devices with the same tokens score alike; where results are gathered, one copy is enough.
        scores = PartitionSpec(layout.copies_axis if jax.process_count() == 1 else None, layout.token_axes)

        def program(transformer: Transformer, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            tokens_PT, lengths_P = jax.tree.map(layout.vary_local, inputs)
            found = score_local(transformer, tokens_PT, lengths_P, layout)
            fields = (field.reshape(1, *tokens_PT.shape, *field.shape[1:]) for field in found)
            return tuple(to_host.readable_local(field, scores) for field in fields)

        def run(params: nnx.State, tokens: jax.Array, lengths: jax.Array) -> Any:
            in_specs = (layout.batch_spec(None), layout.batch_spec())
            out_specs = to_host.readable_spec(scores)
            return run_on_mesh(nnx.merge(graphdef, params), layout, program, in_specs, out_specs)((tokens, lengths))

        self._program = jax.jit(run).lower(self._params, *self._pack([])).compile()

    def score(self, prompts: Sequence[Sequence[int]]) -> list[list[TokenLogprobs]]:
        """Of every prompt the log-probabilities of its tokens from the second one on, given those before."""
        assert self._program is not None, "compile first"
        scores: list[list[TokenLogprobs]] = []
        shards = self._layout.num_token_shards
        for start in range(0, len(prompts), shards):
            batch = prompts[start : start + shards]
            fields = [field[0] for field in to_host.read(self._program(self._params, *self._pack(batch)))]
            for row, prompt in enumerate(batch):
                own, tokens, logprobs = (field[row, : len(prompt) - 1].tolist() for field in fields)
                places = zip(own, map(tuple, tokens), map(tuple, logprobs), strict=True)
                scores.append([TokenLogprobs(*place) for place in places])
        return scores

    def _pack(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.zeros((self._layout.num_token_shards, self._length), np.int32)
        lengths = np.zeros(self._layout.num_token_shards, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        return tokens, lengths


def score_local(
    transformer: Transformer, tokens_PT: jax.Array, lengths_P: jax.Array, layout: Layout
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability of the token after each one [N], and the likeliest tokens there with theirs [N, 20]."""
    positions_T = jnp.arange(tokens_PT.shape[1], dtype=jnp.int32)
    active_PT = positions_T[None] < lengths_P[:, None]
    positions_PT = layout.vary_local(jnp.broadcast_to(positions_T[None], tokens_PT.shape))
    output = transformer.run_stack_local(
        tokens_PT.reshape(-1),
        positions_PT.reshape(-1),
        PackedSequences(positions_PT, active_PT.astype(jnp.int32)),
        layout,
        active_tokens=active_PT.reshape(-1),
    )
    hidden_ND = transformer.hidden_rows_local(output.streams, jnp.arange(tokens_PT.size, dtype=jnp.int32), layout)
    next_N = jnp.roll(tokens_PT, -1, axis=1).reshape(-1)
    head_DV = transformer.head_local(layout, whole_vocab=True)

    def score(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        hidden_MD, next_M = inputs
        return logprobs_of(logits_of(hidden_MD, head_DV), next_M, LARGEST_TOP_LOGPROBS)

    chunks = tokens_PT.size // _ROWS_AT_A_TIME
    split = jax.tree.map(lambda x: x.reshape(chunks, _ROWS_AT_A_TIME, *x.shape[1:]), (hidden_ND, next_N))
    found: tuple[jax.Array, jax.Array, jax.Array] = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(score, split)
    )
    return found
