"""The machines that a prediction is for: accelerators, the links between them, and which share of each is reached.

Peaks come from public data sheets. The shares and latencies are assumptions until somebody measures them: every one is
a field, so that a cluster file or an option replaces it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import field_validator

from foejax.config import ConfigError, Fraction, NonNegativeFloat, Positive, PositiveFloat, Section, parse_section
from sharding.mesh import MeshSizes


class Accelerator(Section):
    """Peaks of one device."""

    name: str
    """as it is called"""
    matmul_flops: PositiveFloat
    """FLOP/s of dense bf16 matmuls"""
    float32_flops: PositiveFloat
    """FLOP/s in float32, without tensor cores: the router"""
    memory_bandwidth: PositiveFloat
    """bytes/s of the device's memory"""
    memory: PositiveFloat
    """bytes of it"""
    link_bandwidth: PositiveFloat
    """bytes/s that a device sends inside its host, one direction"""
    network_bandwidth: PositiveFloat
    """bytes/s that a device sends to other hosts, one direction"""


ACCELERATORS = {
    # NVIDIA A100 80GB SXM data sheet (June 2021); NVLink 3: 600 GB/s both ways; DGX A100: one 200 Gb/s adapter a GPU.
    "A100": Accelerator(
        name="A100",
        matmul_flops=312e12,
        float32_flops=19.5e12,
        memory_bandwidth=2.039e12,
        memory=80e9,
        link_bandwidth=300e9,
        network_bandwidth=25e9,
    ),
    # NVIDIA H100 SXM data sheet; NVLink 4: 900 GB/s both ways; DGX H100: one 400 Gb/s adapter a GPU.
    "H100": Accelerator(
        name="H100",
        matmul_flops=989e12,
        float32_flops=67e12,
        memory_bandwidth=3.35e12,
        memory=80e9,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
    ),
    # NVIDIA H200 SXM data sheet; links as the H100's.
    "H200": Accelerator(
        name="H200",
        matmul_flops=989e12,
        float32_flops=67e12,
        memory_bandwidth=4.8e12,
        memory=141e9,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
    ),
}


class Cluster(Section):
    """Equal hosts of equal devices, and how much of the peaks a program reaches."""

    hosts: Positive = 1
    """machines"""
    devices_per_host: Positive = 8
    """devices of each"""
    accelerator: Accelerator
    """a device, or the name of a known one"""
    matmul_fraction: Fraction = 0.5
    """share of the peak that projections, experts and head reach"""
    attention_fraction: Fraction = 0.5
    """share of the matmul peak that attention over the context reaches"""
    memory_fraction: Fraction = 0.7
    """share of the memory's bandwidth"""
    link_fraction: Fraction = 0.7
    """share of the links' bandwidth, inside a host"""
    network_fraction: Fraction = 0.7
    """share of the network's bandwidth, between hosts"""
    collective_latency: NonNegativeFloat = 10e-6
    """seconds to start a collective"""
    link_latency: NonNegativeFloat = 1e-6
    """seconds of each of its steps inside a host"""
    network_latency: NonNegativeFloat = 5e-6
    """seconds of each of its steps between hosts"""
    layer_floor: NonNegativeFloat = 100e-6
    """seconds that a layer takes at least: launches"""
    all_reduce: Literal["ring", "hierarchical"] = "ring"
    """ring: one ring through all devices, those of a host next to each other; hierarchical: reduce-scatter inside the
    hosts, all-reduce between them, all-gather inside"""
    overlap: Fraction = 0.0
    """share of the shorter of a layer's compute and communication that runs behind the other"""

    @field_validator("accelerator", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        names = {name.lower(): found for name, found in ACCELERATORS.items()}
        if value.lower() not in names:
            raise ValueError(
                f"{value} is not known: choose one of {', '.join(ACCELERATORS)}, or give a cluster file "
                "that describes it (docs/plan.md)"
            )
        return names[value.lower()]

    @field_validator("matmul_fraction", "attention_fraction", "memory_fraction", "link_fraction", "network_fraction")
    @classmethod
    def _reached(cls, value: float) -> float:
        if value == 0.0:
            raise ValueError("0 is no share to compute with: choose a number above 0, up to 1")
        return value

    @property
    def devices(self) -> int:
        """Devices of all hosts."""
        return self.hosts * self.devices_per_host

    @property
    def name(self) -> str:
        """`2x8xH100`, or `8xH100` for one host."""
        hosts = f"{self.hosts}x" if self.hosts > 1 else ""
        return f"{hosts}{self.devices_per_host}x{self.accelerator.name}"

    def host_names(self) -> list[str]:
        """Host of every device, in the order of a mesh: those of a host follow each other."""
        return [f"host{index // self.devices_per_host}" for index in range(self.devices)]

    def check_mesh(self, kind: str, sizes: MeshSizes) -> None:
        """Refuse an FoE mesh whose `expert` axis would cross hosts, as `sharding.hosts.check_hosts` does.

        Raises:
          ValueError: names the axis and the devices of a host.
        """
        if kind == "foe" and self.hosts > 1 and self.devices_per_host % sizes.expert:
            raise ValueError(
                f"mesh.expert={sizes.expert} would cross hosts of {self.devices_per_host} devices, and a group's "
                f"tokens with it: choose mesh.expert as a divisor of {self.devices_per_host}"
            )


def read_cluster(text: str, overrides: dict[str, Any] | None = None) -> Cluster:
    """A cluster from `HOSTSxDEVICESxNAME`, `DEVICESxNAME`, or the path of a YAML or JSON file with `Cluster`'s fields.

    Args:
      overrides: fields that replace those of the text.

    Raises:
      ConfigError: neither a file nor such a text; an unknown accelerator or field; a value that cannot be.
    """
    path = Path(text)
    if path.suffix in (".yaml", ".yml", ".json") or path.is_file():
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"cluster file {text} cannot be read: {' '.join(str(error).split())}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"cluster file {text} holds no mapping: give it the fields of a cluster (docs/plan.md)")
    else:
        match = re.fullmatch(r"(?:(\d+)x)?(\d+)x([A-Za-z]\w*)", text)
        if match is None:
            raise ConfigError(
                f"cluster {text!r} is neither a file nor HOSTSxDEVICESxNAME: write for example 2x8xH100 or 8xH200"
            )
        hosts, devices, name = match.groups()
        values = {"hosts": int(hosts or 1), "devices_per_host": int(devices), "accelerator": name}
    return parse_section(Cluster, values | (overrides or {}))
