"""What each layout sends for a token, and with how many collectives: from compiled programs on eight devices.

Bytes are those of all devices together over the tokens of the batch, which is the same as the bytes of one device over
its share of the tokens: FoE's devices all work on the same tokens, the others' each on their own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from foejax.analysis.comms import lower_forward, lower_train_step
from foejax.config import RunConfig, parse_config
from foejax.models import LanguageModel
from foejax.training.run import make_layout
from sharding.audit import Collective, audit, is_token_sized
from sharding.formulas import foe_forward, hp_forward, moe_ep_forward

DEVICES = 8
CHOICES = (1, 2, 4, 8)
"""Experts per token (of a head, where there are heads)."""
Program = Literal["forward", "train_step"]
PROGRAMS: tuple[Program, ...] = ("forward", "train_step")
PASSES = {"forward": 1, "train_step": 2}
"""How often a token travels each way of the forward pass: the backward pass sends its gradients along the same ways."""


@dataclass(frozen=True)
class Sizes:
    """The same for every layout; heads are as many as devices, and their sub-tokens fill the width."""

    layers: int = 2
    width: int = 128
    experts: int = 64
    expert_hidden: int = 64
    vocab: int = 512
    rows: int = 64
    length: int = 128

    @property
    def tokens(self) -> int:
        """Of the batch, over all devices."""
        return self.rows * self.length


QUICK = Sizes(layers=1, width=64, experts=16, expert_hidden=8, vocab=64, rows=16, length=64)


@dataclass(frozen=True)
class Case:
    """One architecture on its layout.

    Attributes:
      kind: `ep` (MoE), `hp` (Multi-Head LatentMoE) or `foe`.
      k: experts per token; of a head for `hp`, over all groups for `foe`.
    """

    kind: Literal["ep", "hp", "foe"]
    k: int

    @property
    def axis(self) -> str:
        """Mesh axis of the eight devices."""
        return "expert" if self.kind == "ep" else "group"


CASES = (
    *(Case("ep", k) for k in CHOICES),
    *(Case("hp", k) for k in CHOICES),
    Case("foe", DEVICES),
    Case("foe", 2 * DEVICES),
)
QUICK_CASES = (Case("ep", 2), Case("hp", 1), Case("hp", 2), Case("foe", DEVICES))


def case_config(case: Case, sizes: Sizes) -> RunConfig:
    """The run that a case describes; where a head has one expert, its router takes the score that has a gradient."""
    model: dict[str, Any] = {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.width,
        "num_layers": sizes.layers,
        "num_query_heads": DEVICES,
        "num_kv_heads": DEVICES,
        "head_dim": sizes.width // DEVICES,
        "num_experts": sizes.experts,
        "experts_per_token": case.k,
        "expert_hidden_size": sizes.expert_hidden,
        "max_seq_len": sizes.length,
    }
    training: dict[str, Any] = {"num_steps": 100, "warmup_steps": 10, "decay_start_step": 50}
    if case.kind == "foe":
        model["num_groups"] = DEVICES
    if case.kind == "hp":
        score = {"router_score": "topk_softmax"} if case.k > 1 else {"router_score": "softmax", "router_scope": "group"}
        model |= {
            "num_ffn_heads": DEVICES,
            "num_experts": DEVICES * sizes.experts,
            "experts_per_token": DEVICES * case.k,
            "expert_activation": "gelu",
            **score,
        }
        training |= {"load_balance_coef": 0.0, "z_loss_coef": 0.0, "router_bias_rate": 0.01}
    return parse_config(
        {
            "model": model,
            "mesh": {"layout": case.kind, "data": 1, case.axis: DEVICES},
            "data": {"sequence_length": sizes.length, "batch_size": sizes.rows, "tokenizer_vocab_size": sizes.vocab},
            "training": training,
        }
    )


def measure(case: Case, sizes: Sizes, programs: Sequence[Program] = PROGRAMS) -> dict[str, Any]:
    """Compile a case's programs and add up what they send; the run as `bytes.json` holds it."""
    config = case_config(case, sizes)
    layout = make_layout(config.model, config.mesh)
    local = sizes.tokens if case.kind == "foe" else sizes.tokens // DEVICES
    found: dict[str, Any] = {"kind": case.kind, "k": case.k}
    for program in programs:
        if program == "forward":
            model = LanguageModel.abstract(config.model, dataclasses.replace(layout, shard_params=False))
            lowered = lower_forward(model, (sizes.rows, sizes.length))
        else:
            lowered = lower_train_step(config, layout)
        collectives = audit(lowered, layout.mesh)
        found[program] = _sums(collectives, local, sizes) | needed(case, sizes, program)
    return found


def _sums(collectives: Iterable[Collective], local: int, sizes: Sizes) -> dict[str, Any]:
    """Bytes and executions, activations apart from gradients of parameters and statistics.

    Where an exchange has several buffer sizes, one of which runs, `bytes_per_token` is with the smallest and
    `bytes_per_token_at_most` with the largest.
    """
    activations: list[Collective] = []
    others: list[Collective] = []
    for each in collectives:
        moves_tokens = each.op == "all-to-all" or is_token_sized(each, local, sizes.width)
        (activations if moves_tokens else others).append(each)
    small, large = ([each for each in activations if _branch(each) in (None, side)] for side in _sides(activations))
    return {
        "bytes_per_token": _per_token(small, sizes),
        "bytes_per_token_at_most": _per_token(large, sizes),
        "exchanges": _executions(small),
        "other_bytes_per_device": sum(each.total_wire_bytes for each in others),
        "others": _executions(others),
    }


def _branch(collective: Collective) -> int | None:
    return int(collective.branches[-1].rpartition(":")[2]) if collective.branches else None


def _sides(collectives: Sequence[Collective]) -> tuple[int, int]:
    """Branch numbers of the smallest and of the largest buffers."""
    branches = [branch for each in collectives if (branch := _branch(each)) is not None]
    return min(branches, default=0), max(branches, default=0)


def _per_token(collectives: Iterable[Collective], sizes: Sizes) -> float:
    return sum(each.total_wire_bytes for each in collectives) * DEVICES / sizes.tokens


def _executions(collectives: Iterable[Collective]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for each in collectives:
        counts[each.op] = counts.get(each.op, 0) + each.count
    return counts


def needed(case: Case, sizes: Sizes, program: Program) -> dict[str, float]:
    """Bytes per token by closed formulas: `needed_bytes_per_token`, and for `ep` what a copy per expert would send.

    For `ep` what uniform routing needs, a copy of a token to each device with one of its experts; for `hp` sub-tokens
    there and back; for `foe` the all-reduces, and one reduce-scatter for the last.
    """
    local = sizes.tokens // DEVICES

    def per_token(rows: Iterable[Mapping[str, Any]]) -> float:
        return PASSES[program] * sum(row["total_wire_bytes"] for row in rows) * DEVICES / sizes.tokens

    if case.kind == "ep":
        of_ep = functools.partial(moe_ep_forward, num_experts=sizes.experts, experts_per_token=case.k)
        return {
            "needed_bytes_per_token": per_token(of_ep(sizes.layers, local, sizes.width, DEVICES, deduplicate=True)),
            "copy_per_expert_bytes_per_token": per_token(
                of_ep(sizes.layers, local, sizes.width, DEVICES, deduplicate=False)
            ),
        }
    if case.kind == "hp":
        rows = hp_forward(sizes.layers, local, sizes.width, DEVICES)
    else:
        rows = foe_forward(sizes.layers, sizes.tokens, sizes.width, DEVICES)
    return {"needed_bytes_per_token": per_token(rows)}
