"""head_parallel.md: every table and every sentence is made from the JSON files of the parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.head_parallel.conclusion import conclusion
from experiments.head_parallel.loss import SWEEP_SEED
from experiments.head_parallel.models import CONFIGS, NAMES
from experiments.head_parallel.paired import Interval, best_rates, losses_by_seed, paired_difference
from experiments.head_parallel.plots import LAYOUTS, PROGRAMS, plot_bytes, plot_load, plot_losses, plot_speed
from experiments.head_parallel.results import PARTS, read_part
from experiments.head_parallel.wire import DEVICES
from experiments.two_hosts.report import audited_bytes, rate_text
from foejax.serving.load.report import table

Run = Mapping[str, Any]
Found = Mapping[str, Any]

TWO_HOSTS = Path(__file__).parents[1] / "results" / "two_hosts" / "two_hosts.json"
PAPERS_RATE = 50
"""Step size of the bias rule over the learning rate in the code of arXiv 2602.04870."""


def write_report(folder: Path, two_hosts: Path = TWO_HOSTS) -> None:
    """Write FOLDER.md and, into the folder, the plots of the parts that have run."""
    parts = {part: read_part(folder, part) for part in PARTS}
    wire = json.loads(two_hosts.read_text(encoding="utf-8"))["runs"] if two_hosts.is_file() else []
    sections = [
        "# FoE, expert parallelism and Head Parallel",
        "Three ways to spread the experts of a language model over devices, in one code. FoE's groups meet in an "
        "all-reduce a layer; expert parallelism (`ep`) sends tokens to their experts and back; Multi-Head LatentMoE "
        "with Head Parallel (`hp`, arXiv 2602.04870) sends sub-tokens to their heads and back, before they are "
        "routed. All of it: `python -m experiments.head_parallel --out experiments/results/head_parallel`.",
        conclusion(parts, wire),
        _section("Bytes and collectives", "bytes", parts["bytes"], _bytes_section, folder),
        _section("Loss", "loss", parts["loss"], _loss_section, folder),
        _section("Step time", "speed", parts["speed"], _speed_section, folder),
        _two_hosts_section(wire),
        _section("Load inside heads", "load", parts["load"], _load_section, folder),
        _not_measured(),
    ]
    plots = {"bytes": plot_bytes, "speed": plot_speed, "load": plot_load}
    for part, plot in plots.items():
        if (found := parts[part]) is not None and found["runs"]:
            plot(found, folder / f"{part}.png")
    if (found := parts["loss"]) is not None and losses_by_seed(found["runs"], SWEEP_SEED):
        plot_losses(found, SWEEP_SEED, folder / "loss.png")
    folder.with_suffix(".md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _section(title: str, part: str, found: Found | None, write: Any, folder: Path) -> str:
    """A part's section: its command and machine, what `write` says, its plot; or that it has not run."""
    command = f"python -m experiments.head_parallel --out experiments/results/head_parallel --part {part}"
    if found is None or not found["runs"]:
        return f"## {title}\n\nNot run yet: `{command}`"
    facts = found["facts"]
    where = f"`{command}`, on {facts['device']}, {facts['cores']} cores; {facts['software']}."
    return "\n\n".join([f"## {title}", where, write(found), f"![{title}]({folder.name}/{part}.png)"])


def _bytes_section(found: Found) -> str:
    sizes, runs = found["settings"], found["runs"]
    text = (
        f"From the compiled programs (`sharding.audit`) of models of width {sizes['width']} with {sizes['layers']} "
        f"layers on {DEVICES} devices, {sizes['rows'] * sizes['length']:,} tokens a step, bfloat16 as written: "
        f"{sizes['experts']} experts, for `hp` of each of the {DEVICES} heads, whose k is of a head (with sub-tokens "
        f"of 1/{DEVICES} of the width equal k take equal shares of the experts). Bytes are what all devices together "
        "send on rings for a token of the batch, which is what one device sends for a token of its share. Activations "
        "alone: tokens, their expert indices and weights, and their gradients. `ep` compiles several buffer sizes, "
        "of which a step takes the smallest that holds its tokens: both ends are given, and what uniform routing "
        "needs without padding. Without de-duplication: a copy of a token for each of its experts."
    )
    header = ["layout", "k", "bytes per token", "needed (formula)", "a copy per expert", "exchanges", "all collectives"]
    parts = [text]
    for program in ("forward", "train_step"):
        if program in runs[0]:
            rows = [_bytes_row(run, run[program]) for run in runs]
            parts.append(f"{PROGRAMS[program].capitalize()}:\n\n{table(header, rows)}")
    if "train_step" in runs[0]:
        others = ", ".join(
            f"{kind} {max(run['train_step']['other_bytes_per_device'] for run in runs if run['kind'] == kind):,}"
            for kind in dict.fromkeys(run["kind"] for run in runs)
        )
        parts.append(
            "Besides, whatever the number of tokens, a training step sends gradients of the parameters that devices "
            f"hold alike, and statistics: at most so many bytes a device: {others}. (Without a `data` axis; with one, "
            "every layout gathers parameters and scatters gradients over it.)"
        )
    return "\n\n".join(parts)


def _bytes_row(run: Run, sent: Mapping[str, Any]) -> list[str]:
    least, most = sent["bytes_per_token"], sent["bytes_per_token_at_most"]
    copies = sent.get("copy_per_expert_bytes_per_token")
    exchanges = " + ".join(f"{count} {op}" for op, count in sorted(sent["exchanges"].items()))
    return [
        run["kind"],
        str(run["k"]),
        f"{least:,.0f}" if least == most else f"{least:,.0f} to {most:,.0f}",
        f"{sent['needed_bytes_per_token']:,.0f}",
        "" if copies is None else f"{copies:,.0f}",
        exchanges,
        str(sum(sent["exchanges"].values()) + sum(sent["others"].values())),
    ]


def _loss_section(found: Found) -> str:
    runs, settings = found["runs"], found["settings"]
    best, losses = best_rates(runs, SWEEP_SEED), losses_by_seed(runs, SWEEP_SEED)
    models = [model for model in NAMES if model in best]
    first = runs[0]
    text = (
        f"`{'`, `'.join(CONFIGS[model] for model in models)}` on one device, {settings['steps']} steps, "
        f"{first['tokens']:,} tokens in all (so few that the whole part takes half an hour on two cores). "
        f"Each model tried the learning rates {', '.join(f'{rate:g}' for rate in settings['rates'])} with seed "
        f"{SWEEP_SEED}, and ran the best with {_count(len(settings['seeds']), 'other seed')}, of weights, held-out "
        "split and order of the data, the same for all models. MoE and FoE balance by their auxiliary loss, the "
        "Multi-Head LatentMoEs by the bias rule, whose rate stays that of their "
        "configs whatever the learning rate. Validation loss: cross-entropy in nats per token, on the whole split."
    )
    sweep = [
        [
            NAMES[model],
            *(_of(runs, model, rate, SWEEP_SEED) for rate in settings["rates"]),
            _edge(model, best, settings),
        ]
        for model in models
    ]
    parts = [text, table(["seed 0, by rate", *(f"{rate:g}" for rate in settings["rates"]), "best"], sweep)]
    if losses:
        parts += [_seeds_table(runs, losses, settings["seeds"]), *_differences(losses)]
    return "\n\n".join(parts)


def _of(runs: Sequence[Run], model: str, rate: float, seed: int) -> str:
    """The validation loss of one run."""
    return next(
        (f"{r['validation_loss']:.4f}" for r in runs if (r["model"], r["rate"], r["seed"]) == (model, rate, seed)), ""
    )


def _edge(model: str, best: Mapping[str, float], settings: Mapping[str, Any]) -> str:
    at_end = best[model] in (min(settings["rates"]), max(settings["rates"]))
    return f"{best[model]:g}{' (at the end of the sweep)' if at_end else ''}"


def _seeds_table(runs: Sequence[Run], losses: Mapping[str, Mapping[int, float]], seeds: Sequence[int]) -> str:
    header = ["model", "parameters", "active", *(f"seed {seed}" for seed in seeds), "mean", "standard deviation"]
    rows = []
    for model in (name for name in NAMES if name in losses):
        one = next(run for run in runs if run["model"] == model)
        own = losses[model]
        rows.append(
            [
                NAMES[model],
                f"{one['parameters']:,}",
                f"{one['active_parameters']:,}",
                *(f"{own[seed]:.4f}" if seed in own else "" for seed in seeds),
                f"{np.mean(list(own.values())):.4f}",
                f"{np.std(list(own.values()), ddof=1):.4f}" if len(own) > 1 else "",
            ]
        )
    return table(header, rows)


def _differences(losses: Mapping[str, Mapping[int, float]]) -> list[str]:
    pairs = [(a, b) for index, b in enumerate(losses) for a in list(losses)[index + 1 :]]
    rows = []
    for first, second in sorted(pairs, key=lambda pair: (list(NAMES).index(pair[1]), list(NAMES).index(pair[0]))):
        found = paired_difference(losses[first], losses[second])
        rows.append([f"{NAMES[first]} - {NAMES[second]}", f"{found.mean:+.4f}", interval_text(found), verdict(found)])
    return [
        "Differences seed by seed, with 95% intervals by the t distribution (no correction for looking at several):",
        table(["difference", "mean", "95% interval", "reads as"], rows),
    ]


def interval_text(found: Interval) -> str:
    """`+0.0100 to +0.0300`."""
    return f"{found.low:+.4f} to {found.high:+.4f}"


def verdict(found: Interval) -> str:
    """What an interval of a difference of losses says of the first."""
    return {1: "higher loss", -1: "lower loss", 0: "not told apart"}[found.side]


def _speed_section(found: Found) -> str:
    settings = found["settings"]
    text = (
        "The models of the loss in float32 (a CPU emulates bfloat16). Each cell is a step's time over FoE's in the "
        f"same turn: median of {settings['turns']} turns, and quartiles. Simulated devices share the machine's cores "
        "and its memory is their network: this compares work and overheads, not networks. No absolute times are given. "
        f"Decoding: {settings['sequences']} sequences with {settings['context']} tokens of context."
    )
    rows = []
    for run in found["runs"]:
        cells = {name: np.percentile(values, (25, 50, 75)) for name, values in run["ratios"].items()}
        shown = [
            f"{cells[name][1]:.2f} ({cells[name][0]:.2f} to {cells[name][2]:.2f})" if name in cells else ""
            for name in LAYOUTS
        ]
        rows.append([str(run["devices"]), PROGRAMS[run["program"]], *shown])
    return text + "\n\n" + table(["devices", "program", *LAYOUTS.values()], rows)


def _two_hosts_section(runs: Sequence[Run]) -> str:
    title = "## Two hosts and a slow link"
    if not any(run["kind"] == "hp" for run in runs):
        return (
            f"{title}\n\nNot measured for `hp`: `experiments/results/two_hosts` holds no such run "
            "(`python -m experiments.two_hosts --out experiments/results/two_hosts`)."
        )
    parts = [
        f"{title}\n\nFrom [two_hosts/two_hosts.md](two_hosts/two_hosts.md) (`python -m experiments.two_hosts --out "
        "experiments/results/two_hosts`): a step's time over that of the first FoE layout at the same rate, and MB "
        "that a host sends to the other in a step."
    ]
    for program, title in PROGRAMS.items():
        own = [run for run in runs if run["program"] == program and run["kind"] in ("foe", "ep", "hp")]
        if own:
            parts.append(f"{title.capitalize()}:\n\n{_two_hosts_table(own)}")
    return "\n\n".join(parts)


def _two_hosts_table(runs: Sequence[Run]) -> str:
    rates = list(dict.fromkeys(run["rate_mbit"] for run in runs))
    first = {run["rate_mbit"]: run["seconds"] for run in reversed(runs) if run["kind"] == "foe"}
    rows = []
    for name in dict.fromkeys(run["name"] for run in runs):
        own = {run["rate_mbit"]: run for run in runs if run["name"] == name}
        cells = [f"{own[rate]['seconds'] / first[rate]:.2f}" if rate in own and rate in first else "" for rate in rates]
        rows.append([name, f"{audited_bytes(next(iter(own.values()))) / 1e6:.2f}", *cells])
    return table(["layout", "MB", *map(rate_text, rates)], rows)


def _load_section(found: Found) -> str:
    settings, runs = found["settings"], _by_rate(found["runs"])
    text = (
        f"`mhlmoe_tiny` from its initial weights, {settings['steps']} steps at a learning rate of "
        f"{settings['learning_rate']:g}, no auxiliary loss; the bias rule without and with several step sizes "
        f"(`training.router_bias_rate`). Largest over mean: tokens of the busiest expert of a layer over the mean; "
        f"{runs[0]['most']:g} is the most there can be, all tokens with the same experts. At the end, of each head on "
        "the validation split: its busiest and its idlest expert over the mean, median over heads and layers, and the "
        "worst."
    )
    papers_rate = PAPERS_RATE * settings["learning_rate"]
    if any(run["rate"] == papers_rate for run in runs):
        text += f" {papers_rate:g} is {PAPERS_RATE} times the learning rate, the paper's rule."
    rows = []
    for run in runs:
        largest, smallest = np.ravel(run["largest"]), np.ravel(run["smallest"])
        rows.append(
            [
                f"{run['rate']:g}" if run["rate"] else "off",
                f"{run['steps'][0]:.2f}",
                f"{max(run['steps']):.2f}",
                f"{run['steps'][-1]:.2f}",
                f"{np.median(largest):.2f}, {largest.max():.2f}",
                f"{np.median(smallest):.2f}, {smallest.min():.2f}",
                f"{run['validation_loss']:.4f}",
            ]
        )
    header = ["bias rule", "largest over mean, step 1", "most in the run", "last step", "busiest: median, worst"]
    header += ["idlest: median, worst", "validation loss"]
    return text + "\n\n" + table(header, rows)


def _by_rate(runs: Sequence[Run]) -> list[Run]:
    return sorted(runs, key=lambda run: run["rate"])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _not_measured() -> str:
    return (
        "## Not measured\n\n"
        "GPUs and real networks; larger models, other corpora, longer training; benchmarks other than loss. The step "
        "times are of a CPU, whose costs (many small matmuls, rows moved in "
        "memory) are not a GPU's. Heads beyond one for each device, or an `expert` axis inside a head, are tested "
        "elsewhere and were not compared here."
    )
