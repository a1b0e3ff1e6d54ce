"""Typed configuration: YAML files, dotted overrides, and errors in one sentence.

A run is described by four sections: `model`, `mesh`, `data` and `training`. Every field is typed and described
here once; the command line and notebooks use the same objects.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

if TYPE_CHECKING:
    from sharding import LayoutKind


class ConfigError(ValueError):
    """A configuration that cannot work; the message names the field, its value and the way out."""


Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Section(BaseModel):
    """Fields with types, defaults and descriptions; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


SectionType = TypeVar("SectionType", bound=Section)


def _require_multiple(field: str, value: int, of_field: str, of: int) -> None:
    if value % of:
        raise ValueError(
            f"{field}={value} is not divisible by {of_field}={of}: choose {field} as a multiple of {of}, "
            f"or {of_field} as a divisor of {value}"
        )


class ModelConfig(Section):
    """The architecture. `num_groups=1` is the plain mixture-of-experts transformer (OLMoE-like)."""

    vocab_size: Positive = 50304
    """rows of the embedding and columns of the head"""
    hidden_size: Positive = 768
    """width D of the residual streams"""
    num_layers: Positive = 16
    """number L of blocks"""
    num_query_heads: Positive = 8
    """query heads over all groups"""
    num_kv_heads: Positive = 8
    """key/value heads over all groups"""
    head_dim: Positive = 96
    """size K of one head"""
    num_experts: Positive = 64
    """routed experts E per layer over all groups or heads"""
    experts_per_token: Positive = 8
    """chosen experts k per token over all groups or heads; each takes its equal share among its own"""
    expert_hidden_size: Positive = 384
    """inner width F of one expert"""
    expert_activation: Literal["swiglu", "gelu"] = "swiglu"
    """swiglu: three matrices; gelu: two, with the exact GELU between them"""
    num_groups: Positive = 1
    """FoE groups H; 1 is the plain MoE"""
    num_ffn_heads: NonNegative = 0
    """heads of Multi-Head LatentMoE, each with its own sub-token, router and experts; 0: experts read whole tokens"""
    ffn_head_dim: NonNegative = 0
    """size of a sub-token; 0 takes hidden_size / num_ffn_heads"""
    max_seq_len: Positive = 2048
    """longest context in tokens"""
    rope_base: PositiveFloat = 500_000.0
    """base of the rotary embedding"""
    rope_scaling_factor: PositiveFloat = 1.0
    """positions are divided by this factor (linear RoPE scaling)"""
    norm_eps: PositiveFloat = 1e-5
    """epsilon of every RMSNorm"""
    merge_scale: Literal["mean", "rsqrt", "sum"] = "mean"
    """weight of a merged branch: 1/H (the paper's mean), 1/sqrt(H) or 1"""
    embedding_scale: PositiveFloat = 1.0
    """factor on the token embedding"""
    router_score: Literal["softmax", "sigmoid", "topk_softmax"] = "softmax"
    """non-linearity of the router; topk_softmax: the choice by logits, then the softmax over the chosen ones"""
    router_scope: Literal["global", "group"] = "global"
    """softmax over all experts, or over the experts of each group"""
    init_std: PositiveFloat = 0.02
    """standard deviation of the initial weights"""
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """dtype of activations and matmuls; router, norms, softmax and loss use at least float32"""

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        groups = self.num_groups
        _require_multiple("num_kv_heads", self.num_kv_heads, "num_groups", groups)
        _require_multiple("num_query_heads", self.num_query_heads, "num_kv_heads", self.num_kv_heads)
        _require_multiple("num_experts", self.num_experts, "num_groups", groups)
        _require_multiple("experts_per_token", self.experts_per_token, "num_groups", groups)
        if self.num_ffn_heads:
            self._check_heads()
        elif self.ffn_head_dim:
            raise ValueError(
                f"ffn_head_dim={self.ffn_head_dim} has no meaning without num_ffn_heads: set both, or none"
            )
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than num_experts={self.num_experts}: "
                "choose fewer experts per token or more experts"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd: rotary embeddings need an even head_dim")
        if self.router_score == "sigmoid" and self.router_scope == "group":
            raise ValueError(
                "router_scope=group has no meaning with router_score=sigmoid (each score stands alone): "
                "set router_scope=global"
            )
        if self.router_score == "topk_softmax" and self.experts_per_stack < 2:
            raise ValueError(
                f"router_score=topk_softmax gives the only expert of experts_per_token={self.experts_per_token} over "
                f"{self.num_stacks} stacks the weight 1, and the router no gradient: choose twice as many, or softmax"
            )
        return self

    def _check_heads(self) -> None:
        heads = self.num_ffn_heads
        if self.num_groups > 1:
            raise ValueError(
                f"num_ffn_heads={heads} does not go with num_groups={self.num_groups}: experts are stacked by heads or "
                "by groups, set one of them"
            )
        _require_multiple("num_experts", self.num_experts, "num_ffn_heads", heads)
        _require_multiple("experts_per_token", self.experts_per_token, "num_ffn_heads", heads)
        if not self.ffn_head_dim:
            _require_multiple("hidden_size", self.hidden_size, "num_ffn_heads", heads)
        if self.router_scope == "global" and self.router_score == "softmax":
            raise ValueError(
                f"router_scope=global has no meaning with num_ffn_heads={heads}, each of which routes on its own: "
                "set router_scope=group, or router_score=topk_softmax"
            )

    @property
    def num_stacks(self) -> int:
        """Stacks of experts with a router each: FoE's groups, the heads of Multi-Head LatentMoE, or 1."""
        return self.num_ffn_heads or self.num_groups

    @property
    def streams_scores(self) -> bool:
        """Whether routers keep the scores of the chosen experts alone, from which no auxiliary loss can be made."""
        return self.num_ffn_heads > 0 and self.router_score == "topk_softmax"

    def check_router_loss(self, name: str, coef: float) -> None:
        """ValueError for an auxiliary loss that this model's routers have no scores for."""
        if coef and self.streams_scores:
            raise ValueError(
                f"{name}={coef} needs the scores of all experts, of which router_score=topk_softmax keeps the chosen "
                "ones alone: set it to 0 and balance by router_bias_rate, or set router_score=softmax"
            )

    @property
    def stack_axis(self) -> str:
        """Logical name of the dimension that runs over the stacks."""
        return "ffn_heads" if self.num_ffn_heads else "group"

    @property
    def experts_per_stack(self) -> int:
        """Chosen experts per token in each stack."""
        return self.experts_per_token // self.num_stacks

    @property
    def expert_width(self) -> int:
        """Size of what an expert reads and writes."""
        return self.ffn_head_dim or self.hidden_size // max(self.num_ffn_heads, 1)

    @property
    def expert_size(self) -> int:
        """Weights of one expert."""
        return (3 if self.expert_activation == "swiglu" else 2) * self.expert_width * self.expert_hidden_size

    @property
    def latent_width(self) -> int:
        """Size of all sub-tokens of a token; 0 without heads of experts."""
        return self.num_ffn_heads * self.expert_width


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
        _require_multiple(
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


def config_folders() -> list[Path]:
    """Folders searched for config files given by name: the installed package's, then the checkout's."""
    package = Path(__file__).resolve().parent
    return [folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()]


def find_config(name: str | Path) -> Path:
    """Path of a config file given as a path or as the name of a packaged config (`foe_tiny`).

    Raises:
      ConfigError: there is no such file; names the packaged configs.
    """
    path = Path(name)
    if path.is_file():
        return path
    stem = path.name.removesuffix(".yaml")
    for folder in config_folders():
        if (folder / f"{stem}.yaml").is_file() and path.parent in (Path("."), Path("configs")):
            return folder / f"{stem}.yaml"
    known = sorted({found.stem for folder in config_folders() for found in folder.glob("*.yaml")})
    raise ConfigError(f"config {str(name)!r} not found: give a path to a YAML file or one of {', '.join(known)}")


def load_config(source: str | Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read a run config from YAML and apply dotted overrides.

    Args:
      source: a path, or the name of a packaged config such as `foe_tiny`.
      overrides: e.g. `{"model.num_groups": 4, "training.num_steps": 40}`; string values are read as YAML scalars.
        The file's warm-up and decay stretch with an overridden `training.num_steps`, unless they are overridden too.

    Raises:
      ConfigError: missing file, unknown key or impossible combination, in one sentence.
    """
    path = find_config(source)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} is not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name} holds a {type(values).__name__}: a config is a mapping of sections")
    overrides = overrides or {}
    return parse_config(_with_overrides(values, _stretched_schedule(values, overrides) | overrides))


def parse_config(values: dict[str, Any]) -> RunConfig:
    """Validate a nested dict as a run config; raises ConfigError in one sentence."""
    return parse_section(RunConfig, values)


def parse_section(kind: type[SectionType], values: dict[str, Any]) -> SectionType:
    """Validate a nested dict as a section of this kind; raises ConfigError in one sentence."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_one_sentence(error, kind)) from None


def override_config(config: RunConfig, overrides: dict[str, Any]) -> RunConfig:
    """A copy of `config` with dotted overrides applied and everything validated again."""
    return parse_config(_with_overrides(config.model_dump(), overrides))


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write the whole config as YAML, so that a run folder describes itself."""
    Path(path).write_text(yaml.safe_dump(config.model_dump(), sort_keys=False), encoding="utf-8")


def _with_overrides(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    values = {key: dict(section) if isinstance(section, dict) else section for key, section in values.items()}
    for dotted, value in overrides.items():
        section, _, field = dotted.partition(".")
        if not field:
            raise ConfigError(f"override {dotted!r} names no field: write SECTION.FIELD, e.g. training.num_steps")
        entry = values.setdefault(section, {})
        if not isinstance(entry, dict):
            raise ConfigError(f"section {section!r} is not a mapping: it cannot take {dotted}={value}")
        entry[field] = _read_scalar(dotted, value)
    return values


def _stretched_schedule(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Overrides that keep the shape of a file's learning-rate schedule under another number of steps."""
    section = values.get("training")
    section = section if isinstance(section, dict) else {}
    num_steps = _read_scalar("training.num_steps", overrides.get("training.num_steps"))
    names = ("num_steps", "warmup_steps", "decay_start_step")
    planned, *steps = (section.get(name, TrainingConfig.model_fields[name].default) for name in names)
    if not all(isinstance(value, int) and value >= 0 for value in (num_steps, planned, *steps)) or not planned:
        return {}  # what is wrong with them is found when the config is validated
    return {f"training.{name}": step * num_steps // planned for name, step in zip(names[1:], steps, strict=True)}


def _read_scalar(field: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return float(value) if "e" in value.lower() and _is_float(value) else yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{field}={value!r} is not a YAML value: quote it") from error


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _one_sentence(error: ValidationError, kind: type[Section]) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known_fields(kind, first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        way_out = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {field}={first['input']!r}: {way_out}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{field}: {message}" if field else message
    return f"{field}={first['input']!r} is refused: {message[0].lower()}{message[1:]}"


def _known_fields(kind: type[Section], location: tuple[Any, ...]) -> list[str]:
    fields = kind.model_fields
    for part in location:
        section = fields[str(part)].annotation
        assert isinstance(section, type) and issubclass(section, BaseModel)
        fields = section.model_fields
    return list(fields)
