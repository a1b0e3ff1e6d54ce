"""The load bench against a server: a small stand-in on a real socket."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from foejax.cli import main
from foejax.serving.load.latency import summarise
from foejax.serving.load.over_http import Server, run_over_http
from foejax.serving.load.trace import LoadError, Trace, TracedRequest


def trace_of(*requests: tuple[float, int, int]) -> Trace:
    """From (arrival, first prompt token, output tokens)."""
    return Trace(tuple(TracedRequest(arrival, (first, 1, 2), count) for arrival, first, count in requests), 0.5, 0)


# Over HTTP.

Send = Callable[[dict[str, Any]], Awaitable[None]]


class FakeServer:
    """`/v1/completions` whose first prompt token chooses what happens."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.knows_more_than_openai = True

    async def __call__(self, scope: dict[str, Any], receive: Callable[[], Awaitable[Any]], send: Send) -> None:
        assert scope["type"] == "http"
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        fields = json.loads(body)
        self.bodies.append(fields)
        if scope["path"] != "/v1/completions" or fields["model"] != "fake":
            await answer(send, 404, {"error": {"message": "the model does not exist"}})
        elif "ignore_eos" in fields and not self.knows_more_than_openai:
            await answer(send, 400, {"error": {"message": "unknown field"}})
        elif not fields.get("stream"):
            await answer(send, 200, {"choices": [{"text": "x"}]})
        elif fields["prompt"][0] == 429:
            await answer(send, 429, {"error": {"message": "the queue is full"}})
        else:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await self._stream(fields, send)
            await send({"type": "http.response.body", "body": b""})

    async def _stream(self, fields: dict[str, Any], send: Send) -> None:
        kind, count = fields["prompt"][0], fields["max_tokens"]
        with_ids = fields.get("return_token_ids", False)
        if kind == 500:
            await event(send, {"error": {"message": "out of memory"}})
            return
        left = count
        while left:
            await asyncio.sleep(1.5 if kind == 3 and left == count else 0.05)
            now = min(left, 2 if left < count else 1)
            left -= now
            ids = {"token_ids": [9] * now} if with_ids else {}
            await event(send, {"choices": [{"text": "ab" * now, "finish_reason": None, **ids}], "usage": None})
            if kind == 502:
                return
        ids = {"token_ids": []} if with_ids else {}
        await event(send, {"choices": [{"text": "", "finish_reason": "length", **ids}], "usage": None})
        await event(send, {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": count}})
        await send({"type": "http.response.body", "body": b": a comment\n\ndata: [DONE]\n\n", "more_body": True})


async def answer(send: Send, status: int, content: dict[str, Any]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


async def event(send: Send, content: dict[str, Any]) -> None:
    data = f"data: {json.dumps(content)}\n\n".encode()
    await send({"type": "http.response.body", "body": data, "more_body": True})


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[FakeServer, str]]:
    """The fake server on a free port, and its address."""
    fake = FakeServer()
    bound = socket.create_server(("127.0.0.1", 0))
    uvicorn_server = uvicorn.Server(uvicorn.Config(fake, lifespan="off", log_level="error"))
    thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [bound]})
    thread.start()
    while not uvicorn_server.started:
        time.sleep(0.01)
    yield fake, f"http://127.0.0.1:{bound.getsockname()[1]}"
    uvicorn_server.should_exit = True
    thread.join()


def test_streams_are_timed_and_failures_told_apart(server: tuple[FakeServer, str]) -> None:
    fake, url = server
    fake.bodies.clear()
    trace = trace_of((0, 1, 5), (0, 429, 5), (0.1, 500, 5), (0.1, 502, 5), (0.2, 3, 5), (0.3, 1, 1))
    records = run_over_http(Server(url, "fake", timeout=1.0), trace)
    assert [record.failure for record in records] == [
        "",
        "429: the queue is full",
        "in the stream: out of memory",
        "the stream broke off",
        "timed out",
        "",
    ]
    for record, request in zip(records, trace.requests, strict=True):
        assert request.arrival <= record.sent < request.arrival + 0.5
    whole = records[0]
    assert [count for _, count in whole.bursts] == [1, 2, 2] and whole.prompt_tokens == 3
    assert 0.05 <= whole.ttft < 0.5 and 0.1 <= whole.e2e - whole.ttft < 1
    assert whole.finished >= whole.e2e
    assert records[4].finished == pytest.approx(1.2, abs=0.5)
    sent = next(body for body in fake.bodies if body["prompt"] == [1, 1, 2] and body.get("stream"))
    assert sent["max_tokens"] == 5 and sent["temperature"] == 0 and sent["ignore_eos"] is True
    found = summarise(records)
    assert (found.completed, found.failed, found.short) == (2, 4, 0)


def test_servers_that_know_openais_fields_alone_are_measured_too(server: tuple[FakeServer, str]) -> None:
    """Their events do not say how many tokens they hold: those of the usage are spread."""
    fake, url = server
    fake.knows_more_than_openai = False
    try:
        (record,) = run_over_http(Server(f"{url}/v1/", "fake"), trace_of((0, 1, 6)))
    finally:
        fake.knows_more_than_openai = True
    assert not record.failure and [count for _, count in record.bursts] == [1, 2, 1, 2]


def test_addresses_that_answer_nothing_are_told_in_one_line(server: tuple[FakeServer, str]) -> None:
    _, url = server
    with pytest.raises(LoadError, match="answers 404: the model does not exist: correct --url, --model"):
        run_over_http(Server(url, "another"), trace_of((0, 1, 1)))
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(LoadError, match="does not answer .*: start the server, or correct --url"):
        run_over_http(Server(f"http://127.0.0.1:{port}", "fake"), trace_of((0, 1, 1)))


def test_bench_serve_replays_a_trace_on_a_server(
    server: tuple[FakeServer, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = trace_of((0, 1, 3), (0.1, 429, 3))
    trace.save(tmp_path / "trace.jsonl")
    command = ["bench", "serve", "--url", server[1], "--model", "fake", "--trace", str(tmp_path / "trace.jsonl")]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| 1 of 2 | 0 | 1 |" in text and "| 0.5 | fake | 1 | 429: the queue is full |" in text
