"""One optimizer step: gradients over micro-batches, AdamW, the selection-bias update and the figures to log.

Shape letters: A micro-batches, B sequences per step, T tokens, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from foejax.training.batches import Batch
from foejax.training.optimizer import update_selection_bias

LossFunction = Callable[[Any, Any, Batch], tuple[jax.Array, dict[str, jax.Array]]]
"""(params, router_state, batch) -> (loss to minimise, metrics of LanguageModel.loss)"""
Metrics = dict[str, jax.Array]
TrainStep = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]

_MEANS = ("cross_entropy", "load_balance_loss", "z_loss")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a step changes.

    Attributes:
      params: trained parameters.
      router_state: selection bias of loss-free balancing, [L, H, E / H]; not trained by gradient.
      opt_state: state of the optimizer.
      step: optimizer steps taken, int32 scalar.
      key_data: root random key of the run as raw data, uint32 [2]; step n draws from
        `fold_in(wrap_key_data(key_data), n)`.
    """

    params: Any
    router_state: Any
    opt_state: Any
    step: jax.Array
    key_data: jax.Array


def abstract_train_state(
    params: Any, router_state: Any, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of a state: moments lie like their parameters, counters are replicated.

    Args:
      params, router_state: arrays, or `jax.ShapeDtypeStruct`s with shardings.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    opt_state = jax.eval_shape(optimizer.init, params)
    shardings = optax.tree.map_params(
        optimizer.init,
        lambda _, param: param.sharding,
        opt_state,
        params,
        transform_non_params=lambda _: replicated,
    )
    key_data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))

    def place(leaf: Any, sharding: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def keep(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: place(leaf, leaf.sharding), tree)

    return TrainState(
        params=keep(params),
        router_state=keep(router_state),
        opt_state=jax.tree.map(place, opt_state, shardings),
        step=place(jnp.zeros((), jnp.int32), replicated),
        key_data=place(key_data, replicated),
    )


def create_train_state(
    params: Any, router_state: Any, optimizer: optax.GradientTransformation, key: jax.Array, mesh: Mesh
) -> TrainState:
    """The state before the first step, laid out as `abstract_train_state` says."""

    def start(params: Any, router_state: Any, key_data: jax.Array) -> TrainState:
        return TrainState(params, router_state, optimizer.init(params), jnp.zeros((), jnp.int32), key_data)

    abstract = abstract_train_state(params, router_state, optimizer, mesh)
    out_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    key_data = np.asarray(jax.random.key_data(key))
    return jax.jit(start, out_shardings=out_shardings)(params, router_state, key_data)


def make_train_step(
    loss_function: LossFunction,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    mesh: Mesh,
    *,
    accumulation: int = 1,
    router_bias_rate: float = 0.0,
    num_stacks: int = 1,
) -> TrainStep:
    """Compile-once training step `(state, batch) -> (state, metrics)`; the state is donated and keeps its shardings.

    Args:
      loss_function: see `LossFunction`; its metrics hold cross_entropy, load_balance_loss, z_loss (means over the
        weighted tokens) and tokens_per_expert [L, E].
      optimizer: from `make_optimizer`.
      schedule: learning rate by steps taken, for the log.
      state: a state with the shardings to keep.
      mesh: mesh of the state.
      accumulation: A; above 1 the batch is [A, B / A, T] and micro-batches are weighted by their loss weights, so that
        gradient and cross-entropy equal those of the whole batch. (The load-balance loss is not linear in the batch:
        it is the weighted mean over micro-batches.)
      router_bias_rate: step of the loss-free selection-bias update; 0 leaves the bias alone.
      num_stacks: groups or heads with a router each, for the selection-bias update.

    Returns:
      A jitted function. Its metrics are scalars: loss (cross-entropy in nats per token), load_balance_loss, z_loss,
      grad_norm (before the clip), learning_rate, load_imbalance (largest over mean tokens per expert, averaged over
      layers) and num_tokens (loss weights of the batch).
    """
    gradients = _accumulated_gradients(loss_function, accumulation)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, figures = gradients(state.params, state.router_state, batch)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        router_state, tokens_per_expert_LE = state.router_state, figures["tokens_per_expert"]
        if router_bias_rate > 0:
            router_state = jax.tree.map(
                lambda bias: update_selection_bias(
                    bias.reshape(tokens_per_expert_LE.shape), tokens_per_expert_LE, router_bias_rate, num_stacks
                ).reshape(bias.shape),
                router_state,
            )
        metrics = {
            "loss": figures["cross_entropy"],
            "load_balance_loss": figures["load_balance_loss"],
            "z_loss": figures["z_loss"],
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step),
            "load_imbalance": load_imbalance(tokens_per_expert_LE),
            "num_tokens": figures["num_tokens"],
        }
        return TrainState(params, router_state, opt_state, state.step + 1, state.key_data), metrics

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, replicated))


def load_imbalance(tokens_per_expert_LE: jax.Array) -> jax.Array:
    """Tokens of the busiest expert over the mean, averaged over layers; 1 is perfect balance."""
    mean_L = jnp.maximum(tokens_per_expert_LE.mean(axis=-1), 1e-9)
    return jnp.mean(tokens_per_expert_LE.max(axis=-1) / mean_L)


def _accumulated_gradients(
    loss_function: LossFunction, accumulation: int
) -> Callable[[Any, Any, Batch], tuple[Any, Metrics]]:
    """Gradient and metrics of the whole batch, from one micro-batch at a time."""

    def micro_batch(params: Any, router_state: Any, batch: Batch, share: jax.Array) -> tuple[Any, Metrics]:
        def weighted_loss(params: Any) -> tuple[jax.Array, Metrics]:
            loss, metrics = loss_function(params, router_state, batch)
            return loss * share.astype(loss.dtype), metrics

        grads, metrics = jax.grad(weighted_loss, has_aux=True)(params)
        figures = {name: metrics[name] * share.astype(metrics[name].dtype) for name in _MEANS}
        return grads, figures | {"tokens_per_expert": metrics["tokens_per_expert"]}

    def whole_batch(params: Any, router_state: Any, batch: Batch) -> tuple[Any, Metrics]:
        weights = batch["loss_weights"]
        num_tokens = weights.sum()
        if accumulation == 1:
            grads, figures = micro_batch(params, router_state, batch, jnp.ones((), jnp.float32))
            return grads, figures | {"num_tokens": num_tokens}
        share_A = weights.sum(axis=(1, 2)) / jnp.maximum(num_tokens, 1.0)

        def add(total: Any, micro: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, micro_batch(params, router_state, *micro)), None

        first = jax.tree.map(lambda rows: rows[0], (batch, share_A))
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(lambda micro: micro_batch(params, router_state, *micro), first),
        )
        (grads, figures), _ = jax.lax.scan(add, zeros, (batch, share_A))
        return grads, figures | {"num_tokens": num_tokens}

    return whole_batch
