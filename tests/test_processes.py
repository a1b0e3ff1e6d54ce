"""Training in two processes: the same numbers, the same checkpoint, the same end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bigram_stand_in import tiny_run, write_corpus
from process_runs import child_environment, figures, losses, run_processes, train_processes

from foejax.config import RunConfig, override_config, save_config
from foejax.training.loop import train
from sharding.roll_call import EXIT_LOST

STEPS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the configs `foe.yaml` and `moe.yaml`, the data cache, and `compiled` programs for all processes."""
    folder = tmp_path_factory.mktemp("processes")
    os.environ["FOEJAX_CACHE"] = str(folder / "cache")
    corpus = write_corpus(folder / "words.jsonl", 40)
    save_config(foe_run(corpus), folder / "foe.yaml")
    save_config(moe_run(corpus), folder / "moe.yaml")
    yield folder
    del os.environ["FOEJAX_CACHE"]


def foe_run(corpus: Path) -> RunConfig:
    """Two groups and two data shards: the batch and the parameters' shards cross processes."""
    return tiny_run(corpus, num_steps=STEPS, eval_every=4, gradient_accumulation=2)


def moe_run(corpus: Path) -> RunConfig:
    """Experts and tokens over four devices: the all-to-alls cross processes."""
    mesh = {"mesh.layout": "ep", "mesh.data": 1, "mesh.group": 1, "mesh.expert": 4}
    return override_config(tiny_run(corpus, num_steps=4, load_balance_coef=0.01), {"model.num_groups": 1, **mesh})


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The FoE run in two processes that nothing interrupts."""
    for ended in train_processes(place / "foe.yaml", place / "whole", place / "compiled"):
        assert ended.code == 0, ended.output
    return place / "whole"


def train_here(place: Path, config: RunConfig, name: str) -> Path:
    """The same run in this process alone."""
    return train(config, place / name, progress=False).run_dir


def test_two_processes_train_foe_like_one(place: Path, whole: Path) -> None:
    alone = train_here(place, foe_run(place / "words.jsonl"), "foe_alone")
    assert len(losses(whole)) == STEPS + 2
    np.testing.assert_allclose(losses(whole), losses(alone), rtol=1e-6)
    assert [path.name for path in sorted((whole / "checkpoints").iterdir())] == ["00000004", "00000006", "00000008"]


def test_two_processes_train_and_evaluate_moe_like_one(place: Path) -> None:
    def launch(*command: str) -> subprocess.CompletedProcess[str]:
        arguments = ["--nproc", "2", "--devices-per-process", "2", "--", *command]
        environment = child_environment(place / "compiled")
        launched = [sys.executable, "-m", "foejax.launch", *arguments]
        return subprocess.run(launched, env=environment, capture_output=True, text=True)

    trained = launch("train", str(place / "moe.yaml"), "--run-dir", str(place / "moe"), "--quiet")
    assert trained.returncode == 0, trained.stderr
    assert "[0] 2 processes: 4 devices on" in trained.stderr and "expert=4 crosses processes" in trained.stderr
    assert trained.stdout.startswith("[0] ") and trained.stdout.count("train loss") == 1
    alone = train_here(place, moe_run(place / "words.jsonl"), "moe_alone")
    np.testing.assert_allclose(losses(place / "moe"), losses(alone), rtol=1e-6)
    evaluated = launch("evaluate", str(place / "moe"), "--batches", "2", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    found = json.loads(evaluated.stdout.removeprefix("[0] "))
    assert found["loss"] == pytest.approx(losses(alone)[-1], rel=1e-6)


def test_whichever_process_is_killed_the_other_names_it_and_the_run_resumes_bit_for_bit(
    place: Path, whole: Path
) -> None:
    run_dir = place / "killed"
    for step, lost in ((3, 1), (5, 0)):
        started = time.monotonic()
        ended = train_processes(place / "foe.yaml", run_dir, place / "compiled", signal_at=(step, lost, signal.SIGKILL))
        assert [ended[lost].code, ended[1 - lost].code] == [-signal.SIGKILL, EXIT_LOST], ended[1 - lost].output
        assert f"foejax: error: process {lost} on " in ended[1 - lost].output
        assert "Traceback" not in ended[1 - lost].output
        assert time.monotonic() - started < 120
    assert [ended.code for ended in train_processes(place / "foe.yaml", run_dir, place / "compiled")] == [0, 0]
    assert figures(run_dir) == figures(whole)
    assert_same_checkpoint(run_dir, whole)


def test_sigterm_to_one_process_makes_all_save_the_same_step(place: Path, whole: Path) -> None:
    run_dir = place / "stopped"
    ended = train_processes(place / "foe.yaml", run_dir, place / "compiled", signal_at=(2, 1, signal.SIGTERM))
    assert [each.code for each in ended] == [75, 75], ended[0].output + ended[1].output
    [step] = {int(path.name) for path in (run_dir / "checkpoints").iterdir()} - {2}
    assert 3 <= step < STEPS
    assert all(f"SIGTERM after step {step}: the checkpoint is saved" in each.output for each in ended)
    # On another mesh, in one process: the numbers agree up to the order of additions.
    other = override_config(foe_run(place / "words.jsonl"), {"mesh.devices": 2, "mesh.data": 1, "mesh.group": 2})
    assert train(other, run_dir, progress=False).resumed_from == step
    np.testing.assert_allclose(losses(run_dir), losses(whole), rtol=1e-4)


def assert_same_checkpoint(found: Path, expected: Path) -> None:
    manifests = [
        json.loads((run / "checkpoints" / f"{STEPS:08d}" / "info.json").read_text()) for run in (found, expected)
    ]
    assert manifests[0]["validation_loss"] == manifests[1]["validation_loss"]


REDUCE_SCATTER = """
import jax, numpy as np
from sharding import Layout, hosts
from sharding.collectives import reduce_scatter_local
hosts.start()
layout = Layout.create("fsdp", data=4)
hosts.connect(layout.mesh)
spec = layout.batch_spec()
rows = np.random.default_rng(0).integers(-9, 9, (4, 8, 6)).astype(np.float32)
weights = np.random.default_rng(1).integers(-9, 9, (4, 1, 2, 6)).astype(np.float32)
place = lambda x: jax.make_array_from_callback(x.shape, layout.sharding(spec), lambda index: x[index])
def scatter(x, w):
    total, pull = jax.vjp(lambda x: reduce_scatter_local(x, "data", 1), x)
    return total, *pull(w[0])
program = jax.jit(layout.shard_map(scatter, (spec, spec), spec)).lower(place(rows), place(weights)).compile()
assert "reduce-scatter" not in program.as_text()
total, grad = program(place(rows), place(weights))
wanted = rows.sum(0).reshape(4, 1, 2, 6)
for shard in total.addressable_shards:
    np.testing.assert_array_equal(shard.data, wanted[shard.index[0].start or 0])
for shard in grad.addressable_shards:
    np.testing.assert_array_equal(shard.data[0], weights.reshape(8, 6))
"""


def test_sums_are_scattered_without_gloos_reduce_scatter(place: Path) -> None:
    for ended in run_processes(REDUCE_SCATTER, [], 2, 2, place / "compiled"):
        assert ended.code == 0, ended.output


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 1, "group": 8}, {"data": 4, "group": 2}])
def test_foe_on_two_processes_of_four_devices_equals_one_process(place: Path, sizes: dict[str, int]) -> None:
    heads = {"model.num_groups": 8, "model.num_kv_heads": 8, "model.num_query_heads": 8, "model.num_experts": 16}
    mesh = {"mesh.devices": 8} | {f"mesh.{axis}": size for axis, size in sizes.items()}
    config = override_config(
        tiny_run(place / "words.jsonl", num_steps=10),
        {**heads, "model.experts_per_token": 8, "data.batch_size": 8, **mesh},
    )
    name = f"eight_{sizes['group']}"
    save_config(config, place / f"{name}.yaml")
    for ended in train_processes(place / f"{name}.yaml", place / name, place / "compiled", devices=4):
        assert ended.code == 0, ended.output
    np.testing.assert_allclose(losses(place / name), losses(train_here(place, config, f"{name}_alone")), rtol=1e-5)
