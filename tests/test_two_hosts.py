"""The experiment on two hosts: its commands, its cases, its report; and, where namespaces can be made, a real run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.timed_programs import PROGRAMS
from experiments.two_hosts import link, measure, report
from experiments.two_hosts.__main__ import main
from experiments.two_hosts.cases import CASES, QUICK, Case, Sizes, as_options, parameter_counts, run_config
from experiments.two_hosts.worker import Worker
from foejax.cli import report_errors
from foejax.models.expert_parallel import buffer_sizes
from foejax.training.run import make_layout

TINY = Sizes(hidden_size=16, num_layers=1, expert_hidden_size=8, rows=8, length=8, sequences=16, context=4)

# The link


def test_the_rate_is_set_at_both_ends() -> None:
    slow, fast = link.rate_commands([11, 12], 50), link.rate_commands([11, 12], 1000)
    for commands in (slow, fast, link.rate_commands([11, 12], None)):
        assert [command[1] for command in commands] == ["--target=11", "--target=12"]
        assert [command[command.index("dev") + 1] for command in commands] == ["veth0", "veth1"]
    assert slow[0][-6:] == ["rate", "50000000bit", "burst", "18100b", "limit", "4mb"]
    assert fast[0][-4:-2] == ["burst", "62500b"]
    assert link.rate_commands([11, 12], None)[0][-2:] == ["root", "noqueue"]


def test_the_cable_joins_the_holders() -> None:
    add, *ends = link.cable_commands([11, 12])
    assert add[add.index("netns") + 1] == "11" and add[-2:] == ["netns", "12"]
    assert [end[-4:] for end in ends if "address" in end] == [
        ["add", "10.77.0.1/24", "dev", "veth0"],
        ["add", "10.77.0.2/24", "dev", "veth1"],
    ]


def test_bytes_are_read_from_the_column_of_sent_ones() -> None:
    text = (
        "Inter-|   Receive                          |  Transmit\n"
        " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls\n"
        "    lo: 1 2 0 0 0 0 0 0 3 4 0 0 0 0 0 0\n"
        " veth0:5000 7 0 0 0 0 0 0 123456 8 0 0 0 0 0 0\n"
    )
    assert link.transmitted(text, "veth0") == 123456
    with pytest.raises(link.LinkError, match="veth1 is not among"):
        link.transmitted(text, "veth1")


def test_a_machine_that_cannot_is_told_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(link.LinkError, match="ip, tc, nsenter.* not found: install"):
        link.check_machine(user=0, search_path=str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert report_errors(lambda: main(["--out", str(tmp_path / "out")])) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "need root" in said[0]
    assert not (tmp_path / "out").exists()


def test_holders_end_with_a_link_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[subprocess.Popen[str]] = []

    def hold(host: str) -> subprocess.Popen[str]:
        held.append(subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return held[-1]

    def fail(command: Any) -> None:
        raise link.LinkError("no veth here")

    monkeypatch.setattr(link, "check_machine", lambda: None)
    monkeypatch.setattr(link, "_hold", hold)
    monkeypatch.setattr(link, "_run", fail)
    with pytest.raises(link.LinkError, match="no veth here"), link.TwoHosts():
        pass
    assert [holder.returncode for holder in held] == [-9, -9]


# The cases


@pytest.mark.parametrize("sizes", [Sizes(), QUICK], ids=["whole", "quick"])
def test_every_layout_fits_and_no_exchange_across_hosts_pads_to_the_worst_case(sizes: Sizes) -> None:
    for case in CASES:
        config = run_config(case, sizes)
        layout = make_layout(config.model, config.mesh)
        assert layout.kind == case.kind and dict(layout.mesh.shape) == case.mesh
        assert sizes.rows % layout.num_token_shards == 0 == sizes.sequences % layout.num_token_shards
        for program in PROGRAMS:
            own = sizes.tokens(program) // layout.num_token_shards
            own //= layout.num_token_slices if layout.slices_tokens else 1
            if layout.num_expert_shards == len(jax.devices()) and layout.exchanges_tokens:
                assert buffer_sizes(own, 8, 64, layout.num_expert_shards)[0].tokens < 0.9 * own


def test_models_differ_in_the_groups_alone() -> None:
    foe, moe = (run_config(case, Sizes()).model for case in (Case("foe", group=8), Case("tp", group=8)))
    assert foe.model_copy(update={"num_groups": 1}) == moe


@pytest.mark.parametrize("sizes", [Sizes(), TINY], ids=["whole", "tiny"])
def test_smaller_experts_pay_for_the_projections_of_heads(sizes: Sizes) -> None:
    """Per layer, in parameters: total and active ones are the MoE's, but for the routers."""
    moe, heads = (run_config(case, sizes).model for case in (Case("tp", group=8), Case("hp", group=8)))
    moe_expert = 3 * moe.hidden_size * moe.expert_hidden_size
    head_expert = 2 * heads.expert_width * heads.expert_hidden_size
    projections = 2 * heads.hidden_size * heads.num_ffn_heads * heads.expert_width
    assert heads.num_experts * head_expert + projections == moe.num_experts * moe_expert
    assert heads.experts_per_token * head_expert + projections == moe.experts_per_token * moe_expert
    counts = parameter_counts(sizes)
    routers = moe.num_layers * (heads.expert_width * heads.num_experts - moe.hidden_size * moe.num_experts)
    for name in ("total", "active"):
        assert counts["Multi-Head LatentMoE"][name] == counts["MoE"][name] + routers
    assert abs(routers) < 0.01 * counts["MoE"]["total"]


def prepare(worker: Worker, program: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """In one process that plays both hosts."""
    monkeypatch.setattr(worker, "_host_of_device", lambda: ["host0"] * 4 + ["host1"] * 4)
    return worker.prepare(program)


def test_head_parallel_sends_what_does_not_depend_on_the_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(**as_options(Case("hp", group=8), TINY))
    prepared = prepare(worker, "decode_step", monkeypatch)
    (row,) = prepared["collectives"]
    own = TINY.sequences // 8 * TINY.hidden_size * 4
    assert (row["op"], row["count"], row["payload_bytes"]) == ("all-to-all", 2 * TINY.num_layers, own)
    egress = measure.audited_egress(prepared["collectives"])
    assert egress == dict.fromkeys(("host0", "host1"), 2 * TINY.num_layers * 4 * own / 2)
    assert measure.those_that_ran(prepared["collectives"], egress)[1] == (egress["host0"], egress["host0"])


def test_a_worker_audits_and_runs_its_decoding_step(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(**as_options(Case("foe", group=8), TINY))
    prepared = prepare(worker, "decode_step", monkeypatch)
    merge = 2 * 7 / 8 * 16 * 16 * 4
    egress = measure.audited_egress(prepared["collectives"])
    assert egress == {"host0": 2 * merge, "host1": 2 * merge}
    assert [row["op"] for row in prepared["collectives"]] == ["all-reduce"]
    assert prepared["flops"] > 0
    (first, second), (third, fourth) = worker.run("decode_step"), worker.run("decode_step")
    assert first < second < third < fourth
    cache = worker._programs["decode_step"].carry
    keys = np.asarray(jax.device_get(cache.k_LBCSGK))
    assert np.abs(keys[:, :, 3]).max() > 0 and np.abs(keys[:, :, :3]).max() == 0


# What was measured


def test_a_step_lasts_from_the_first_start_to_the_last_end() -> None:
    assert measure.step_seconds([(1.0, 3.0), (1.5, 4.0)]) == 3.0


def run_of(name: str, seconds: float, sent: float, rate: float | None = 100.0) -> dict[str, Any]:
    return {
        "name": name,
        "kind": name.split()[0],
        "mesh": dict(axis.split("=") for axis in name.split()[1:]),
        "program": "forward",
        "tokens": 2048,
        "rate_mbit": rate,
        "seconds": seconds,
        "egress_bytes": {"host0": sent * 1.02, "host1": sent},
        "audited_egress_bytes": {"host0": sent, "host1": sent},
        "audited_bounds": [sent, sent],
        "collectives": [{"op": "all-reduce", "count": 2, "arrays": 3}, {"op": "all-to-all", "count": 2, "arrays": 8}],
    }


RUNS = [
    run_of("foe group=8", 1.0, 5e6),
    run_of("foe group=8", 0.2, 5e6, None),
    run_of("ep expert=8", 0.9, 8e6),
    run_of("ep expert=8", 0.3, 8e6, None),
    run_of("tp group=8", 1.6, 7e6),
    run_of("tp group=8", 0.3, 7e6, None),
    run_of("fsdp data=8", 0.1, 0.0),
    run_of("fsdp data=8", 0.1, 0.0, None),
]
HEAD_RUNS = [
    run_of("hp group=8", 0.7, 1e6),
    run_of("hp group=8", 0.5, 1e6, None),
    run_of("hp data=2 group=4", 0.1, 0.0),
]


def test_a_faster_moe_that_sends_more_is_named() -> None:
    pairs = report.decided_by_the_link(RUNS)
    assert [(pair.foe["name"], pair.other["name"], pair.other["rate_mbit"]) for pair in pairs] == [
        ("foe group=8", "ep expert=8", 100.0),
        ("foe group=8", "tp group=8", 100.0),
    ]
    assert report.no_more_bytes_than_foe(RUNS) == ["forward pass, foe group=8: fsdp data=8"]
    lines = report._check_section(RUNS)
    assert "- 2 such pairs, FoE's step shorter in 1" in lines
    assert "- foe group=8: 2 pairs, shorter in 1; in 0 of them it sends nothing itself" in lines
    assert "- violated: foe group=8, forward pass, 100 Mbit/s takes 1.000 s and ep expert=8 0.900 s" in lines


def test_head_parallel_is_no_moe_layout_and_has_sentences_of_its_own() -> None:
    runs = [*RUNS, *HEAD_RUNS, *(run | {"name": "hp group=8", "kind": "hp", "seconds": 9.0} for run in RUNS[2:4])]
    assert report._check_section(runs) == report._check_section(RUNS)
    assert report.against_heads([*RUNS, *HEAD_RUNS]) == [
        "Forward pass, foe group=8 sends 5.00 MB and hp group=8 1.00 MB: FoE's step is the shorter one: unlimited "
        "(2.50); Head Parallel's step is the shorter one: 100 Mbit/s (0.70)."
    ]
    assert report.against_heads(RUNS) == []


def test_steps_that_do_not_wait_for_the_link_say_nothing() -> None:
    busy = [run | {"seconds": 1.0 + 0.1 * (run["rate_mbit"] is not None)} for run in RUNS]
    assert report.decided_by_the_link(busy) == []


def test_the_report_shows_times_and_bytes(tmp_path: Path) -> None:
    strayed = run_of("tp group=8", 1.7, 1e6) | {"egress_bytes": {"host0": 1.2e6, "host1": 1e6}, "rate_mbit": 200.0}
    results = {
        "command": "python -m experiments.two_hosts --out here",
        "environment": {"cpu": "a CPU", "cores": 2, "python": "3.12", "jax": "0.11", "mtu": 9000},
        "model": Sizes().model(),
        "head_model": Sizes().head_model(),
        "parameters": {"MoE": {"total": 2000, "active": 300}, "Multi-Head LatentMoE": {"total": 2001, "active": 301}},
        "sizes": {"rows": 16, "length": 128, "sequences": 1024, "context": 32},
        "runs": [*RUNS, strayed, *HEAD_RUNS],
    }
    (tmp_path / "two_hosts.json").write_text(json.dumps(results), encoding="utf-8")
    assert main(["--out", str(tmp_path), "--render"]) == 0
    text = (tmp_path / "two_hosts.md").read_text(encoding="utf-8")
    assert "| ep expert=8 | 0.900 (0.90) | 0.300 (1.50) |" in text
    assert "| foe group=8 | forward pass | 5.000 | 5.100 | +2.0% to +2.0% |" in text
    assert "| fsdp data=8 | forward pass | 0.000 | 0.000 |  |" in text
    assert "audit: tp group=8, forward pass, 200 Mbit/s (+20.0%, 200 kB at 2 exchanges and 6 reduced arrays)." in text
    assert "| hp group=8 | 0.700 (0.70) | 0.500 (2.50) |" in text
    assert "8 heads with a sub-token of 16 and 68 experts each, 5 per sub-token, two matrices of width 32" in text
    assert "Parameters (active for a token): MoE 2,000 (300), Multi-Head LatentMoE 2,001 (301)" in text
    assert "- Forward pass, foe group=8 sends 5.00 MB and hp group=8 1.00 MB: FoE's" in text
    assert all(limit in text for limit in report.LIMITS)
    assert (tmp_path / "forward.png").stat().st_size > 10_000


# Two real hosts


@pytest.mark.slow
def test_two_hosts_send_what_the_audit_says() -> None:
    try:
        link.check_machine()
    except link.LinkError as error:
        pytest.skip(str(error))
    with link.TwoHosts() as hosts:
        pids = hosts.pids
        runs = list(measure.measure_case(hosts, Case("ep", expert=8), Sizes(num_layers=1), [50.0, None], 2))
    for run in runs:  # the only layer's exchange takes one size or the other
        excesses = [report.counted_bytes(run) / bound - 1 for bound in run["audited_bounds"]]
        assert any(0 < excess < report.ALLOWED_BYTES for excess in excesses), run
    for slow, free in zip(runs[::2], runs[1::2], strict=True):
        assert (slow["rate_mbit"], free["rate_mbit"]) == (50.0, None)
        on_the_link = report.audited_bytes(slow) * 8 / 50e6
        assert slow["seconds"] > 0.9 * on_the_link
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_the_counters_tell_which_buffers_a_step_took() -> None:
    """An all-reduce that always runs, and an exchange that takes one of two sizes."""

    def row(sent: float, **branch: int) -> dict[str, Any]:
        return {"op": "all-to-all", "count": 2, "egress_bytes": {"host0": sent, "host1": sent}, **branch}

    collectives = [row(100.0), row(850.0, branch=0), row(1000.0, branch=1)]
    for counted, larger in ((1880.0, 0.0), (1900.0, 0.0), (2125.0, 0.75), (2240.0, 1.0)):
        ran, bounds = measure.those_that_ran(collectives, {"host0": counted, "host1": counted})
        assert bounds == (1900.0, 2200.0)
        assert {row.get("branch"): row["count"] for row in ran} == {
            branch: count for branch, count in ((None, 2), (0, 2 * (1 - larger)), (1, 2 * larger)) if count
        }
    assert measure.those_that_ran(collectives[:1], {"host0": 0.0}) == (collectives[:1], (200.0, 200.0))


def test_between_the_bounds_of_the_audit_nothing_is_in_excess() -> None:
    run = run_of("ep expert=8", 1.0, 8e6) | {"audited_bounds": [7e6, 9e6]}
    for counted, excess in ((6.3e6, -0.1), (8e6, 0.0), (9.9e6, 0.1)):
        assert report.bytes_excess(run | {"egress_bytes": {"host0": counted}}) == pytest.approx(excess)
