"""What is compared: the layouts, the matched models, the programs, and how large they are."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from foejax.config import RunConfig, parse_config
from sharding.mesh import LayoutKind

DEVICES_PER_HOST = 4
PROGRAMS = ("forward", "train_step", "decode_step")


@dataclass(frozen=True)
class Case:
    """A layout of the eight devices; the first four are host0's.

    Attributes:
      kind: the layout; `foe` takes the FoE model, the others the MoE of its size.
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
        """The `model` section of the MoE's config; the FoE's has eight groups."""
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


QUICK = Sizes(num_layers=1, rows=8)
"""Shows that it works."""


def run_config(case: Case, sizes: Sizes) -> RunConfig:
    """The run that a case and sizes describe.

    Raises:
      ConfigError: sizes that do not fit the layout.
    """
    return parse_config(
        {
            "model": sizes.model() | {"num_groups": 8 if case.kind == "foe" else 1},
            "mesh": {"layout": case.kind} | case.mesh,
            "data": {
                "sequence_length": sizes.length,
                "batch_size": sizes.rows,
                "tokenizer_vocab_size": sizes.vocab_size,
            },
            "training": {"num_steps": 1000, "warmup_steps": 10, "decay_start_step": 500},
        }
    )


def as_options(case: Case, sizes: Sizes) -> dict[str, Any]:
    """Both as plain values, for another process."""
    return {"case": asdict(case), "sizes": asdict(sizes)}
