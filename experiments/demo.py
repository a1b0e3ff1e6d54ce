"""A Federation of Experts next to the mixture of experts of its size, on eight simulated devices.

    python -m experiments.demo [--devices N] [--out DIR] [--SECTION.FIELD VALUE ...]

Trains configs/foe_tiny.yaml and configs/moe_tiny.yaml into runs/demo/foe and runs/demo/moe (afresh every time), and
writes runs/demo/summary.json and runs/demo/loss.png. Overrides apply to both models: `--training.num_steps 20` is a
quick try. Fields that only one layout has are set in the YAML files.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foejax.cli import report_errors
from foejax.commands.parser import split_overrides
from foejax.config import RunConfig, load_config
from foejax.devices import simulate_devices

if TYPE_CHECKING:
    from foejax.data import Dataset

MODELS = {"foe": "foe_tiny", "moe": "moe_tiny"}
PROMPT, SAMPLE_TOKENS, SAMPLE_TEMPERATURE = "ROMEO.\n", 100, 0.7
AVERAGED_STEPS = 20
"""The reported training loss is the mean over so many last steps: that of a single batch is noise."""


def main(argv: list[str]) -> int:
    """Train both models, compare them, write the results and print one table."""
    arguments, overrides = split_overrides(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=8, metavar="N", help="simulated devices (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    options = parser.parse_args(arguments)
    simulate_devices(options.devices)
    configs = {name: load_config(config, overrides) for name, config in MODELS.items()}
    started = time.monotonic()

    _keep_compiled_programs(options.out / "compiled")
    from experiments import demo_report
    from foejax.data import open_dataset
    from foejax.evaluation.bigram import bigram_baseline

    dataset = open_dataset(configs["foe"].data, vocab_size=configs["foe"].model.vocab_size)
    print(
        f"{dataset.num_train_tokens:,} training and {dataset.num_validation_tokens:,} validation tokens of "
        f"{configs['foe'].data.corpus}, vocabulary {dataset.tokenizer.vocab_size:,}",
        flush=True,
    )
    models = {name: run_model(name, config, options.out / name, dataset) for name, config in configs.items()}
    bigram = bigram_baseline(dataset)
    summary = demo_report.summarise(
        models,
        {"loss": bigram.nats_per_token, "bits_per_byte": bigram.bits_per_byte},
        {
            "devices": options.devices,
            "steps": configs["foe"].training.num_steps,
            "tokens_per_step": configs["foe"].data.batch_size * configs["foe"].data.sequence_length,
            "train_loss_is_mean_of_last_steps": AVERAGED_STEPS,
            "seconds": round(time.monotonic() - started, 1),
        },
    )
    demo_report.write_summary(summary, options.out / "summary.json")
    demo_report.plot_losses(
        {name: options.out / name for name in models}, bigram.nats_per_token, options.out / "loss.png"
    )
    demo_report.print_table(summary)
    return 0


def run_model(name: str, config: RunConfig, run_dir: Path, dataset: Dataset) -> dict[str, Any]:
    """Train one model from the beginning and find out everything that the summary says about it."""
    import numpy as np

    from foejax.analysis.accounting import account
    from foejax.api import LoadedModel
    from foejax.evaluation.evaluate import evaluate
    from foejax.training.loop import train
    from foejax.training.run_folder import read_metrics

    shutil.rmtree(run_dir, ignore_errors=True)
    print(f"{name}: training for {config.training.num_steps} steps into {run_dir}", flush=True)
    result = train(config, run_dir, dataset=dataset)
    found = account(config, result.model.layout)
    validation = evaluate(result.model, dataset)
    losses = [line["loss"] for line in read_metrics(run_dir) if "loss" in line]
    loaded = LoadedModel(result.model, dataset.tokenizer, config, run_dir, result.step)
    sample = loaded.generate(PROMPT, SAMPLE_TOKENS, temperature=SAMPLE_TEMPERATURE)[0]
    return {
        "parameters": found.parameters,
        "active_parameters": found.active_parameters,
        "layout": result.model.layout.kind,
        "mesh": found.mesh,
        "train_loss": float(np.mean(losses[-AVERAGED_STEPS:])),
        "validation_loss": validation.loss,
        "validation_bits_per_byte": validation.bits_per_byte,
        "tokens_per_second": result.tokens_per_second,
        "collectives_per_step": collectives_per_step(config),
        "sample": PROMPT + sample,
    }


def _keep_compiled_programs(folder: Path) -> None:
    """Compile a program once: the audit meets the training step again, and the next demo all of them."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def collectives_per_step(config: RunConfig) -> dict[str, Any]:
    """Of a forward pass and of a training step: executions by operation, and what one device sends on a ring."""
    from foejax.analysis.comms import communication_report, count_by_op

    report = communication_report(config, programs=("forward", "train_step"))
    return {
        program: {
            "counts": count_by_op(rows),
            "wire_bytes_per_device": sum(row["count"] * row["wire_bytes"] for row in rows),
            "rows": rows,
        }
        for program, rows in report.items()
    }


if __name__ == "__main__":
    raise SystemExit(report_errors(lambda: main(sys.argv[1:])))
