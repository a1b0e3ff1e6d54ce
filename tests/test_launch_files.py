"""The files that start a run on a cluster: what train.sbatch does with what it is given, and that a JobSet is one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from experiments.launch import slurm_here, try_slurm
from foejax.cli import EXIT_ERROR, EXIT_NON_FINITE, EXIT_PREEMPTED
from foejax.commands.parser import make_parser, split_overrides
from foejax.config import load_config

ROOT = Path(__file__).parent.parent
SBATCH = ROOT / "experiments" / "launch" / "train.sbatch"
JOBSET = ROOT / "experiments" / "launch" / "jobset.yaml"
SCHEMA = Path(__file__).parent / "data" / "jobset_v0.12.0.schema.json"

# train.sbatch, with stand-ins for Slurm's commands that write down what they are called with.

FAKE = """#!{python}
import json, os, sys
call = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
names = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "NCCL_DEBUG", "PYTHONFAULTHANDLER")
with open({calls!r}, "a") as file:
    print(json.dumps([call, {{name: os.environ.get(name) for name in names}}]), file=file)
sys.exit(int(os.environ["SRUN_STATUS"]) if call[0] == "srun" else 0)
"""


def run_sbatch_body(
    folder: Path, arguments: list[str], status: int = 0, **variables: str
) -> tuple[int, list[list[str]], dict[str, str]]:
    """Exit status of the script, calls of Slurm's commands, and variables that the tasks would see."""
    calls = folder / "calls"
    for name in ("srun", "scontrol"):
        (folder / name).write_text(FAKE.format(python=sys.executable, calls=str(calls)))
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "SRUN_STATUS": str(status)}
    ended = subprocess.run(["bash", str(SBATCH), *arguments], env=environment | variables, timeout=60)
    lines = [json.loads(line) for line in calls.read_text().splitlines()]
    return ended.returncode, [call for call, _ in lines], lines[0][1]


def test_sbatch_runs_training_in_every_task(tmp_path: Path) -> None:
    arguments = ["foe_tiny", "--run-dir", "runs/with space", "--training.num_steps", "7"]
    code, calls, variables = run_sbatch_body(tmp_path, arguments)
    assert code == 0 and len(calls) == 1
    task = calls[0][calls[0].index("python") :]
    assert calls[0][:4] == ["srun", "--cpu-bind=none", "--kill-on-bad-exit=0", "--wait=60"]
    assert task == ["python", "-m", "foejax", "train", *arguments]
    rest, overrides = split_overrides(task[3:])
    options = make_parser().parse_args(rest)
    assert (options.command, str(options.run_dir)) == ("train", "runs/with space")
    assert overrides == {"training.num_steps": "7"}
    assert variables == {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9", "NCCL_DEBUG": "WARN", "PYTHONFAULTHANDLER": "1"}


def test_sbatch_leaves_the_users_own_choices(tmp_path: Path) -> None:
    own = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5", "NCCL_DEBUG": "INFO", "SLURM_CPUS_PER_TASK": "12"}
    _, calls, variables = run_sbatch_body(tmp_path, ["foe_tiny"], **own)
    assert variables["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5" and variables["NCCL_DEBUG"] == "INFO"
    assert calls[0][1] == "--cpus-per-task=12" and "--cpu-bind=none" not in calls[0]


@pytest.mark.parametrize("status", [0, EXIT_ERROR, EXIT_NON_FINITE, 69, EXIT_PREEMPTED, 137])
def test_sbatch_requeues_when_training_has_saved_and_only_then(tmp_path: Path, status: int) -> None:
    code, calls, _ = run_sbatch_body(tmp_path, ["foe_tiny"], status)
    assert code == status
    assert calls[1:] == ([["scontrol", "requeue", "17"]] if status == EXIT_PREEMPTED else [])


def test_sbatch_options_stand_where_slurm_reads_them() -> None:
    """Slurm takes no option below the first command."""
    lines = SBATCH.read_text().splitlines()
    first_command = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line.removeprefix("#SBATCH ") for line in lines[:first_command] if line.startswith("#SBATCH ")]
    assert len(options) == sum(line.startswith("#SBATCH") for line in lines)
    assert {"--requeue", "--open-mode=append", "--signal=TERM@120"} <= set(options)
    assert not any(re.match("--(nodes|ntasks|gres|gpus)", option) for option in options)  # the command line's


# try_slurm.py


def test_try_slurm_says_in_one_line_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slurm_here, "search_path", lambda: str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert try_slurm.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("try_slurm: this machine lacks root, slurmctld, slurmd, ") and said.count("\n") == 1


def test_slurm_times_are_read() -> None:
    assert [try_slurm.seconds_of(text) for text in ("00:01:29", "1-02:00:00")] == [89, 93_600]


# jobset.yaml


@pytest.fixture
def jobset() -> dict[str, Any]:
    return yaml.safe_load(JOBSET.read_text())


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    return Draft202012Validator(closed(json.loads(SCHEMA.read_text())))


def closed(schema: Any) -> Any:
    """The schema with unknown fields refused, as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {
        name: {key: closed(value) for key, value in each.items()} if name == "properties" else closed(each)
        for name, each in schema.items()
    }
    if "properties" in result and result["properties"] and "additionalProperties" not in result:
        result["additionalProperties"] = False
    return result


def job_of(jobset: dict[str, Any]) -> dict[str, Any]:
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def container_of(jobset: dict[str, Any]) -> dict[str, Any]:
    return job_of(jobset)["template"]["spec"]["containers"][0]


def test_jobset_is_one(jobset: dict[str, Any], validator: Draft202012Validator) -> None:
    assert list(validator.iter_errors(jobset)) == []


Change = Callable[[dict[str, Any]], object]
MISTAKES: list[tuple[str, Change]] = [
    ("maxRestart", lambda it: it["spec"]["failurePolicy"].update(maxRestart=5)),
    ("Restart", lambda it: it["spec"]["failurePolicy"]["rules"][0].update(action="Restart")),
    ("parallelism", lambda it: job_of(it).update(parallelism="two")),
    ("replicatedJob", lambda it: it["spec"]["coordinator"].pop("replicatedJob")),
    ("operator", lambda it: job_of(it)["podFailurePolicy"]["rules"][0]["onExitCodes"].pop("operator")),
    ("terminationGracePeriod", lambda it: job_of(it)["template"]["spec"].update(terminationGracePeriod=120)),
    ("value", lambda it: container_of(it)["env"][2].update(value=2)),
    ("claimName", lambda it: job_of(it)["template"]["spec"]["volumes"][0]["persistentVolumeClaim"].pop("claimName")),
]


@pytest.mark.parametrize(("field", "change"), MISTAKES, ids=[field for field, _ in MISTAKES])
def test_a_mistake_in_a_jobset_is_found(
    jobset: dict[str, Any], validator: Draft202012Validator, field: str, change: Change
) -> None:
    change(jobset)
    errors = [f"{error.json_path} {error.message}" for error in validator.iter_errors(jobset)]
    assert len(errors) == 1 and field in errors[0]


def test_jobset_starts_one_process_per_node(jobset: dict[str, Any]) -> None:
    job, container = job_of(jobset), container_of(jobset)
    environment = {each["name"]: each.get("value") for each in container["env"]}
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] == int(environment["FOEJAX_NUM_PROCESSES"])
    assert {"FOEJAX_COORDINATOR", "FOEJAX_PROCESS_ID"} <= set(environment)
    names = [each["name"] for each in container["env"]]  # a reference is resolved from what stands above it
    assert names.index("COORDINATOR_HOST") < names.index("FOEJAX_COORDINATOR")
    assert jobset["spec"]["coordinator"]["replicatedJob"] == jobset["spec"]["replicatedJobs"][0]["name"]


def test_jobset_trains(jobset: dict[str, Any]) -> None:
    container = container_of(jobset)
    assert container["command"] == ["python", "-m", "foejax"]
    arguments, overrides = split_overrides(container["args"])
    options = make_parser().parse_args(arguments)
    assert options.command == "train"
    assert load_config(options.config, overrides).data.corpus == "/runs/text"
    mounts = {each["mountPath"] for each in container["volumeMounts"]}
    assert str(options.run_dir).startswith("/runs/") and {"/runs", "/dev/shm"} == mounts


def test_jobset_restarts_what_has_saved_and_gives_up_on_what_would_fail_again(jobset: dict[str, Any]) -> None:
    job = job_of(jobset)
    rules = job["podFailurePolicy"]["rules"]
    codes = [rule["onExitCodes"]["values"] for rule in rules]
    assert codes == [[EXIT_PREEMPTED], [EXIT_ERROR, EXIT_NON_FINITE]]
    assert {rule["onExitCodes"]["containerName"] for rule in rules} == {container_of(jobset)["name"]}
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    # What a Job says of itself then; JobSet searches it for the patterns, and the first rule that fits counts.
    message = (
        "Container foejax for pod default/foejax-train-0-1 failed with exit code {} matching FailJob rule at index 0"
    )
    saved, ours = jobset["spec"]["failurePolicy"]["rules"]
    (pattern,) = saved["onJobFailureMessagePatterns"]
    assert re.search(pattern, message.format(EXIT_PREEMPTED)) and not re.search(pattern, message.format(EXIT_ERROR))
    assert [saved["action"], ours["action"]] == ["RestartJobSetAndIgnoreMaxRestarts", "FailJobSet"]
