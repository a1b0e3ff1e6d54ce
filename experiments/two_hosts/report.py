"""What `experiments.two_hosts` writes beside its figures: two_hosts.md, and a plot for every program."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from experiments.two_hosts.cases import Architecture, architecture

Run = Mapping[str, Any]

TITLES = {"forward": "Forward pass", "train_step": "Training step", "decode_step": "Decoding step"}
ALLOWED_BYTES = 0.05
"""How far the bytes counted on the link may lie from the audit's, relative to these."""
LIMITS = (
    "All collectives go through Gloo over TCP, those between devices of one process too.",
    "Gloo's all-to-all sends and receives in turn: it takes up to twice the time of a link that does both at once.",
    "Gloo's reduce-scatter is wrong for slices of some MB: an all-reduce and a slice stand in for it, at twice its "
    "bytes (the last merge of FoE, attention of tp_ep, gradients of fsdp and of every data axis).",
    "The link has a rate and no delay of its own.",
    "Eight simulated devices share the machine's cores, so that what a step computes takes longer than its share.",
)
_MARKERS = "os^DvPX*hd"
_LINES: dict[Architecture, str] = {"FoE": "-", "MoE": "--", "Multi-Head LatentMoE": ":"}


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Write the markdown and the plots; `results` is the content of two_hosts.json."""
    (folder / "two_hosts.md").write_text(markdown(results), encoding="utf-8")
    for program in TITLES:
        runs = [run for run in results["runs"] if run["program"] == program]
        if runs:
            plot(runs, folder / f"{program}.png")


def markdown(results: Mapping[str, Any]) -> str:
    """Tables of time and bytes, the two checks, and FoE against Head Parallel."""
    runs, environment, sizes = results["runs"], results["environment"], results["sizes"]
    lines = [
        "# Two hosts and a slow link",
        "",
        f"`{results['command']}`, on {environment['cpu']}, {environment['cores']} cores; Python "
        f"{environment['python']}, JAX {environment['jax']}; two processes of four simulated devices, MTU "
        f"{environment['mtu']}.",
        "",
        f"Models: {_model_line(results['model'])}. Forward pass and training step: {sizes['rows']} sequences of "
        f"{sizes['length']} tokens; decoding step: {sizes['sequences']} sequences, each with {sizes['context']} tokens "
        "of context. Seconds are medians; in brackets how many times those of the first FoE layout.",
        "",
        *_head_model_lines(results),
        *(f"- {limit}" for limit in LIMITS),
    ]
    for program, title in TITLES.items():
        own = [run for run in runs if run["program"] == program]
        lines += ["", f"## {title}", "", *_times_table(own)] if own else []
    lines += ["", "## Bytes on the link", "", *_bytes_section(runs)]
    lines += ["", "## Where the link decides", "", *_check_section(runs)]
    sentences = against_heads(runs)
    if sentences:
        lines += ["", "## FoE and Head Parallel", "", "In brackets Head Parallel's seconds over FoE's.", ""]
        lines += [f"- {sentence}" for sentence in sentences]
    return "\n".join(lines) + "\n"


def _model_line(model: Mapping[str, Any]) -> str:
    return (
        f"{model['num_layers']} layers of width {model['hidden_size']}, {model['num_experts']} experts of width "
        f"{model['expert_hidden_size']}, {model['experts_per_token']} per token, vocabulary {model['vocab_size']}, "
        "float32; FoE with 8 groups"
    )


def _head_model_lines(results: Mapping[str, Any]) -> list[str]:
    """What the layouts `hp` run, where there are any: another model, matched with the MoE."""
    if not any(run["kind"] == "hp" for run in results["runs"]):
        return []
    model, parameters = results["head_model"], results["parameters"]
    heads = model["num_ffn_heads"]
    counted = [f"{name} {counts['total']:,} ({counts['active']:,})" for name, counts in parameters.items()]
    return [
        f"`hp` is Head Parallel of a Multi-Head LatentMoE: {heads} heads with a sub-token of "
        f"{model['hidden_size'] // heads} and {model['num_experts'] // heads} experts each, "
        f"{model['experts_per_token'] // heads} per sub-token, two matrices of width {model['expert_hidden_size']} "
        "with a GELU between them. Its experts are smaller by the parameters of its two projections. Parameters "
        f"(active for a token): {', '.join(counted)}. It trains without auxiliary losses, the others with theirs.",
        "",
    ]


def _times_table(runs: Sequence[Run]) -> list[str]:
    rates = list(dict.fromkeys(run["rate_mbit"] for run in runs))
    first = {run["rate_mbit"]: run["seconds"] for run in reversed(runs) if run["kind"] == "foe"}
    lines = ["| layout | " + " | ".join(map(rate_text, rates)) + " |", "| --- |" + " ---: |" * len(rates)]
    for name, own in _by_name(runs).items():
        cells = [f"{run['seconds']:.3f}{_times(run['seconds'], first.get(run['rate_mbit']))}" for run in own]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _times(seconds: float, of: float | None) -> str:
    return "" if of is None else f" ({seconds / of:.2f})"


def _bytes_section(runs: Sequence[Run]) -> list[str]:
    """Per step and host, sent to the other one: the audit's figure and the interface counters'."""
    lines = [
        "Sent by one host to the other in a step, the larger of the two. Counted: on the interface, headers and "
        "acknowledgements included, over all rates. Where the audit has two figures, exchanges of tokens choose "
        "between two buffer sizes, and what is counted should lie between them. Gloo adds some kB of its own to every "
        "exchange, and to every array that is reduced, also where the compiler has put many into one all-reduce: they "
        "weigh where a step sends little.",
        "",
        "| layout | program | audited, MB | counted, MB | counted over audited |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for (name, program), own in _by_name_and_program(runs).items():
        counted = [counted_bytes(run) for run in own]
        cells = [_span(own[0]["audited_bounds"], 1e6, 3), _span(counted, 1e6, 3)]
        ratios = [excess for run in own if (excess := bytes_excess(run)) is not None]
        if len(set(own[0]["audited_bounds"])) > 1 and not any(ratios):
            cells.append("between the two")
        else:
            cells.append(f"{min(ratios):+.1%} to {max(ratios):+.1%}" if ratios else "")
        lines.append(f"| {name} | {TITLES[program].lower()} | " + " | ".join(cells) + " |")
    beyond = [run for run in runs if abs(bytes_excess(run) or 0.0) > ALLOWED_BYTES]
    lines += ["", f"Further than {ALLOWED_BYTES:.0%} from the audit: {_named(beyond)}."]
    return lines


def _span(values: Sequence[float], unit: float, digits: int) -> str:
    low, high = (f"{value / unit:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _check_section(runs: Sequence[Run]) -> list[str]:
    pairs = decided_by_the_link(runs)
    lost = [pair for pair in pairs if pair.foe["seconds"] >= pair.other["seconds"]]
    lines = [
        "Wire time is a step's time at a rate less its time without a limit. Wherever it is more than half of FoE's "
        "step, or of the MoE's, FoE's step should be shorter than that of every MoE layout that sends more bytes.",
        "",
        *(f"- {line}" for line in _count_by_layout(pairs, lost)),
        *(
            f"- violated: {_run_name(pair.foe)} takes {pair.foe['seconds']:.3f} s and {pair.other['name']} "
            f"{pair.other['seconds']:.3f} s"
            for pair in lost
        ),
    ]
    others = no_more_bytes_than_foe(runs)
    if others:
        lines += ["", "MoE layouts that do not send more bytes, about which this says nothing:", ""]
        lines += [f"- {line}" for line in others]
    return lines


def _count_by_layout(pairs: Sequence[Pair], lost: Sequence[Pair]) -> list[str]:
    """How many pairs each FoE layout is in and wins; one that sends nothing wins them for that alone."""
    names = dict.fromkeys(pair.foe["name"] for pair in pairs)
    lines = [f"{len(pairs)} such pairs, FoE's step shorter in {len(pairs) - len(lost)}"] if pairs else ["no such pair"]
    for name in names:
        own = [pair for pair in pairs if pair.foe["name"] == name]
        silent = sum(audited_bytes(pair.foe) == 0 for pair in own)
        shorter = len(own) - sum(pair.foe["name"] == name for pair in lost)
        lines.append(f"{name}: {len(own)} pairs, shorter in {shorter}; in {silent} of them it sends nothing itself")
    return lines


class Pair(NamedTuple):
    """A run of FoE and one of another architecture, of one program at one rate."""

    foe: Run
    other: Run


def decided_by_the_link(runs: Sequence[Run]) -> list[Pair]:
    """Pairs of which the MoE sends more bytes and at least one spends more than half of its step on the link."""
    free = {(run["name"], run["program"]): run["seconds"] for run in runs if run["rate_mbit"] is None}

    def waits(run: Run) -> bool:
        unlimited = free.get((run["name"], run["program"]))
        return unlimited is not None and run["seconds"] - unlimited > run["seconds"] / 2

    return [pair for pair in _pairs(runs, "MoE") if _sends_more(pair) and (waits(pair.foe) or waits(pair.other))]


def no_more_bytes_than_foe(runs: Sequence[Run]) -> list[str]:
    """For each FoE layout and program, the MoE layouts that do not send more, in words."""
    found: dict[str, list[str]] = {}
    for pair in _pairs(runs, "MoE"):
        if not _sends_more(pair):
            names = found.setdefault(f"{TITLES[pair.foe['program']].lower()}, {pair.foe['name']}", [])
            names += [] if pair.other["name"] in names else [pair.other["name"]]
    return [f"{foe}: {', '.join(names)}" for foe, names in found.items()]


def _pairs(runs: Sequence[Run], of: Architecture) -> list[Pair]:
    return [
        Pair(foe, other)
        for foe in runs
        for other in runs
        if architecture(foe["kind"]) == "FoE"
        and architecture(other["kind"]) == of
        and (foe["program"], foe["rate_mbit"]) == (other["program"], other["rate_mbit"])
    ]


def _sends_more(pair: Pair) -> bool:
    return audited_bytes(pair.other) > audited_bytes(pair.foe)


def against_heads(runs: Sequence[Run]) -> list[str]:
    """For each arrangement of the devices that both have and each program, at which rates whose step is shorter."""
    found: dict[tuple[str, str], list[Pair]] = {}
    for pair in _pairs(runs, "Multi-Head LatentMoE"):
        if pair.foe["mesh"] == pair.other["mesh"]:
            found.setdefault((pair.foe["name"], pair.foe["program"]), []).append(pair)
    return [_verdict(pairs) for pairs in found.values()]


def _verdict(pairs: Sequence[Pair]) -> str:
    """Of pairs that differ in the rate alone."""
    foe, heads = pairs[0]
    parts = []
    for who, foe_wins in (("FoE", True), ("Head Parallel", False)):
        own = [pair for pair in pairs if (pair.foe["seconds"] < pair.other["seconds"]) == foe_wins]
        rates = [f"{rate_text(pair.foe['rate_mbit'])} ({_ratio(pair):.2f})" for pair in own]
        parts += [f"{who}'s step is the shorter one: {', '.join(rates)}"] if own else []
    return (
        f"{TITLES[foe['program']]}, {foe['name']} sends {audited_bytes(foe) / 1e6:.2f} MB and {heads['name']} "
        f"{audited_bytes(heads) / 1e6:.2f} MB: {'; '.join(parts)}."
    )


def _ratio(pair: Pair) -> float:
    return pair.other["seconds"] / pair.foe["seconds"]


def audited_bytes(run: Run) -> float:
    """What the audit has the busier host send in a step."""
    return max(run["audited_egress_bytes"].values())


def counted_bytes(run: Run) -> float:
    """What the busier host has sent in a step."""
    return max(run["egress_bytes"].values())


def bytes_excess(run: Run) -> float | None:
    """Counted over audited bytes of a step, less one; None where nothing should cross.

    Where exchanges choose between buffer sizes the audit gives bounds: 0 between them, else from the nearer one.
    """
    low, high = run["audited_bounds"]
    if not high:
        return None
    return max(counted_bytes(run) / high - 1, 0.0) or min(counted_bytes(run) / low - 1, 0.0)


def _named(runs: Sequence[Run]) -> str:
    return ", ".join(f"{_run_name(run)} ({bytes_excess(run):+.1%}, {_excess_text(run)})" for run in runs) or "none"


def _excess_text(run: Run) -> str:
    """What is counted beyond the audit, how many arrays the step reduces and how many collectives else it has."""
    reduced = sum(row["count"] * row["arrays"] for row in run["collectives"] if row["op"] == "all-reduce")
    others = sum(row["count"] for row in run["collectives"] if row["op"] != "all-reduce")
    excess = (counted_bytes(run) - audited_bytes(run)) / 1e3
    return f"{excess:.0f} kB at {others:g} exchanges and {reduced:g} reduced arrays"


def _run_name(run: Run) -> str:
    return f"{run['name']}, {TITLES[run['program']].lower()}, {rate_text(run['rate_mbit'])}"


def rate_text(mbit: float | None) -> str:
    """For tables."""
    return "unlimited" if mbit is None else f"{mbit:g} Mbit/s"


def _by_name(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run["name"], []).append(run)
    return found


def _by_name_and_program(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        found.setdefault((run["name"], run["program"]), []).append(run)
    return found


def plot(runs: Sequence[Run], path: Path) -> None:
    """Time of one program against the rate, a line for each layout; the last point is without a limit."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    limited = sorted({run["rate_mbit"] for run in runs if run["rate_mbit"] is not None})
    free_at = 4 * max(limited, default=250.0)
    for index, (name, own) in enumerate(_by_name(runs).items()):
        at = [free_at if run["rate_mbit"] is None else run["rate_mbit"] for run in own]
        line = _LINES[architecture(own[0]["kind"])]
        axes.plot(at, [run["seconds"] for run in own], f"{_MARKERS[index % len(_MARKERS)]}{line}", label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([*limited, free_at], [*(f"{rate:g}" for rate in limited), "unlimited"], minor=False)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel("rate of the link in each direction (Mbit/s)")
    axes.set_ylabel("seconds of a step (median)")
    axes.set_title(f"{TITLES[runs[0]['program']]}, {runs[0]['tokens']:,} tokens")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    state_limits(figure)
    figure.savefig(path, dpi=120)


def state_limits(figure: Figure) -> None:
    """Write under a plot of these measurements what they cannot show."""
    columns = int(15 * figure.get_figwidth())
    figure.supxlabel("\n".join(textwrap.wrap(" ".join(LIMITS), columns)), fontsize=7)
