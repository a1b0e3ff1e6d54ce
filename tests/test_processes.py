"""Training in two processes: the same numbers, the same checkpoint, the same end."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from bigram_stand_in import BigramModel, tiny_run, write_corpus
from flax import nnx
from process_runs import figures, launch, losses, run_processes, train_stand_in

from foejax.config import RunConfig, override_config, save_config
from foejax.training import run as run_module
from foejax.training.loop import train
from sharding.roll_call import EXIT_LOST

STEPS = 8
MOE = {"model.num_groups": 1, "mesh.layout": "ep", "mesh.data": 1, "mesh.group": 1, "mesh.expert": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the text and the data cache."""
    folder = tmp_path_factory.mktemp("processes")
    os.environ["FOEJAX_CACHE"] = str(folder / "cache")
    write_corpus(folder / "words.jsonl", 40)
    yield folder
    del os.environ["FOEJAX_CACHE"]


def config_of(place: Path, name: str, changes: dict[str, object], **training: object) -> tuple[RunConfig, Path]:
    """A tiny config, and the file that it is written to."""
    config = override_config(tiny_run(place / "words.jsonl", **training), changes)
    save_config(config, place / f"{name}.yaml")
    return config, place / f"{name}.yaml"


# The real models


def test_two_processes_train_foe_like_one(place: Path) -> None:
    """Batch and parameter shards cross processes; every micro-batch has rows of both."""
    config, file = config_of(place, "foe", {}, num_steps=4, gradient_accumulation=2)
    launched = launch("train", str(file), "--run-dir", str(place / "foe"), "--quiet")
    assert launched.returncode == 0, launched.stderr
    alone = train(config, place / "foe_alone", progress=False)
    assert len(losses(place / "foe")) == 4 + 2
    np.testing.assert_allclose(losses(place / "foe"), losses(alone.run_dir), rtol=1e-6)


@pytest.mark.slow
def test_two_processes_train_and_evaluate_moe_like_one(place: Path) -> None:
    """The all-to-alls of tokens cross processes."""
    config, file = config_of(place, "moe", MOE, num_steps=2, eval_every=2)
    run_dir = place / "moe"
    trained = launch("train", str(file), "--run-dir", str(run_dir), "--quiet")
    assert trained.returncode == 0, trained.stderr
    assert "[0] 2 processes: 4 devices on" in trained.stderr and "expert=4 crosses processes" in trained.stderr
    assert trained.stdout.startswith(f"[0] {run_dir}: step 2") and trained.stdout.count("\n") == 1
    alone = train(config, place / "moe_alone", progress=False)
    np.testing.assert_allclose(losses(run_dir), losses(alone.run_dir), rtol=1e-6)
    evaluated = launch("evaluate", str(run_dir), "--batches", "2", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    found = json.loads(evaluated.stdout.removeprefix("[0] "))
    assert found["loss"] == pytest.approx(alone.validation_loss, rel=1e-6)


# Ends, planned and other; with the stand-in model, which compiles in a second


@pytest.fixture(scope="module")
def stand_in(place: Path) -> tuple[RunConfig, Path]:
    return config_of(place, "stand_in", {}, num_steps=STEPS, eval_every=4)


@pytest.fixture(scope="module")
def whole(place: Path, stand_in: tuple[RunConfig, Path]) -> Path:
    """The run in two processes that nothing interrupts."""
    for ended in train_stand_in(stand_in[1], place / "whole"):
        assert ended.code == 0, ended.output
    return place / "whole"


def test_whichever_process_is_killed_the_other_names_it_and_the_run_resumes_bit_for_bit(
    place: Path, stand_in: tuple[RunConfig, Path], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (config, file), run_dir = stand_in, place / "killed"
    for step, lost in ((5, 1), (7, 0)):
        ended = train_stand_in(file, run_dir, signal_at=(step, lost, signal.SIGKILL))
        other = ended[1 - lost]
        assert [ended[lost].code, other.code] == [-signal.SIGKILL, EXIT_LOST], other.output
        assert f"foejax: error: process {lost} on " in other.output and "Traceback" not in other.output
        assert other.at - ended[lost].at < 60
    again = train_stand_in(file, run_dir)
    assert [each.code for each in again] == [0, 0], again[0].output + again[1].output
    assert "going on from step" in again[0].output
    assert figures(run_dir) == figures(whole)
    monkeypatch.setattr(run_module, "LanguageModel", BigramModel)
    found, expected = (nnx.state(train(config, folder, progress=False).model) for folder in (run_dir, whole))
    for array, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(array, wanted)


def test_sigterm_to_one_process_makes_all_save_the_same_step(
    place: Path, stand_in: tuple[RunConfig, Path], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, file = stand_in
    run_dir = place / "stopped"
    ended = train_stand_in(file, run_dir, signal_at=(2, 1, signal.SIGTERM))
    assert [each.code for each in ended] == [75, 75], ended[0].output + ended[1].output
    step = max(int(path.name) for path in (run_dir / "checkpoints").iterdir())
    assert 3 <= step < STEPS
    assert all(f"SIGTERM after step {step}: the checkpoint is saved" in each.output for each in ended)
    # On another mesh, in one process, the numbers agree up to the order of additions.
    monkeypatch.setattr(run_module, "LanguageModel", BigramModel)
    other = override_config(config, {"mesh.devices": 8, "mesh.data": 8, "mesh.group": 1})
    assert train(other, run_dir, progress=False).resumed_from == step
    np.testing.assert_allclose(losses(run_dir), losses(whole), rtol=1e-4)


# The collective that Gloo gets wrong

REDUCE_SCATTER = """
import jax, numpy as np
from sharding import Layout, hosts
from sharding.collectives import gather_local, reduce_scatter_local
hosts.start()
layout = Layout.create("fsdp", data=4)
hosts.connect(layout.mesh)
assert not jax.config.jax_enable_compilation_cache  # what is read back may stand still
spec = layout.batch_spec()
rows = np.random.default_rng(0).integers(-9, 9, (4, 8, 6)).astype(np.float32)
weights = np.random.default_rng(1).integers(-9, 9, (4, 2, 6)).astype(np.float32)
def place(x):
    return jax.make_array_from_callback(x.shape, layout.sharding(spec), lambda index: x[index])
def scatter_local(x, w):
    total, pull = jax.vjp(lambda x: reduce_scatter_local(x, "data", 1), x)
    _, pull_gather = jax.vjp(lambda w: gather_local(w, "data", 1), w)
    return total, *pull(w), *pull_gather(x)
mapped = layout.shard_map(scatter_local, (spec, spec), (spec, spec, spec))
program = jax.jit(mapped).lower(place(rows), place(weights)).compile()
assert "reduce-scatter" not in program.as_text()
total, grad, gather_grad = program(place(rows), place(weights))
for shard in [*total.addressable_shards, *gather_grad.addressable_shards]:
    np.testing.assert_array_equal(shard.data[0], rows.sum(0).reshape(4, 2, 6)[shard.index[0].start])
for shard in grad.addressable_shards:
    np.testing.assert_array_equal(shard.data[0], weights.reshape(8, 6))
"""


def test_sums_are_scattered_without_gloos_reduce_scatter(place: Path) -> None:
    for ended in run_processes(REDUCE_SCATTER, [], 2, 2):
        assert ended.code == 0, ended.output


# More devices


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 1, "group": 8}, {"data": 4, "group": 2}])
def test_foe_on_two_processes_of_four_devices_equals_one_process(place: Path, sizes: dict[str, int]) -> None:
    heads = {"model.num_groups": 8, "model.num_kv_heads": 8, "model.num_query_heads": 8, "model.num_experts": 16}
    mesh = {"mesh.devices": 8} | {f"mesh.{axis}": size for axis, size in sizes.items()}
    name = f"eight_{sizes['group']}"
    config, file = config_of(place, name, {**heads, "model.experts_per_token": 8, **mesh}, num_steps=10)
    launched = launch("train", str(file), "--run-dir", str(place / name), "--quiet", devices=4)
    assert launched.returncode == 0, launched.stderr
    alone = train(config, place / f"{name}_alone", progress=False)
    np.testing.assert_allclose(losses(place / name), losses(alone.run_dir), rtol=1e-5)


@pytest.mark.slow
def test_foe_resumes_on_another_mesh_with_the_same_losses(place: Path) -> None:
    """Two processes of two devices stop at step 4; one process with eight devices goes on for ten steps."""
    config, file = config_of(place, "remesh", {"data.batch_size": 8}, num_steps=14, eval_every=0, checkpoint_every=4)
    arguments = ["train", str(file), "--run-dir", str(place / "remesh"), "--quiet"]
    first = launch(*arguments, "--training.num_steps", "4")
    assert first.returncode == 0, first.stderr
    other = override_config(config, {"mesh.devices": 8, "mesh.data": 4, "mesh.group": 2})
    assert train(other, place / "remesh", progress=False).resumed_from == 4
    alone = train(config, place / "remesh_alone", progress=False)
    np.testing.assert_allclose(losses(place / "remesh")[:14], losses(alone.run_dir)[:14], rtol=1e-4)
