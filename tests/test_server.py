"""The server as OpenAI's own client sees it, over a fake model behind a real socket."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from server_fakes import (
    CONTEXT,
    LONG,
    NAME,
    FakeServer,
    byte_tokenizer,
    client_of,
    encode,
    expected_text,
    expected_tokens,
    scrape,
    serving,
)


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with serving() as fake:
        yield fake
        assert fake.num_held_blocks == 0
    assert fake.ended == [True]


@pytest.fixture
def client(server: FakeServer) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def rendered(*texts: str) -> list[int]:
    """Token ids of a chat in which user and assistant take turns."""
    roles = ["user", "assistant"]
    prompt: list[int] = []
    for index, text in enumerate(texts):
        prompt += byte_tokenizer().encode(f"{roles[index % 2]}: {text}") + [byte_tokenizer().eos_id]
        prompt += byte_tokenizer().encode("\n")
    return prompt + byte_tokenizer().encode("assistant: ")


def test_a_completion(client: openai.OpenAI) -> None:
    completion = client.completions.create(model=NAME, prompt=LONG, max_tokens=20, temperature=0)
    assert completion.object == "text_completion" and completion.model == NAME and completion.id.startswith("cmpl-")
    assert abs(completion.created - time.time()) < 60
    (choice,) = completion.choices
    assert choice.text == expected_text(encode(LONG), 20)
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert completion.usage is not None
    assert completion.usage.to_dict() == {"prompt_tokens": 17, "completion_tokens": 20, "total_tokens": 37}
    assert len(expected_tokens(encode(LONG), 90)) > 50


def test_a_streamed_completion_is_the_same(client: openai.OpenAI) -> None:
    with client.completions.create(
        model=NAME, prompt=LONG, max_tokens=20, stream=True, stream_options={"include_usage": True}
    ) as stream:
        *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected_text(encode(LONG), 20)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len(chunks) > 5 and len({chunk.id for chunk in chunks} | {last.id}) == 1
    assert all(chunk.usage is None for chunk in chunks)
    assert not last.choices and last.usage is not None and last.usage.completion_tokens == 20
    without = list(client.completions.create(model=NAME, prompt=LONG, max_tokens=3, stream=True))
    assert all(chunk.choices for chunk in without)


def test_the_frames_of_a_stream(server: FakeServer) -> None:
    body = {"prompt": LONG, "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        text = response.read().decode()
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    for frame in frames[:-2]:
        content = json.loads(frame.removeprefix("data: "))
        assert set(content) == {"id", "object", "created", "model", "choices"}
        assert set(content["choices"][0]) == {"index", "text", "logprobs", "finish_reason"}


def test_several_prompts_of_every_kind(client: openai.OpenAI) -> None:
    texts = ["one", "two two"]
    tokens = [encode(text) for text in texts]
    expected = [expected_text(prompt, 9) for prompt in tokens]
    for prompt, answers in (
        (texts, expected),
        (tokens, expected),
        (tokens[0], expected[:1]),
        ([texts[1]], expected[1:]),
    ):
        completion = client.completions.create(model=NAME, prompt=prompt, max_tokens=9)
        assert [choice.text for choice in completion.choices] == answers
        assert [choice.index for choice in completion.choices] == list(range(len(answers)))


def test_continuations_of_several_prompts(client: openai.OpenAI) -> None:
    """Choice p * n + i is continuation i of prompt p, streamed or not."""
    texts = ["one", "two two"]
    expected = [text for prompt in texts for text in [expected_text(encode(prompt), 9)] * 3]
    whole = client.completions.create(model=NAME, prompt=texts, max_tokens=9, n=3)
    assert [choice.text for choice in whole.choices] == expected
    found = [""] * 6
    for chunk in client.completions.create(model=NAME, prompt=texts, max_tokens=9, n=3, stream=True):
        found[chunk.choices[0].index] += chunk.choices[0].text
    assert found == expected


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_a_text_across_tokens(client: openai.OpenAI, stream: bool) -> None:
    """Every token of this model is one letter, so that a stop string spans several, and half of one may be a feint."""
    text = expected_text(encode(LONG), 40)
    for stop in ([text[5:9]], [text[7:10], "never"], [text[3:5] + "~", text[11:13]]):
        end = min(text.find(one) for one in stop if one in text)
        asked: dict[str, Any] = {"model": NAME, "prompt": LONG, "max_tokens": 40, "stop": stop}
        if stream:
            choices = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
        else:
            choices = client.completions.create(**asked).choices
        assert "".join(choice.text for choice in choices) == text[:end]
        assert choices[-1].finish_reason == "stop"
    assert client.completions.create(model=NAME, prompt=LONG, stop=text[1]).choices[0].text == text[:1]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_a_completion(client: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {"model": NAME, "prompt": LONG, "max_tokens": 5, "logprobs": 2}
    choices = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)] if stream else []
    choices = choices or client.completions.create(**asked).choices
    parts = [choice.logprobs for choice in choices if choice.logprobs is not None]
    letters = list(expected_text(encode(LONG), 5))
    assert [token for part in parts for token in part.tokens or []] == letters
    assert [value for part in parts for value in part.token_logprobs or []] == [-0.5] * 5
    assert [offset for part in parts for offset in part.text_offset or []] == list(range(5))
    tops = [top for part in parts for top in part.top_logprobs or []]
    for letter, top in zip(letters, tops, strict=True):
        assert top == {letter: -0.5, chr(ord(letter) + 1): -1.5}


def test_echo_puts_the_prompt_before(client: openai.OpenAI) -> None:
    expected = LONG + expected_text(encode(LONG), 5)
    whole = client.completions.create(model=NAME, prompt=LONG, max_tokens=5, echo=True)
    assert whole.choices[0].text == expected
    stream = client.completions.create(model=NAME, prompt=encode(LONG), max_tokens=5, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_log_probabilities_tells_those_of_the_prompt(client: openai.OpenAI, stream: bool) -> None:
    """As lm-eval scores texts; the first token has none, and the special token before a text is not echoed."""
    for prompt, hidden in (("a dog", 1), (encode("a dog")[1:], 0)):
        asked: dict[str, Any] = {"prompt": prompt, "max_tokens": 2, "echo": True, "logprobs": 1, "n": 2}
        whole: Any = client.completions.create(model=NAME, **asked)
        choices = whole.choices
        if stream:
            choices = [chunk.choices[0] for chunk in client.completions.create(model=NAME, **asked, stream=True)]
        for index in range(2):
            own = [choice for choice in choices if choice.index == index]
            text = "".join(choice.text for choice in own)
            tokens = [token for choice in own for token in choice.logprobs.tokens]
            assert text == whole.choices[index].text and text.startswith("a dog")
            assert tokens == ["<|endoftext|>"] * hidden + list(text)
            values = [value for choice in own for value in choice.logprobs.token_logprobs]
            assert values == [None] + [-0.5] * (len(tokens) - 1)
            tops = [top for choice in own for top in choice.logprobs.top_logprobs]
            assert tops == [None] + [{token: -0.5} for token in tokens[1:]]
            offsets = [offset for choice in own for offset in choice.logprobs.text_offset]
            assert offsets == [0] * hidden + list(range(len(text)))


def test_a_chat(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "Hi!"}], max_completion_tokens=9, seed=3
    )
    assert chat.object == "chat.completion" and chat.id.startswith("chatcmpl-")
    (choice,) = chat.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected_text(rendered("Hi!"), 9))
    assert chat.usage is not None and chat.usage.prompt_tokens == len(rendered("Hi!"))
    turns: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go on."},
    ]
    chat = client.chat.completions.create(model=NAME, messages=turns, max_tokens=9, n=2)
    assert [choice.message.content for choice in chat.choices] == [
        expected_text(rendered("Hi!", "Yes?", "Go on."), 9)
    ] * 2


def test_a_streamed_chat(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Tell me"}]
    chunks = list(
        client.chat.completions.create(
            model=NAME, messages=messages, max_tokens=30, n=2, stream=True, stream_options={"include_usage": True}
        )
    )
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
    for index in range(2):
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in own) == expected_text(rendered("Tell me"), 30)
        assert own[-1].finish_reason in ("stop", "length") and own[-2].finish_reason is None
    assert chunks[-1].usage is not None and chunks[-1].usage.prompt_tokens == len(rendered("Tell me"))


def test_log_probabilities_of_a_chat(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Tell me"}]
    asked: dict[str, Any] = {"model": NAME, "messages": messages, "max_tokens": 5, "logprobs": True, "top_logprobs": 3}
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    letters = list(expected_text(rendered("Tell me"), 5))
    assert [one.token for one in choice.logprobs.content] == letters
    assert [one.bytes for one in choice.logprobs.content] == [list(letter.encode()) for letter in letters]
    assert [[top.logprob for top in one.top_logprobs] for one in choice.logprobs.content] == [[-0.5, -1.5, -2.5]] * 5
    streamed = client.chat.completions.create(**asked | {"top_logprobs": None}, stream=True)
    parts = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs is not None]
    assert [one.token for part in parts for one in part.content or []] == letters
    assert all(not one.top_logprobs for part in parts for one in part.content or [])


def test_models_and_health(client: openai.OpenAI, server: FakeServer) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (NAME, "model", "foejax")
    assert client.models.retrieve(NAME).model_dump()["max_model_len"] == CONTEXT
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other")
    assert error.value.code == "model_not_found"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_a_model_without_tokenizer_takes_and_gives_token_ids() -> None:
    with serving(tokenizer=False) as fake:
        body = {"prompt": [5, 6, 9], "max_tokens": 7, "return_token_ids": True, "logprobs": 0}
        (choice,) = httpx.post(f"{fake.url}/v1/completions", json=body).json()["choices"]
        assert choice["token_ids"] == expected_tokens([5, 6, 9], 7)
        assert choice["prompt_token_ids"] == [5, 6, 9] and choice["text"] == ""
        assert choice["logprobs"]["tokens"][0] == f"token_id:{choice['token_ids'][0]}"
        for bad in ({"prompt": "text"}, {"prompt": [1], "stop": "x"}):
            refused = httpx.post(f"{fake.url}/v1/completions", json=bad)
            assert refused.status_code == 400 and "tokenizer" in refused.json()["error"]["message"]


def test_metrics_are_prometheus(client: openai.OpenAI, server: FakeServer) -> None:
    before = scrape(server)
    client.completions.create(model=NAME, prompt=LONG, max_tokens=10, n=2)
    after = scrape(server)
    grown = {name: value - before[name] for name, value in after.items() if value != before[name]}
    assert grown["foejax_generated_tokens_total"] == 20 and grown["foejax_prompt_tokens_total"] == 34
    assert grown["foejax_prefix_hit_tokens_total"] >= 16
    assert grown['foejax_finished_total{reason="length"}'] == 2
    for name, count in (("time_to_first_token", 1), ("time_between_tokens", 18), ("request", 1)):
        assert grown[f"foejax_{name}_seconds_count"] == grown[f'foejax_{name}_seconds_bucket{{le="+Inf"}}'] == count
        assert grown[f"foejax_{name}_seconds_sum"] > 0
    for name in ("sequences_running", "sequences_waiting", "kv_cache_used_ratio", "preemptions_total"):
        assert after[f"foejax_{name}"] == 0
    assert after["foejax_expert_imbalance_ratio"] == 2
