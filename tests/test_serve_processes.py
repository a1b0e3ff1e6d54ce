"""`foejax serve` in two processes: answers after idleness, one end for all, and a loss that is told by name."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from process_runs import child_environment
from server_fakes import export_byte_model, wait_until

import foejax
from foejax.launch import process_environments
from sharding.roll_call import EXIT_LOST

pytestmark = pytest.mark.slow

SIZES = ["--context", "64", "--max-sequences", "4", "--prefill-tokens", "16", "--decode-steps", "1"]
PROMPTS = ["The cat", "sat on", "the mat and", "saw a rat."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_byte_model(tmp_path_factory.mktemp("served") / "tiny")


@dataclass
class Served:
    """The processes of `foejax serve`, and where they write."""

    processes: list[subprocess.Popen[bytes]]
    logs: list[Path]
    url: str = ""

    def complete(self, prompt: str | list[str], **fields: object) -> list[str]:
        """Texts that continue the prompts, greedily."""
        body = {"prompt": prompt, "max_tokens": 20, "temperature": 0} | fields
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        return [choice["text"] for choice in answer.json()["choices"]]

    def codes(self) -> list[int]:
        """Exit codes, once all have ended."""
        return [process.wait(120) for process in self.processes]

    def output(self) -> str:
        return "\n".join(log.read_text(encoding="utf-8") for log in self.logs)


@contextlib.contextmanager
def served(folder: Path, logs: Path) -> Iterator[Served]:
    """Two processes of two devices, once they serve."""
    argv = [sys.executable, "-m", "foejax", "serve", str(folder), "--port", "0", *SIZES]
    environments = process_environments(2, 2, child_environment())
    with contextlib.ExitStack() as stack:
        found = Served([], [logs / "0", logs / "1"])
        for environment, log in zip(environments, found.logs, strict=True):
            out = stack.enter_context(log.open("wb"))
            process = subprocess.Popen(argv, env=environment, stdout=out, stderr=subprocess.STDOUT)
            stack.callback(process.wait)
            stack.callback(process.kill)
            found.processes.append(process)

        def serves() -> bool:
            assert all(process.poll() is None for process in found.processes), found.output()
            said = re.search(r"serving \S+ at (http\S+)", found.output())
            found.url = said[1] if said else ""
            return bool(said)

        wait_until(serves, 500)
        yield found


def test_two_processes_serve_what_one_would_after_idleness_too(folder: Path, tmp_path: Path) -> None:
    """Longer than Gloo waits for anybody; then all end by one signal, wherever it comes."""
    expected = foejax.load(folder, devices=1).generate(PROMPTS, 20)
    with served(folder, tmp_path) as server:
        assert server.complete(PROMPTS) == expected
        time.sleep(40)
        assert server.complete(PROMPTS) == expected
        assert len(server.complete("x", n=3, temperature=1.0, max_tokens=9, ignore_eos=True)) == 3
        metrics = httpx.get(f"{server.url}/metrics").text
        assert "foejax_expert_imbalance_ratio" in metrics and "foejax_kv_cache_used_ratio 0.0\n" in metrics
        server.processes[1].send_signal(signal.SIGTERM)
        assert server.codes() == [0, 0], server.output()


def test_a_killed_process_is_named_by_the_one_that_serves(folder: Path, tmp_path: Path) -> None:
    with served(folder, tmp_path) as server:
        body = {"prompt": "x", "max_tokens": 60, "ignore_eos": True, "stream": True, "n": 8}
        with (
            contextlib.suppress(httpx.HTTPError),
            httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as answer,
        ):
            for number, _ in enumerate(answer.iter_lines()):
                if number == 1:
                    server.processes[1].kill()
        assert server.codes() == [EXIT_LOST, -signal.SIGKILL]
        assert "foejax: error: process 1 on " in server.output() and "Traceback" not in server.output()


def test_the_server_killed_while_idle_is_named_by_the_other(folder: Path, tmp_path: Path) -> None:
    with served(folder, tmp_path) as server:
        server.processes[0].kill()
        assert server.codes() == [-signal.SIGKILL, EXIT_LOST]
        assert "foejax: error: process 0 on " in server.output() and "Traceback" not in server.output()


def test_the_launcher_serves_until_a_signal(folder: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "foejax.launch", "--nproc", "2", "--devices-per-process", "2", "--"]
    environment = child_environment()
    with (tmp_path / "log").open("wb") as out:
        argv = [*launcher, "serve", str(folder), "--port", "0", *SIZES]
        process = subprocess.Popen(argv, env=environment, stdout=out, stderr=subprocess.STDOUT)
    with process:
        log = tmp_path / "log"
        try:
            wait_until(lambda: "[0] serving tiny at http" in log.read_text() or process.poll() is not None, 500)
            process.send_signal(signal.SIGINT)
            assert process.wait(120) == 0, log.read_text()
        finally:
            process.kill()
