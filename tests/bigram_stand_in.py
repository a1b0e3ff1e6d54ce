"""A bigram model with the interface of LanguageModel: it compiles in a second, so that tests of the loop are quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from foejax.config import ModelConfig, RunConfig, parse_config
from sharding import Layout

CORPUS_WORDS = "the quick brown fox jumps over a lazy dog while seven wizards box grumpy frogs by moonlight".split()


class BigramModel(nnx.Module):
    """Embedding and head only; "experts" are classes of tokens, and a norm stands for parameters that do not decay."""

    def __init__(self, config: ModelConfig, layout: Layout, key: jax.Array) -> None:
        vocab, width = config.vocab_size, config.hidden_size
        self.config, self.layout = config, layout
        self.embedding_VD = nnx.Param(jax.random.normal(key, (vocab, width)) * 0.02)
        self.head_DV = nnx.Param(jax.random.normal(jax.random.fold_in(key, 1), (width, vocab)) * 0.02)
        self.final_norm_D = nnx.Param(jnp.ones((width,)))
        shape = (config.num_layers, config.num_groups, config.num_experts // config.num_groups)
        self.selection_bias = nnx.Variable(jnp.zeros(shape))

    @classmethod
    def create(cls, config: ModelConfig, layout: Layout, key: jax.Array) -> BigramModel:
        graphdef, state = nnx.split(cls(config, layout, key))
        placed = jax.tree.map(lambda leaf: jax.device_put(leaf, _sharding(leaf, layout)), state)
        return nnx.merge(graphdef, placed)

    @classmethod
    def abstract(cls, config: ModelConfig, layout: Layout) -> BigramModel:
        graphdef, state = nnx.split(nnx.eval_shape(lambda: cls(config, layout, jax.random.key(0))))
        placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(leaf, layout)), state
        )
        return nnx.merge(graphdef, placed)

    def loss(self, batch: Any, **options: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        tokens, targets, weights = batch["tokens"], batch["targets"], batch["loss_weights"]
        hidden = self.embedding_VD[...][tokens] * self.final_norm_D[...][None, None]
        log_probs = jax.nn.log_softmax(hidden @ self.head_DV[...])
        nats = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        loss = (nats * weights).sum() / weights.sum()
        experts = self.config.num_experts
        counts = jnp.stack(
            [jnp.bincount((tokens + layer).ravel() % experts, length=experts) for layer in range(2)]
        ).astype(jnp.float32)
        zero = jnp.zeros((), loss.dtype)
        return loss, {
            "cross_entropy": loss, "load_balance_loss": zero, "z_loss": zero,
            "tokens_per_expert": counts, "num_tokens": weights.sum(),
        }  # fmt: skip


def _sharding(leaf: Any, layout: Layout) -> jax.sharding.NamedSharding:
    """Matrices are split over `data` along their first dimension, as FSDP does."""
    return layout.sharding(jax.sharding.PartitionSpec("data" if leaf.ndim == 2 else None))


def write_corpus(path: Path, num_documents: int) -> Path:
    """Documents of words drawn from a Markov chain, so that there is something to learn."""
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(num_documents):
        word, words = 0, []
        for _ in range(60):
            word = int((word * 3 + rng.integers(0, 3)) % len(CORPUS_WORDS))
            words.append(CORPUS_WORDS[word])
        documents.append('{"text": "' + " ".join(words) + '"}')
    path.write_text("\n".join(documents), encoding="utf-8")
    return path


def tiny_run(corpus: Path, **training: Any) -> RunConfig:
    """A run of seconds; `training` overrides the training section."""
    model = dict(
        vocab_size=320, hidden_size=16, num_layers=2, num_query_heads=2, num_kv_heads=2, head_dim=8, num_experts=4,
        experts_per_token=2, expert_hidden_size=8, num_groups=2, max_seq_len=32, dtype="float32",
    )  # fmt: skip
    data = dict(corpus=str(corpus), tokenizer_vocab_size=300, sequence_length=32, batch_size=8, validation_fraction=0.2)
    defaults = dict(
        num_steps=6, schedule="constant", warmup_steps=1, learning_rate=0.03, eval_every=3, eval_batches=2,
        checkpoint_every=2, router_bias_rate=0.01,
    )  # fmt: skip
    return parse_config(
        dict(model=model, mesh=dict(devices=4, data=2, group=2), data=data, training=defaults | training)
    )
