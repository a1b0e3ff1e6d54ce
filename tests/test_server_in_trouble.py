"""Too many clients, clients that leave, an engine that fails, a server that ends: over a fake model."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
from server_fakes import LONG, NAME, client_of, encode, expected_text, scrape, serving, wait_until

from foejax.serving.sequence import FinishReason

STREAM_AND_HANG = """
import json, socket, sys, time
host, port, body = sys.argv[1], int(sys.argv[2]), sys.argv[3].encode()
connection = socket.create_connection((host, port))
connection.sendall(b"POST /v1/completions HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
received = b""
while b"data:" not in received:
    received += connection.recv(1000)
print("streaming", flush=True)
time.sleep(100)
"""


def test_a_full_queue_is_429_and_draining_503() -> None:
    with (
        serving(max_waiting=1) as fake,
        client_of(fake) as client,
        concurrent.futures.ThreadPoolExecutor(5) as pool,
        fake.runner.held_up(),
    ):
        running = [pool.submit(client.completions.create, model=NAME, prompt=LONG, max_tokens=9) for _ in range(5)]
        wait_until(lambda: fake.thread.num_running + fake.thread.num_waiting == 5)
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(model=NAME, prompt=LONG)
        assert full.value.response.headers["retry-after"] == "1" and full.value.code == "rate_limit_exceeded"
        figures = scrape(fake)
        assert figures["foejax_sequences_running"] + figures["foejax_sequences_waiting"] == 5
        assert 0 < figures["foejax_sequences_running"] <= 4 and 0 < figures["foejax_kv_cache_used_ratio"] < 1
        assert httpx.get(f"{fake.url}/health").status_code == 200
        assert fake.server is not None
        fake.server.handle_exit(15, None)
        wait_until(lambda: httpx.get(f"{fake.url}/health").status_code == 503)
        with pytest.raises(openai.InternalServerError) as draining:
            client.completions.create(model=NAME, prompt=LONG)
        assert draining.value.status_code == 503 and draining.value.code == "draining"
        fake.runner.open.set()
        for future in running:
            assert future.result(20).choices[0].text == expected_text(encode(LONG), 9)
        wait_until(lambda: fake.ended == [True])


@pytest.mark.parametrize("how", ["a second signal", "the end of its time"])
def test_draining_can_be_cut_short(how: str) -> None:
    body = {"prompt": LONG, "max_tokens": 50, "stream": True}
    with serving(pause=0.1, drain_timeout=0.3 if how == "the end of its time" else 60) as fake:
        assert fake.server is not None
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            httpx.stream("POST", f"{fake.url}/v1/completions", json=body) as answer,
        ):
            events = answer.iter_lines()
            next(events)
            start = time.monotonic()
            fake.server.handle_exit(15, None)
            if how == "a second signal":
                fake.server.handle_exit(15, None)
            rest = [line for line in events if line]
            assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "stopped"
        wait_until(lambda: fake.ended == [False])
        assert time.monotonic() - start < 4


def test_a_server_drains_where_another_process_is_told_to_end() -> None:
    told = threading.Event()
    with (
        serving(ends_too=told.is_set) as fake,
        client_of(fake) as client,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        fake.runner.held_up(),
    ):
        running = pool.submit(client.completions.create, model=NAME, prompt=LONG, max_tokens=9)
        wait_until(lambda: fake.thread.num_running == 1)
        told.set()
        wait_until(lambda: httpx.get(f"{fake.url}/health").status_code == 503)
        fake.runner.open.set()
        assert running.result(20).choices[0].text == expected_text(encode(LONG), 9)
        wait_until(lambda: fake.ended == [True])


def test_an_engine_that_fails_is_503_from_then_on() -> None:
    with serving(pause=0.02) as fake, client_of(fake) as client:
        stream = client.completions.create(model=NAME, prompt=LONG, max_tokens=50, stream=True)
        next(stream)
        fake.runner.failure = RuntimeError("the devices are gone")
        with pytest.raises(openai.APIError, match="the engine failed"):
            list(stream)
        with pytest.raises(openai.InternalServerError) as later:
            client.completions.create(model=NAME, prompt=LONG)
        assert later.value.status_code == 503 and later.value.code == "engine_failed"
        assert httpx.get(f"{fake.url}/health").status_code == 503


def test_a_request_that_runs_out_of_time_returns_what_it_has() -> None:
    with serving(pause=0.03, request_timeout=0.3) as fake, client_of(fake) as client:
        choice = client.completions.create(model=NAME, prompt=LONG, max_tokens=50).choices[0]
        assert choice.finish_reason == "length" and 0 < len(choice.text) < 50
        assert expected_text(encode(LONG), 50).startswith(choice.text)


def test_a_client_killed_in_mid_stream_frees_its_blocks() -> None:
    body = json.dumps({"prompt": LONG, "max_tokens": 50, "stream": True})
    with serving(pause=0.05) as fake:
        host, port = fake.url.removeprefix("http://").split(":")
        command = [sys.executable, "-c", STREAM_AND_HANG, host, port, body]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
            assert killed.stdout is not None and killed.stdout.readline() == "streaming\n"
            assert fake.num_held_blocks > 0
            killed.kill()
        wait_until(lambda: fake.thread.is_idle)
        assert fake.thread.statistics.finished == {FinishReason.ABORT: 1} and fake.num_held_blocks == 0


def test_clients_that_give_up_leave_room_for_the_next() -> None:
    """200 requests for far more than half a second of work, streamed or not."""
    with serving(pause=0.02) as fake, client_of(fake) as client:
        gave_up = threading.Semaphore(0)

        def give_up(index: int) -> None:
            try:
                asked = {"model": NAME, "prompt": LONG, "max_tokens": 70, "timeout": 0.5}
                answer = client.completions.create(**asked, stream=index % 2 == 0)
                time.sleep(0.5) if index % 2 == 0 else None
                answer.close() if index % 2 == 0 else None
            except openai.APITimeoutError:
                gave_up.release()

        with concurrent.futures.ThreadPoolExecutor(200) as pool:
            list(pool.map(give_up, range(200)))
        start = time.monotonic()
        assert client.completions.create(model=NAME, prompt=LONG, max_tokens=5).choices[0].text == expected_text(
            encode(LONG), 5
        )
        assert time.monotonic() - start < 5
        wait_until(lambda: fake.thread.is_idle)
        assert fake.num_held_blocks == 0
        assert fake.thread.statistics.finished[FinishReason.ABORT] > 100


def test_every_tenth_of_many_requests_is_aborted_in_mid_stream() -> None:
    with serving(pause=0.002) as fake, client_of(fake) as client:

        def ask(index: int) -> str:
            if index % 10:
                return client.completions.create(model=NAME, prompt=f"{index}", max_tokens=12).choices[0].text
            long = {"prompt": f"{LONG}{index}", "max_tokens": 70, "extra_body": {"ignore_eos": True}}
            with client.completions.create(model=NAME, **long, stream=True) as stream:
                next(stream)
            return ""

        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            texts = list(pool.map(ask, range(200)))
        assert texts == [expected_text(encode(f"{index}"), 12) if index % 10 else "" for index in range(200)]
        wait_until(lambda: fake.thread.is_idle)
        assert fake.num_held_blocks == 0
        assert fake.thread.statistics.finished[FinishReason.ABORT] == 20
