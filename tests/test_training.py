"""The step (accumulation, compilation, shardings) and the loop around it (files, signals, NaN, evaluation)."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bigram_stand_in import BigramModel, tiny_run, write_corpus
from flax import nnx

from foejax.config import ConfigError, RunConfig, override_config
from foejax.data import open_dataset
from foejax.evaluation.evaluate import EvalResult, evaluate, model_loss
from foejax.models import LanguageModel
from foejax.training import run as run_module
from foejax.training.batches import data_shard, place_batch
from foejax.training.errors import NonFiniteLoss, Preempted, TrainingError
from foejax.training.loop import train
from foejax.training.optimizer import learning_rate_schedule, make_optimizer
from foejax.training.run import make_layout
from foejax.training.run_folder import MetricsLog, read_metrics
from foejax.training.step import create_train_state, load_imbalance, make_train_step
from sharding import Layout


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    os.environ["FOEJAX_CACHE"] = str(folder / "cache")
    yield write_corpus(folder / "words.jsonl", 40)
    del os.environ["FOEJAX_CACHE"]


@pytest.fixture
def bigram(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "LanguageModel", BigramModel)


# The step


def random_batch(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    batch = {name: rng.integers(0, 320, (rows, 16), np.int32) for name in ("tokens", "targets")}
    batch["loss_weights"] = (rng.random((rows, 16)) < np.linspace(0.1, 1.0, rows)[:, None]).astype(np.float32)
    return batch


def make_step(config: RunConfig, accumulation: int):
    """(step function, its first state, function that places rows)."""
    layout = make_layout(config.model, config.mesh)
    graphdef, params, router_state = nnx.split(
        BigramModel.create(config.model, layout, jax.random.key(0)), nnx.Param, nnx.Variable
    )
    optimizer, schedule = make_optimizer(config.training), learning_rate_schedule(config.training)
    state = create_train_state(params, router_state, optimizer, jax.random.key(1), layout.mesh)
    step = make_train_step(
        model_loss(graphdef), optimizer, schedule, state, layout.mesh, accumulation=accumulation,
        router_bias_rate=config.training.router_bias_rate, num_stacks=config.model.num_stacks,
    )  # fmt: skip
    sharding = layout.sharding(layout.batch_spec())
    return step, state, lambda rows: place_batch(rows, sharding, accumulation)


def test_accumulation_equals_the_whole_batch(corpus: Path):
    config = tiny_run(corpus)
    results = {}
    for accumulation in (1, 4):
        step, state, place = make_step(config, accumulation)
        results[accumulation] = step(state, place(random_batch(8)))
    (whole, whole_metrics), (parts, parts_metrics) = results[1], results[4]
    for name in ("loss", "grad_norm", "num_tokens", "load_imbalance", "learning_rate"):
        np.testing.assert_allclose(parts_metrics[name], whole_metrics[name], rtol=1e-5, err_msg=name)
    moments = [jax.tree.leaves(state.opt_state) for state in (whole, parts)]
    for expected, found in zip(*moments, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6 * float(jnp.abs(expected).max()))
    np.testing.assert_array_equal(*(jax.tree.leaves(state.router_state)[0] for state in (whole, parts)))
    assert float(jnp.abs(jax.tree.leaves(whole.router_state)[0]).max()) == pytest.approx(0.01)


def test_step_compiles_once_keeps_shardings_and_donates(corpus: Path):
    step, state, place = make_step(tiny_run(corpus), 1)
    first, shardings = state, jax.tree.map(lambda leaf: leaf.sharding, state)
    assert any(not sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings.opt_state))
    for seed in range(3):
        state, metrics = step(state, place(random_batch(8, seed)))
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
    assert step._cache_size() == 1
    assert int(state.step) == 3
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))
    assert all(math.isfinite(value) for value in metrics.values())


def test_load_imbalance_is_largest_over_mean_averaged_over_layers():
    assert float(load_imbalance(jnp.array([[4.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]]))) == pytest.approx(1.5)


def test_rows_of_a_process_lie_together_or_are_refused():
    """Two processes of four devices; heads over `group`, the experts of each over `expert`, whose rows take turns."""

    class OfProcess:
        """The sharding as one process sees it, which has the first half of the mesh's devices."""

        def __init__(self, layout):
            self.mesh, self.spec = layout.mesh, layout.batch_spec()
            self._whole, self._own = layout.sharding(self.spec), set(layout.mesh.devices.flat[:4])

        def addressable_devices_indices_map(self, shape):
            return {d: i for d, i in self._whole.devices_indices_map(shape).items() if d in self._own}

    sizes = {"num_ffn_heads": 4, "num_experts": 64}
    assert data_shard(OfProcess(Layout.create("hp", **sizes, group=4, data=2)), 16) == (0, 2)
    assert data_shard(OfProcess(Layout.create("hp", num_ffn_heads=2, num_experts=64, group=2, expert=2)), 16) == (0, 2)
    with pytest.raises(ValueError, match=r"do not lie together \(mesh.data=1, mesh.group=4, mesh.expert=2\)"):
        data_shard(OfProcess(Layout.create("hp", **sizes, group=4, expert=2)), 16)


def test_processes_that_hold_the_same_rows_read_the_same_part():
    layout = Layout.create("foe", num_groups=2, num_devices=4, data=2, group=2)
    sharding = layout.sharding(layout.batch_spec())
    assert data_shard(sharding, 8) == (0, 1)
    with pytest.raises(ValueError, match="a batch of 3 sequences does not divide over 2 batch shards"):
        data_shard(sharding, 3)


# The loop


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory):
    """A finished run of the real model: (config, result, dataset)."""
    config = tiny_run(corpus, num_steps=6)
    dataset = open_dataset(config.data, vocab_size=config.model.vocab_size)
    run_dir = tmp_path_factory.mktemp("run")
    return config, train(config, run_dir, progress=False, dataset=dataset), dataset


def test_a_run_learns_and_describes_itself(finished):
    config, result, dataset = finished
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    expected = {
        "step", "loss", "load_balance_loss", "z_loss", "grad_norm", "learning_rate", "tokens_per_second",
        "load_imbalance",
    }  # fmt: skip
    assert all(set(line) == expected for line in steps)
    assert steps[0]["loss"] == pytest.approx(math.log(320), rel=0.05)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 6]
    assert sorted(path.name for path in result.run_dir.iterdir()) == [
        "checkpoints", "config.yaml", "metrics.jsonl", "tensorboard", "tokenizer.json",
    ]  # fmt: skip
    assert (result.step, result.resumed_from, result.train_loss) == (6, 0, steps[-1]["loss"])


def test_a_finished_run_is_returned_at_once(finished):
    config, result, dataset = finished
    again = train(config, result.run_dir, progress=False, dataset=dataset)
    assert again.resumed_from == 6 and again.validation_loss == result.validation_loss
    for found, expected in zip(
        jax.tree.leaves(nnx.state(again.model)), jax.tree.leaves(nnx.state(result.model)), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_evaluate_gives_the_logged_figures_and_counts_bytes_exactly(finished):
    config, result, dataset = finished
    found = evaluate(result.model, dataset, limit=config.training.eval_batches)
    assert isinstance(result.model, LanguageModel) and isinstance(found, EvalResult)
    assert found.loss == pytest.approx(result.validation_loss, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(result.validation_bits_per_byte, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    batches = list(dataset.validation_batches(limit=config.training.eval_batches))
    num_bytes = sum(dataset.num_bytes(batch) for batch in batches)
    assert found.num_bytes == num_bytes
    assert found.num_tokens == sum(int(batch["loss_weights"].sum()) for batch in batches)
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) * found.num_tokens / num_bytes)
    assert found.tokens_per_expert.shape == (2, 4)
    tokens = sum(int((batch["segment_ids"] != 0).sum()) for batch in batches)
    np.testing.assert_array_equal(found.tokens_per_expert.sum(axis=1), 2 * tokens)


def test_a_run_of_another_architecture_is_refused(finished):
    config, result, dataset = finished
    other = override_config(config, {"model.expert_hidden_size": 16})
    with pytest.raises(ConfigError, match="expert_hidden_size=8 and this config has model.expert_hidden_size=16"):
        train(other, result.run_dir, progress=False, dataset=dataset)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_next_step_border_and_has_its_own_exit_code(corpus, tmp_path, bigram, number):
    handlers = signal.getsignal(number)

    def send(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), number)

    config = tiny_run(corpus, checkpoint_every=0, profile_start=1, profile_steps=1)
    with pytest.raises(Preempted, match=f"{number.name} after step 3") as caught:
        train(config, tmp_path, progress=False, after_step=send)
    assert caught.value.exit_code == 75
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000003"]
    assert [line["step"] for line in read_metrics(tmp_path) if "loss" in line] == [1, 2, 3]
    assert signal.getsignal(number) is handlers
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert train(config, tmp_path, progress=False).resumed_from == 3


def test_nan_loss_stops_with_the_batch_written_out(corpus: Path, tmp_path: Path, bigram):
    config = tiny_run(corpus, learning_rate=1e30, checkpoint_every=1)
    dataset = open_dataset(config.data)
    with pytest.raises(NonFiniteLoss, match="at step 2: the batch is in .*nonfinite_step_2.npz") as caught:
        train(config, tmp_path, progress=False, dataset=dataset)
    assert isinstance(caught.value, TrainingError) and "\n" not in str(caught.value)
    iterator = dataset.train_iterator()
    next(iterator)
    expected = next(iterator)
    with np.load(tmp_path / "nonfinite_step_2.npz") as found:
        assert set(found) == set(expected)
        for name, rows in expected.items():
            np.testing.assert_array_equal(found[name], rows)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000001"]


def test_accumulation_that_does_not_divide_over_the_mesh_is_a_config_error(corpus: Path, tmp_path: Path):
    config = override_config(tiny_run(corpus), {"training.gradient_accumulation": 8})
    with pytest.raises(ConfigError, match="a batch of 1 sequences does not divide over 2 batch shards"):
        train(config, tmp_path, progress=False)
    too_large = override_config(tiny_run(corpus), {"mesh.devices": 64, "mesh.data": 32})
    with pytest.raises(ConfigError, match="needs 64 devices and there are 8"):
        train(too_large, tmp_path, progress=False)


def test_metrics_log_drops_later_lines_and_a_torn_one(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    log = MetricsLog(tmp_path, 1)
    log.write(2, {"loss": 2.5})
    log.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]
