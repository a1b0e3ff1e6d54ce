"""What was found, and when to choose which; every sentence is made from figures, so that none outlives its figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.head_parallel.loss import SWEEP_SEED
from experiments.head_parallel.models import NAMES
from experiments.head_parallel.paired import losses_by_seed, paired_difference
from experiments.head_parallel.plots import PROGRAMS
from experiments.head_parallel.wire import DEVICES

Run = Mapping[str, Any]
Found = Mapping[str, Any]

LAYOUT_NAMES = {"ep": "expert parallelism", "hp": "Head Parallel", "foe": "FoE"}


def conclusion(parts: Mapping[str, Found | None], two_hosts: Sequence[Run]) -> str:
    """The findings of the parts that have run, and the choice.

    Args:
      two_hosts: runs of `two_hosts.json`.
    """
    runs = {part: found["runs"] if found is not None else [] for part, found in parts.items()}
    findings = [
        *_bytes_findings(runs["bytes"]),
        *_loss_findings(runs["loss"]),
        *_speed_findings(runs["speed"]),
        *_two_hosts_findings(two_hosts),
        *_load_findings(runs["load"]),
    ]
    choice = [*_choice_by_bytes(runs["bytes"]), *_choice_by_loss(runs["loss"]), *_STRUCTURE]
    return "\n\n".join(
        [
            "## In short",
            _bullets(findings or ["Nothing has been measured yet."]),
            "## Which to choose",
            _bullets(choice),
        ]
    )


_STRUCTURE = (
    "Where attention and its cache should be split over the devices as well: FoE, whose groups hold them. `ep` and "
    "`hp` leave both with the tokens.",
    "Where load between devices must be even: FoE and `hp`, by construction, whatever the routing; `ep` waits for its "
    "busiest device, and `hp` too as soon as an `expert` axis splits a head.",
    "Number of devices: FoE and `hp` use as many as they have groups or heads, and beyond that expert parallelism "
    "inside them; `ep` uses as many as divide its experts. `ep` alone takes a plain MoE as it is: the other two are "
    "architectures that a model must be trained with.",
)
"""What follows from how the layouts are built, without figures."""


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _of_kind(runs: Sequence[Run], kind: str) -> list[Run]:
    return [run for run in runs if run["kind"] == kind]


def _bytes_findings(runs: Sequence[Run]) -> list[str]:
    """Of the forward pass."""
    ep, hp, foe = (_of_kind(runs, kind) for kind in LAYOUT_NAMES)
    lines = []
    if len(hp) > 1:
        sent = {run["k"]: run["forward"]["bytes_per_token"] for run in hp}
        ks = ", ".join(map(str, sent))
        needed = hp[0]["forward"]["needed_bytes_per_token"]
        if len(set(sent.values())) == 1:
            same = "what the formula says" if sent[hp[0]["k"]] == needed else f"where the formula says {needed:,.0f}"
            lines.append(f"Head Parallel sends {sent[hp[0]['k']]:,.0f} bytes per token forward for k = {ks}, {same}.")
        else:
            each = ", ".join(f"{value:,.0f}" for value in sent.values())
            lines.append(f"Head Parallel's bytes per token forward change with k: {each} for k = {ks}.")
    for run in ep if hp else ():
        own, others = run["forward"], hp[0]["forward"]["bytes_per_token"]
        lines.append(
            f"Expert parallelism with k = {run['k']} sends {own['bytes_per_token'] / others:.2f} times as much as Head "
            f"Parallel with its smallest buffers and {own['bytes_per_token_at_most'] / others:.2f} with its largest; "
            f"uniform routing needs {own['needed_bytes_per_token'] / others:.2f}, and a copy per expert would send "
            f"{own['copy_per_expert_bytes_per_token'] / others:.2f}."
        )
    if foe and hp:
        ratio = ", ".join(
            f"{run['forward']['bytes_per_token'] / hp[0]['forward']['bytes_per_token']:.2f} (k = {run['k']})"
            for run in foe
        )
        lines.append(f"FoE sends {ratio} times as much as Head Parallel: all its devices see all tokens.")
    counts = [
        f"{LAYOUT_NAMES[own[0]['kind']]} {sum(own[0]['forward']['exchanges'].values())}" for own in (foe, hp, ep) if own
    ]
    if counts:
        lines.append(f"Collectives that move activations in a forward pass of the same depth: {', '.join(counts)}.")
    return lines


def _loss_findings(runs: Sequence[Run]) -> list[str]:
    losses = losses_by_seed(runs, SWEEP_SEED)
    means = {model: float(np.mean(list(losses[model].values()))) for model in NAMES if model in losses}
    if not means:
        return []
    listed = ", ".join(f"{NAMES[model]} {mean:.4f}" for model, mean in means.items())
    seeds = min(len(own) for own in losses.values())
    lines = [f"Validation loss at matched parameters and tokens, mean of {seeds} seeds: {listed}."]
    for first, second in (("mhlmoe", "moe"), ("mhlmoe", "foe"), ("mhlmoe_fine", "mhlmoe")):
        if first in means and second in means:
            found = paired_difference(losses[first], losses[second])
            side = {1: "higher", -1: "lower", 0: "not told apart from zero"}[found.side]
            lines.append(
                f"{NAMES[first]} minus {NAMES[second]}: {found.mean:+.4f} nats per token, 95% interval "
                f"{found.low:+.4f} to {found.high:+.4f}: {side}."
            )
    return lines


def _speed_findings(runs: Sequence[Run]) -> list[str]:
    lines = []
    for count in sorted({run["devices"] for run in runs}):
        shown = []
        for run in (run for run in runs if run["devices"] == count):
            ratios = {name: np.median(values) for name, values in run["ratios"].items()}
            shown.append(f"{PROGRAMS[run['program']]} ep {ratios['ep']:.2f}, hp {ratios['hp']:.2f}")
        where = "one device" if count == 1 else f"{count} simulated devices"
        lines.append(f"Step time over FoE's on {where} of a CPU: {'; '.join(shown)}.")
    return lines


def _two_hosts_findings(runs: Sequence[Run]) -> list[str]:
    """At the slowest rate, the fastest layout of each kind."""
    limited = [run["rate_mbit"] for run in runs if run["rate_mbit"] is not None]
    if not limited or not _of_kind(runs, "hp"):
        return []
    lines = []
    for program, title in PROGRAMS.items():
        slowest = [run for run in runs if run["rate_mbit"] == min(limited) and run["program"] == program]
        best = {
            kind: min(own, key=lambda run: run["seconds"]) for kind in LAYOUT_NAMES if (own := _of_kind(slowest, kind))
        }
        if "hp" not in best or "foe" not in best:
            continue
        against = ", ".join(
            f"{best[kind]['name']} {best[kind]['seconds'] / best['foe']['seconds']:.2f}"
            for kind in best
            if kind != "foe"
        )
        lines.append(
            f"Two hosts with {min(limited):g} Mbit/s between them, {title}, over the best FoE layout "
            f"({best['foe']['name']}): {against}."
        )
    return lines


def _load_findings(runs: Sequence[Run]) -> list[str]:
    """The run without the bias rule against those with it."""
    without = next((run for run in runs if not run["rate"]), None)
    others = [run for run in runs if run["rate"]]
    if without is None or not others:
        return []
    ends = {run["rate"]: float(np.median(run["largest"])) for run in sorted(others, key=lambda run: run["rate"])}
    off, listed = (
        float(np.median(without["largest"])),
        ", ".join(f"{end:.2f} at {rate:g}" for rate, end in ends.items()),
    )
    nearer = [rate for rate, end in ends.items() if end < off]
    effect = "at every rate" if len(nearer) == len(ends) else "at " + ", ".join(f"{rate:g}" for rate in nearer)
    verdict = f"drives the load towards uniform {effect}" if nearer else "does not drive the load towards uniform"
    return [
        f"Load inside heads: the busiest expert of a head ends (median) at {off:.2f} times the mean without the bias "
        f"rule, of {without['most']:g} at most, and with it at {listed}: the rule {verdict}."
    ]


def _choice_by_bytes(runs: Sequence[Run]) -> list[str]:
    """Who sends least at which k, and who needs the fewest collectives."""
    ep, hp, foe = (_of_kind(runs, kind) for kind in LAYOUT_NAMES)
    if not (ep and hp and foe):
        return []
    least: dict[str, list[int]] = {}
    for run in ep:
        sent = {"ep": run["forward"]["bytes_per_token"], "hp": hp[0]["forward"]["bytes_per_token"]}
        if run["k"] >= foe[0]["k"]:  # FoE has no fewer choices than groups
            sent["foe"] = foe[0]["forward"]["bytes_per_token"]
        least.setdefault(min(sent, key=lambda kind: sent[kind]), []).append(run["k"])
    won = "; ".join(f"{LAYOUT_NAMES[kind]} for k = {', '.join(map(str, ks))}" for kind, ks in least.items())
    counts = {own[0]["kind"]: sum(own[0]["forward"]["exchanges"].values()) for own in (ep, hp, foe)}
    fewest = min(counts, key=lambda kind: counts[kind])
    sizes = "" if fewest == "ep" else ", all of sizes known when the program is compiled"
    return [
        f"Where bytes on the wire limit (long prompts, large batches), what sends least on {DEVICES} devices: {won}.",
        f"Where each collective's latency limits (decoding of few sequences): {LAYOUT_NAMES[fewest]}, which has the "
        f"fewest, {counts[fewest]}{sizes}.",
    ]


def _choice_by_loss(runs: Sequence[Run]) -> list[str]:
    """The lowest mean loss, and which models cannot be told apart from it."""
    losses = losses_by_seed(runs, SWEEP_SEED)
    if len(losses) < 2:
        return []
    best = min(losses, key=lambda model: float(np.mean(list(losses[model].values()))))
    close = [
        NAMES[model]
        for model in NAMES
        if model in losses and model != best and paired_difference(losses[model], losses[best]).side == 0
    ]
    also = f"; not told apart from it: {' and '.join(close)}" if close else ", told apart from all others"
    return [
        f"By loss at this size (a tiny model, one corpus, few seeds): {NAMES[best]} has the lowest{also}. This says "
        "little about large models, for which the papers' own figures stand."
    ]
