"""Loss, perplexity and exact bits per byte on a validation split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from foejax.data import Dataset
from foejax.models import LanguageModel
from foejax.training.batches import Batch, HostBatch, data_shard, place_batch
from foejax.training.step import LossFunction


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found.

    Attributes:
      loss: cross-entropy in nats per target token.
      bits_per_byte: bits spent on the targets over the bytes of text they stand for; comparable between tokenisers.
      perplexity: exp(loss).
      tokens_per_expert: float64 [L, E], how often each expert was chosen.
      num_tokens: targets counted.
      num_bytes: bytes of text that these targets stand for.
    """

    loss: float
    bits_per_byte: float
    perplexity: float
    tokens_per_expert: np.ndarray
    num_tokens: int
    num_bytes: int


class Evaluator:
    """Evaluates parameters on batches; compiles once for batches of one shape.

    Args:
      loss_function: `(params, router_state, batch) -> (loss, metrics)`.
      sharding: partition of [B, T] batch arrays.
      token_bytes: int32 [vocab], bytes of text that each token stands for.
    """

    def __init__(self, loss_function: LossFunction, sharding: NamedSharding, token_bytes: np.ndarray) -> None:
        replicated = NamedSharding(sharding.mesh, PartitionSpec())
        self._sharding = sharding
        self._token_bytes = jax.device_put(np.asarray(token_bytes, np.int32), replicated)
        self._step = jax.jit(_eval_step(loss_function), out_shardings=replicated)

    def run(self, params: Any, router_state: Any, batches: Iterable[HostBatch]) -> EvalResult:
        """Evaluate on batches of this process's rows.

        Raises:
          ValueError: the batches hold no target.
        """
        nats, num_tokens, num_bytes, tokens_per_expert = 0.0, 0, 0, np.zeros(())
        for rows in batches:
            batch = place_batch(rows, self._sharding)
            counts = jax.device_get(self._step(params, router_state, batch, self._token_bytes))
            nats += float(counts["nats"])
            num_tokens += round(float(counts["num_tokens"]))
            num_bytes += int(counts["num_bytes"])
            tokens_per_expert = tokens_per_expert + counts["tokens_per_expert"].astype(np.float64)
        if num_tokens == 0 or num_bytes == 0:
            raise ValueError("the validation split holds no target token: raise data.validation_fraction")
        loss = nats / num_tokens
        perplexity = math.exp(loss) if loss < 700 else math.inf
        bits_per_byte = nats / math.log(2) / num_bytes
        return EvalResult(loss, bits_per_byte, perplexity, tokens_per_expert, num_tokens, num_bytes)


def evaluate(model: LanguageModel, dataset: Dataset, limit: int | None = None) -> EvalResult:
    """Evaluate a `LanguageModel` on the validation split of a dataset.

    Args:
      model: arrays on its layout's mesh.
      dataset: its tokenizer is the model's.
      limit: number of validation batches; None takes all.
    """
    graphdef, params, router_state = split_model(model)
    sharding = model.layout.sharding(model.layout.batch_spec())
    token_bytes = pad_token_bytes(dataset.token_byte_lengths, model.config.vocab_size)
    index, count = data_shard(sharding, dataset.config.batch_size)
    batches = dataset.validation_batches(None, limit, index, count)
    return Evaluator(model_loss(graphdef), sharding, token_bytes).run(params, router_state, batches)


def split_model(model: LanguageModel) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Structure, trained parameters and router state (the selection bias) of a model."""
    graphdef, params, router_state = nnx.split(model, nnx.Param, nnx.Variable)  # type: ignore[misc]
    return graphdef, params, router_state


def model_loss(graphdef: nnx.GraphDef, **options: Any) -> LossFunction:
    """The loss of a split `LanguageModel` as a pure function of its parameters; `options` go to its `loss`."""

    def loss_function(params: Any, router_state: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return nnx.merge(graphdef, params, router_state).loss(batch, **options)

    return loss_function


def pad_token_bytes(token_bytes: np.ndarray, vocab_size: int) -> np.ndarray:
    """Byte lengths for every row of the embedding; rows that no token uses stand for nothing."""
    return np.pad(np.asarray(token_bytes, np.int32), (0, vocab_size - len(token_bytes)))


def _eval_step(loss_function: LossFunction) -> Callable[..., dict[str, jax.Array]]:
    def eval_step(params: Any, router_state: Any, batch: Batch, token_bytes_V: jax.Array) -> dict[str, jax.Array]:
        _, metrics = loss_function(params, router_state, batch)
        is_target = batch["loss_weights"] > 0
        num_tokens = batch["loss_weights"].sum()
        return {
            "nats": metrics["cross_entropy"] * num_tokens.astype(metrics["cross_entropy"].dtype),
            "num_tokens": num_tokens,
            "num_bytes": jnp.where(is_target, token_bytes_V[batch["targets"]], 0).sum(),
            "tokens_per_expert": metrics["tokens_per_expert"],
        }

    return eval_step
