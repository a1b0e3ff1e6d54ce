"""Runs a trace against a server with OpenAI's API: `/v1/completions`, streaming."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foejax.serving.load.latency import RequestRecord
from foejax.serving.load.trace import LoadError, Trace, TracedRequest

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True)
class Server:
    """Where to send requests.

    Attributes:
      url: with or without `/v1` at its end.
      model: name by which the server knows the model.
      api_key: sent as a bearer token; "" sends none.
      timeout: seconds after which a request fails.
    """

    url: str
    model: str
    api_key: str = ""
    timeout: float = 600.0

    @property
    def completions(self) -> str:
        """Address of the endpoint."""
        base = self.url.rstrip("/")
        return f"{base if base.endswith('/v1') else base + '/v1'}/completions"


class _Refused(Exception):
    """The server answered, but not with a continuation."""


def run_over_http(server: Server, trace: Trace) -> list[RequestRecord]:
    """One record for each request of the trace, in its order; greedy, past the end of the text where the server can.

    A burst is an event of the stream. How many tokens it holds is read off its `token_ids` or `logprobs`; where it has
    neither, the tokens of the final `usage` are spread evenly over the events with text, or, without one, each event
    counts as a token. Only the figures of gaps depend on that.

    Raises:
      LoadError: httpx is not there, or the address answers no request.
    """
    try:
        import httpx
    except ImportError:
        raise LoadError("a server is measured with httpx, which is not installed: pip install httpx") from None

    async def run() -> list[RequestRecord]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        headers = {"authorization": f"Bearer {server.api_key}"} if server.api_key else {}
        async with httpx.AsyncClient(limits=limits, timeout=None, headers=headers) as client:
            fields = await _find_fields(client, server, trace.requests[0])
            start = time.monotonic()
            return list(
                await asyncio.gather(*(_send(client, server, fields, request, start) for request in trace.requests))
            )

    return asyncio.run(run())


_BEYOND_OPENAI = {"ignore_eos": True, "return_token_ids": True}
"""Fields that most servers know; the others ignore or refuse them."""


async def _find_fields(client: httpx.AsyncClient, server: Server, request: TracedRequest) -> dict[str, Any]:
    """Fields beside the prompt and its output length that the server takes, found with one token of a request."""
    import httpx

    common = {"model": server.model, "temperature": 0}
    for fields in (common | _BEYOND_OPENAI, common):
        body = fields | {"prompt": _plain(request.prompt), "max_tokens": 1}
        try:
            response = await client.post(server.completions, json=body, timeout=server.timeout)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise LoadError(
                f"{server.completions} does not answer ({type(error).__name__}: {error}): start the server, or correct "
                "--url"
            ) from None
        if response.status_code == 200:
            return fields
    raise LoadError(
        f"{server.completions} answers {_error_of(response.status_code, response.content)}: correct --url, --model, "
        "the API key or the prompts"
    )


async def _send(
    client: httpx.AsyncClient, server: Server, fields: dict[str, Any], request: TracedRequest, start: float
) -> RequestRecord:
    import httpx

    record = RequestRecord(request.arrival, request.output_tokens)
    await asyncio.sleep(max(0.0, start + request.arrival - time.monotonic()))
    record.sent = time.monotonic() - start
    try:
        async with asyncio.timeout(server.timeout):
            await _stream(client, server, fields, record, request, start)
        record.failure = "" if record.bursts else "no token came"
    except TimeoutError:
        record.failure = "timed out"
    except _Refused as error:
        record.failure = str(error)
    except httpx.HTTPError as error:
        record.failure = f"connection: {type(error).__name__}"
    record.finished = time.monotonic() - start
    return record


async def _stream(
    client: httpx.AsyncClient,
    server: Server,
    fields: dict[str, Any],
    record: RequestRecord,
    request: TracedRequest,
    start: float,
) -> None:
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    body = fields | stream | {"prompt": _plain(request.prompt), "max_tokens": request.output_tokens}
    events: list[tuple[float, int | None]] = []
    usage: dict[str, int] = {}
    ended = False
    async with client.stream("POST", server.completions, json=body) as response:
        if response.status_code != 200:
            raise _Refused(_error_of(response.status_code, await response.aread()))
        async for event in _events(response):
            now = time.monotonic() - start
            if "error" in event:
                raise _Refused(f"in the stream: {_message(event)}")
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                ended |= choice.get("finish_reason") is not None
                known = _tokens_of(choice)
                if known or (known is None and choice.get("text")):
                    events.append((now, known))
    record.prompt_tokens = usage.get("prompt_tokens", 0)
    record.bursts = _spread(events, usage.get("completion_tokens", 0))
    if not ended:
        raise _Refused("the stream broke off")


def _plain(prompt: str | tuple[int, ...]) -> str | list[int]:
    return prompt if isinstance(prompt, str) else list(prompt)


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Objects of a stream of server-sent events, up to `[DONE]`."""
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line[len("data:") :].strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError:
            raise _Refused("an event of the stream is not JSON") from None
        if isinstance(event, dict):
            yield event


def _tokens_of(choice: dict[str, Any]) -> int | None:
    """Tokens that an event says it holds."""
    tokens = choice.get("token_ids")
    if tokens is None:
        tokens = (choice.get("logprobs") or {}).get("tokens")
    return None if tokens is None else len(tokens)


def _spread(events: list[tuple[float, int | None]], total: int) -> list[tuple[float, int]]:
    """Bursts from events, the tokens that nobody placed spread over those that do not say theirs."""
    open_ones = [index for index, (_, known) in enumerate(events) if known is None]
    counts = [known or 0 for _, known in events]
    left = max(total - sum(counts), len(open_ones))
    for place, index in enumerate(open_ones):
        counts[index] = (place + 1) * left // len(open_ones) - place * left // len(open_ones)
    return [(time, count) for (time, _), count in zip(events, counts, strict=True)]


def _error_of(status: int, content: bytes) -> str:
    try:
        return f"{status}: {_message(json.loads(content))}"
    except ValueError:
        return f"{status}: {content[:100].decode(errors='replace')}"


def _message(answer: Any) -> str:
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return " ".join(str(error.get("message", error) if isinstance(error, dict) else error).split())[:200]
