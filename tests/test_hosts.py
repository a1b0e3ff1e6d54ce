"""Which process this is, what may cross hosts, and what the launcher gives to whom; nothing is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from foejax import launch
from foejax.devices import simulate_devices
from sharding import hosts
from sharding.hosts import ProcessPlace, check_hosts, describe, find_place, hosts_crossed
from sharding.mesh import AXES
from sharding.roll_call import EXIT_LOST


def mesh_of(sizes: tuple[int, int, int], devices_per_process: int) -> Any:
    """What `hosts` reads of a mesh whose devices lie in the order of processes."""
    devices = [SimpleNamespace(process_index=index // devices_per_process) for index in range(int(np.prod(sizes)))]
    grid = np.array(devices, dtype=object).reshape(sizes)
    return SimpleNamespace(devices=grid, axis_names=AXES, shape=dict(zip(AXES, sizes, strict=True)))


SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}  # fmt: skip


def test_a_process_without_signs_of_others_is_alone() -> None:
    assert find_place({}) is None
    assert find_place({"FOEJAX_COORDINATOR": "a:1", "FOEJAX_NUM_PROCESSES": "1", "FOEJAX_PROCESS_ID": "0"}) is None
    assert find_place(SLURM | {"SLURM_NTASKS": "1"}) is None
    assert find_place({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}) is None  # a batch script outside srun
    assert hosts.start() is None
    hosts.finish()


def test_the_variables_come_first() -> None:
    given = {"FOEJAX_COORDINATOR": "10.0.0.1:99", "FOEJAX_NUM_PROCESSES": "4", "FOEJAX_PROCESS_ID": "3"}
    assert find_place(SLURM | given) == ProcessPlace("10.0.0.1:99", 4, 3)


def test_slurm_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert find_place() == ProcessPlace(f"node3:{7 + 61440}", 2, 1, [0])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"FOEJAX_NUM_PROCESSES": "2"}, "FOEJAX_COORDINATOR, FOEJAX_PROCESS_ID not"),
        (
            {"FOEJAX_COORDINATOR": "a:1", "FOEJAX_NUM_PROCESSES": "two", "FOEJAX_PROCESS_ID": "0"},
            "='two' is not a number",
        ),
        ({"FOEJAX_COORDINATOR": "a:1", "FOEJAX_NUM_PROCESSES": "2", "FOEJAX_PROCESS_ID": "2"}, "=2 is outside 0..1"),
    ],
)
def test_half_given_or_wrong_variables_are_refused(given: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_place(given)


def test_an_foe_group_that_crosses_hosts_is_refused_with_the_hosts() -> None:
    mesh = mesh_of((1, 2, 4), devices_per_process=2)
    assert hosts_crossed(mesh, "expert", ["a", "a", "b", "b"]) == []
    check_hosts(mesh, "foe", ["a", "a", "b", "b"])
    with pytest.raises(ValueError, match="mesh.expert=4 crosses the hosts a, b, .* divisor of the devices of a host"):
        check_hosts(mesh, "foe", ["a", "b", "c", "d"])


def test_an_expert_axis_of_another_layout_may_cross_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(hosts.logger, "warning", lambda text, *values: said.append(text % values))
    check_hosts(mesh_of((1, 1, 4), devices_per_process=2), "ep", ["a", "b"])
    assert said == ["mesh.expert=4 crosses the hosts a, b: every layer's all-to-alls go between hosts"]


def test_a_process_without_a_device_in_the_mesh_is_refused() -> None:
    with pytest.raises(ValueError, match="mesh of 4 devices leaves nothing to process 2, 3 of 4"):
        check_hosts(mesh_of((2, 2, 1), devices_per_process=2), "foe", ["a", "a", "b", "b"])


def test_the_topology_says_what_crosses_what() -> None:
    mesh = mesh_of((2, 4, 2), devices_per_process=4)
    assert describe(mesh, ["a", "a", "b", "b"]) == (
        "4 processes: 8 devices on a, 8 devices on b; data=2 crosses hosts, group=4 crosses processes, "
        "expert=2 stays inside a process"
    )


# The launcher


def test_gpus_are_shared_out_in_order() -> None:
    given = launch.process_environments(2, None, {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "PATH": "/bin"})
    assert [each["CUDA_VISIBLE_DEVICES"] for each in given] == ["0,1", "2,3"]
    assert [each["FOEJAX_PROCESS_ID"] for each in given] == ["0", "1"]
    assert {each["FOEJAX_NUM_PROCESSES"] for each in given} == {"2"} and given[0]["PATH"] == "/bin"
    assert len({each["FOEJAX_COORDINATOR"] for each in given}) == 1
    with pytest.raises(ValueError, match="nproc=3 does not divide the 2 GPUs 4,5"):
        launch.process_environments(3, None, {"CUDA_VISIBLE_DEVICES": "4,5"})


def test_gpus_are_counted_where_no_variable_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: one (UUID: a)'\necho 'GPU 1: two (UUID: b)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert launch.visible_gpus({}) == ["0", "1"]
    assert launch.visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []


def test_simulated_devices_are_the_same_number_in_every_process() -> None:
    given = launch.process_environments(2, 4, {})
    assert all("--xla_force_host_platform_device_count=4" in each["XLA_FLAGS"] for each in given)
    assert all(each["JAX_PLATFORMS"] == "cpu" and "CUDA_VISIBLE_DEVICES" not in each for each in given)
    with pytest.raises(ValueError, match="devices=3 does not divide over 2 processes"):
        simulate_devices(3, processes=2)


def test_commands_of_one_process_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--nproc", "2", "--", "generate", "runs/first"], ["--nproc", "2"]):
        assert launch.main(arguments) == 2
        assert "give train, evaluate or serve after --" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [([], 0), ([75, 75], 75), ([-9, 69], 137), ([69, 2, 69], 2), ([69, 69], 69)],
)
def test_the_exit_status_is_the_cause_not_the_consequence(statuses: list[int], expected: int) -> None:
    assert launch._first_cause(statuses) == expected
    assert launch.EXIT_LOST == EXIT_LOST
