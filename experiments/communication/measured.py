"""What the two hosts measured, in short; `experiments/results/two_hosts` has all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.two_hosts.cases import Architecture, architecture
from experiments.two_hosts.report import TITLES, audited_bytes, decided_by_the_link, rate_text
from foejax.serving.load.report import table

Run = Mapping[str, Any]


def measured_section(results: Mapping[str, Any]) -> str:
    """Seconds of every layout and rate, bytes between the hosts, and the notes that go with them."""
    runs = results["runs"]
    parts = [
        "# Measured: two hosts and a wire of a set rate",
        f"`{results['command']}`; all of it in [two_hosts/two_hosts.md](two_hosts/two_hosts.md). Seconds of a step, "
        "medians, and MB that one host sends to the other in it. The fastest of a column is bold.",
    ]
    for program, title in TITLES.items():
        own = [run for run in runs if run["program"] == program]
        if own:
            parts.append(f"{title}:\n\n{_table(own)}")
    parts.append("\n".join(f"- {note}" for note in results["environment"]["notes"]))
    return "\n\n".join(parts)


def _table(runs: Sequence[Run]) -> str:
    rates = list(dict.fromkeys(run["rate_mbit"] for run in runs))
    fastest = {rate: min(run["seconds"] for run in runs if run["rate_mbit"] == rate) for rate in rates}
    rows = []
    for name in dict.fromkeys(run["name"] for run in runs):
        own = {run["rate_mbit"]: run for run in runs if run["name"] == name}
        first = next(iter(own.values()))
        cells = [
            "" if rate not in own else _bold(own[rate]["seconds"], own[rate]["seconds"] == fastest[rate])
            for rate in rates
        ]
        rows.append([name, f"{audited_bytes(first) / 1e6:.2f}", *cells])
    return table(["layout", "MB", *map(rate_text, rates)], rows)


def _bold(seconds: float, is_fastest: bool) -> str:
    return f"**{seconds:.3f}**" if is_fastest else f"{seconds:.3f}"


Finding = tuple[str, bool]
"""A sentence, and whether it speaks for FoE."""


def measured_findings(runs: Sequence[Run]) -> list[Finding]:
    """Who was faster where."""
    pairs = decided_by_the_link(runs)
    won = [pair for pair in pairs if pair.foe["seconds"] < pair.other["seconds"]]
    text = (
        "Where the wire takes more than half of a step and an MoE layout sends more bytes than FoE, FoE's step is the "
        f"shorter one in {len(won)} of {len(pairs)} comparisons."
    )
    lines = [(text, len(won) == len(pairs))]
    others: tuple[Architecture, ...] = ("MoE", "Multi-Head LatentMoE")
    for other in others:
        for program, title in TITLES.items():
            lines += _program_findings([run for run in runs if run["program"] == program], title, other)
    return lines


def _program_findings(runs: Sequence[Run], title: str, other: Architecture) -> list[Finding]:
    """At the slowest rate: the fastest FoE layout and the fastest of another architecture, and their bytes."""
    limited = [run["rate_mbit"] for run in runs if run["rate_mbit"] is not None]
    if not limited:
        return []
    slowest = [run for run in runs if run["rate_mbit"] == min(limited)]
    foe, best = (
        min((run for run in slowest if architecture(run["kind"]) == of), key=lambda run: run["seconds"], default=None)
        for of in ("FoE", other)
    )
    if foe is None or best is None:
        return []
    ratio = best["seconds"] / foe["seconds"]
    sent = f"{audited_bytes(best) / 1e6:.2f} MB against {audited_bytes(foe) / 1e6:.2f} MB"
    text = (
        f"{title} at {rate_text(min(limited))}: the best {other} layout, {best['name']}, takes {ratio:.2f} times as "
        f"long as the best FoE layout, {foe['name']} ({sent} between the hosts)."
    )
    return [(text, ratio >= 1)]
