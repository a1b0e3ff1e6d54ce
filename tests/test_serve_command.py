"""`foejax serve` on a real model: over HTTP as alone, drained by SIGTERM, and under load."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_fakes import export_byte_model, wait_until

import foejax
from foejax.cli import main
from foejax.commands.engine_options import engine_config_of
from foejax.commands.parser import make_parser
from foejax.serving.engine_config import EngineConfig

SIZES = ["--context", "64", "--max-sequences", "1", "--prefill-tokens", "16", "--decode-steps", "1"]
PROMPTS = ["The cat", "sat on", "the mat and", "saw a rat."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_byte_model(tmp_path_factory.mktemp("served") / "tiny")


@dataclass
class Served:
    """A process of `foejax serve`."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) << 10

    def num_compilations(self) -> int:
        """Needs JAX_LOG_COMPILES."""
        return self.log.read_text(encoding="utf-8").count("Finished XLA compilation of")


@contextlib.contextmanager
def served(folder: Path, log: Path, *options: str, **environment: str) -> Iterator[Served]:
    """Start the command on one device and wait until it serves."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | environment
    argv = [sys.executable, "-m", "foejax", "serve", str(folder), "--port", "0", *SIZES, *options]
    with log.open("w") as errors:
        process = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
    with process:
        try:
            assert process.stdout is not None
            lines = (re.search(r"serving (\S+) at (http\S+)", line) for line in process.stdout)
            found = next(filter(None, lines), None)
            assert found and found[1] == folder.name, log.read_text(encoding="utf-8")
            yield Served(process, found[2], log)
        finally:
            process.kill()


def test_a_real_server_from_its_start_to_its_drained_end(folder: Path, tmp_path: Path) -> None:
    """Over HTTP the model says what it says alone; SIGTERM lets it finish what it says."""
    expected = foejax.load(folder, devices=1).generate(PROMPTS, 20)
    with served(folder, tmp_path / "log") as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            asked: dict[str, Any] = {"model": folder.name, "prompt": PROMPTS, "max_tokens": 20, "temperature": 0}
            assert [choice.text for choice in client.completions.create(**asked).choices] == expected
            streamed = [""] * len(PROMPTS)
            for chunk in client.completions.create(**asked, stream=True):
                streamed[chunk.choices[0].index] += chunk.choices[0].text
            assert streamed == expected
            with pytest.raises(openai.BadRequestError, match="no chat template"):
                client.chat.completions.create(model=folder.name, messages=[{"role": "user", "content": "hi"}])
        body = {"prompt": "x", "max_tokens": 60, "n": 60, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
            assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}).status_code == 503
            events = [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert sum('"finish_reason":"length"' in event for event in events) == 60
        assert server.process.wait(20) == 0


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("foejax: error: ") and error.count("\n") == 1
    return error


def test_what_the_command_refuses(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1 port {port}: Address already in use" in failure(capsys, "serve", "x", "--port", port)
    assert "choose another --host" in failure(capsys, "serve", "x", "--host", "256.0.0.1")
    assert "choose at least 1" in failure(capsys, "serve", "x", "--max-sequences", "0")
    assert "choose at least 0" in failure(capsys, "serve", "x", "--drain-timeout", "-1")
    assert "neither" in failure(capsys, "serve", str(tmp_path), "--port", "0")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "serving needs uvicorn: pip install foejax[serve]" in failure(capsys, "serve", "x")


def test_the_commands_defaults_are_the_engines() -> None:
    for argv in (["serve", "x"], ["bench", "serve", "x", "--out", "y"]):
        assert engine_config_of(make_parser().parse_args(argv)) == EngineConfig()
    options = make_parser().parse_args(["serve", "x", "--expert-budget", "8", "--expert-warm-up", "1"])
    assert engine_config_of(options, score_prompts=True) == EngineConfig(
        expert_budget=8, expert_warm_up=1, score_prompts=True
    )


@pytest.mark.slow
def test_a_server_on_eight_devices_says_the_same(folder: Path, tmp_path: Path) -> None:
    """Two groups, each on four devices that share the requests."""
    expected = foejax.load(folder, devices=1).generate(PROMPTS, 20)
    with served(folder, tmp_path / "log", "--devices", "8") as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            asked: dict[str, Any] = {"model": folder.name, "prompt": PROMPTS, "max_tokens": 20, "temperature": 0}
            assert [choice.text for choice in client.completions.create(**asked).choices] == expected
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


@pytest.mark.slow
def test_1000_requests_over_http(folder: Path, tmp_path: Path) -> None:
    """Every tenth aborted in mid-stream, the others exact; nothing compiled, no block kept, no memory gained."""
    prompts, lengths = [f"prompt {index}" for index in range(1000)], [4 + 8 * (index % 3) for index in range(1000)]
    model = foejax.load(folder, devices=1)
    options = ["--max-sequences", "8", "--max-waiting", "1000", "--decode-steps", "4"]
    with (
        served(folder, tmp_path / "log", *options, JAX_LOG_COMPILES="1") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
    ):

        def ask(index: int) -> str | None:
            asked: dict[str, Any] = {"model": folder.name, "prompt": prompts[index], "temperature": 0}
            if index % 10 == 0:
                asked |= {"max_tokens": 50, "extra_body": {"ignore_eos": True}, "stream": True}
                with client.completions.create(**asked) as stream:
                    next(stream)
                return None
            return client.completions.create(**asked, max_tokens=lengths[index]).choices[0].text

        compilations = server.num_compilations()
        assert compilations > 0
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            texts = list(pool.map(ask, range(200)))
            before = server.resident_bytes()
            texts += pool.map(ask, range(200, 1000))
        assert server.resident_bytes() <= 1.02 * before
        assert server.num_compilations() == compilations
        wait_until(lambda: "foejax_kv_cache_used_ratio 0.0\n" in httpx.get(f"{server.url}/metrics").text)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
    by_length = {length: model.generate(prompts, length) for length in set(lengths)}
    for index, text in enumerate(texts):
        assert text is None or text == by_length[lengths[index]][index]
