"""The predicted time of a step: parts of a layer, its collectives, and what comes once.

A layer takes its compute plus its communication, less the share of the shorter that a cluster is said to hide, and at
least the cluster's floor. Nothing overlaps by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from foejax.analysis.cost_model.cluster import Cluster
from foejax.analysis.cost_model.step import Step
from foejax.analysis.cost_model.traffic import seconds, traffic_of
from foejax.analysis.cost_model.work import ITEMSIZE, Part, head_part, layer_parts
from foejax.analysis.expected_collectives import Exchanged, expected_collectives
from foejax.config import ModelConfig
from foejax.models.expert_parallel import buffer_sizes
from sharding import Layout
from sharding.formulas import expected_destinations
from sharding.forward_pass import Rows

Exchange = Literal["buffers", "needed", "copies"]
"""What all-to-alls between devices that share experts send: the program's buffers, padding included; only what routing
needs, a token once to each device; or a copy for every expert, as many systems do."""


@dataclass(frozen=True)
class Item:
    """A part of the time.

    Attributes:
      seconds: of all its executions, in one layer or in what comes once.
      bound: `compute`, `memory`, `link` (inside a host) or `network` (between hosts).
      flops: of a computation.
      bytes: that a computation moves; of a collective, its operand on one device.
      detail: a collective's op, axes and devices; "" for a computation.
    """

    name: str
    seconds: float
    bound: str
    flops: float
    bytes: float
    detail: str = ""

    @property
    def communicates(self) -> bool:
        """Whether it is a collective."""
        return bool(self.detail)


@dataclass(frozen=True)
class Prediction:
    """A step's time.

    Attributes:
      layers: number of them.
      layer: items of one layer.
      once: items of the rest: last merge, head.
      floor: least seconds of a layer.
      overlap: hidden share of the shorter of a layer's compute and communication.
    """

    layers: int
    layer: tuple[Item, ...]
    once: tuple[Item, ...]
    floor: float
    overlap: float

    @property
    def layer_seconds(self) -> float:
        """Of one layer."""
        computing, talking = _sum(self.layer, communicates=False), _sum(self.layer, communicates=True)
        return max(self.floor, computing + talking - self.overlap * min(computing, talking))

    @property
    def seconds(self) -> float:
        """Of the step."""
        return self.layers * self.layer_seconds + sum(item.seconds for item in self.once)

    @property
    def communication_seconds(self) -> float:
        """Of all collectives, hidden ones too."""
        return self.layers * _sum(self.layer, communicates=True) + _sum(self.once, communicates=True)

    def as_dict(self) -> dict[str, Any]:
        """Nested plain values, the sums included."""
        sums = {
            "seconds": self.seconds,
            "layer_seconds": self.layer_seconds,
            "communication_seconds": self.communication_seconds,
        }
        return asdict(self) | sums


def predict_step(
    model: ModelConfig,
    layout: Layout,
    step: Step,
    cluster: Cluster,
    *,
    imbalance: float = 1.0,
    exchange: Exchange = "buffers",
) -> Prediction:
    """The time of a forward pass, a prompt's chunk or a decoding step.

    Args:
      layout: may be `Layout.abstract`; as many devices as the cluster.
      imbalance: tokens of the fullest device over their mean, where devices share experts (1 is balance).

    Raises:
      ValueError: another number of devices or of token shards; an imbalance below 1.
    """
    _check(layout, step, cluster, imbalance)
    per_layer, once = collective_rows(model, layout, step, imbalance=imbalance, exchange=exchange)
    parts = layer_parts(model, layout, step, imbalance)
    head = head_part(model, layout, step)
    return Prediction(
        model.num_layers,
        (*(computed(part, cluster) for part in parts), *communicated(per_layer, layout, cluster)),
        (computed(head, cluster), *communicated(once, layout, cluster)),
        cluster.layer_floor,
        cluster.overlap,
    )


def collective_rows(
    model: ModelConfig, layout: Layout, step: Step, *, imbalance: float = 1.0, exchange: Exchange = "buffers"
) -> tuple[Rows, Rows]:
    """Collectives of one layer (count is 1) and those that come once, as rows of `sharding.forward_pass`."""
    stated = expected_collectives(model, layout, step.device_tokens, logits_rows=step.logits_rows)
    rows = _exchanged(stated, model, layout, step, imbalance, exchange)
    per_layer = [row | {"count": 1} for row in rows if row["count"] == model.num_layers]
    return per_layer, [row for row in rows if row["count"] != model.num_layers]


def _check(layout: Layout, step: Step, cluster: Cluster, imbalance: float) -> None:
    if layout.mesh.size != cluster.devices:
        raise ValueError(
            f"a mesh of {layout.mesh.size} devices on a cluster of {cluster.devices} ({cluster.name}): choose mesh "
            f"sizes whose product is {cluster.devices}"
        )
    if len(step.shards) != layout.num_token_shards:
        raise ValueError(
            f"a step of {len(step.shards)} token shards on a layout of {layout.num_token_shards}: deal its rows out "
            f"over {layout.num_token_shards}"
        )
    if imbalance < 1.0:
        raise ValueError(f"imbalance={imbalance}: the fullest device has at least the mean, choose 1 or more")


def _exchanged(
    rows: Rows, model: ModelConfig, layout: Layout, step: Step, imbalance: float, exchange: Exchange
) -> Rows:
    """The rows with one size of the exchange's buffers: that which runs, or what else is asked for."""
    axes = [layout.expert_axis]
    sends = [row for row in rows if row["op"] == "all-to-all" and row["axes"] == axes]
    others = [row for row in rows if row not in sends and row["what"] != "choice of the buffers"]
    if not sends:
        return rows
    here, meeting = Exchanged.of(model, layout, step.device_tokens), layout.num_head_exchangers
    # Of sub-tokens that came together some are padding, which chooses nothing.
    choosing = step.most_tokens(meeting) if meeting > 1 else here.tokens
    if exchange == "buffers":
        branch = _branch(here, choosing, layout, imbalance)
        choice = [row for row in rows if row["what"] == "choice of the buffers"]
        return others + choice + [row for row in sends if row.get("branch", 0) == branch]
    useful = [row for row in sends if "useful_payload_bytes" in row and row.get("branch", 0) == 0]
    # The fullest sender, or the fullest receiver where that one gets more.
    load = max(choosing / here.tokens, imbalance * step.tokens / (len(step.shards) * step.device_tokens))
    if exchange == "needed":
        return others + [row | {"payload_bytes": round(row["useful_payload_bytes"] * load)} for row in useful]
    elements = here.tokens * here.choices * here.groups * here.width * load
    return others + [row | {"payload_bytes": round(elements * ITEMSIZE[model.dtype])} for row in useful]


def _branch(here: Exchanged, choosing: int, layout: Layout, imbalance: float) -> int:
    """Number of the smallest buffers that hold `imbalance` times what uniform routing of the `choosing` tokens needs
    between two devices."""
    shards = layout.num_expert_shards
    sizes = buffer_sizes(here.tokens, here.choices, here.experts, shards, here.groups)
    destinations = expected_destinations(here.experts, here.choices, shards)
    needed = choosing * here.groups * destinations / shards * imbalance
    return next((index for index, size in enumerate(sizes) if size.outputs >= needed), len(sizes) - 1)


def computed(part: Part, cluster: Cluster) -> Item:
    """A part of the work with its time."""
    took, bound = part.seconds(cluster)
    return Item(part.name, took, bound, part.flops, part.bytes)


def communicated(rows: Rows, layout: Layout, cluster: Cluster) -> list[Item]:
    """Collectives, as rows of `sharding.forward_pass`, with their times."""
    items = []
    for row in rows:
        traffic = traffic_of(row, layout, cluster.host_names())
        took, fabric = seconds(traffic, cluster)
        detail = f"{row['op']} over {' '.join(row['axes'])} of {traffic.devices}"
        items.append(Item(row["what"], took * row["count"], fabric, 0.0, float(row["payload_bytes"]), detail))
    return items


def _sum(items: Sequence[Item], *, communicates: bool) -> float:
    return sum(item.seconds for item in items if item.communicates == communicates)
