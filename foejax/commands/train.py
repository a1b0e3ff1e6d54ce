"""`foejax train` and `foejax config`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from foejax.config import RunConfig, load_config


def read_config(options: argparse.Namespace, overrides: dict[str, Any]) -> RunConfig:
    """The config named on the command line; `--devices` counts as `mesh.devices` unless that is given too."""
    devices = {"mesh.devices": options.devices} if options.devices else {}
    return load_config(options.config, devices | overrides)


def run_train(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Train, then say where the run is and how well it did."""
    config = read_config(options, overrides)
    from foejax.training.loop import train

    run_dir = Path(options.run_dir or Path("runs") / Path(options.config).stem)
    result = train(config, run_dir, progress=not options.quiet)
    print(
        f"{run_dir}: step {result.step}, train loss {result.train_loss:.4f}, "
        f"validation loss {result.validation_loss:.4f} ({result.validation_bits_per_byte:.4f} bits per byte), "
        f"{result.tokens_per_second:,.0f} tokens/s"
    )


def run_config(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Print the whole config as YAML."""
    print(yaml.safe_dump(read_config(options, overrides).model_dump(), sort_keys=False), end="")
