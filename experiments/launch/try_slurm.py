"""Does `train.sbatch` do what it says? Tried on a Slurm cluster of two nodes that lives on this machine for minutes.

    python -m experiments.launch.try_slurm

Needs root, Slurm and munge (Debian: `apt-get install slurm-wlm slurm-client munge`), and says what is missing (exit
status 2). A tiny model trains on the CPU, two simulated devices per task. Tried: who finds which place; a run that
nothing interrupts; the same run with `scontrol requeue` in its middle, which must end with the same numbers, bit for
bit; the time limit, before which the run saves and goes back into the queue; and `scancel`, after which it does not.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from experiments.launch.slurm_here import SlurmError, SlurmHere, missing, wait_until
from foejax.config import parse_config, save_config
from foejax.training.run_folder import read_metrics

ROOT = Path(__file__).resolve().parents[2]
STEPS = 80
PATIENCE = 600.0
"""Seconds that a start, a stretch of training or an end may take."""

MODEL = dict(
    vocab_size=320, hidden_size=16, num_layers=2, num_query_heads=2, num_kv_heads=2, head_dim=8, num_experts=4,
    experts_per_token=2, expert_hidden_size=8, num_groups=2, max_seq_len=32, dtype="float32",
)  # fmt: skip
TRAINING = dict(schedule="constant", warmup_steps=1, learning_rate=0.01, eval_every=40, eval_batches=2)
PLACES = """
echo alone; python -c "$0"
echo srun; srun --label --ntasks-per-node=2 python -c "$0"
"""
FIND_PLACE = "from sharding.hosts import find_place; print(find_place(), flush=True)"


class Trial:
    """One cluster with a corpus and configs in its folder, and what is tried on it."""

    def __init__(self, cluster: SlurmHere) -> None:
        self.cluster, self.folder = cluster, cluster.folder
        words = "the quick brown fox jumps over a lazy dog while seven wizards box".split()
        chosen = random.Random(0)
        documents = [{"text": " ".join(chosen.choices(words, k=60))} for _ in range(60)]
        (self.folder / "words.jsonl").write_text("\n".join(map(json.dumps, documents)))
        self._variables = {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "FOEJAX_CACHE": str(self.folder / "cache"),
        }

    def find_places(self) -> str:
        """Under srun every task knows its place and its GPU; Python in the script's body is alone."""
        script = self.folder / "places.sh"
        script.write_text("#!/bin/bash\n" + PLACES.replace("$0", FIND_PLACE))
        job_id = self._sbatch("--wait", "--output=places.log", "--ntasks-per-node=2", "--overcommit", str(script))
        text = (self.folder / "places.log").read_text()
        alone, _, tasks = text.removeprefix("alone\n").partition("srun\n")
        port = int(job_id) % 4096 + 61440
        expected = [
            f"{rank}: ProcessPlace(coordinator='node0:{port}', num_processes=4, process_id={rank}, "
            f"local_device_ids=[{rank % 2}])"
            for rank in range(4)
        ]
        expect(alone.strip() == "None" and sorted(tasks.splitlines()) == expected, text)
        return "4 tasks on 2 nodes know their places; Python without srun is alone"

    def train_whole(self) -> str:
        """Trains over both nodes, with one logger."""
        job_id = self._train("whole", STEPS)
        expect(self.cluster.wait_for_end(job_id, PATIENCE) == "COMPLETED", self._log(job_id))
        log = self._log(job_id)
        topology = "2 processes: 2 devices on node0, 2 devices on node1; data=2 crosses hosts"
        expect(log.count(topology) == 1, log)
        steps = [line["step"] for line in read_metrics(self.folder / "whole") if "loss" in line]
        expect(steps == list(range(1, STEPS + 1)), f"steps in the metrics: {steps}")
        return f"{STEPS} steps over both nodes, logged once"

    def requeue_in_the_middle(self) -> str:
        """`scontrol requeue` makes it save; the job comes back by itself and ends as if nothing had been."""
        job_id = self._train("requeued", STEPS)
        self._wait_for_lines("requeued", 10)
        self.cluster.run("scontrol", "requeue", job_id)
        expect(self.cluster.wait_for_end(job_id, PATIENCE) == "COMPLETED", self._log(job_id))
        expect(self.cluster.job(job_id)["Restarts"] == "1", str(self.cluster.job(job_id)))
        step = self._resumed_from(job_id)
        expect(10 <= step < STEPS, f"resumed from step {step}")
        found, expected = self._figures("requeued"), self._figures("whole")
        differing = [pair for pair in zip(found, expected, strict=False) if pair[0] != pair[1]]
        expect(found == expected, f"{len(found)} and {len(expected)} lines, differing: {differing[:2]}")
        return f"went on from step {step} to {STEPS}; every figure equal bit for bit"

    def reach_the_limit(self) -> str:
        """The script's own signal comes before the limit: saved, requeued, gone on; and scancel is the end."""
        job_id = self._train("limited", 1_000_000)
        self._wait_for_lines("limited", 10)
        minutes = seconds_of(self.cluster.job(job_id)["RunTime"]) // 60 + 2
        self.cluster.run("scontrol", "update", f"JobId={job_id}", f"TimeLimit={minutes}")
        wait_until(lambda: self.cluster.job(job_id)["Restarts"] == "1", PATIENCE, "the job to be requeued")
        log = self._log(job_id)
        expect(log.count("the checkpoint is saved") == 2 and "DUE TO TIME LIMIT" not in log, log)
        expect("task 0: Exited with exit code 75" in log, log)
        self.cluster.run("scontrol", "update", f"JobId={job_id}", "TimeLimit=60")
        wait_until(lambda: "going on from step" in self._log(job_id), PATIENCE, "the job to go on")
        self.cluster.run("scancel", job_id)
        expect(self.cluster.wait_for_end(job_id, PATIENCE) == "CANCELLED", self._log(job_id))
        return f"saved before its limit and went on from step {self._resumed_from(job_id)}; cancelled, it stayed away"

    def _train(self, name: str, steps: int) -> str:
        """Submit a training run over both nodes by train.sbatch; the job's number."""
        config = self.folder / f"{name}.yaml"
        values = dict(
            model=MODEL, mesh=dict(devices=4, data=2, group=2), training=TRAINING | dict(num_steps=steps),
            data=dict(
                corpus=str(self.folder / "words.jsonl"), tokenizer_vocab_size=300, sequence_length=32, batch_size=8
            ),
        )  # fmt: skip
        save_config(parse_config(values), config)
        command = (str(config), "--run-dir", str(self.folder / name), "--devices", "4")
        script = str(ROOT / "experiments" / "launch" / "train.sbatch")
        return self._sbatch("--ntasks-per-node=1", "--time=60", script, *command)

    def _sbatch(self, *arguments: str) -> str:
        return self.cluster.run("sbatch", "--parsable", "--nodes=2", *arguments, variables=self._variables).strip()

    def _log(self, job_id: str) -> str:
        log = self.folder / f"foejax-{job_id}.log"
        return log.read_text() if log.exists() else ""

    def _resumed_from(self, job_id: str) -> int:
        return int(self._log(job_id).partition("going on from step ")[2].split()[0])

    def _wait_for_lines(self, name: str, count: int) -> None:
        metrics = self.folder / name / "metrics.jsonl"
        wait_until(
            lambda: metrics.exists() and metrics.read_text().count("\n") >= count, PATIENCE, f"{count} steps of {name}"
        )

    def _figures(self, name: str) -> list[dict[str, float]]:
        """Every metrics line but for the speed."""
        lines = read_metrics(self.folder / name)
        return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


def expect(holds: bool, seen: str) -> None:
    """Raise SlurmError with what was seen unless it holds."""
    if not holds:
        raise SlurmError(f"not as expected:\n{seen}")


def seconds_of(time: str) -> int:
    """Seconds of Slurm's [days-]hours:minutes:seconds."""
    days, _, clock = time.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def main() -> int:
    """Try everything; 0 where all went well, 1 where something did not, 2 where there can be no cluster."""
    if lacking := missing():
        print(f"try_slurm: this machine lacks {lacking}: nothing is tried", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a `with` block ends
    began = time.monotonic()
    try:
        with SlurmHere() as cluster:
            passed = _try_all(Trial(cluster))
    except SlurmError as error:
        print(f"try_slurm: no cluster can be made here: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"try_slurm: {'passed' if passed else 'FAILED'} in {time.monotonic() - began:.0f} s")
    return 0 if passed else 1


def _try_all(trial: Trial) -> bool:
    """Whether all went well; stops where something did not, with what was seen."""
    trials: list[Callable[[], str]] = [
        trial.find_places, trial.train_whole, trial.requeue_in_the_middle, trial.reach_the_limit
    ]  # fmt: skip
    for each in trials:
        try:
            print(f"{each.__name__}: {each()}", flush=True)
        except SlurmError as error:
            print(f"{each.__name__}: {error}", flush=True)
            return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())
