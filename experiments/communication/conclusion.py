"""The account in plain words; every sentence is made from figures, so that none outlives its figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.communication.calibrated import WANTED_ERROR, Calibrated
from experiments.communication.measured import Finding, measured_findings
from experiments.two_hosts.report import audited_bytes, rate_text
from foejax.analysis.cost_model.cluster import read_cluster
from foejax.analysis.cost_model.matched import matched_models
from foejax.analysis.cost_model.paper import FORWARD_SECONDS
from foejax.analysis.cost_model.predict import predict_step
from foejax.analysis.cost_model.step import decode_step, prefill_step
from foejax.analysis.plan import MANY_PROMPTS, ONE_PROMPT, PAPER_ENGINE, PAPERS, ForwardRow, Plan, find
from foejax.config import ModelConfig
from foejax.serving.load.report import table
from sharding import Layout
from sharding.formulas import communication_table
from sharding.mesh import MeshSizes

Run = Mapping[str, Any]


def conclusion(
    runs: Sequence[Run], calibrated: Calibrated, plans: Mapping[str, Plan], balance: Sequence[Mapping[str, Any]]
) -> str:
    """What was found, and where FoE does not win."""
    one_host = next(plan for plan in plans.values() if plan.cluster.hosts == 1)
    measured, trained = measured_findings(runs), [_training_sentence(plan) for plan in plans.values()]
    found = [text for text, foe_wins in measured if foe_wins]
    found += [_calibration_sentence(calibrated), *_prediction_sentences(one_host)]
    found += [text for text, foe_wins in trained if foe_wins]
    losses = [
        *(text for text, foe_wins in measured if not foe_wins),
        *_inner_ep_sentences(runs),
        _bytes_sentence(one_host.config.model),
        _single_device_sentence(one_host.config.model),
        _small_batch_sentence(one_host.forward[ONE_PROMPT]),
        _tp_ep_sentence(one_host.forward[ONE_PROMPT], one_host),
        *(text for text, foe_wins in trained if not foe_wins),
        *_balance_sentences(balance),
    ]
    return "\n\n".join(
        [
            "# In short",
            "\n".join(f"- {line}" for line in found),
            "## Where FoE does not win",
            "\n".join(f"- {line}" for line in losses),
            _bytes_table(one_host.config.model),
        ]
    )


def _calibration_sentence(calibrated: Calibrated) -> str:
    rates = " and ".join(f"{rate:g}" for rate in calibrated.rates)
    verdict = "within" if calibrated.error <= WANTED_ERROR else "beyond"
    return (
        f"Fitted to the steps at {rates} Mbit/s, the cost model predicts those at the other rates with a median error "
        f"of {calibrated.error:.1%}, {verdict} the {WANTED_ERROR:.0%} that were asked for."
    )


def _prediction_sentences(plan: Plan) -> list[str]:
    lines = []
    for title in (ONE_PROMPT, MANY_PROMPTS):
        row = plan.forward[title][-1]
        if row.ratio is not None:
            lines.append(
                f"Predicted for the 7B models on {plan.cluster.name}, {row.tokens:,} tokens as {title}: MoE with "
                f"expert parallelism over FoE is {row.ratio.whole:.2f} = {row.ratio.imbalance:.2f} by imbalance x "
                f"{row.ratio.spread * row.ratio.attention:.2f} by how attention is spread over devices x "
                f"{row.ratio.collectives:.2f} by the kind of collectives."
            )
    if PAPER_ENGINE in plan.forward and plan.paper_cluster is not None:
        lines.append(_paper_sentence(plan))
    lines += _serving_sentences(plan)
    return lines


def _paper_sentence(plan: Plan) -> str:
    """How far two fitted cells carry, and what a better MoE layout would have done."""
    candidates = [steps.candidate for steps in plan.steps]
    foe, tp_ep = find(candidates, "foe"), find(candidates, "tp_ep")
    row = plan.forward[PAPER_ENGINE][-1]
    assert foe is not None and tp_ep is not None and plan.paper_cluster is not None and row.measured is not None
    moe, measured = row.measured
    attention = f"{plan.paper_cluster.attention_fraction:.1%}"
    return (
        f"The paper's own {row.tokens:,}-token figures are MoE {moe:.2f} s and FoE {measured:.2f} s, "
        f"{moe / measured:.2f} times. With attention at {attention} of the matmul peak and the floor of a layer, both "
        "read off the MoE column, and heads that FoE splits over the devices and its MoE does not, FoE is predicted at "
        f"{row.seconds[foe.name]:.2f} s, and an MoE with its heads split (`tp_ep`) at {row.seconds[tp_ep.name]:.2f} s."
    )


def _serving_sentences(plan: Plan) -> list[str]:
    lines = []
    for scale in dict.fromkeys(row.interarrival for row in plan.serving):
        rows = [row for row in plan.serving if row.interarrival == scale and row.engine == PAPERS and row.paper]
        moe = next((row for row in rows if row.candidate.startswith("ep")), None)
        foe = next((row for row in rows if row.candidate.startswith("foe")), None)
        if moe is None or foe is None or moe.paper is None or foe.paper is None:
            continue
        lines.append(
            f"One request every {scale:g} s, on {plan.cluster.name} with the paper's engine: TTFT of MoE over FoE is "
            f"predicted at {moe.summary.ttft.mean / foe.summary.ttft.mean:.2f} (paper: "
            f"{moe.paper.ttft / foe.paper.ttft:.2f}). TBT is predicted at {foe.summary.tbt.mean:.3f} s for FoE and the "
            f"paper has {foe.paper.tbt:.3f} s: what makes its tokens that slow is not in the model."
        )
    return lines


def _inner_ep_sentences(runs: Sequence[Run]) -> list[str]:
    """An MoE whose experts stay inside a host against FoE over both, at the slowest rate."""
    lines = []
    limited = [run["rate_mbit"] for run in runs if run["rate_mbit"] is not None]
    for program in ("forward", "decode_step"):
        slowest = [run for run in runs if run["program"] == program and run["rate_mbit"] == min(limited, default=None)]
        inner = next((run for run in slowest if run["kind"] == "ep" and run["mesh"]["data"] > 1), None)
        across = next((run for run in slowest if run["kind"] == "foe" and run["mesh"]["data"] == 1), None)
        inside = next((run for run in slowest if run["kind"] == "foe" and run["mesh"]["data"] > 1), None)
        if inner is None or across is None:
            continue
        beside = (
            "" if inside is None else f" FoE in that arrangement, {inside['name']}, takes {inside['seconds']:.3f} s."
        )
        lines.append(
            f"{program.replace('_', ' ').capitalize()} with experts inside a host and `data` between hosts "
            f"({inner['name']}): {audited_bytes(inner) / 1e6:.2f} MB cross and a step takes {inner['seconds']:.3f} s "
            f"at {rate_text(min(limited))}; {across['name']} sends {audited_bytes(across) / 1e6:.2f} MB and takes "
            f"{across['seconds']:.3f} s.{beside}"
        )
    return lines


def _egress(model: ModelConfig, devices: int) -> dict[str, float]:
    """Bytes that a device sends in a forward pass of 1,024 tokens a device, by layout."""
    foe, _ = matched_models(model)
    rows = communication_table(
        num_layers=model.num_layers,
        tokens_per_device=1024,
        width=model.hidden_size,
        num_devices=devices,
        num_groups=foe.num_groups,
        num_experts=model.num_experts,
        experts_per_token=model.experts_per_token,
    )
    sent: dict[str, float] = {}
    for row in rows:
        sent[row["layout"]] = sent.get(row["layout"], 0.0) + row["total_wire_bytes"]
    return sent


_DEVICES = (2, 4, 8, 16, 32, 64)


def _bytes_sentence(model: ModelConfig) -> str:
    fewer = [
        devices for devices in _DEVICES if (sent := _egress(model, devices))["moe ep, de-duplicated"] < sent["foe"]
    ]
    if not fewer:
        return "Bytes: FoE sends fewer than expert parallelism at every number of devices looked at."
    ratios = {
        devices: sent["moe ep, de-duplicated"] / sent["foe"] for devices in fewer if (sent := _egress(model, devices))
    }
    least = min(ratios, key=lambda devices: ratios[devices])
    return (
        f"Bytes: with k = {model.experts_per_token} and {model.num_experts} experts, an MoE that sends a token once to "
        f"each device sends fewer than FoE on {', '.join(map(str, fewer))} devices ({ratios[least]:.2f} of them on "
        f"{least}). FoE's all-reduce of all tokens is no saving of bytes by itself."
    )


def _bytes_table(model: ModelConfig) -> str:
    layouts = ("foe", "moe ep", "moe ep, de-duplicated", "moe tp", "moe tp_ep")
    rows = []
    for devices in _DEVICES:
        sent = _egress(model, devices)
        rows.append([str(devices), *(f"{sent[layout] / sent['foe']:.2f}" for layout in layouts)])
    return (
        "Bytes that a device sends in a forward pass, equal work, relative to FoE (`sharding.formulas`; beyond "
        f"{matched_models(model)[0].num_groups} devices FoE has `data` replicas):\n\n"
        + table(["devices", *layouts], rows)
    )


def _single_device_sentence(model: ModelConfig) -> str:
    cluster, layout = read_cluster("1xH100"), Layout.abstract("foe", MeshSizes(1, 1, 1))
    foe, moe = matched_models(model)
    ratios = []
    for step in (prefill_step(8192, 1), decode_step(64, 9000, 1)):
        seconds = [predict_step(which, layout, step, cluster).seconds for which in (foe, moe)]
        ratios.append(seconds[0] / seconds[1])
    return (
        f"A single GPU: nothing is sent, and FoE's {foe.num_groups} residual streams are read and written besides. "
        f"Predicted: {ratios[0]:.2f} times the MoE's prompt step, {ratios[1]:.2f} times its decoding step."
    )


def _small_batch_sentence(rows: Sequence[ForwardRow]) -> str:
    small = [row for row in rows if row.tokens <= 8 and row.ratio is not None]
    ratios = [row.ratio.whole for row in small if row.ratio is not None]
    paper = [moe / foe for tokens, (moe, foe) in FORWARD_SECONDS.items() if tokens <= 1024]
    return (
        f"Small batches: up to {small[-1].tokens} tokens the predicted MoE over FoE is {min(ratios):.2f} to "
        f"{max(ratios):.2f}: launches and latencies decide. The paper measured {min(paper):.2f} to {max(paper):.2f} "
        "up to 1,024 tokens."
    )


def _tp_ep_sentence(rows: Sequence[ForwardRow], plan: Plan) -> str:
    candidates = [steps.candidate for steps in plan.steps]
    foe, tp_ep = find(candidates, "foe"), find(candidates, "tp_ep")
    assert foe is not None and tp_ep is not None
    balanced = rows[-1].ratio.collectives if rows[-1].ratio is not None else float("nan")
    return (
        f"Against an MoE with its heads split (`tp_ep`) attention is no advantage: at {rows[-1].tokens:,} tokens that "
        f"takes {rows[-1].seconds[tp_ep.name] / rows[-1].seconds[foe.name]:.2f} times as long as FoE on "
        f"{plan.cluster.name} with an imbalance of {plan.workload.imbalance:g}, {balanced:.2f} in balance."
    )


def _training_sentence(plan: Plan) -> Finding:
    """The fastest layout of the training step, and whether it is FoE's."""
    order = sorted(plan.steps, key=lambda steps: steps.training.seconds)
    best, foe = order[0], next(steps for steps in order if steps.candidate.layout.kind == "foe")
    other = next(steps for steps in order if (steps.candidate.layout.kind == "foe") != (best is foe))
    times = f"{other.training.seconds / best.training.seconds:.2f} times as long"
    fastest = f"Training on {plan.cluster.name}, predicted approximately: {best.candidate.name} is the fastest layout"
    return f"{fastest}; {other.candidate.name} takes {times}.", best is foe


def _balance_sentences(balance: Sequence[Mapping[str, Any]]) -> list[str]:
    """Groups are balanced by construction; devices inside a group are not."""
    spread = [row for row in balance if row["layout"] == "foe" and row["expert_axis"] > 1]
    ep = [row for row in balance if row["layout"] == "ep"]
    return [
        f"Balance: between FoE's groups it is exact, but devices that share a group are as uneven as expert "
        f"parallelism: most over median rows {inside['row_discrepancy']:.2f} ({inside['run']}, {inside['mesh']}) "
        f"against {outside['row_discrepancy']:.2f} ({outside['run']}, {outside['layout']} {outside['mesh']})."
        for inside, outside in zip(spread, ep, strict=False)
    ]
