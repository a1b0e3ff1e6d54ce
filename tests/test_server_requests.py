"""Whatever a client sends, the answer is right or a 4xx in OpenAI's shape, and the server goes on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import hypothesis.strategies as st
import pytest
from server_fakes import CONTEXT, NAME, FakeServer, encode, expected_text, make_fake, started
from starlette.types import ASGIApp

from foejax.serving.server.app import make_app
from foejax.serving.server.connection import LARGEST_BODY

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeServer]:
    with started() as fake:
        yield fake
        assert fake.thread.is_idle and fake.num_held_blocks == 0 and fake.thread.failure is None


@pytest.fixture(scope="module")
def app(fake: FakeServer) -> ASGIApp:
    return make_app(fake.model)


def send(app: ASGIApp, method: str, path: str, body: Any = b"", **headers: str) -> httpx.Response:
    """One request in process; an exception in the application is raised here."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    lines = {"content-type": "application/json", **headers}
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in lines.items()]

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), trust_env=False, base_url="http://server"
        ) as client:
            return await asyncio.wait_for(client.request(method, path, content=content, headers=encoded), 30)

    return asyncio.run(ask())


def assert_is_error(response: httpx.Response, status: int, part: str = "", param: str | None = None) -> None:
    assert response.status_code == status, response.text
    content = response.json()
    assert set(content) == {"error"} and set(content["error"]) == {"message", "type", "param", "code"}
    assert content["error"]["message"] and content["error"]["type"] == "invalid_request_error"
    assert part in content["error"]["message"]
    assert content["error"]["param"] == (param if param else content["error"]["param"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"prompt": "x"', "not valid JSON"),
        (b'{"prompt": "x"} trailing', "not valid JSON"),
        (b'{"prompt": "\xff\xfe"}', "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b'{"prompt": "x", "temperature": NaN}', "not valid JSON"),
        (b'{"prompt": "x", "anything": Infinity}', "not valid JSON"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "x", "temperature": %s}' % (b"9" * 400), "temperature"),
        (b'{"prompt": "x", "max_tokens": %s}' % (b"9" * 5000), "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"prompt": ' + b"[" * 150 + b"]" * 150 + b"}", "prompt: give a text"),
        (b"[]", "not a JSON object"),
        (b'"prompt"', "not a JSON object"),
        (b"\x00", "not valid JSON"),
    ],
)
def test_bodies_that_are_no_request(app: ASGIApp, body: bytes, message: str) -> None:
    assert_is_error(send(app, "POST", COMPLETIONS, body), 400, message)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [1, 2.0]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [257]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": "x" * CONTEXT}, "prompt"),
        ({"prompt": "x" * 100_000}, "prompt"),
        ({"prompt": [1] * CONTEXT}, "prompt"),
        ({"prompt": ["x"] * 300}, "prompt"),
        ({"prompt": ["x"] * 10, "n": 100}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": CONTEXT}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": 2**70}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 5.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e6}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 2**31}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": [1]}, "n"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", 1]}, "stop.1"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 257}, "stop.0"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stop_token_ids": [1, "a"]}, "stop_token_ids.1"),
        ({"stop_token_ids": [1] * 257}, "stop_token_ids"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, None),
        ({"stream": True, "stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": "yes"}, "echo"),
        ({"best_of": 3}, None),
        ({"suffix": "end"}, "suffix"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"model": 5}, "model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_fields_of_completions_are_named(app: ASGIApp, fields: dict[str, Any], param: str | None) -> None:
    response = send(app, "POST", COMPLETIONS, {"model": NAME, "prompt": "hello"} | fields)
    assert_is_error(response, 400, next(reversed(fields)) if param is None else "", param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [3]}, "messages.0"),
        ({"messages": [{"content": "hello"}]}, "messages.0.role"),
        ({"messages": [{"role": "king", "content": "hello"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": ["hello"]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x" * 100}]}, "prompt"),
        ({"max_completion_tokens": CONTEXT}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"top_logprobs": 3}, None),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_fields_of_chats_are_named(app: ASGIApp, fields: dict[str, Any], param: str | None) -> None:
    response = send(app, "POST", CHAT, {"model": NAME, "messages": HELLO} | fields)
    assert_is_error(response, 400, next(reversed(fields)) if param is None else "", param)


def test_other_refusals(app: ASGIApp) -> None:
    for path, body in ((COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": HELLO})):
        response = send(app, "POST", path, body | {"model": "gpt-5"})
        assert_is_error(response, 404, "the model 'gpt-5' does not exist", "model")
        assert response.json()["error"]["code"] == "model_not_found"
        assert_is_error(send(app, "GET", path), 405)
        assert_is_error(send(app, "POST", path + "/"), 404)
        assert_is_error(send(app, "POST", path, body, **{"content-type": "text/plain"}), 415, "text/plain")
        large = json.dumps(body | {"user": "x" * LARGEST_BODY}).encode()
        assert_is_error(send(app, "POST", path, large), 413, str(LARGEST_BODY))
    assert_is_error(send(app, "DELETE", "/health"), 405)
    assert_is_error(send(app, "GET", "/v1/nothing"), 404)
    assert_is_error(send(app, "GET", "/v1/models/other"), 404, "'other'", "model")


def test_an_engine_that_scores_no_prompts_says_so() -> None:
    fake = make_fake(scores_prompts=False)
    body = {"prompt": "x", "logprobs": 1, "echo": True}
    assert_is_error(send(make_app(fake.model), "POST", COMPLETIONS, body), 400, "score_prompts", "prompt_logprobs")


def test_a_model_without_chat_template_says_so() -> None:
    fake = make_fake(template=None)
    assert_is_error(send(make_app(fake.model), "POST", CHAT, {"messages": HELLO}), 400, "use /v1/completions")


def test_nulls_and_unknown_fields_are_ignored(app: ASGIApp) -> None:
    names = "max_tokens temperature top_p top_k min_p repetition_penalty seed n stop stop_token_ids ignore_eos stream"
    nulls = dict.fromkeys([*names.split(), "stream_options", "logprobs", "echo", "model", "logit_bias", "suffix"])
    neutral = {"frequency_penalty": 0.0, "presence_penalty": 0, "best_of": 1, "user": {"a": [1]}, "top_k": -1}
    response = send(app, "POST", COMPLETIONS, {"prompt": "hello", **nulls, **neutral})
    assert response.json()["choices"][0]["text"] == expected_text(encode("hello"), 16)


def test_a_longest_request_is_taken(app: ASGIApp) -> None:
    prompt = "x" * (CONTEXT - 2)
    response = send(app, "POST", COMPLETIONS, {"prompt": prompt, "max_tokens": 1})
    assert response.json()["choices"][0]["text"] == expected_text(encode(prompt), 1)
    assert send(app, "POST", COMPLETIONS, {"prompt": prompt}).status_code == 200, "the default gives way"
    body = {"messages": [{"role": "user", "content": "x" * (CONTEXT - 25)}]}
    assert send(app, "POST", CHAT, body).json()["usage"]["total_tokens"] <= CONTEXT


texts = st.text(max_size=8) | st.sampled_from(["", "x" * 200, "<|endoftext|>", "\x00", "\ud800", "\ufdd0", "😀"])
odd = st.sampled_from(
    [None, True, False, 0, 1, -1, 3.5, -0.0, 1e300, 2**31, 2**63, -(2**80), 10**300, "", "x", "5", [], [[]], [None], {}]
    + [{"a": 1}, [1, "a", None], {"type": "text"}, [{"type": "text", "text": 3}], {"include_usage": 1}, [[[[[1]]]]]]
)
anything = (
    odd | st.lists(odd, max_size=3) | st.dictionaries(st.sampled_from(["role", "type", "", "x"]), odd, max_size=3)
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": texts},
        optional={"name": anything, "tool_calls": anything},
    ),
    min_size=1,
    max_size=3,
)
fitting: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.one_of(
        texts,
        st.lists(texts, max_size=3),
        st.lists(st.integers(-1, 258), max_size=9),
        st.lists(st.lists(st.integers(0, 256), max_size=4), max_size=3),
    ),
    "messages": messages,
    "model": st.sampled_from([NAME, NAME, NAME, "other", None]),
    "max_tokens": st.integers(-1, CONTEXT + 1),
    "max_completion_tokens": st.integers(0, 20),
    "temperature": st.floats(-0.5, 3),
    "top_p": st.floats(-0.1, 1.1),
    "top_k": st.integers(-2, 60),
    "min_p": st.floats(-0.1, 1.1),
    "repetition_penalty": st.floats(0, 2),
    "seed": st.integers(-(2**64), 2**64),
    "n": st.integers(0, 6),
    "stop": texts | st.lists(texts, max_size=18),
    "stop_token_ids": st.lists(st.integers(-1, 300), max_size=3),
    "ignore_eos": st.booleans(),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans() | anything}),
    "logprobs": st.integers(-1, 21) | st.booleans(),
    "top_logprobs": st.integers(-1, 21),
    "echo": st.booleans(),
    "return_token_ids": st.booleans(),
    "logit_bias": anything,
    "tools": anything,
    "response_format": anything,
}
names = st.lists(st.sampled_from([*fitting]), max_size=4, unique=True)


@st.composite
def raw_bodies(draw: st.DrawFn) -> bytes:
    """JSON, mostly of a request that may be right, sometimes damaged."""
    content = {name: draw(fitting[name]) for name in ("prompt", "messages", *draw(names))}
    content |= {name: draw(anything) for name in draw(names)[2:]}
    body = json.dumps(content, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    damage = draw(st.sampled_from(["none"] * 7 + ["cut", "insert", "noise"]))
    place = draw(st.integers(0, len(body)))
    if damage == "cut":
        return body[:place]
    if damage == "insert":
        wedge = draw(st.sampled_from([b"NaN", b"-Infinity", b"\xff", b"[" * 300, b'"', b"1e999", b"\\ud800", b"\x00"]))
        return body[:place] + wedge + body[place:]
    return (
        draw(st.binary(max_size=40) | anything.map(lambda value: json.dumps(value).encode()))
        if damage == "noise"
        else body
    )


JSON = "application/json"
LINES = [("POST", COMPLETIONS, JSON)] * 9 + [("POST", CHAT, JSON)] * 9
LINES += [("GET", CHAT, JSON), ("PUT", COMPLETIONS, ""), ("OPTIONS", CHAT, "é"), ("HEAD", "/v1/models", JSON)]
LINES += [
    ("POST", COMPLETIONS, kind) for kind in ("", "text/plain", "application/json; charset=latin-1", "é", "a/b+json")
]
LINES += [("GET", path, JSON) for path in ("/v1/models", "/v1/models/%00", "//", "/metrics", "/health?x=%ff")]


@hypothesis.given(
    body=raw_bodies(),
    line=st.sampled_from(LINES),
)
@hypothesis.settings(max_examples=2000, suppress_health_check=list(hypothesis.HealthCheck))
def test_2000_odd_requests_find_no_5xx(fake: FakeServer, app: ASGIApp, line: tuple[str, str, str], body: bytes) -> None:
    method, path, kind = line
    response = send(app, method, path, body, **{"content-type": kind})
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert method == "HEAD" or set(response.json()["error"]) == {"message", "type", "param", "code"}
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert response.text.endswith("data: [DONE]\n\n") and '"error"' not in response.text
    hypothesis.event(f"{path} {response.status_code}")
    assert fake.thread.failure is None
