"""Sizes of an engine as a user gives them, and what they come to on a model's devices."""

from __future__ import annotations

from dataclasses import dataclass, fields

import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from foejax.config import ConfigError, ModelConfig
from foejax.serving.expert_budget import ExpertBudget, check_scores
from foejax.serving.scheduler import SchedulerLimits
from sharding import Layout

_CACHE_BYTES_WITHOUT_GPU = 2 << 30
_SHARE_OF_FREE_GPU_MEMORY = 0.8
"""The rest is for the activations of a step."""
_LONG_ROW, _SHORT_ROW = 128, 32
"""Prompt tokens of a row: in longer ones fewer rows read the same keys, and more of a prompt's last row is padding."""


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine; where devices hold different sequences (`data`, `expert`), they share them evenly.

    Attributes:
      max_sequences: sequences that run at the same time; others wait.
      context: longest sequence, prompt and output; 0 is the model's.
      cache_tokens: tokens whose keys and values fit the cache; 0 is as many as `max_sequences` of `context` need, or as
        fit into most of a GPU's free memory (without a GPU: 2 GiB).
      block_size: tokens of a cache block.
      prefill_tokens: prompt tokens of a step, on each part of the devices that holds sequences of its own.
      decode_steps: tokens in a row that sequences decode without the host where nobody waits.
      reuse_prefixes: keep the cache of finished sequences for prompts that begin like them, while there is room.
      score_prompts: be able to tell log-probabilities of prompts, for which one more program is compiled.
      expert_budget: experts of a layer, over all groups or heads, that a step which only decodes may read; 0 is all.
        Split evenly over these and over the devices that share experts; see `expert_budget.py`.
      expert_warm_up: choices of every token inside each group or head that stay whatever the budget says, and may
        exceed it.
      report_experts: say of every step which experts it read; under a budget that takes any out it is always said.
    """

    max_sequences: int = 64
    context: int = 0
    cache_tokens: int = 0
    block_size: int = 16
    prefill_tokens: int = 2048
    decode_steps: int = 8
    reuse_prefixes: bool = True
    score_prompts: bool = False
    expert_budget: int = 0
    expert_warm_up: int = 0
    report_experts: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            least = 0 if isinstance(field.default, bool) or not field.default else 1
            value = getattr(self, field.name)
            if value < least:
                raise ConfigError(f"{field.name}={value}: choose at least {least}")
        if self.expert_warm_up and not self.expert_budget:
            raise ConfigError(
                f"expert_warm_up={self.expert_warm_up} needs a budget to keep choices from: set expert_budget too"
            )

    def context_of(self, model: ModelConfig) -> int:
        """Longest sequence.

        Raises:
          ConfigError: it is longer than the model's.
        """
        if self.context > model.max_seq_len:
            raise ConfigError(
                f"context={self.context} is longer than the model's max_seq_len={model.max_seq_len}: "
                f"choose at most {model.max_seq_len}"
            )
        return self.context or model.max_seq_len

    def expert_budget_of(self, model: ModelConfig, layout: Layout) -> ExpertBudget | None:
        """The budget of each part of a layer's experts; None where it would change nothing.

        Raises:
          ConfigError: a router without scores to sum, fewer experts than a token chooses, or a number that does not
            divide over the parts.
        """
        budget, shards = self.expert_budget, layout.num_expert_shards
        if budget:
            check_scores(model)
        parts = model.num_stacks * shards
        if not budget or budget >= model.num_experts:
            return None
        if budget < model.experts_per_token:
            raise ConfigError(
                f"expert_budget={budget} is less than the experts_per_token={model.experts_per_token} of the model: "
                f"choose at least {model.experts_per_token}"
            )
        if budget % parts:
            field = "num_ffn_heads" if model.num_ffn_heads else "num_groups"
            stacks, devices = f"{field}={model.num_stacks}", f"the {shards} devices that share the experts"
            over = " x ".join([stacks] * (model.num_stacks > 1) + [devices] * (shards > 1))
            raise ConfigError(
                f"expert_budget={budget} is not divisible by {over}: choose a multiple of {parts}, "
                f"up to num_experts={model.num_experts}"
            )
        if self.expert_warm_up >= model.experts_per_stack:
            return None
        return ExpertBudget(budget // parts, self.expert_warm_up, shards)

    def limits(self, model: ModelConfig, layout: Layout) -> SchedulerLimits:
        """Sizes of each part of the devices that holds sequences of its own.

        Raises:
          ConfigError: the cache is too small for one sequence of the context.
        """
        shards, context = layout.num_token_shards, self.context_of(model)
        sequences = -(-self.max_sequences // shards)
        blocks = self._cache_blocks(model, layout, sequences, context)
        if blocks * self.block_size < context:
            there = blocks * self.block_size * shards
            raise ConfigError(
                f"the cache holds {there} tokens, {there // shards} in each of {shards} parts of the devices, and the "
                f"context is {context}: choose a shorter context, or a larger cache_tokens if memory allows"
            )
        return SchedulerLimits(
            num_shards=shards,
            max_sequences=sequences,
            num_blocks=blocks,
            block_size=self.block_size,
            prefill_shapes=_prefill_shapes(min(self.prefill_tokens, sequences * context), context),
            decode_steps=(1, self.decode_steps) if self.decode_steps > 1 else (1,),
            reuse_prefixes=self.reuse_prefixes,
            reuse_outputs=self.expert_budget_of(model, layout) is None,
        )

    def _cache_blocks(self, model: ModelConfig, layout: Layout, sequences: int, context: int) -> int:
        """Blocks of one part of the devices."""
        if self.cache_tokens:
            return self.cache_tokens // layout.num_token_shards // self.block_size
        wanted = sequences * -(-context // self.block_size)
        heads = model.num_kv_heads // layout.num_token_slices
        token_bytes = 2 * model.num_layers * heads * model.head_dim * jnp.dtype(model.dtype).itemsize
        return min(wanted, _memory_for_cache(layout) // (token_bytes * self.block_size))


def _prefill_shapes(num_tokens: int, context: int) -> tuple[tuple[int, int], ...]:
    """All long rows, a quarter of them and so on down to one, and the same tokens as many short rows."""
    rows = -(-num_tokens // min(_LONG_ROW, context))
    length = num_tokens // rows
    shapes = {(max(rows // 4**power, 1), length) for power in range(rows.bit_length())}
    if length >= 2 * _SHORT_ROW:
        shapes.add((num_tokens // _SHORT_ROW, _SHORT_ROW))
    return tuple(sorted(shapes))


def _memory_for_cache(layout: Layout) -> int:
    """Bytes on each device, the same in all processes, which call this together."""
    statistics = [device.memory_stats() if device.platform == "gpu" else None for device in layout.mesh.local_devices]
    free = min((found["bytes_limit"] - found["bytes_in_use"] for found in statistics if found), default=0)
    if not free:
        return _CACHE_BYTES_WITHOUT_GPU // layout.mesh.devices.size
    mebibytes = np.int32(_SHARE_OF_FREE_GPU_MEMORY * free / (1 << 20))
    return int(np.min(multihost_utils.process_allgather(mebibytes))) << 20
