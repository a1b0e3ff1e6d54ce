"""A config and what it is fairly compared with, on the same cluster: FoE and the matched MoE in every layout, or
Multi-Head LatentMoE in every mesh and the MoE whose experts weigh the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from foejax.analysis.cost_model.cluster import Cluster
from foejax.analysis.cost_model.predict import Exchange, Prediction, predict_step
from foejax.analysis.cost_model.step import Step
from foejax.config import ConfigError, ModelConfig, RunConfig
from sharding import Layout
from sharding.mesh import LayoutKind, MeshSizes, plan_mesh

PAPER_IMBALANCE = 1.64
"""Most over median tokens on a device under expert parallelism, measured in arXiv 2605.06206, Fig. 4."""


@dataclass(frozen=True)
class Candidate:
    """A model in a layout.

    Attributes:
      imbalance: of the devices that share experts; 1 where none do.
      exchange: what its all-to-alls send.
    """

    name: str
    model: ModelConfig
    layout: Layout
    imbalance: float = 1.0
    exchange: Exchange = "buffers"

    def predict(self, step: Step, cluster: Cluster, *, imbalance: float | None = None) -> Prediction:
        """The step's time, with another imbalance where one is given."""
        chosen = self.imbalance if imbalance is None else imbalance
        return predict_step(self.model, self.layout, step, cluster, imbalance=chosen, exchange=self.exchange)


def matched_models(model: ModelConfig) -> tuple[ModelConfig, ModelConfig]:
    """FoE and MoE that differ in the number of groups alone.

    For a model of one group FoE gets as many groups as divide its key/value heads, experts and choices.

    Raises:
      ConfigError: no number of groups but 1 does; a model with heads of experts.
    """
    if model.num_ffn_heads:
        raise ConfigError(
            f"num_ffn_heads={model.num_ffn_heads}: no FoE model differs from heads of experts in the number of groups "
            "alone; set num_ffn_heads=0"
        )
    heads = math.gcd(model.num_kv_heads, model.experts_per_token, model.num_experts)
    groups = model.num_groups if model.num_groups > 1 else heads
    if groups == 1:
        raise ConfigError(
            f"num_kv_heads={model.num_kv_heads}, experts_per_token={model.experts_per_token} and "
            f"num_experts={model.num_experts} have no common divisor: no FoE model matches; choose others"
        )
    foe, moe = (ModelConfig.model_validate(model.model_dump() | {"num_groups": number}) for number in (groups, 1))
    return foe, moe


def matched_moe(model: ModelConfig) -> ModelConfig:
    """The MoE whose experts, all together and those of a token, weigh what those of all heads do.

    It has the experts and choices of one head, each over whole tokens, and no projections to sub-tokens.

    Raises:
      ConfigError: all sub-tokens of a token are not as wide as the token, so that no such MoE exists.
    """
    heads = model.num_ffn_heads
    if model.latent_width != model.hidden_size:
        raise ConfigError(
            f"{heads} sub-tokens of {model.expert_width} are not hidden_size={model.hidden_size}: no MoE's experts "
            "weigh the same; leave ffn_head_dim at 0"
        )
    changes = {
        "num_ffn_heads": 0,
        "ffn_head_dim": 0,
        "num_experts": model.num_experts // heads,
        "experts_per_token": model.experts_per_stack,
    }
    return ModelConfig.model_validate(model.model_dump() | changes)


def own_candidate(config: RunConfig, cluster: Cluster, imbalance: float) -> Candidate:
    """The config's own model in its own layout (auto: foe, hp for heads of experts, or fsdp).

    Raises:
      ValueError: the mesh does not fit the cluster or the model.
    """
    model, mesh = config.model, config.mesh
    kind = mesh.kind_for(model)
    sizes = _plan(kind, model, cluster, data=mesh.data, group=mesh.group, expert=mesh.expert)
    return _candidate(kind, model, sizes, imbalance)


def candidates(config: RunConfig, cluster: Cluster, imbalance: float) -> tuple[list[Candidate], dict[str, str]]:
    """The config's own layout first, then every other that is worth comparing.

    Of FoE: groups as spread out as they go with the surplus in `data`, and groups of several devices. Of the MoE: `ep`
    over all devices (what this library's buffers send, what routing needs, a copy for every expert), `ep` inside each
    host with `data` between them, `tp`, `tp_ep` and plain data parallelism. Of Multi-Head LatentMoE: `hp` over all
    devices, inside each host and with heads of several devices, and data parallelism; beside it `ep` of `matched_moe`.

    Args:
      imbalance: of layouts whose devices share experts.

    Returns:
      The candidates, and for each layout that does not fit why.

    Raises:
      ValueError: the config's own layout does not fit.
    """
    found, left_out = [own_candidate(config, cluster, imbalance)], dict[str, str]()
    if config.model.num_ffn_heads:
        wanted = _with_heads(config.model, cluster, left_out)
    else:
        wanted = _with_groups(*matched_models(config.model), cluster)
    for kind, model, axes in wanted:
        try:
            made = _candidate(kind, model, _plan(kind, model, cluster, **axes), imbalance)
        except ValueError as error:
            left_out[kind] = str(error)
            continue
        if made.name not in [candidate.name for candidate in found]:
            found.append(made)
    first_ep = next((made for made in found if made.layout.kind == "ep" and made.layout.sizes.expert > 1), None)
    if first_ep is not None:
        variants: Sequence[tuple[str, Exchange]] = (("a copy per device", "needed"), ("a copy per expert", "copies"))
        found += [
            Candidate(f"{first_ep.name}, {text}", first_ep.model, first_ep.layout, imbalance, exchange)
            for text, exchange in variants
        ]
    return found, left_out


_Wanted = list[tuple[LayoutKind, ModelConfig, dict[str, int]]]
"""Layout, model and given sizes of a candidate's mesh."""


def _with_groups(foe: ModelConfig, moe: ModelConfig, cluster: Cluster) -> _Wanted:
    return [
        ("foe", foe, {}),
        *(("foe", foe, axes) for axes in _spread_stacks(foe, cluster)),
        *(("ep", moe, axes) for axes in _expert_parallel(cluster)),
        ("tp", moe, {}),
        ("tp_ep", moe, {}),
        ("fsdp", moe, {}),
    ]


def _with_heads(model: ModelConfig, cluster: Cluster, left_out: dict[str, str]) -> _Wanted:
    inside_hosts = math.gcd(model.num_ffn_heads, cluster.devices_per_host)
    wanted: _Wanted = [
        ("hp", model, {}),
        *(("hp", model, axes) for axes in _spread_stacks(model, cluster)),
        *((("hp", model, {"group": inside_hosts}),) if inside_hosts > 1 else ()),
        ("fsdp", model, {}),
    ]
    try:
        moe = matched_moe(model)
    except ConfigError as error:
        left_out["ep"] = str(error)
        return wanted
    return wanted + [("ep", moe, axes) for axes in _expert_parallel(cluster)]


def _expert_parallel(cluster: Cluster) -> list[dict[str, int]]:
    """Over all devices, and inside each host."""
    inside = {"data": cluster.hosts, "expert": cluster.devices_per_host}
    return [{}, inside] if cluster.hosts > 1 else [{}]


def _spread_stacks(model: ModelConfig, cluster: Cluster) -> list[dict[str, int]]:
    """Several devices of a group or head, if there are more of them than of these."""
    size, rest = divmod(cluster.devices, model.num_stacks)
    return [{"group": model.num_stacks, "expert": size}] if rest == 0 and size > 1 else []


def _plan(kind: LayoutKind, model: ModelConfig, cluster: Cluster, **axes: int) -> MeshSizes:
    sizes = plan_mesh(
        kind,
        cluster.devices,
        num_groups=model.num_groups,
        num_experts=model.num_experts,
        num_kv_heads=model.num_kv_heads,
        num_ffn_heads=model.num_ffn_heads or 1,
        **axes,
    )
    cluster.check_mesh(kind, sizes)
    if model.num_ffn_heads and model.expert_width % sizes.data:
        raise ValueError(
            f"ffn_head_dim={model.expert_width} is not divisible by mesh.data={sizes.data}, over which parameters are "
            "split: choose fewer data shards, or another ffn_head_dim"
        )
    return sizes


def _candidate(kind: LayoutKind, model: ModelConfig, sizes: MeshSizes, imbalance: float) -> Candidate:
    layout = Layout.abstract(kind, sizes)
    axes = " x ".join(f"{axis}={size}" for axis, size in sizes._asdict().items() if size > 1)
    name = f"{'data' if kind == 'fsdp' else kind} {axes}".strip()
    return Candidate(name, model, layout, imbalance if layout.num_expert_shards > 1 else 1.0)
