"""Everything else that describes a run: mesh, data, training, and how they fit each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from foejax.config.model import ModelConfig
from foejax.config.section import (
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    require_multiple,
)

if TYPE_CHECKING:
    from sharding import LayoutKind


class MeshConfig(Section):
    """How devices are arranged. A size of 0 is derived from the others and the device count."""

    layout: Literal["auto", "foe", "fsdp", "ep", "tp", "tp_ep", "hp"] = "auto"
    """foe: groups over the mesh; fsdp: data parallel with sharded parameters; ep: experts over the mesh, tokens by
    all-to-all; tp: heads and experts over the mesh, two all-reduces a layer; tp_ep: heads and experts over the mesh,
    tokens by all-to-all; hp: heads of Multi-Head LatentMoE over the mesh, sub-tokens by all-to-all before they are
    routed; auto: foe for num_groups > 1, hp for num_ffn_heads, else fsdp"""
    devices: NonNegative = 0
    """devices to use; 0 takes all there are"""
    data: NonNegative = 0
    """size of the `data` axis: batch and parameter shards"""
    group: NonNegative = 0
    """size of the `group` axis: FoE groups; heads and experts of the tp and tp_ep layouts; heads of the hp layout"""
    expert: NonNegative = 0
    """size of the `expert` axis: experts and tokens of the ep layout, of each group of foe, of each head of hp"""

    def kind_for(self, model: ModelConfig) -> LayoutKind:
        """The layout, where it is `auto` the one that fits the model."""
        if self.layout != "auto":
            return self.layout
        return "hp" if model.num_ffn_heads else "foe" if model.num_groups > 1 else "fsdp"


class DataConfig(Section):
    """Which text, how it becomes tokens, and how tokens become batches."""

    corpus: str = "shakespeare"
    """a named corpus (`foejax data list`) or a path to text, JSONL or Parquet files"""
    text_field: str = "text"
    """field that holds the text in JSONL and Parquet files"""
    tokenizer: str = "bpe"
    """`bpe` trains a byte-level BPE on the corpus (cached); otherwise a path to a tokenizer.json"""
    tokenizer_vocab_size: Positive = 1024
    """vocabulary of the trained BPE; at most model.vocab_size"""
    sequence_length: Positive = 2048
    """tokens per packed sequence"""
    batch_size: Positive = 128
    """sequences per optimizer step over all devices and accumulation steps"""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """share of the documents held out for validation"""
    seed: NonNegative = 0
    """seed of the held-out split and of the shuffle"""


class TrainingConfig(Section):
    """Optimiser, schedule, evaluation, checkpoints."""

    num_steps: Positive = 18_000
    """optimizer steps"""
    learning_rate: PositiveFloat = 6e-4
    """peak learning rate of AdamW"""
    final_learning_rate_fraction: Fraction = 0.1
    """learning rate at the end, as a share of the peak"""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """wsd: linear warm-up, stable, linear decay; cosine: linear warm-up, cosine decay"""
    warmup_steps: NonNegative = 1_000
    """steps of linear warm-up from 0"""
    decay_start_step: NonNegative = 15_000
    """first step of the decay of the wsd schedule"""
    beta1: Fraction = 0.9
    """AdamW first-moment decay"""
    beta2: Fraction = 0.95
    """AdamW second-moment decay"""
    adam_eps: PositiveFloat = 1e-8
    """AdamW epsilon"""
    weight_decay: NonNegativeFloat = 0.1
    """decoupled weight decay, on matrices only"""
    clip_norm: PositiveFloat = 1.0
    """largest global gradient norm"""
    gradient_accumulation: Positive = 1
    """micro-batches per optimizer step"""
    load_balance_coef: NonNegativeFloat = 0.01
    """weight of the load-balance loss"""
    z_loss_coef: NonNegativeFloat = 0.001
    """weight of the router z-loss"""
    router_bias_rate: NonNegativeFloat = 0.0
    """step of the loss-free selection-bias update; 0 switches it off"""
    remat: Literal["none", "dots", "full"] = "none"
    """what the backward pass recomputes: nothing, all but matmul outputs, or everything but merged residuals"""
    eval_every: NonNegative = 500
    """steps between evaluations on the validation split; 0 evaluates only at the end"""
    eval_batches: Positive = 16
    """validation batches per evaluation"""
    checkpoint_every: NonNegative = 500
    """steps between checkpoints; 0 saves only at the end"""
    keep_last: Positive = 3
    """how many of the newest checkpoints stay"""
    keep_best: NonNegative = 1
    """how many of the checkpoints with the lowest validation loss stay besides"""
    profile_start: NonNegative = 0
    """first step of the profiler window; used when profile_steps > 0"""
    profile_steps: NonNegative = 0
    """length of the profiler window in steps; its trace goes to RUN/profile"""
    seed: NonNegative = 0
    """seed of the initial weights"""

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        if self.schedule == "wsd" and not self.warmup_steps <= self.decay_start_step <= self.num_steps:
            raise ValueError(
                f"decay_start_step={self.decay_start_step} does not lie between warmup_steps={self.warmup_steps} "
                f"and num_steps={self.num_steps}: the wsd schedule warms up, stays, then decays"
            )
        if self.warmup_steps > self.num_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is more than num_steps={self.num_steps}: choose fewer warm-up steps"
            )
        return self


class RunConfig(Section):
    """One training run: a model on a mesh, its data and its training."""

    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.data.sequence_length > self.model.max_seq_len:
            raise ValueError(
                f"data.sequence_length={self.data.sequence_length} is more than "
                f"model.max_seq_len={self.model.max_seq_len}: choose shorter sequences or a longer context"
            )
        if self.data.tokenizer == "bpe" and self.data.tokenizer_vocab_size > self.model.vocab_size:
            raise ValueError(
                f"data.tokenizer_vocab_size={self.data.tokenizer_vocab_size} is more than "
                f"model.vocab_size={self.model.vocab_size}: choose a smaller tokenizer or a larger vocab_size"
            )
        require_multiple(
            "data.batch_size",
            self.data.batch_size,
            "training.gradient_accumulation",
            self.training.gradient_accumulation,
        )
        if self.mesh.layout in ("fsdp", "ep", "tp", "tp_ep") and self.model.num_groups > 1:
            raise ValueError(
                f"mesh.layout={self.mesh.layout} does not fit model.num_groups={self.model.num_groups}: "
                "use mesh.layout=foe (or auto), or model.num_groups=1"
            )
        if self.mesh.layout not in ("auto", "fsdp", "hp") and self.model.num_ffn_heads:
            raise ValueError(
                f"mesh.layout={self.mesh.layout} does not fit model.num_ffn_heads={self.model.num_ffn_heads}: "
                "use mesh.layout=hp (or auto), or fsdp"
            )
        if self.mesh.layout == "hp" and not self.model.num_ffn_heads:
            raise ValueError(
                "mesh.layout=hp spreads heads of experts, and model.num_ffn_heads=0: set model.num_ffn_heads, "
                "or another layout"
            )
        for name in ("load_balance_coef", "z_loss_coef"):
            self.model.check_router_loss(f"training.{name}", getattr(self.training, name))
        return self
