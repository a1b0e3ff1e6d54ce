"""AdamW with warm-up, decay only where it belongs, and the loss-free update of the router's selection bias.

Shape letters: L layers, E experts, H groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import optax

from foejax.config import TrainingConfig


def learning_rate_schedule(config: TrainingConfig) -> optax.Schedule:
    """Learning rate as a function of the number of steps already taken.

    Step n (counted from 1) of the warm-up uses `learning_rate * n / warmup_steps`, so that no step is spent at 0.
    wsd then stays at the peak and falls linearly after `decay_start_step`; cosine falls from the end of the warm-up.
    Both reach `final_learning_rate_fraction` of the peak at the last step.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_learning_rate_fraction
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    if config.schedule == "wsd":
        decay_steps = max(config.num_steps - config.decay_start_step, 1)
        parts = [warmup, optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay_steps)]
        joined = optax.join_schedules(parts, [config.warmup_steps, config.decay_start_step])
    elif config.schedule == "cosine":
        decay_steps = max(config.num_steps - config.warmup_steps, 1)
        decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_learning_rate_fraction)
        joined = optax.join_schedules([warmup, decay], [config.warmup_steps])
    else:
        joined = optax.join_schedules([warmup, optax.constant_schedule(peak)], [config.warmup_steps])

    def schedule(steps_taken: jax.Array) -> jax.Array:
        with _default_promotion():
            return jnp.asarray(joined(steps_taken + 1), jnp.float32)

    return schedule


def parameter_name(path: tuple[Any, ...]) -> str:
    """Dotted name of a leaf of a (nested) parameter tree, without the box that nnx puts around arrays."""
    return ".".join(path_names(path))


def path_names(path: tuple[Any, ...]) -> list[str]:
    """Names along a pytree path; nnx's `.value` at the end is left out."""
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    is_boxed = bool(path) and isinstance(path[-1], jax.tree_util.GetAttrKey) and names[-1] == "value"
    return names[:-1] if is_boxed else names


def is_decayed(name: str) -> bool:
    """Whether the parameter with this dotted name gets weight decay: every matrix does, norms and biases do not.

    The name decides because stacking layers and groups adds axes to the shape of a norm. Embedding, head and router are
    matrices and decay like the others, as in the paper's training engine.
    """
    last = name.rsplit(".", 1)[-1]
    return "norm" not in last and "bias" not in last


def decay_mask(params: Any) -> Any:
    """Tree of booleans: which parameters get weight decay."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_decayed(parameter_name(path)), params)


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) behind a clip by the global gradient norm.

    The moments have the dtype of the parameters, which are at least float32.
    """
    adamw = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.adam_eps),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(learning_rate_schedule(config)),
    )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with _default_promotion():
            return adamw.update(updates, state, params)

    return optax.GradientTransformation(adamw.init, update)


def update_selection_bias(
    bias_LE: jax.Array, tokens_per_expert_LE: jax.Array, rate: float, num_stacks: int
) -> jax.Array:
    """Loss-free load balancing: raise the selection bias of experts below the mean load, lower it above.

    `bias += rate * (u - mean u)` with `u = sign(mean load - load)` (Wang et al., arXiv 2408.15664, used by DeepSeek-V3;
    the mean, which no choice sees, is taken off as in arXiv 2602.04870, so that biases do not drift).
    Every group or head chooses among its own block of E / S experts, so means are taken within each block.

    Args:
      bias_LE: selection bias, [L, E].
      tokens_per_expert_LE: tokens each expert received in the last step, [L, E].
      rate: size of one update.
      num_stacks: S; divides E.
    """
    num_layers, num_experts = bias_LE.shape
    loads_LSE = tokens_per_expert_LE.astype(bias_LE.dtype).reshape(num_layers, num_stacks, num_experts // num_stacks)
    below_LSE = jnp.sign(loads_LSE.mean(axis=-1, keepdims=True) - loads_LSE)
    below_LSE = below_LSE - below_LSE.mean(axis=-1, keepdims=True)
    return bias_LE + jnp.asarray(rate, bias_LE.dtype) * below_LSE.reshape(num_layers, num_experts)


@contextmanager
def _default_promotion() -> Iterator[None]:
    """optax relies on JAX's default promotion; the library around it also works under the strict one."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
