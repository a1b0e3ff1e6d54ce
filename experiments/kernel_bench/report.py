"""report.md and results.json: what ran where, how fast against the peers and the ceilings, and what did not run.

A dry run's report holds ratios of wall-clock times on a CPU, says so in its first line, and prints no absolute figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.kernel_bench.targets import best_of_ours, judge_targets

DRY_RUN_WARNING = (
    "**DRY RUN on a CPU with tiny shapes: it shows that the bench works. Its ratios are of wall-clock times and say "
    "nothing about any GPU.**"
)


_MOST_OF_ROOF = 1.15


def results(
    machine: Mapping[str, Any],
    ceilings: Mapping[str, Any],
    correctness: Sequence[Mapping[str, Any]],
    races: Sequence[Mapping[str, Any]],
    unfinished: Sequence[str],
) -> dict[str, Any]:
    """Everything measured, each cell with its ratios and shares: the content of results.json."""
    dry_run = machine["dry_run"]
    races = [{**race, "cells": judged(race, ceilings)} for race in races]
    return {
        "dry_run": dry_run,
        "note": "wall clock of a CPU dry run with tiny shapes: proves that the bench works, nothing else"
        if dry_run
        else "device times",
        "time_unit": "the fastest time of the race" if dry_run else "seconds per call",
        "machine": dict(machine),
        "ceilings": dict(ceilings),
        "correctness": list(correctness),
        # A CPU's ratios say nothing about targets for a GPU.
        "targets": judge_targets([] if dry_run else races),
        "races": races,
        "unfinished_parts": list(unfinished),
    }


def judged(race: Mapping[str, Any], ceilings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The race's cells with what they are compared with.

    Adds to each: best_peer and times_best_peer (its speed over that peer's), share_of_bound (of the speed of the
    even-groups bound), vs_uniform (its rate over its own with the race's first sizes), and, where ceilings are known,
    share_of_matmul and share_of_copy and share_of_roof (the ceilings' own time for the work over the time taken).
    """
    cells = race["cells"]
    amount = race["judged_by"]
    bound = min((cell["time"] / cell["flops"] for cell in cells if cell["kind"] == "bound"), default=None)
    own = {cell["contender"]: cell["time"] / cell[amount] for cell in cells if cell["sizes"] == race["sizes"][0]}
    result = []
    for cell in cells:
        peers = [other for other in cells if other["kind"] == "peer" and other["sizes"] == cell["sizes"]]
        peers = [peer for peer in peers if peer["contender"] != cell["contender"]]
        best = min(peers, key=lambda peer: peer["time"], default=None)
        added: dict[str, Any] = {
            "best_peer": best["contender"] if best else None,
            "times_best_peer": best["time"] / cell["time"] if best else None,
            "share_of_bound": bound / (cell["time"] / cell["flops"]) if bound else None,
            "vs_uniform": own[cell["contender"]] * cell[amount] / cell["time"] if cell["contender"] in own else None,
        }
        if ceilings.get("matmul_flops"):
            matmul = cell["flops"] / ceilings["matmul_flops"]
            copy = cell["bytes"] / ceilings["copy_bytes"]
            shares = {"matmul": matmul, "copy": copy, "roof": max(matmul, copy)}
            added |= {f"share_of_{name}": seconds / cell["time"] for name, seconds in shares.items()}
        result.append({**cell, **added})
    return result


def headline(race: Mapping[str, Any], *, dry_run: bool) -> str:
    """One line on the best of ours in a race whose cells are judged."""
    found = []
    for sizes, best in best_of_ours(race).items():
        rate = "" if dry_run else f" {_rate(best, race['judged_by'])}"
        ratio = f"{_times(best['times_best_peer'])} {best['best_peer']}" if best["best_peer"] else ""
        found.append(f"{sizes} {best['contender']}{rate}" + (f", {ratio}" if ratio else ""))
    return f"{_name(race)}: " + ("; ".join(found) or "none of ours ran")


def _name(race: Mapping[str, Any]) -> str:
    return f"{race['operation']} {race['shape']} {race['step']}"


def markdown(found: Mapping[str, Any]) -> str:
    """report.md from results.json's content."""
    sections = [
        "# Kernel bench" + (" (dry run)" if found["dry_run"] else ""),
        *([DRY_RUN_WARNING] if found["dry_run"] else []),
        _machine(found["machine"]),
        _unfinished(found["unfinished_parts"]),
        _targets(found["targets"]),
        _ceilings(found["ceilings"], found["dry_run"]),
        _contenders(found["correctness"]),
        _correctness(found["correctness"], found["races"]),
        _summary(found["races"], found["dry_run"]),
        *(_race(race, found["dry_run"]) for race in found["races"]),
        _not_run(found["correctness"], found["races"], found["ceilings"]),
        "" if found["dry_run"] else "![roofline](roofline.png)",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"- Device: {machine['device']}" + (f" ({machine['gpu']})" if machine["gpu"] else ""),
        f"- Software: Python {machine['python']}, {versions}",
        f"- Code: commit {machine['commit'] or 'unknown'}, kernels {machine['sources']}, tables {machine['tables']}",
        f"- Command: `{machine['command']}`",
    ]
    if machine["xla_flags"]:
        lines.append(f"- XLA_FLAGS: `{machine['xla_flags']}`")
    return "\n".join(lines)


def _unfinished(parts: Sequence[str]) -> str:
    return f"Not measured yet (the same command goes on with them): {', '.join(parts)}." if parts else ""


def _targets(targets: Sequence[Mapping[str, Any]]) -> str:
    rows = [[each["target"], each["wanted"], each["measured"], each["met"]] for each in targets]
    return "## Targets\n\n" + _table(["target", "wanted", "measured", "met"], rows)


def _ceilings(ceilings: Mapping[str, Any], dry_run: bool) -> str:
    if dry_run or not ceilings:
        return ""
    lines = ["## Ceilings", "", "| way | rate |", "| --- | ---: |"]
    lines += [f"| {way} | {rate / 1e12:.0f} TFLOP/s |" for way, rate in ceilings["matmul_by_way"].items()]
    lines += [f"| {way} | {rate / 1e12:.2f} TB/s |" for way, rate in ceilings["copy_by_way"].items()]
    if ceilings["clocks"]:
        ratios = ", ".join(f"{way} {ratio:.3f}" for way, ratio in ceilings["clocks"].items())
        lines += ["", f"Time by CUPTI over time by the clock used, on the same programs: {ratios}."]
    return "\n".join(lines)


def _contenders(parts: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [part["operation"], each["name"], each["kind"], each["remark"]]
        for part in parts
        for each in part["contenders"]
    ]  # fmt: skip
    return "## Contenders\n\n" + _table(["operation", "name", "kind", "remark"], rows) if rows else ""


def _correctness(parts: Sequence[Mapping[str, Any]], races: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "## Correctness",
        "",
        "| operation | contender | checks passed | largest error over what rounding allows |",
    ]
    lines += ["| --- | --- | ---: | ---: |"]
    faults = []
    for part in parts:
        for name in dict.fromkeys(check["contender"] for check in part["checks"]):
            own = [check for check in part["checks"] if check["contender"] == name]
            errors = [check["error"] for check in own if check["error"] is not None]
            passed = sum(check["fault"] is None for check in own)
            worst = f"{max(errors):.2f}" if errors else "-"
            lines.append(f"| {part['operation']} | {name} | {passed} of {len(own)} | {worst} |")
            faults += [
                f"- **{name}** {part['operation']} {check['step']}, {check['case']}: {check['fault']}"
                for check in own
                if check["fault"]
            ]
    faults += [
        f"- **{record['contender']}** {_name(race)}, {record['sizes']}: {record['reason']}"
        for race in races
        for record in race["wrong"]
    ]
    return "\n".join([*lines, "", "Wrong, and so not timed:" if faults else "Nobody is wrong.", "", *faults]).rstrip()


def _summary(races: Sequence[Mapping[str, Any]], dry_run: bool) -> str:
    header = [
        "operation",
        "shape",
        "step",
        "sizes",
        "best of ours",
        "speed over best peer",
        "best peer",
        "of even bound",
        "over uniform",
    ]
    if not dry_run:
        header += ["rate", "of matmul", "of copy"]
    rows = []
    for race in races:
        for sizes, best in best_of_ours(race).items():
            row = [race["operation"], race["shape"], race["step"], sizes, best["contender"]]
            row.append(_times(best["times_best_peer"]))
            row += [best["best_peer"] or "none", _share(best["share_of_bound"]), _times(best["vs_uniform"])]
            if not dry_run:
                row += [_rate(best, race["judged_by"]), _share(best["share_of_matmul"]), _share(best["share_of_copy"])]
            rows.append(row)
    return "## Ours against the best peer\n\n" + _table(header, rows) if rows else ""


def _race(race: Mapping[str, Any], dry_run: bool) -> str:
    dims = ", ".join(f"{name} {size:,}" for name, size in race["dims"].items())
    header = ["sizes", "contender", "kind", "speed over best other peer", "of even bound", "over uniform"]
    if not dry_run:
        header += ["time (us)", "spread", "rate", "of matmul", "of copy", "of roof", "clock"]
    rows = []
    for cell in race["cells"]:
        row = [cell["sizes"], cell["contender"], cell["kind"], _times(cell["times_best_peer"])]
        row += [_share(cell["share_of_bound"]), _times(cell["vs_uniform"])]
        if not dry_run:
            row += [f"{cell['time'] * 1e6:.1f}", f"{cell['spread']:.1%}", _rate(cell, race["judged_by"])]
            row += [_share(cell[f"share_of_{name}"]) for name in ("matmul", "copy", "roof")]
            row.append(_clock(cell))
        rows.append(row)
    title = f"## {race['operation']}: {race['shape']}, {race['step']}\n\n"
    note = f"{dims}; {race['calls']} calls a program"
    if race["weight_copies"] > 1:
        note += f", {race['weight_copies']} copies of the weights"
    if race["cached"]:
        note += ", all of whose operands fit into the L2 cache: a share of the copy rate means nothing here"
    return title + note + ".\n\n" + (_table(header, rows) if rows else "Nobody ran.")


def _rate(cell: Mapping[str, Any], judged_by: str) -> str:
    rate = cell[judged_by] / cell["time"]
    if judged_by == "flops":
        return f"{rate / 1e12:.0f} TFLOP/s" if rate >= 1e14 else f"{rate / 1e12:.2g} TFLOP/s"
    return f"{rate / 1e9:,.0f} GB/s" + (" of weights" if judged_by == "weight_bytes" else "")


def _clock(cell: Mapping[str, Any]) -> str:
    if not cell["host_bound"]:
        # Reading alone can pass a copy's rate by a little; by more, something was not computed or not read.
        return cell["clock"] + (" (above the roof: distrust it)" if cell["share_of_roof"] > _MOST_OF_ROOF else "")
    kernels = f"; kernels alone {cell['kernel_time'] * 1e6:.1f} us" if cell["kernel_time"] else ""
    return f"{cell['clock']}, host-bound{kernels}"


def _not_run(
    correctness: Sequence[Mapping[str, Any]], races: Sequence[Mapping[str, Any]], ceilings: Mapping[str, Any]
) -> str:
    """Contenders and reasons, each reason once with where it applies."""
    where: dict[tuple[str, str], list[str]] = {}
    for part in correctness:
        for record in part["not_run"]:
            place = f"{part['operation']} correctness, {record['step']}"
            where.setdefault((record["contender"], record["reason"]), []).append(place)
    for race in races:
        for record in race["not_run"]:
            place = f"{_name(race)} {record['sizes']}".strip()
            where.setdefault((record["contender"], record["reason"]), []).append(place)
    for way, reason in ceilings.get("not_run", {}).items():
        where.setdefault((way, reason), []).append("ceilings")
    rows = [[name, reason.replace("|", "\\|"), _places(places)] for (name, reason), places in where.items()]
    return "## Not run\n\n" + _table(["contender", "reason", "where"], rows) if rows else ""


def _places(places: Sequence[str]) -> str:
    return ", ".join(places) if len(places) <= 3 else f"{places[0]} and {len(places) - 1} more"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
