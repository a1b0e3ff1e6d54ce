"""What an installation gives: the packages, the configs as data, and an environment like the pinned one."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

from foejax.config import config_folders, load_config

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def packaged_configs() -> list[Path]:
    return sorted(path for folder in config_folders() for path in folder.glob("*.yaml"))


def test_configs_are_found_from_any_folder() -> None:
    assert {"foe_tiny"} <= {path.stem for path in packaged_configs()}


@pytest.mark.parametrize("path", packaged_configs(), ids=lambda path: path.stem)
def test_every_config_loads(path: Path) -> None:
    config = load_config(path)
    assert config == load_config(path.stem)
    assert config.model.num_layers >= 1


def test_imports_start_no_backend() -> None:
    """`jax.distributed.initialize` and the choice of simulated devices come after the imports."""
    code = (
        "import foejax, sharding, pallas_kernels.grouped_matmul, jax; "
        "jax.config.update('jax_num_cpu_devices', 3); assert jax.device_count() == 3"
    )
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_simulated_devices_and_strict_promotion_are_on() -> None:
    assert jax.device_count() == 8
    with pytest.raises(ValueError, match="promotion"):
        jax.numpy.ones(2, "float32") + jax.numpy.ones(2, "int32")
    with pytest.raises(ValueError, match="rank_promotion"):
        jax.numpy.ones((2, 2)) + jax.numpy.ones(2)


def test_loose_promotion_lifts_the_rules(loose_promotion: None) -> None:
    assert (jax.numpy.ones((2, 2), "float32") + jax.numpy.ones(2, "int32")).shape == (2, 2)


def test_every_direct_dependency_is_pinned() -> None:
    pinned = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(entry for extra in extras.values() for entry in extra)]
    for requirement in wanted:
        name = requirement.split(";")[0].split("[")[0].split("=")[0].split(">")[0].split("<")[0].strip().lower()
        assert name in pinned, f"{requirement} has no pin in constraints.txt"
