"""The study of Head Parallel: what its parts measure, and a report whose sentences follow the figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.head_parallel import load, loss, speed, wire
from experiments.head_parallel.__main__ import main
from experiments.head_parallel.conclusion import conclusion
from experiments.head_parallel.models import CONFIGS, model_config
from experiments.head_parallel.paired import best_rates, interval, losses_by_seed, paired_difference
from experiments.head_parallel.report import write_report
from experiments.head_parallel.results import PARTS, open_part, read_part, write_part
from foejax.analysis.accounting import account
from foejax.cli import report_errors
from foejax.models.expert_parallel import buffer_sizes
from sharding import Layout

FACTS = {"device": "8 x cpu", "software": "Python 3, jax 0", "cores": 2}


def bytes_run(kind: str, k: int, sent: float, most: float | None = None, **more: float) -> dict[str, Any]:
    own = {
        "bytes_per_token": sent,
        "bytes_per_token_at_most": sent if most is None else most,
        "needed_bytes_per_token": sent,
        "exchanges": {"all-reduce": 3} if kind == "foe" else {"all-to-all": 4 if kind == "hp" else 8},
        "others": {"all-reduce": 1},
        "other_bytes_per_device": 10,
    }
    return {"kind": kind, "k": k, "forward": own | more, "train_step": own | more}


def bytes_part(ep: dict[int, float], hp: dict[int, float], foe: dict[int, float]) -> dict[str, Any]:
    copies = {"copy_per_expert_bytes_per_token": 400.0}
    runs = [bytes_run("ep", k, sent, 2 * sent, **copies) for k, sent in ep.items()]
    runs += [bytes_run("hp", k, sent) for k, sent in hp.items()] + [
        bytes_run("foe", k, sent) for k, sent in foe.items()
    ]
    return {
        "facts": FACTS,
        "settings": {"width": 64, "layers": 2, "rows": 8, "length": 16, "experts": 16},
        "runs": runs,
    }


def loss_run(model: str, rate: float, seed: int, value: float) -> dict[str, Any]:
    return {
        "model": model,
        "rate": rate,
        "seed": seed,
        "parameters": 1000,
        "active_parameters": 100,
        "tokens": 64,
        "validation_loss": value,
        "train_losses": list(np.linspace(value + 1, value, 20)),
        "validation_curve": [[10, value + 0.5], [20, value]],
    }


def loss_part(shift: float) -> dict[str, Any]:
    """The Multi-Head LatentMoE lies `shift` above the others, whose seeds differ more than they do."""
    runs = []
    for model in CONFIGS:
        own = shift if model == "mhlmoe" else 0.0
        runs += [loss_run(model, rate, 0, 2.0 + own + rate) for rate in (0.1, 0.2)]
        runs += [loss_run(model, 0.1, seed, 2.0 + own + 0.5 * seed + 0.001 * (seed % 2)) for seed in (1, 2, 3)]
    settings = {"steps": 20, "rates": [0.1, 0.2], "seeds": [1, 2, 3]}
    return {"facts": FACTS, "settings": settings, "runs": runs}


def speed_part() -> dict[str, Any]:
    runs = [
        {"devices": count, "program": program, "ratios": {"foe": [1.0] * 3, "ep": [1.5, 2.5, 2.0], "hp": [0.5] * 3}}
        for count in (1, 8)
        for program in ("forward", "train_step")
    ]
    return {"facts": FACTS, "settings": {"turns": 3, "sequences": 8, "context": 8}, "runs": runs}


def load_part(*with_rule: float) -> dict[str, Any]:
    """Where the busiest experts end: at 2.5 times the mean without the rule."""
    runs = [
        {
            "rate": 0.1 * index,
            "most": 4.0,
            "validation_loss": 2.0,
            "steps": [3.0, 2.0],
            "largest": [[end] * 8],
            "smallest": [[0.5] * 8],
        }
        for index, end in enumerate((2.5, *with_rule))
    ]
    return {"facts": FACTS, "settings": {"steps": 2, "learning_rate": 0.002, "rates": [0.0, 0.1, 0.2]}, "runs": runs}


def all_parts() -> dict[str, dict[str, Any]]:
    sent = bytes_part({1: 110.0, 4: 300.0}, {1: 100.0, 4: 100.0}, {8: 350.0})
    return dict(zip(PARTS, (sent, loss_part(0.3), speed_part(), load_part(1.1, 1.2)), strict=True))


# The report


def test_the_report_holds_the_figures_of_all_parts(tmp_path: Path) -> None:
    for part, found in all_parts().items():
        write_part(tmp_path / "hp", part, found)
    write_report(tmp_path / "hp", two_hosts=tmp_path / "none.json")
    text = (tmp_path / "hp.md").read_text()
    for part in PARTS:
        assert (tmp_path / "hp" / f"{part}.png").stat().st_size > 5000
        assert f"(hp/{part}.png)" in text and f"--part {part}`, on 8 x cpu, 2 cores" in text
    assert "Not run yet" not in text and "Not measured for `hp`" in text
    for line in ("| ep     | 4 |     300 to 600 |", "| Multi-Head LatentMoE - MoE "):
        assert " ".join(line.split()) in " ".join(text.split())
    assert "2.00 (1.75 to 2.25)" in text
    assert "0.1 (at the end of the sweep)" in text


def test_a_report_says_what_has_not_run(tmp_path: Path) -> None:
    assert report_errors(lambda: main(["--out", str(tmp_path / "hp"), "--part", "report"])) == 0
    assert (tmp_path / "hp.md").read_text().count("Not run yet: `python -m experiments.head_parallel") == 4
    write_report(tmp_path / "hp", two_hosts=tmp_path / "none.json")
    assert "Nothing has been measured yet." in (tmp_path / "hp.md").read_text()


def test_two_hosts_are_taken_from_their_own_measurement(tmp_path: Path) -> None:
    runs = [
        {
            "name": f"{kind} group=8",
            "kind": kind,
            "program": "forward",
            "rate_mbit": rate,
            "seconds": seconds,
            "audited_egress_bytes": {"a": 1e6, "b": 2e6},
        }
        for kind, seconds in (("foe", 2.0), ("hp", 0.5), ("tp", 9.0))
        for rate in (100.0, None)
    ]
    (tmp_path / "two_hosts.json").write_text(json.dumps({"runs": runs}))
    write_report(tmp_path / "hp", two_hosts=tmp_path / "two_hosts.json")
    text = (tmp_path / "hp.md").read_text()
    assert "forward pass, over the best FoE layout (foe group=8): hp group=8 0.25." in text
    assert "tp group=8" not in text and "| hp group=8 " in text and "2.00 |" in text


def test_findings_follow_the_bytes() -> None:
    def written(**sent: dict[int, float]) -> str:
        return conclusion({"bytes": bytes_part(**sent), "loss": None, "speed": None, "load": None}, [])

    text = written(ep={1: 90.0, 4: 300.0}, hp={1: 100.0, 4: 100.0}, foe={8: 350.0})
    assert "Head Parallel sends 100 bytes per token forward for k = 1, 4, what the formula says." in text
    assert "k = 4 sends 3.00 times as much as Head Parallel with its smallest buffers and 6.00 with" in text
    assert "FoE sends 3.50 (k = 8) times as much" in text
    assert "what sends least on 8 devices: expert parallelism for k = 1; Head Parallel for k = 4." in text
    assert "FoE, which has the fewest, 3, all of sizes known" in text
    text = written(ep={4: 300.0, 8: 500.0}, hp={1: 100.0, 4: 200.0}, foe={8: 50.0})
    assert "Head Parallel's bytes per token forward change with k: 100, 200" in text
    assert "what sends least on 8 devices: Head Parallel for k = 4; FoE for k = 8." in text


@pytest.mark.parametrize(("shift", "side"), [(0.3, "higher"), (-0.3, "lower"), (0.0, "not told apart from zero")])
def test_findings_follow_the_losses(shift: float, side: str) -> None:
    text = conclusion({"bytes": None, "loss": loss_part(shift), "speed": None, "load": None}, [])
    assert f"Multi-Head LatentMoE minus MoE: {shift:+.4f} nats per token" in text
    assert f": {side}." in text
    best = "Multi-Head LatentMoE has the lowest, told apart from all others" if shift < 0 else "MoE has the lowest"
    assert best in text


@pytest.mark.parametrize(
    ("ends", "effect"),
    [
        ((1.1, 1.2), "drives the load towards uniform at every rate"),
        ((2.6, 1.2), "drives the load towards uniform at 0.2"),
        ((2.6, 2.7), "does not drive the load towards uniform"),
    ],
)
def test_findings_follow_the_load(ends: tuple[float, float], effect: str) -> None:
    text = conclusion({"bytes": None, "loss": None, "speed": None, "load": load_part(*ends)}, [])
    assert "ends (median) at 2.50 times the mean without the bias rule, of 4 at most" in text
    assert f"with it at {ends[0]:.2f} at 0.1, {ends[1]:.2f} at 0.2: the rule {effect}." in text


# Pairs of runs


def test_an_interval_is_that_of_the_t_distribution() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.side == 0  # 4.303 standard errors of 0.577 each way
    assert found.high - 2.0 == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4) == 2.0 - found.low
    assert interval([1.0]).side == 0
    assert paired_difference({1: 5.0, 2: 7.0, 9: 0.0}, {1: 4.0, 2: 6.001}).side == 1


def test_the_sweep_chooses_and_does_not_count() -> None:
    runs = loss_part(0.0)["runs"] + [loss_run("moe", 0.2, 1, 1.0)]
    assert best_rates(runs, 0)["moe"] == 0.1
    assert losses_by_seed(runs, 0)["moe"] == {1: 2.501, 2: 3.0, 3: 3.501}


# The parts


def test_head_parallel_sends_what_the_formula_says() -> None:
    found = wire.measure(wire.Case("hp", 2), wire.QUICK, ("forward",))["forward"]
    assert found["bytes_per_token"] == found["bytes_per_token_at_most"] == 2 * 64 * 2 * 7 / 8
    assert found["bytes_per_token"] == found["needed_bytes_per_token"]
    assert found["exchanges"] == {"all-to-all": 2}


def test_expert_parallelism_sends_its_smallest_buffers_or_its_largest() -> None:
    found = wire.measure(wire.Case("ep", 2), wire.QUICK, ("forward",))["forward"]
    small, large = (sizes.tokens for sizes in (buffer_sizes(128, 2, 16, 8)[index] for index in (0, -1)))
    slot = 2 * 64 * 2 + 2 * (4 + 4)  # a token there, its output back, two weights and two indices
    assert found["bytes_per_token"] == 7 * small * slot / 128
    assert found["bytes_per_token_at_most"] == 7 * large * slot / 128
    assert found["needed_bytes_per_token"] < found["bytes_per_token"]
    assert found["exchanges"] == {"all-to-all": 4} and found["others"] == {"all-reduce": 1}


def test_the_formulas_of_the_other_layouts() -> None:
    ep = wire.needed(wire.Case("ep", 2), wire.QUICK, "train_step")
    assert ep["copy_per_expert_bytes_per_token"] == 2 * 2 * 2 * 64 * 2 * 7 / 8
    assert ep["needed_bytes_per_token"] == pytest.approx(
        8 * (1 - (14 * 13) / (16 * 15)) * 2 * 2 * 64 * 2 * 7 / 8, rel=1e-3
    )
    foe = wire.needed(wire.Case("foe", 8), wire.QUICK, "forward")
    assert foe["needed_bytes_per_token"] == 8 * (2 + 1) * 64 * 2 * 7 / 8


def test_the_models_are_matched() -> None:
    counted = {
        name: account(model_config(name, {}), Layout.single_device("fsdp")) for name in ("moe", "mhlmoe", "mhlmoe_fine")
    }
    for found in counted.values():
        assert found.parameters == pytest.approx(counted["moe"].parameters, rel=0.02)
        assert found.active_parameters == pytest.approx(counted["moe"].active_parameters, rel=0.02)


def test_jobs_differ_in_rate_and_seed_alone() -> None:
    job = loss.Job("mhlmoe", 0.02, 3, loss.QUICK, Path("runs"))
    config = model_config(job.model, job.overrides, quick=True)
    assert (config.training.learning_rate, config.training.seed, config.data.seed) == (0.02, 3, 3)
    assert config.training.num_steps == 4 and config.mesh.devices == 1


def test_shares_are_of_the_mean_of_a_head() -> None:
    shares = load.shares_of_heads(np.array([[1.0, 3.0, 5.0, 5.0]]), heads=2)
    np.testing.assert_array_equal(shares, [[[0.5, 1.5], [1.0, 1.0]]])


def test_ratios_are_taken_within_a_turn() -> None:
    ratios = speed.race({"foe": lambda: jax.numpy.ones(()), "hp": lambda: jax.numpy.ones(())}, turns=3)
    assert ratios["foe"] == [1.0] * 3 and len(ratios["hp"]) == 3 and min(ratios["hp"]) > 0


# Files


def test_a_part_goes_on_with_its_own_settings_alone(tmp_path: Path) -> None:
    assert read_part(tmp_path, "load") is None
    found = open_part(tmp_path, "load", {"steps": 2}, FACTS)
    found["runs"].append({"rule": True})
    write_part(tmp_path, "load", found)
    assert open_part(tmp_path, "load", {"steps": 2}, FACTS)["runs"] == [{"rule": True}]
    with pytest.raises(
        ValueError, match=r"was made with \{'steps': 2\}, and this run has \{'steps': 3\}: remove it, or"
    ):
        open_part(tmp_path, "load", {"steps": 3}, FACTS)
