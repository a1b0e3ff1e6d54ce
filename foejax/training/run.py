"""A run opened: model, data, optimizer, checkpoints and log, fresh or restored."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import jax
import optax
from flax import nnx

from foejax.config import ConfigError, MeshConfig, ModelConfig, RunConfig
from foejax.data import Dataset, TrainIterator, open_dataset
from foejax.evaluation.evaluate import EvalResult, Evaluator, model_loss, pad_token_bytes, split_model
from foejax.models import LanguageModel
from foejax.training.batches import Batch, HostBatch, data_shard, place_batch
from foejax.training.checkpoint import CheckpointStore
from foejax.training.optimizer import learning_rate_schedule, make_optimizer
from foejax.training.run_folder import CHECKPOINTS, MetricsLog, check_same_run, write_run_files
from foejax.training.step import TrainState, TrainStep, abstract_train_state, create_train_state, make_train_step
from sharding import Layout, hosts

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A run ready for its next step.

    Attributes:
      state: current state; replaced by every step.
      start: steps already taken when the run was opened.
    """

    config: RunConfig
    run_dir: Path
    layout: Layout
    graphdef: nnx.GraphDef
    state: TrainState
    start: int
    dataset: Dataset
    iterator: TrainIterator
    store: CheckpointStore
    log: MetricsLog
    train_step: TrainStep
    evaluator: Evaluator

    def place(self, rows: HostBatch) -> Batch:
        """This process's rows as a batch on the mesh."""
        sharding = self.layout.sharding(self.layout.batch_spec())
        return place_batch(rows, sharding, self.config.training.gradient_accumulation)

    def evaluate(self) -> EvalResult:
        """Evaluate the current parameters on the first `training.eval_batches` validation batches."""
        sharding = self.layout.sharding(self.layout.batch_spec())
        index, count = data_shard(sharding, self.config.data.batch_size)
        batches = self.dataset.validation_batches(None, self.config.training.eval_batches, index, count)
        return self.evaluator.run(self.state.params, self.state.router_state, batches)

    def save(self, step: int, validation_loss: float | None) -> None:
        """Start a checkpoint; every metrics line up to `step` is on disk before it."""
        self.log.sync()
        data_state = self.iterator.get_state()
        self.store.save(
            self.state, step=step, config=self.config, data_state=data_state, validation_loss=validation_loss
        )


def train_step_of(
    config: RunConfig,
    graphdef: nnx.GraphDef[LanguageModel],
    optimizer: optax.GradientTransformation,
    state: TrainState,
    layout: Layout,
) -> TrainStep:
    """The training step that a config asks for; `state` may be abstract."""
    training = config.training
    loss = model_loss(
        graphdef,
        load_balance_coef=training.load_balance_coef,
        z_loss_coef=training.z_loss_coef,
        remat=training.remat,
    )
    return make_train_step(
        loss,
        optimizer,
        learning_rate_schedule(training),
        state,
        layout.mesh,
        accumulation=training.gradient_accumulation,
        router_bias_rate=training.router_bias_rate,
        num_stacks=config.model.num_stacks,
    )


def open_run(config: RunConfig, run_dir: Path, dataset: Dataset | None) -> Run:
    """Build a run, or restore it from the newest good checkpoint in `run_dir`; see `foejax.training.loop.train`."""
    training = config.training
    store = CheckpointStore(run_dir / CHECKPOINTS, keep_last=training.keep_last, keep_best=training.keep_best)
    if store.steps():
        check_same_run(config, run_dir)
    layout = make_layout(config.model, config.mesh)
    process_index, process_count = _check_batch(config, layout)
    try:
        model = LanguageModel.abstract(config.model, layout)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    dataset = dataset or open_dataset(config.data, vocab_size=config.model.vocab_size)
    _check_same_data(dataset)
    iterator = dataset.train_iterator(process_index, process_count, training.gradient_accumulation)
    optimizer = make_optimizer(training)
    graphdef, params, router_state = split_model(model)
    restored = store.restore(abstract_train_state(params, router_state, optimizer, layout.mesh), config)
    if restored is not None:
        state, start = restored.state, restored.step
        if restored.data_state is not None:  # an imported model has seen no batch
            iterator.set_state(restored.data_state)
        logger.info("going on from step %d of %s", start, run_dir)
    else:
        model_key, run_key = jax.random.split(jax.random.key(training.seed))
        model = LanguageModel.create(config.model, layout, model_key)
        graphdef, params, router_state = split_model(model)
        state, start = create_train_state(params, router_state, optimizer, run_key, layout.mesh), 0
    store.set_aside_after(start)
    run_dir.mkdir(parents=True, exist_ok=True)
    is_writer = jax.process_index() == 0
    if is_writer:
        write_run_files(config, dataset.tokenizer, run_dir)
    train_step = train_step_of(config, graphdef, optimizer, state, layout)
    token_bytes = pad_token_bytes(dataset.token_byte_lengths, config.model.vocab_size)
    evaluator = Evaluator(model_loss(graphdef), layout.sharding(layout.batch_spec()), token_bytes)
    log = MetricsLog(run_dir, start, enabled=is_writer)
    return Run(config, run_dir, layout, graphdef, state, start, dataset, iterator, store, log, train_step, evaluator)


def _check_batch(config: RunConfig, layout: Layout) -> tuple[int, int]:
    """Which part of a batch this process reads; ConfigError when micro-batches do not divide over the mesh."""
    micro_batch = config.data.batch_size // config.training.gradient_accumulation
    try:
        return data_shard(layout.sharding(layout.batch_spec()), micro_batch)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_same_data(dataset: Dataset) -> None:
    """ConfigError where processes have opened different texts: every host reads its own copy."""
    if jax.process_count() == 1:
        return
    if others := hosts.processes_that_differ(dataset.fingerprint):
        raise ConfigError(
            f"the training data of process {', '.join(map(str, others))} differ from those of process 0: "
            "give data.corpus and data.tokenizer the same files on every host"
        )


def make_layout(model: ModelConfig, mesh: MeshConfig) -> Layout:
    """The layout that a config asks for on the devices there are, of all processes, which meet here.

    Raises:
      ConfigError: the mesh does not fit the devices, the hosts or the model.
      StartError: a process does not come.
    """
    try:
        layout = Layout.create(
            mesh.kind_for(model),
            num_groups=model.num_groups,
            num_experts=model.num_experts,
            num_kv_heads=model.num_kv_heads,
            num_ffn_heads=model.num_ffn_heads or 1,
            num_devices=mesh.devices,
            data=mesh.data,
            group=mesh.group,
            expert=mesh.expert,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    hosts.connect(layout.mesh)
    return layout
