"""`foejax comms` and `foejax info`: a run in numbers, without running it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from foejax.commands.train import read_config
from foejax.config import RunConfig

if TYPE_CHECKING:
    from foejax.analysis.accounting import Account

DEFAULT_DEVICES = 8
"""Devices of `foejax comms` where neither the command line nor the config says: one device has no collectives."""

_TITLES = {
    "forward": "forward pass of one micro-batch, to the logits",
    "decode_step": "decoding step",
    "train_step": "training step",
}


def run_comms(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Print the collectives of the three programs, as tables or as JSON."""
    config = _read_simulated(options, overrides, DEFAULT_DEVICES)
    from foejax.analysis.comms import communication_report, compare_with_formulas
    from sharding.audit import format_table

    report = communication_report(config)
    if options.json:
        print(json.dumps(report))
        return
    print("Bytes are per device and execution, in the dtype as written; wire is what a device sends on a ring.\n")
    for name, rows in report.items():
        print(f"{_TITLES[name]}\n{format_table(rows) if rows else 'no collective'}\n")
    for name, rows in compare_with_formulas(config, report).items():
        if rows:
            print(f"{_TITLES[name]}: collectives against the closed formulas (docs/communication.md)")
            print(_format_comparison(rows) + "\n")


def run_info(options: argparse.Namespace, overrides: dict[str, Any]) -> None:
    """Print parameters, FLOPs and memory, as a table or as JSON."""
    config = _read_simulated(options, overrides, 1)
    from foejax.analysis.accounting import account
    from foejax.training.run import make_layout

    found = account(config, make_layout(config.model, config.mesh))
    print(json.dumps(found.as_dict()) if options.json else _format_account(found, config))


def _read_simulated(options: argparse.Namespace, overrides: dict[str, Any], default: int) -> RunConfig:
    """The config on as many simulated devices as `--devices`, the config or `default` says."""
    config = read_config(options, overrides)
    if options.devices:
        return config
    from foejax.devices import simulate_devices

    sizes = [size for size in (config.mesh.data, config.mesh.group, config.mesh.expert) if size]
    devices = config.mesh.devices or (_product(sizes) if len(sizes) == 3 else default)
    simulate_devices(devices)
    return config.model_copy(update={"mesh": config.mesh.model_copy(update={"devices": devices})})


def _product(sizes: Sequence[int]) -> int:
    data, group, expert = sizes
    return data * group * expert


def _format_comparison(rows: Sequence[Mapping[str, Any]]) -> str:
    from sharding.audit import format_bytes

    lines = []
    for row in rows:
        notes = [row["what"], f"{row['formula']} each"] if row["formula"] else [row["what"]]
        notes += [] if row["branch"] is None else [f"buffers of size {row['branch'] + 1}"]
        useful = row.get("useful_payload_bytes")
        notes += [] if useful is None else [f"{format_bytes(useful)} under uniform routing"]
        lines.append(
            f"  {row['op']} over {' '.join(row['axes'])} of {format_bytes(row['payload_bytes'])} {row['dtype']} "
            f"({'; '.join(notes)}): {row['count']} found, {row['expected_count']} by formula"
        )
    return "\n".join(lines)


def _format_account(found: Account, config: RunConfig) -> str:
    from sharding.audit import format_bytes

    model, flops, memory = config.model, found.flops, found.memory
    kinds = ("parameters", "optimizer", "gradients", "activations")
    stacks = f"{model.num_ffn_heads} heads of experts" if model.num_ffn_heads else f"{model.num_groups} group(s)"
    lines = [
        ("model", f"{stacks}, {model.num_layers} layers, width {model.hidden_size}, "
         f"{model.experts_per_token} of {model.num_experts} experts per token"),
        ("mesh", " x ".join(f"{axis}={size}" for axis, size in found.mesh.items())),
        ("parameters", f"{found.parameters:,} ({found.parameters / 1e9:.3f} B)"),
        ("  of which", ", ".join(f"{name} {count:,}" for name, count in found.parameters_by_part.items())),
        ("active per token", f"{found.active_parameters:,} ({found.active_parameters / 1e9:.3f} B)"),
        ("FLOPs per token", f"{_engineering(flops.forward)} forward, {_engineering(flops.training)} training, "
         f"in sequences of {found.sequence_length:,}"),
        ("  forward", ", ".join(f"{part} {_engineering(value)}" for part, value in dataclasses.asdict(flops).items()
                                if value)),
        ("training step", f"{found.step_tokens:,} tokens, {_engineering(found.step_flops_per_device)} FLOPs/device"),
        ("memory per device", f"{format_bytes(memory.total)} in training with remat={config.training.remat}"),
        ("  of which", ", ".join(f"{kind} {format_bytes(getattr(memory, kind))}" for kind in kinds) + " (estimated)"),
    ]  # fmt: skip
    return "\n".join(f"{name:18} {text}" for name, text in lines)


def _engineering(value: float) -> str:
    """`1.23e9` as `1.23 G`."""
    units = ["", "k", "M", "G", "T", "P"]
    power = min(int(math.log10(max(value, 1.0))) // 3, len(units) - 1)
    return f"{value / 1000**power:.3g} {units[power]}".rstrip()
