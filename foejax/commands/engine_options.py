"""Options of the commands that run an engine; the meaning of each is that of the field in `EngineConfig`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foejax.serving.engine_config import EngineConfig

# name, least value, default, help. `EngineConfig` itself is not imported for its defaults: it would bring JAX along.
_OPTIONS = (
    ("max_sequences", 1, 64, "sequences that run at the same time"),
    ("context", 0, 0, "longest sequence, prompt and output; 0 is the model's"),
    ("cache_tokens", 0, 0, "tokens that the cache holds; 0 is as many as fit"),
    ("prefill_tokens", 1, 2048, "prompt tokens of a step, for each part of the devices with sequences of its own"),
    ("decode_steps", 1, 8, "tokens in a row that are decoded where nobody waits"),
    ("expert_budget", 0, 0, "experts of a layer that a step which only decodes may read; 0 is all"),
    ("expert_warm_up", 0, 0, "choices of every token inside each group or head that stay whatever the budget says"),
)


def add_engine_options(
    command: argparse.ArgumentParser, positive: Callable[[str], int], not_negative: Callable[[str], int]
) -> None:
    """Add them; the two functions read numbers."""
    for name, least, default, text in _OPTIONS:
        command.add_argument(
            f"--{name.replace('_', '-')}",
            type=positive if least else not_negative,
            default=default,
            metavar="N",
            help=f"{text}; default: {default}",
        )


def engine_config_of(options: argparse.Namespace, **others: Any) -> EngineConfig:
    """The sizes that the options give, with `others` set beside them.

    Raises:
      ConfigError: options that contradict each other.
    """
    from foejax.serving.engine_config import EngineConfig

    return EngineConfig(**{name: getattr(options, name) for name, *_ in _OPTIONS}, **others)
