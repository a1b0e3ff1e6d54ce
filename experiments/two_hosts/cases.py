"""What is compared: the layouts, the matched models, the programs, and how large they are."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from foejax.analysis.accounting import account
from foejax.config import RunConfig, parse_config
from sharding import Layout
from sharding.mesh import LayoutKind, MeshSizes

DEVICES_PER_HOST = 4

HEADS = 8
"""Groups of the FoE, heads of the Multi-Head LatentMoE."""

Architecture = Literal["FoE", "MoE", "Multi-Head LatentMoE"]


def architecture(kind: str) -> Architecture:
    """The model that a layout takes."""
    return "FoE" if kind == "foe" else "Multi-Head LatentMoE" if kind == "hp" else "MoE"


@dataclass(frozen=True)
class Case:
    """A layout of the eight devices; the first four are host0's.

    Attributes:
      kind: the layout, and with it the model; see `architecture`.
      data, group, expert: devices along each mesh axis.
    """

    kind: LayoutKind
    data: int = 1
    group: int = 1
    expert: int = 1

    @property
    def name(self) -> str:
        """For tables: `foe group=8`."""
        axes = {"data": self.data, "group": self.group, "expert": self.expert}
        return " ".join([self.kind, *(f"{axis}={size}" for axis, size in axes.items() if size > 1)])

    @property
    def mesh(self) -> dict[str, int]:
        """Devices along each axis."""
        return {"data": self.data, "group": self.group, "expert": self.expert}


CASES = (
    Case("foe", group=8),
    Case("foe", data=2, group=4),
    Case("ep", expert=8),
    Case("ep", data=2, expert=4),
    Case("tp", group=8),
    Case("tp_ep", group=8),
    Case("fsdp", data=8),
    Case("hp", group=8),
    Case("hp", data=2, group=4),
)


@dataclass(frozen=True)
class Sizes:
    """Of model and work; everything is float32, since XLA on CPU would widen bfloat16 on the wire.

    Attributes:
      hidden_size, num_layers, expert_hidden_size, vocab_size: of the model, which has 64 experts, 8 per token.
      rows, length: sequences and tokens of each in a forward pass and in a training step.
      sequences: that decode a token in one step, over all devices.
      context: cache slots of each; a step attends to all of them.
    """

    hidden_size: int = 128
    num_layers: int = 2
    expert_hidden_size: int = 24
    vocab_size: int = 256
    rows: int = 16
    length: int = 128
    sequences: int = 1024
    context: int = 32

    def tokens(self, program: str) -> int:
        """Tokens of one step over all devices."""
        return self.sequences if program == "decode_step" else self.rows * self.length

    def model(self) -> dict[str, Any]:
        """The `model` section of the MoE's config; the FoE's has HEADS groups."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "num_query_heads": 8,
            "num_kv_heads": 8,
            "head_dim": self.hidden_size // 8,
            "num_experts": 64,
            "experts_per_token": 8,
            "expert_hidden_size": self.expert_hidden_size,
            "max_seq_len": max(self.length, self.context),
            "rope_base": 10_000.0,
            "dtype": "float32",
        }

    def head_model(self) -> dict[str, Any]:
        """The same of the Multi-Head LatentMoE, with the MoE's parameters in a layer, total and active.

        The two projections have 2 D^2 of them; the experts, two matrices each and not three, have as many fewer. They
        come out even with 5 experts per sub-token, and the routers alone differ.
        """
        moe, per_sub_token = self.model(), 5
        projections = 2 * self.hidden_size  # like all that follows, in parameters over D
        active, total = (3 * self.expert_hidden_size * moe[name] for name in ("experts_per_token", "num_experts"))
        width = (active - projections) // (2 * per_sub_token)
        return moe | {
            "num_ffn_heads": HEADS,
            "num_experts": HEADS * ((total - projections) // (2 * width)),
            "experts_per_token": HEADS * per_sub_token,
            "expert_hidden_size": width,
            "expert_activation": "gelu",
            "router_score": "topk_softmax",
        }


QUICK = Sizes(num_layers=1, rows=8)
"""Shows that it works."""


def run_config(case: Case, sizes: Sizes) -> RunConfig:
    """The run that a case and sizes describe.

    Raises:
      ConfigError: sizes that do not fit the layout.
    """
    models: dict[Architecture, dict[str, Any]] = {
        "FoE": sizes.model() | {"num_groups": HEADS},
        "MoE": sizes.model(),
        "Multi-Head LatentMoE": sizes.head_model(),
    }
    # Routers that keep the chosen scores alone have none for auxiliary losses.
    losses = {"load_balance_coef": 0.0, "z_loss_coef": 0.0} if case.kind == "hp" else {}
    return parse_config(
        {
            "model": models[architecture(case.kind)],
            "mesh": {"layout": case.kind} | case.mesh,
            "data": {
                "sequence_length": sizes.length,
                "batch_size": sizes.rows,
                "tokenizer_vocab_size": sizes.vocab_size,
            },
            "training": {"num_steps": 1000, "warmup_steps": 10, "decay_start_step": 500} | losses,
        }
    )


def parameter_counts(sizes: Sizes) -> dict[Architecture, dict[str, int]]:
    """Parameters of each model: all, and those that take part in one token."""
    counts: dict[Architecture, dict[str, int]] = {}
    for case in CASES:
        if architecture(case.kind) not in counts:
            counted = account(run_config(case, sizes), Layout.abstract(case.kind, MeshSizes(1, 1, 1)))
            counts[architecture(case.kind)] = {"total": counted.parameters, "active": counted.active_parameters}
    return counts


def as_options(case: Case, sizes: Sizes) -> dict[str, Any]:
    """Both as plain values, for another process."""
    return {"case": asdict(case), "sizes": asdict(sizes)}
