"""What a load bench found: a table in the layout of arXiv 2605.06206 (tables 5 and 6), JSON, and curves."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from foejax.serving.load.latency import Limits, RequestRecord, Spread, Summary

_LATENCIES = ("ttft", "tbt", "e2e")
_TITLES = {"ttft": "TTFT", "tbt": "TBT", "e2e": "E2E", "gap": "gap between tokens", "stall": "longest stall"}


@dataclass(frozen=True)
class LoadRun:
    """One engine under one trace.

    Attributes:
      engine: the column that tells engines apart.
      interarrival: of the trace, seconds.
      records: of every request.
      summary: their figures.
    """

    engine: str
    interarrival: float
    records: Sequence[RequestRecord]
    summary: Summary


def write_load_report(out: Path, runs: Sequence[LoadRun], facts: dict[str, Any], limits: Limits) -> None:
    """Write report.md, results.json and latencies.png into a folder, made if it is not there.

    Args:
      facts: device, versions, command and what else names the measurement; `on_gpu` decides what the report says of
        absolute times.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(load_markdown(runs, facts, limits), encoding="utf-8")
    found = {
        "facts": facts,
        "limits": {name: value if math.isfinite(value) else None for name, value in vars(limits).items()},
        "runs": [
            {
                "engine": run.engine,
                "interarrival": run.interarrival,
                **run.summary.as_dict(),
                "records": [_plain(record) for record in run.records],
            }
            for run in runs
        ],
    }
    (out / "results.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    plot_latencies(runs, out / "latencies.png")


def load_markdown(runs: Sequence[LoadRun], facts: dict[str, Any], limits: Limits) -> str:
    """The report."""
    asked = [f"{name.upper()} at most {value:g} s" for name, value in vars(limits).items() if math.isfinite(value)]
    sections = [
        "# Load bench",
        "\n".join(f"- {name}: {value}" for name, value in facts.items() if name != "on_gpu"),
        "" if facts["on_gpu"] else "Measured without a GPU: the ratios mean something, the seconds do not.",
        "Seconds as mean, p50, p99; x is the first engine over each other one, above 1 where the other one is faster.",
        latency_table(runs),
        "## Rates and failures",
        f"A request is good if it ends well{''.join(f', {each}' for each in asked)}.",
        rate_table(runs),
        *_failures(runs),
        "## What the columns are",
        "TTFT: from arrival to first token. TBT: mean time between the tokens of a request. E2E: from arrival to last "
        "token. gap: between consecutive tokens of all requests; m tokens that arrive at once, t seconds after those "
        "before, are m gaps of t/m. stall: the longest time in which a request got nothing after its first token. "
        "Arrival is that of the trace. Failed requests are in no time and no rate.",
        "![latencies](latencies.png)",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def latency_table(runs: Sequence[LoadRun], columns: Sequence[str] = _LATENCIES) -> str:
    """One line an engine and mean inter-arrival time; below each engine but the first the first one's times over its.

    In the paper's tables: MoE, FoE, and MoE over FoE.
    """
    rows = []
    for scale in dict.fromkeys(run.interarrival for run in runs):
        same = [run for run in runs if run.interarrival == scale]
        for index, run in enumerate(same):
            spreads = [getattr(run.summary, column) for column in columns]
            rows.append([f"{scale:g}" if index == 0 else "", run.engine, *map(_seconds, spreads)])
            if index:
                firsts = [getattr(same[0].summary, column) for column in columns]
                ratios = [_ratios(*pair) for pair in zip(firsts, spreads, strict=True)]
                rows.append(["", f"x {run.engine}" if len(same) > 2 else "x", *ratios])
    return table(["inter-arrival", "engine", *(_TITLES[column] for column in columns)], rows)


def rate_table(runs: Sequence[LoadRun]) -> str:
    """Throughput, goodput, gaps, stalls and failures."""
    header = ["inter-arrival", "engine", "tokens/s", "requests/s", "good", "goodput (requests/s)"]
    header += [_TITLES["gap"], _TITLES["stall"], "completed", "short", "failed"]
    rows = []
    for run in runs:
        found = run.summary
        rows.append(
            [
                f"{run.interarrival:g}",
                run.engine,
                _number(found.output_tokens_per_second),
                _number(found.requests_per_second),
                "-" if math.isnan(found.good_share) else f"{found.good_share:.0%}",
                _number(found.goodput),
                _seconds(found.gap),
                _seconds(found.stall),
                f"{found.completed} of {found.requests}",
                str(found.short),
                str(found.failed),
            ]
        )
    return table(header, rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot_latencies(runs: Sequence[LoadRun], path: Path) -> None:
    """Cumulative distributions of TTFT, TBT, gaps and E2E over the requests, a line of panels for each trace."""
    scales = list(dict.fromkeys(run.interarrival for run in runs))
    figure = Figure(figsize=(16, 3.6 * len(scales)), layout="constrained")
    panels = figure.subplots(len(scales), 4, squeeze=False)
    for row, scale in zip(panels, scales, strict=True):
        for axes, name in zip(row, ("ttft", "tbt", "gap", "e2e"), strict=True):
            for run in (run for run in runs if run.interarrival == scale):
                values = np.sort(_values(run.records, name))
                axes.step(values, np.arange(1, len(values) + 1) / max(len(values), 1), where="post", label=run.engine)
            axes.set_xlabel(f"{_TITLES[name]} (s)")
            axes.set_ylabel(f"share, one request every {scale:g} s" if name == "ttft" else "")
            axes.set_ylim(0, 1)
            axes.grid(alpha=0.3)
        row[0].legend()
    figure.savefig(path, dpi=110)


def _values(records: Sequence[RequestRecord], name: str) -> list[float]:
    done = [record for record in records if not record.failure]
    if name == "gap":
        return [gap for record in done for gap in record.gaps()]
    return [value for record in done if (value := getattr(record, name)) is not None]


def _failures(runs: Sequence[LoadRun]) -> list[str]:
    rows = [
        [f"{run.interarrival:g}", run.engine, str(count), reason.replace("|", "\\|")]
        for run in runs
        for reason, count in run.summary.failures.items()
    ]
    return ["## Failures", table(["inter-arrival", "engine", "requests", "reason"], rows)] if rows else []


def _plain(record: RequestRecord) -> dict[str, Any]:
    values = vars(record)
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}


def _seconds(spread: Spread) -> str:
    return " ".join(_number(value) for value in (spread.mean, spread.p50, spread.p99))


def _number(value: float) -> str:
    """Three to four digits."""
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.{max(0, 3 - len(str(int(value))) + 1)}f}"


def _ratios(first: Spread, other: Spread) -> str:
    pairs = ((getattr(first, name), getattr(other, name)) for name in ("mean", "p50", "p99"))
    return " ".join("-" if math.isnan(a) or math.isnan(b) or b == 0 else f"{a / b:.2f}" for a, b in pairs)
