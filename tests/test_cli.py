"""The commands, called in process: what they write, what they refuse, and with which exit code."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from flax import nnx

import foejax
from foejax.cli import main
from foejax.commands.fields import describe_fields
from foejax.commands.parser import split_overrides
from foejax.config import ConfigError, RunConfig
from foejax.devices import avoid_broken_reductions
from foejax.training.errors import NonFiniteLoss, Preempted
from foejax.training.run import open_run

SMALL = {
    "model.vocab_size": 264,
    "model.hidden_size": 16,
    "model.num_layers": 2,
    "model.num_query_heads": 4,
    "model.num_kv_heads": 4,
    "model.head_dim": 4,
    "model.num_experts": 8,
    "model.experts_per_token": 4,
    "model.num_groups": 4,
    "model.expert_hidden_size": 8,
    "model.max_seq_len": 32,
    "data.tokenizer_vocab_size": 260,
    "data.sequence_length": 32,
    "data.batch_size": 4,
    "training.num_steps": 2,
    "training.warmup_steps": 1,
    "training.decay_start_step": 2,
    "training.eval_every": 0,
    "training.eval_batches": 1,
}


def small_overrides(**changes: Any) -> list[str]:
    return [f"--{name}={value}" for name, value in (SMALL | changes).items()]


@pytest.fixture(autouse=True)
def _as_a_user_has_it(monkeypatch: pytest.MonkeyPatch, loose_promotion: None) -> None:
    """JAX's default promotion; and the variables that `--devices` writes are put back for later subprocesses."""
    for name in ("XLA_FLAGS", "JAX_PLATFORMS"):
        monkeypatch.setenv(name, os.environ[name])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on two devices, made by the command itself."""
    folder = tmp_path_factory.mktemp("cli")
    text = "\n\n".join(f"In the year {year} nothing of note took place, and all were glad." for year in range(400))
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOEJAX_CACHE", str(folder / "cache"))
        for name in ("XLA_FLAGS", "JAX_PLATFORMS"):
            patch.setenv(name, os.environ[name])
        overrides = small_overrides(**{"data.corpus": folder / "corpus.txt"})
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            assert main(["train", "foe_tiny", "--run-dir", str(folder / "run"), "--devices", "2", *overrides]) == 0
        yield folder / "run"


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a refused command prints."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"foejax: error: [^\n]+\n", captured.err), captured.err
    return captured.err


# Arguments and overrides.


def test_overrides_are_taken_out_wherever_they_stand() -> None:
    argv = ["train", "--model.num_groups", "4", "foe_tiny", "--data.corpus=a=b", "--devices", "2", "--mesh.data=0"]
    rest, overrides = split_overrides(argv)
    assert rest == ["train", "foe_tiny", "--devices", "2"]
    assert overrides == {"model.num_groups": "4", "data.corpus": "a=b", "mesh.data": "0"}


def test_override_without_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="--model.num_groups has no value"):
        split_overrides(["train", "--model.num_groups"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "CONFIG"),
        (["train", "nowhere"], "config 'nowhere' not found.*foe_tiny"),
        (["train", "foe_tiny", "--model.num_group=4"], "unknown key model.num_group='?4'?: did you mean num_groups"),
        (["train", "foe_tiny", "--model.num_groups", "3"], "num_kv_heads=8 is not divisible by num_groups=3"),
        (["train", "foe_tiny", "--model.experts_per_token", "12"], "experts_per_token=12 is not divisible"),
        (["train", "foe_tiny", "--training.num_steps", "many"], "training.num_steps='many' is refused"),
        (["train", "foe_tiny", "--data.corpus", "/no/such/corpus"], "/no/such/corpus"),
        (["info", "foe_tiny", "--mesh.group=16", "--devices", "8"], "mesh.*group"),
        (["info", "foe_tiny", "--devices", "0"], "0 is not positive"),
        (["info", "foe_tiny", "--devices", "1000"], "devices=1000 cannot be simulated"),
        (["generate", "nowhere", "--prompt", "a"], "nowhere does not exist.*config.yaml.*config.json"),
        (["generate", "nowhere"], "--prompt"),
        (["generate", "nowhere", "--prompt", "a", "--model.num_groups", "2"], "model.num_groups cannot change"),
        (["logits", "nowhere", "--tokens", "1,b", "--out", "x.npy"], "--tokens='1,b' is not a list of token ids"),
        (["export", "a", "b", "--model.num_groups", "2"], "takes no config overrides"),
        (["data", "fetch", "library-of-babel"], "corpus 'library-of-babel' is not known"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gets_one_line(
    argv: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(message, failure(capsys, *argv))
    assert not list(tmp_path.glob("runs/*/*")), "a refused command left files"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (Preempted("SIGTERM after step 3"), 75, "SIGTERM after step 3"),
        (NonFiniteLoss("loss is nan at step 3"), 3, "loss is nan"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 2, "the disk is full.*runs/x.*free some space"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "runs/x"), 2, "runs/x"),
        (ValueError("two\nlines"), 2, "two lines"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_exit_codes(
    error: Exception, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("foejax.training.loop.train", fail)
    assert main(["train", "foe_tiny"]) == code
    assert re.fullmatch(rf"foejax: error: .*{message}.*\n", capsys.readouterr().err)
    monkeypatch.setenv("FOEJAX_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["train", "foe_tiny"])


def test_our_own_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("foejax.training.loop.train", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", "foe_tiny"])


# Devices.


@pytest.mark.parametrize(
    ("jaxlib", "given", "expected"),
    [
        ("0.11.2", "", "--xla_cpu_experimental_ynn_fusion_type=-reduce"),
        ("0.11.2", "--a=1", "--a=1 --xla_cpu_experimental_ynn_fusion_type=-reduce"),
        ("0.11.2", "--xla_cpu_experimental_ynn_fusion_type=X", "--xla_cpu_experimental_ynn_fusion_type=X"),
        ("0.10.2", "--a=1", "--a=1"),  # later and earlier releases may not know the flag and would abort on it
        ("0.12.0", "--a=1", "--a=1"),
    ],
)
def test_broken_reductions_are_avoided(jaxlib: str, given: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: jaxlib)
    monkeypatch.setenv("XLA_FLAGS", given)
    avoid_broken_reductions()
    assert os.environ["XLA_FLAGS"] == expected


def test_simulated_devices_compute_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With YNNPACK's reductions the logits of this size are NaN (jaxlib 0.11.2, CPU)."""
    monkeypatch.delenv("XLA_FLAGS")
    code = """
import foejax
foejax.simulate_devices(8)
import jax, numpy as np
model = foejax.build(foejax.load_config("foe_tiny", {"model.dtype": "float32", "model.num_layers": 1}))
positions = np.broadcast_to(np.arange(256, dtype=np.int32), (16, 256))
batch = {"tokens": positions, "positions": positions, "segment_ids": np.ones_like(positions)}
logits = jax.jit(model.logits)
first, second = np.asarray(logits(batch)), np.asarray(logits(batch))
assert np.isfinite(first).all() and (first == second).all()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# Help.


def test_help_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for section, info in RunConfig.model_fields.items():
        for name, field in info.annotation.model_fields.items():  # type: ignore[union-attr]
            assert f"--{section}.{name} " in printed
            assert field.description, f"{section}.{name} has no description"
    assert describe_fields() in printed
    assert "--mesh.layout auto|foe|fsdp|ep|tp|tp_ep|hp = auto" in printed
    assert "--data.validation_fraction float (> 0, < 1) = 0.05" in printed


def test_help_does_not_import_jax() -> None:
    code = (
        "import sys, foejax.cli\n"
        "try: foejax.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'jax' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "foejax comms foe_tiny --devices 8" in result.stdout


def test_names_of_the_package_are_all_there() -> None:
    for name in foejax.__all__:
        assert getattr(foejax, name) is not None
    assert set(foejax.__all__) <= set(dir(foejax))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = foejax.nonsense


def test_config_prints_what_it_reads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["config", "foe_tiny", "--training.num_steps", "1234"]) == 0
    printed = capsys.readouterr().out
    assert "num_steps: 1234" in printed
    (tmp_path / "copy.yaml").write_text(printed, encoding="utf-8")
    assert foejax.load_config(tmp_path / "copy.yaml") == foejax.load_config("foe_tiny", {"training.num_steps": 1234})


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], (400, 40, 300)),
        (["--training.num_steps", "20"], (20, 2, 15)),
        (["--training.num_steps", "40", "--training.warmup_steps=1"], (40, 1, 30)),
        (["--training.num_steps", "40", "--training.decay_start_step=40"], (40, 4, 40)),
        (["--training.warmup_steps", "10"], (400, 10, 300)),
    ],
)
def test_schedule_of_the_file_stretches_with_the_steps(
    overrides: list[str], expected: tuple[int, int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "training: {num_steps: 400, warmup_steps: 40, decay_start_step: 300}"
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert main(["config", str(tmp_path / "run.yaml"), *overrides]) == 0
    training = yaml.safe_load(capsys.readouterr().out)["training"]
    assert (training["num_steps"], training["warmup_steps"], training["decay_start_step"]) == expected


# Programs in numbers.


def test_comms_json_of_foe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["comms", "foe_tiny", "--json", "--devices", "4", *small_overrides()]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["forward", "decode_step", "train_step"]
    keys = {"op", "axes", "count", "payload_bytes", "wire_bytes", "dtype", "compiled_dtype"}
    assert all(keys <= set(row) for rows in report.values() for row in rows)
    assert not [row for rows in report.values() for row in rows if row["op"] == "all-to-all"]
    tokens, width, layers = 4 * 32, 16, 2
    merges = {
        row["op"]: row["count"]
        for row in report["forward"]
        if row["axes"] == ["group"] and row["payload_bytes"] == tokens * width * 2 and row["dtype"] == "bf16"
    }
    assert merges == {"all-reduce": layers, "reduce-scatter": 1}


def test_info_json_agrees_with_the_account(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "foe_7b", "--devices", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 6_852_265_984
    assert found["mesh"] == {"data": 1, "group": 8, "expert": 1}
    assert main(["info", "foe_7b", "--devices", "8"]) == 0
    printed = capsys.readouterr().out
    assert "6,852,265,984 (6.852 B)" in printed and "data=1 x group=8 x expert=1" in printed


# A run and what can be done with it.


def test_train_uses_the_devices_and_logs_every_step(run_dir: Path) -> None:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert foejax.load_config(run_dir / "config.yaml").mesh.devices == 2


def test_evaluate_gives_the_loss_of_the_training_log(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run_dir), "--batches", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    last = json.loads((run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert found["loss"] == pytest.approx(last["val_loss"], rel=1e-3)  # bf16, on other devices
    assert found["bits_per_byte"] == pytest.approx(last["val_bits_per_byte"], rel=1e-3)


def test_generate_continues_every_prompt(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-new-tokens", "4", "--temperature", "1", "--top-k", "50", "--seed", "3", "--devices", "1"]
    prompts = ["--prompt", "In the year", "--prompt", "nothing"]
    assert main(["generate", str(run_dir), *prompts, *options]) == 0
    first = capsys.readouterr().out
    assert first.startswith("In the year") and "\n\nnothing" in first
    assert main(["generate", str(run_dir), *prompts, *options]) == 0
    assert capsys.readouterr().out == first


def test_prompt_longer_than_the_context_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failure(capsys, "generate", str(run_dir), "--prompt", "glad " * 50, "--devices", "1")
    assert "max_seq_len=32" in message
    assert re.search(r"has \d{2,} tokens", message)


def test_logits_survive_export_and_import(run_dir: Path, tmp_path: Path) -> None:
    def logits(folder: Path, devices: int) -> np.ndarray:
        out = tmp_path / "logits"
        tokens = ["--tokens", "1,2,3,250", "--devices", str(devices)]
        assert main(["logits", str(folder), *tokens, "--out", str(out)]) == 0
        return np.load(out)

    exported, imported = tmp_path / "exported", tmp_path / "imported"
    assert main(["export", str(run_dir), str(exported)]) == 0
    assert main(["import", str(exported), str(imported), "--devices", "2"]) == 0
    expected = logits(run_dir, 1)
    assert expected.shape == (4, 264) and expected.dtype == np.float32
    np.testing.assert_array_equal(logits(exported, 1), expected)
    np.testing.assert_allclose(logits(imported, 2), expected, atol=1e-6)


def test_import_can_be_trained_on(run_dir: Path, tmp_path: Path) -> None:
    exported, imported = tmp_path / "exported", tmp_path / "imported"
    foejax.export(run_dir, exported)
    overrides = {name: value for name, value in SMALL.items() if name.startswith("training.")}
    overrides |= {"data.corpus": str(run_dir.parent / "corpus.txt"), "data.batch_size": 4, "mesh.devices": 2}
    config = foejax.import_folder(exported, imported, overrides)
    assert config == foejax.load_config(imported / "config.yaml")
    run = open_run(config, imported, None)
    try:
        assert run.start == 0
        assert next(run.iterator)["tokens"].shape == (4, 32)
        expected = jax.tree.leaves(nnx.state(foejax.load(run_dir).model, nnx.Param))
        for got, wanted in zip(jax.tree.leaves(run.state.params), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)
    finally:
        run.iterator.close()
        run.log.close()
        run.store.close()


@pytest.mark.parametrize("command", ["export", "import"])
def test_folders_in_use_are_not_overwritten(
    command: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").write_text("data", encoding="utf-8")
    assert "empty" in failure(capsys, command, str(run_dir), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("tokens", "message"), [("1,264", "token 264 .* 0 to 263"), ("1," * 32 + "1", "33 tokens.* 32")]
)
def test_impossible_tokens_are_refused(
    tokens: str, message: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "logits.npy"
    assert re.search(message, failure(capsys, "logits", str(run_dir), "--tokens", tokens, "--out", str(out)))
    assert not out.exists()
