"""Checkpoints: what is saved comes back, damage is found, retention keeps the right ones, a full disk loses nothing."""

from __future__ import annotations

import errno
import logging
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from foejax.config import ConfigError, RunConfig, override_config
from foejax.training import checkpoint as checkpoint_module
from foejax.training.checkpoint import CheckpointStore
from foejax.training.errors import CheckpointError
from foejax.training.step import TrainState, create_train_state

CONFIG = RunConfig()


def make_mesh(*sizes: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(devices, ("data", "group"), axis_types=(AxisType.Auto,) * 2)


def make_state(mesh: Mesh, *rows: str) -> TrainState:
    """A small state whose rows are split over these mesh axes (`data` unless told otherwise)."""
    params = {"w": jnp.arange(32.0).reshape(8, 4), "block": {"norm": jnp.ones((8,))}}
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec(rows or "data")))
    bias = {"bias": jax.device_put(jnp.zeros((2, 4)), NamedSharding(mesh, PartitionSpec()))}
    return create_train_state(params, bias, optax.adam(0.1), jax.random.key(7), mesh)


@jax.jit
def advance(state: TrainState) -> TrainState:
    return jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), state)


def save_steps(directory: Path, *steps: int, **options: int) -> dict[int, TrainState]:
    """Save a state per step that differs from the others; returns the states."""
    store, state, saved = CheckpointStore(directory, **options), make_state(make_mesh(4, 1)), {}
    for step in steps:
        state = saved[step] = advance(state)
        store.save(state, step=step, config=CONFIG, data_state={"row": step}, validation_loss=None)
    store.close()
    return saved


def same(left: object, right: object) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), left, right)))


def test_restores_everything_bit_for_bit_with_its_shardings(tmp_path: Path):
    saved = save_steps(tmp_path, 3)[3]
    template = make_state(make_mesh(4, 1))
    restored = CheckpointStore(tmp_path).restore(template, CONFIG)
    assert restored is not None
    assert (restored.step, restored.data_state, restored.validation_loss) == (3, {"row": 3}, None)
    assert same(restored.state, saved) and not same(template, saved)
    assert jax.tree.structure(restored.state) == jax.tree.structure(saved)
    for leaf, expected in zip(jax.tree.leaves(restored.state), jax.tree.leaves(saved), strict=True):
        assert leaf.sharding == expected.sharding and leaf.dtype == expected.dtype


def test_restores_onto_another_mesh(tmp_path: Path):
    saved = save_steps(tmp_path, 1)[1]
    template = make_state(make_mesh(2, 4), "data", "group")
    restored = CheckpointStore(tmp_path).restore(template, CONFIG)
    assert restored is not None and same(restored.state, saved)
    assert restored.state.params["w"].sharding == template.params["w"].sharding


def test_a_reader_of_the_model_needs_no_optimizer(tmp_path: Path):
    saved = save_steps(tmp_path, 1)[1]
    blank = make_state(make_mesh(1, 1))
    params, router_state, step = CheckpointStore(tmp_path).restore_model(blank.params, blank.router_state, CONFIG.model)
    assert step == 1 and same((params, router_state), (saved.params, saved.router_state))


def test_the_state_may_be_donated_while_it_is_being_saved(tmp_path: Path):
    state = make_state(make_mesh(4, 1))
    expected = jax.tree.map(np.array, state)
    donate = jax.jit(lambda s: jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), s), donate_argnums=0)
    store = CheckpointStore(tmp_path)
    store.save(state, step=0, config=CONFIG, data_state=None)
    for _ in range(3):
        state = donate(state)
    jax.block_until_ready(state)
    store.close()
    restored = CheckpointStore(tmp_path).restore(make_state(make_mesh(4, 1)), CONFIG)
    assert restored is not None and same(restored.state, expected)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", [truncate, flip_bit, Path.unlink])
@pytest.mark.parametrize("victim", [lambda folder: largest_file(folder / "state"), lambda f: f / "manifest.json"])
def test_falls_back_from_a_damaged_checkpoint_in_one_line(tmp_path, caplog, damage, victim):
    saved = save_steps(tmp_path, 1, 2)
    damage(victim(tmp_path / "00000002"))
    with caplog.at_level(logging.WARNING):
        store = CheckpointStore(tmp_path)
        restored = store.restore(make_state(make_mesh(4, 1)), CONFIG)
    assert restored is not None and restored.step == 1 and same(restored.state, saved[1])
    (line,) = [record.getMessage() for record in caplog.records]
    assert "step 2 is damaged" in line and "falling back to step 1" in line
    store.set_aside_after(restored.step)
    assert store.steps() == [1] and (tmp_path / "00000002.damaged").is_dir()


def test_no_good_checkpoint_is_an_error_and_none_at_all_is_not(tmp_path: Path):
    template = make_state(make_mesh(4, 1))
    assert CheckpointStore(tmp_path / "empty").restore(template, CONFIG) is None
    save_steps(tmp_path, 1)
    truncate(largest_file(tmp_path / "00000001" / "state"))
    with pytest.raises(CheckpointError, match="step 1 is damaged .* no older checkpoint"):
        CheckpointStore(tmp_path).restore(template, CONFIG)


def test_a_save_that_was_cut_off_is_not_a_checkpoint(tmp_path: Path):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "00000002").rename(tmp_path / "00000002.saving")
    store = CheckpointStore(tmp_path)
    restored = store.restore(make_state(make_mesh(4, 1)), CONFIG)
    assert restored is not None and restored.step == 1
    store.set_aside_after(1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["00000001"]


def test_another_architecture_is_refused_by_its_first_differing_field(tmp_path: Path):
    save_steps(tmp_path, 1)
    other = override_config(CONFIG, {"model.num_layers": 4, "model.num_experts": 32})
    with pytest.raises(ConfigError, match=r"model.num_layers=16 and this config has model.num_layers=4"):
        CheckpointStore(tmp_path).restore(make_state(make_mesh(4, 1)), other)


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path):
    store, state = CheckpointStore(tmp_path, keep_last=2, keep_best=1), make_state(make_mesh(1, 1))
    for step, loss in enumerate([3.0, 1.0, 2.0, None, 4.0, 5.0], start=1):
        store.save(state, step=step, config=CONFIG, data_state=None, validation_loss=loss)
    store.close()
    assert store.steps() == [2, 5, 6]


def test_a_disk_too_small_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved = save_steps(tmp_path, 1)[1]
    free = namedtuple("Usage", "free")
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda folder: free(100))
    with pytest.raises(CheckpointError, match="the disk is full .* bytes needed, 100 free.*step 1 is intact"):
        CheckpointStore(tmp_path).save(saved, step=2, config=CONFIG, data_state=None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["00000001"]


def test_full_disk_is_one_line_and_keeps_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved = save_steps(tmp_path, 1)[1]

    def no_space(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "write_manifest", no_space)
    store = CheckpointStore(tmp_path)
    store.save(saved, step=2, config=CONFIG, data_state=None)
    with pytest.raises(CheckpointError) as caught:
        store.wait()
    assert "the disk is full (No space left on device): the checkpoint of step 2 was not saved" in str(caught.value)
    assert "step 1 is intact" in str(caught.value) and "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["00000001"]
    monkeypatch.undo()
    store.save(saved, step=2, config=CONFIG, data_state=None)
    store.close()
    assert store.steps() == [1, 2]
