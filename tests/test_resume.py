"""A run that is cut off anywhere and started again ends bit for bit like one that ran through."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from bigram_stand_in import BigramModel, tiny_run, write_corpus
from flax import nnx

from foejax.config import RunConfig
from foejax.data import DataError, open_dataset
from foejax.training import run as run_module
from foejax.training.loop import TrainResult, train
from foejax.training.run_folder import read_metrics

STEPS = 12


class Killed(BaseException):
    """Stands for the end of the process in the middle of a run."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    os.environ["FOEJAX_CACHE"] = str(folder / "cache")
    yield write_corpus(folder / "words.jsonl", 16)
    del os.environ["FOEJAX_CACHE"]


@pytest.fixture
def bigram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "LanguageModel", BigramModel)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The stand-in's run that nothing interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "LanguageModel", BigramModel)
        return train(run_config(corpus), tmp_path_factory.mktemp("whole"), progress=False)


def run_config(corpus: Path, **training: object) -> RunConfig:
    options = dict(num_steps=STEPS, checkpoint_every=3, eval_every=4, schedule="cosine", gradient_accumulation=2)
    return tiny_run(corpus, **(options | training))


def epochs_of(config: RunConfig) -> float:
    tokens = config.training.num_steps * config.data.batch_size * config.data.sequence_length
    return tokens / open_dataset(config.data).num_train_tokens


def figures(run_dir: Path) -> list[dict[str, float]]:
    """Every metrics line but for the speed, which differs from run to run."""
    lines = read_metrics(run_dir)
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def parameters(result: TrainResult) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(nnx.state(result.model))[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_run(found: TrainResult, expected: TrainResult) -> None:
    assert figures(found.run_dir) == figures(expected.run_dir)
    found_arrays, expected_arrays = parameters(found), parameters(expected)
    assert found_arrays.keys() == expected_arrays.keys()
    for name, array in expected_arrays.items():
        np.testing.assert_array_equal(found_arrays[name], array, err_msg=name)


def cut_off(config: RunConfig, run_dir: Path, at: int) -> None:
    """Train until the process "dies" right after a step."""

    def die(step: int) -> None:
        if step == at:
            raise Killed

    with pytest.raises(Killed):
        train(config, run_dir, progress=False, after_step=die)


def test_cut_off_anywhere_ends_bit_for_bit_alike(corpus: Path, tmp_path: Path, bigram: None, whole: TrainResult):
    config = run_config(corpus)
    assert epochs_of(config) > 1.5
    assert [line["step"] for line in figures(whole.run_dir) if "loss" in line] == list(range(1, STEPS + 1))
    for at in (2, 8):
        cut_off(config, tmp_path / "cut", at)
    resumed = train(config, tmp_path / "cut", progress=False)
    assert resumed.resumed_from == 6
    assert_same_run(resumed, whole)


def test_a_damaged_checkpoint_costs_steps_but_changes_nothing(corpus, tmp_path, bigram, whole, caplog):
    config = run_config(corpus)
    cut_off(config, tmp_path / "cut", 8)
    (tmp_path / "cut" / "checkpoints" / "00000006" / "data_state.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        resumed = train(config, tmp_path / "cut", progress=False)
    assert resumed.resumed_from == 3
    ours = [record for record in caplog.records if record.name.startswith("foejax")]
    warnings = [record.message for record in ours if record.levelno >= logging.WARNING]
    assert ["step 6 is damaged" in line and "falling back to step 3" in line for line in warnings] == [True]
    assert_same_run(resumed, whole)


def test_other_data_are_refused_on_resume(corpus: Path, tmp_path: Path, bigram: None):
    config = run_config(corpus)
    cut_off(config, tmp_path / "run", 4)
    other = config.model_copy(update={"data": config.data.model_copy(update={"seed": 1})})
    with pytest.raises(DataError, match="data.seed"):
        train(other, tmp_path / "run", progress=False)


TRAIN_IN_A_PROCESS = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_resume import run_config
from foejax.training.loop import train
def after_step(step):
    if step == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
train(run_config(Path(sys.argv[2])), sys.argv[3], progress=False, after_step=after_step)
"""


def train_in_a_process(corpus: Path, run_dir: Path, cache: Path, kill_at: int = 0) -> int:
    """Train the real model in a process of its own (which kills itself with -9 after a step); its exit status."""
    compiled = {  # compiled programs are shared between the processes
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    arguments = [str(Path(__file__).parent), str(corpus), str(run_dir), str(kill_at)]
    return subprocess.run([sys.executable, "-c", TRAIN_IN_A_PROCESS, *arguments], env=os.environ | compiled).returncode


def test_killed_with_9_and_started_again_ends_bit_for_bit_alike(corpus: Path, tmp_path: Path):
    config, cache = run_config(corpus), tmp_path / "compiled"
    assert train_in_a_process(corpus, tmp_path / "whole", cache) == 0
    assert train_in_a_process(corpus, tmp_path / "killed", cache, kill_at=8) == -signal.SIGKILL
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")[:10]
    assert train_in_a_process(corpus, tmp_path / "killed", cache) == 0
    killed, whole = (train(config, tmp_path / name, progress=False) for name in ("killed", "whole"))
    assert len(figures(whole.run_dir)) == STEPS + 3
    assert_same_run(killed, whole)
