"""What the demo makes of its figures; the demo itself is run by `make demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import demo, demo_report


def figures(validation_loss: float, bits_per_byte: float) -> dict[str, Any]:
    program = {"counts": {"all-reduce": 4, "reduce-scatter": 1}, "wire_bytes_per_device": 100, "rows": []}
    return {
        "parameters": 3_692_160,
        "active_parameters": 1_332_864,
        "layout": "foe",
        "mesh": {"data": 1, "group": 8, "expert": 1},
        "train_loss": 4.25,
        "validation_loss": validation_loss,
        "validation_bits_per_byte": bits_per_byte,
        "tokens_per_second": 12_345.6,
        "collectives_per_step": {"forward": program, "train_step": program},
        "sample": "ROMEO.\n[brackets] are not markup",
    }


RUN = {"devices": 8, "steps": 400, "tokens_per_step": 4096, "seconds": 300.0}


def summary_of(foe: float, moe: float, bits: tuple[float, float] = (2.0, 2.0)) -> dict[str, Any]:
    models = {"foe": figures(foe, bits[0]), "moe": figures(moe, bits[1])}
    return demo_report.summarise(models, {"loss": 4.5, "bits_per_byte": 2.4}, RUN)


def test_close_models_below_the_bigram() -> None:
    summary = summary_of(4.1, 4.0)
    assert summary["validation_loss_difference"] == pytest.approx(0.025)
    assert summary["within_3_percent"] and summary["both_below_bigram"]
    assert summary["verdict"] == (
        "FoE's validation loss is 2.5% above the MoE's: within 3%. Both are below the bigram baseline."
    )


def test_distant_models_are_called_so() -> None:
    summary = summary_of(3.6, 4.0, bits=(2.0, 2.5))
    assert not summary["within_3_percent"] and not summary["both_below_bigram"]
    assert summary["below_bigram"] == {"foe": True, "moe": False}
    assert "10.0% below the MoE's, more than 3%" in summary["verdict"]
    assert "Not below the bigram baseline: mixture of experts;" in summary["verdict"]


def test_running_mean_looks_back_only() -> None:
    values = np.array([1.0, 3.0, 5.0, 7.0])
    assert demo_report.running_mean(values, 2).tolist() == [1.0, 2.0, 4.0, 6.0]
    assert demo_report.running_mean(values, 1).tolist() == values.tolist()
    assert demo_report.running_mean(values, 9).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_summary_and_table_hold_both_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = summary_of(4.1, 4.0)
    demo_report.write_summary(summary, tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text(encoding="utf-8")) == summary
    demo_report.print_table(summary)
    printed = capsys.readouterr().out
    for text in ("4.1000", "4.0000", "4.5000", "3,692,160", "12,346", "4 all-reduce", "[brackets] are not markup"):
        assert text in printed
    assert summary["verdict"] in printed


def test_plot_reads_both_runs(tmp_path: Path) -> None:
    for name in ("foe", "moe"):
        (tmp_path / name).mkdir()
        lines = [{"step": step, "loss": 7.0 - step / 10} for step in range(1, 11)]
        lines += [{"step": step, "val_loss": 7.0 - step / 10} for step in (5, 10)]
        text = "\n".join(json.dumps(line) for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text, encoding="utf-8")
    demo_report.plot_losses({name: tmp_path / name for name in ("foe", "moe")}, 6.5, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_models_of_the_demo_are_named_in_the_report() -> None:
    assert set(demo.MODELS) == set(demo_report.NAMES) == set(demo_report.SHORT_NAMES)
