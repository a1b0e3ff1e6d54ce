"""How real routing falls on devices: local activation rate and load discrepancy of trained models on held-out text.

    python -m experiments.load_balance RUN [RUN ...] --out experiments/results/load_balance

RUN is a run folder (`foejax train`, `make demo`). The models run on one device; where their tokens and experts would be
on eight is worked out from the routing. Writes load_balance.md and load_balance.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import foejax
from foejax.analysis.load_balance import LoadBalance, load_balance, routing_of
from foejax.config import ModelConfig
from foejax.data import open_dataset
from foejax.serving.load.report import table
from foejax.training.run_folder import TOKENIZER
from sharding.mesh import LayoutKind, MeshSizes

DEVICES = 8
PAPER = {("foe", 1): "1.00, 1.00", ("ep", DEVICES): "-, 1.64"}
"""Local activation rate and load discrepancy on eight devices in arXiv 2605.06206, Fig. 4."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every run and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--batches", type=int, default=8, help="of held-out text, each a forward pass; default: 8")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args(argv)
    rows = [row for run in options.runs for row in measure(run, options.batches)]
    words = ["python", "-m", "experiments.load_balance", *(sys.argv[1:] if argv is None else argv)]
    write_report(options.out, rows, shlex.join(words))
    print((options.out / "load_balance.md").read_text(encoding="utf-8"))


def measure(run: Path, batches: int) -> Iterator[dict[str, Any]]:
    """One row for each layout of a run's model: means over the batches."""
    loaded = foejax.load(run, devices=1)
    data = loaded.config.data.model_copy(update={"tokenizer": str(run / TOKENIZER)})
    dataset = open_dataset(data, vocab_size=loaded.config.model.vocab_size)
    traces = [routing_of(loaded.model, batch) for batch in dataset.validation_batches(limit=batches)]
    model = loaded.config.model
    for kind, sizes in layouts_of(model):
        found = [load_balance(*trace, kind, sizes, model.num_experts) for trace in traces]
        axes = " x ".join(f"{axis}={size}" for axis, size in sizes._asdict().items() if size > 1)
        yield {
            "run": run.name,
            "step": loaded.step,
            "groups": model.num_groups,
            "heads": model.num_ffn_heads,
            "experts": model.num_experts,
            "experts_per_token": model.experts_per_token,
            "layers": model.num_layers,
            "layout": kind,
            "mesh": axes,
            "expert_axis": sizes.expert,
            "batches": len(found),
            "tokens": int(traces[0][1][0, 0, :, 0].size),
        } | _means(found)


def layouts_of(model: ModelConfig) -> list[tuple[LayoutKind, MeshSizes]]:
    """Those over DEVICES devices that fit the model, and FoE's groups, or heads of experts, on two devices each."""
    groups, experts = model.num_stacks, model.num_experts // model.num_stacks
    if model.num_ffn_heads or groups > 1:
        spread = [MeshSizes(1, groups, size) for size in (1, 2) if experts % size == 0]
        return [("hp" if model.num_ffn_heads else "foe", sizes) for sizes in spread]
    found: list[tuple[LayoutKind, MeshSizes]] = [("ep", MeshSizes(1, 1, DEVICES)), ("tp_ep", MeshSizes(1, DEVICES, 1))]
    return found if experts % DEVICES == 0 else []


def _means(found: Sequence[LoadBalance]) -> dict[str, float]:
    names = [field.name for field in dataclasses.fields(LoadBalance)]
    return {name: float(np.mean([getattr(balance, name) for balance in found])) for name in names}


def write_report(out: Path, rows: Sequence[dict[str, Any]], command: str) -> None:
    """load_balance.json and load_balance.md."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "load_balance.json").write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")
    header = ["run", "layout", "local activation rate", "tokens: most / median", "rows: most / median"]
    header += ["rows, worst layer", "rows: most / mean", "experts: most / median", "paper: rate, discrepancy"]
    body = [
        [
            f"{row['run']}, step {row['step']}",
            f"{row['layout']} {row['mesh']}",
            f"{row['local_activation_rate']:.3f}",
            f"{row['token_discrepancy']:.2f}",
            f"{row['row_discrepancy']:.2f}",
            f"{row['most_row_discrepancy']:.2f}",
            f"{row['row_imbalance']:.2f}",
            f"{row['expert_discrepancy']:.2f}",
            PAPER.get((row["layout"], row["expert_axis"]), ""),
        ]
        for row in rows
    ]
    first = rows[0]
    text = (
        f"# Load balance\n\n`{command}`\n\nHeld-out text, {first['batches']} forward passes of {first['tokens']:,} "
        "tokens each; means over them and over the layers. A row is a token's choice of an expert. The models are the "
        "runs named, not the paper's.\n\n"
        f"{table(header, body)}\n\n"
        "FoE's groups see every token and each takes its own k / H experts of it: 1.00 between groups is how it is "
        "built, not a finding. So it is between heads of experts (hp), whose local activation rate is what the mesh "
        "makes it. Devices inside a group or head, and experts inside a device, are as uneven as routing is.\n"
    )
    (out / "load_balance.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
