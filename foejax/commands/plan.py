"""`foejax plan`: predicted times of a config on a cluster that is not here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from foejax.config import ConfigError, RunConfig, load_config

if TYPE_CHECKING:
    from foejax.analysis.plan import Workload

_CLUSTER = "cluster."


def add_arguments(
    command: argparse.ArgumentParser,
    positive: Callable[[str], int],
    not_negative: Callable[[str], int],
    seconds: Callable[[str], float],
) -> None:
    """What `plan` takes; the three functions read numbers."""
    command.add_argument("config", metavar="CONFIG", help="a YAML file or the name of a packaged config")
    command.add_argument("--cluster", required=True, metavar="CLUSTER", help="for which machines")
    command.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    for name, default, text in (
        ("--sequences", 64, "sequences of the decoding step that is broken down"),
        ("--max-sequences", 256, "sequences that the simulated engine runs at a time"),
        ("--prefill-tokens", 2048, "prompt tokens of one of its steps, over all devices"),
    ):
        command.add_argument(name, type=positive, default=default, metavar="N", help=f"{text}; default: {default}")
    for name, text in (
        ("--tokens", "prompt tokens of the forward pass that is broken down; default: 8192, or the model's context"),
        ("--context", "tokens before each sequence of the decoding step; default: 9000, or the model's context"),
    ):
        command.add_argument(name, type=positive, metavar="N", help=text)
    command.add_argument(
        "--imbalance", type=float, default=1.64, help="most tokens of a device over their mean; default: 1.64"
    )
    command.add_argument(
        "--requests", type=not_negative, default=50, metavar="N", help="of a simulated load; 0: none; default: 50"
    )
    command.add_argument(
        "--interarrival", type=seconds, nargs="+", default=[0.5, 0.75, 1.5], metavar="S", help="mean between requests"
    )
    command.add_argument("--prompt-tokens", default="4000:14000", metavar="LENGTHS", help="N or LOW:HIGH")


def run_plan(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Print the plan as tables or as JSON."""
    from foejax.analysis.cost_model.cluster import read_cluster
    from foejax.analysis.plan import make_plan
    from foejax.analysis.plan_report import format_plan

    changes = {name.removeprefix(_CLUSTER): value for name, value in overrides.items() if name.startswith(_CLUSTER)}
    config = load_config(
        options.config, {name: value for name, value in overrides.items() if not name.startswith(_CLUSTER)}
    )
    plan = make_plan(config, read_cluster(options.cluster, changes), workload_of(options, config))
    print(json.dumps(plan.as_dict(), allow_nan=False) if options.json else format_plan(plan))


def workload_of(options: argparse.Namespace, config: RunConfig) -> Workload:
    """What is to be predicted.

    Raises:
      ConfigError: an imbalance below 1.
      ValueError: lengths of prompts that cannot be read.
    """
    from foejax.analysis.plan import Workload
    from foejax.serving.load.trace import Lengths

    if options.imbalance < 1:
        raise ConfigError(
            f"imbalance={options.imbalance:g}: the fullest device has at least the mean, choose 1 or more"
        )
    default = Workload()
    return replace(
        default,
        tokens=options.tokens or min(default.tokens, config.model.max_seq_len),
        sequences=options.sequences,
        context=options.context or min(default.context, config.model.max_seq_len - 1),
        imbalance=options.imbalance,
        interarrival=tuple(options.interarrival),
        requests=options.requests,
        prompts=Lengths.parse(options.prompt_tokens),
        engine=replace(default.engine, max_sequences=options.max_sequences, prefill_tokens=options.prefill_tokens),
    )
