"""A plan as text: markdown tables and the sentences that go with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from foejax.analysis.cost_model.predict import Item
from foejax.analysis.plan import ONE_PROMPT, PAPER_ENGINE, ForwardRow, Plan, Steps, find
from foejax.serving.load.report import table


def format_plan(plan: Plan) -> str:
    """Everything: assumptions, steps of all layouts, their layers part by part, the paper's tables."""
    sections = [_assumptions(plan), format_steps(plan), *(_layer_section(steps) for steps in plan.steps)]
    sections += [forward_section(plan, title) for title in plan.forward]
    if plan.serving:
        sections.append(serving_section(plan))
    return "\n\n".join(sections)


def _assumptions(plan: Plan) -> str:
    cluster, device = plan.cluster, plan.cluster.accelerator
    lines = [
        f"{cluster.name}, predicted; nothing was run. A device: {device.matmul_flops / 1e12:,.0f} TFLOP/s (bf16), "
        f"{device.memory_bandwidth / 1e12:.2f} TB/s, {device.link_bandwidth / 1e9:.0f} GB/s to its host, "
        f"{device.network_bandwidth / 1e9:.0f} GB/s to others.",
        f"Shares of these peaks that are assumed: matmuls {cluster.matmul_fraction:g}, attention "
        f"{cluster.attention_fraction:g}, memory {cluster.memory_fraction:g}, links {cluster.link_fraction:g}, network "
        f"{cluster.network_fraction:g}; a layer takes at least {_time(cluster.layer_floor)}; all-reduces are "
        f"{cluster.all_reduce}; overlap of compute and communication {cluster.overlap:g}; the fullest device of "
        f"layouts that share experts has {plan.workload.imbalance:g} times the mean.",
    ]
    model = plan.config.model
    if model.num_ffn_heads and any(steps.candidate.layout.kind == "ep" for steps in plan.steps):
        lines.append(
            f"hp and data: {model.num_ffn_heads} heads, each with {model.experts_per_stack} of "
            f"{model.num_experts // model.num_ffn_heads} experts a token. ep: the MoE with the experts and choices of "
            "one head, which read whole tokens and weigh as much as those of all heads."
        )
    lines += [f"Left out: {kind}: {reason}" for kind, reason in plan.left_out.items()]
    return "\n".join(lines)


def format_steps(plan: Plan) -> str:
    """Prompt, decoding step and training step of every layout."""
    work = plan.workload
    training = plan.config.data
    header = [
        "layout",
        f"{work.tokens:,} prompt tokens",
        "of it communication",
        f"{work.sequences:,} x 1 token, context {work.context:,}",
        "of it communication",
        f"training step, {training.batch_size} x {training.sequence_length:,} tokens",
        "of it communication",
    ]
    rows = []
    for steps in plan.steps:
        cells = []
        for prediction in (steps.prefill, steps.decode, steps.training):
            share = prediction.communication_seconds / prediction.seconds
            cells += [_time(prediction.seconds), f"{min(share, 1):.0%}"]
        rows.append([steps.candidate.name, *cells])
    note = (
        "The prompt is a single sequence: layouts that deal sequences out to devices attend to it on one of them. The "
        "training step's gradient collectives are approximate."
    )
    return f"## Steps\n\n{table(header, rows)}\n\n{note}"


def _layer_section(steps: Steps) -> str:
    """One layer's parts of prompt and decoding step."""
    prefill, decode = steps.prefill, steps.decode
    rows = []
    for first, second in ((prefill.layer, decode.layer), (prefill.once, decode.once)):
        names = list(dict.fromkeys(item.name for item in (*first, *second)))
        suffix = "" if first is prefill.layer else " (once)"
        for name in names:
            pair = [next((item for item in items if item.name == name), None) for items in (first, second)]
            detail = next(item.detail for item in pair if item is not None)
            rows.append([name + suffix, detail, *(cell for item in pair for cell in _cells(item))])
    header = ["a layer's part", "collective", "prompt", "bound by", "decoding", "bound by"]
    return f"### {steps.candidate.name}\n\n{table(header, rows)}"


def _cells(item: Item | None) -> list[str]:
    return ["", ""] if item is None else [_time(item.seconds), item.bound]


def forward_section(plan: Plan, title: str) -> str:
    """Forward passes over tokens: the paper's Table 9 beside predictions, and what their ratio is made of."""
    rows = plan.forward[title]
    candidates = [steps.candidate for steps in plan.steps]
    compared = ("ep", "hp", "fsdp") if plan.config.model.num_ffn_heads else ("ep", "tp_ep", "foe")
    kinds = {name: found.name for name in compared if (found := find(candidates, name)) is not None}
    paper = any(row.measured for row in rows) and title != "prompts of 2,048 tokens"
    header = ["tokens", *(["paper: MoE", "FoE", "MoE / FoE"] if paper else []), *kinds.values()]
    if "hp" not in kinds:
        header += ["MoE / FoE", "imbalance", "spread", "attention", "collectives"]
    elif "ep" in kinds:
        header.append("ep / hp")
    body = [_forward_cells(row, kinds, paper) for row in rows]
    text = f"## Forward pass, {title}\n\n{table(header, body)}"
    note = _forward_note(plan, title, rows) if rows else ""
    return f"{text}\n\n{note}" if note else text


def _forward_cells(row: ForwardRow, kinds: Mapping[str, str], paper: bool) -> list[str]:
    cells = [f"{row.tokens:,}"]
    if paper and row.measured:
        moe, foe = row.measured
        cells += [_time(moe), _time(foe), f"{moe / foe:.2f}"]
    cells += [_time(row.seconds[name]) for name in kinds.values()]
    if "hp" in kinds:
        return cells + ([f"{row.seconds[kinds['ep']] / row.seconds[kinds['hp']]:.2f}"] if "ep" in kinds else [])
    ratio = row.ratio
    parts = [None] * 5 if ratio is None else [ratio.whole, *vars(ratio).values()]
    return cells + ["" if value is None else f"{value:.2f}" for value in parts]


def _forward_note(plan: Plan, title: str, rows: Sequence[ForwardRow]) -> str:
    last, parts = rows[-1], []
    if last.ratio is not None:
        ratio = last.ratio
        parts.append(
            f"At {last.tokens:,} tokens the predicted MoE / FoE of {ratio.whole:.2f} is {ratio.imbalance:.2f} "
            f"(imbalance) x {ratio.spread:.2f} (experts over more devices than heads) x {ratio.attention:.2f} "
            f"(attention split over devices: ep against tp_ep) x {ratio.collectives:.2f} (all-to-alls, gathers and "
            "scatters against all-reduces: tp_ep against FoE)."
        )
    if title == PAPER_ENGINE and plan.paper_cluster is not None:
        parts.append(
            f"Two figures are fitted to the first and the last MoE cell of the paper's table: a layer takes at least "
            f"{_time(plan.paper_cluster.layer_floor)}, attention reaches {plan.paper_cluster.attention_fraction:.1%} "
            "of the matmul peak. All other cells are predictions."
        )
    if title == ONE_PROMPT:
        parts.append("Several sequences instead of one let layouts share attention that deal sequences out.")
    return " ".join(parts)


def serving_section(plan: Plan) -> str:
    """Latencies under Poisson arrivals: the real scheduler in simulated time, beside the paper's Tables 5 and 6."""
    header = ["mean s between requests", "layout", "engine", "TTFT", "TBT", "E2E", "paper: TTFT", "TBT", "E2E"]
    rows = []
    for row in plan.serving:
        found = (row.summary.ttft.mean, row.summary.tbt.mean, row.summary.e2e.mean)
        paper = [_time(value) for value in row.paper] if row.paper else [""] * 3
        rows.append([f"{row.interarrival:g}", row.candidate, row.engine, *map(_time, found), *paper])
    work = plan.workload
    lengths = f"{work.prompts.first:,.0f}" + (f" to {work.prompts.second:,.0f}" if work.prompts.second else "")
    note = (
        f"Means over {work.requests} requests of {lengths} prompt tokens and 256 output tokens, at most "
        f"{work.engine.max_sequences} at a time, {work.engine.prefill_tokens:,} prompt tokens a step over all devices. "
        "The paper says neither how many requests it sent nor its engine's limits."
    )
    return f"## Serving\n\n{table(header, rows)}\n\n{note}"


def _time(seconds: float) -> str:
    """`12.3 ms`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
