"""One HTTP exchange: a body of bounded size, and work that ends when its client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from foejax.serving.engine_thread import PieceStream, Refused
from foejax.serving.server.answers import Answer, Json
from foejax.serving.server.errors import ApiError, of_refusal

LARGEST_BODY = 4 << 20
_MOST_DISCARDED = 16 * LARGEST_BODY
"""Bytes that are read on and dropped, so that a client who is still sending gets to read the answer."""

Result = TypeVar("Result")


async def read_body(request: Request) -> bytes:
    """
    Raises:
      ApiError: not sent as JSON, or too large.
      ClientDisconnect: it did not come to its end.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= LARGEST_BODY:
            parts.append(part)
        elif size > _MOST_DISCARDED:
            break
    if size > LARGEST_BODY:
        raise ApiError(413, f"the body is larger than {LARGEST_BODY} bytes", code="body_too_large")
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"content type {kind!r} is not application/json", code="unsupported_media_type")
    return b"".join(parts)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """What the work returns.

    Args:
      receive: of a request whose body has been read.

    Raises:
      ClientDisconnect: the client went away, and the work was cancelled.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_wait_until_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def collect(pieces: PieceStream, answer: Answer) -> Json:
    """The answer when all pieces have come.

    Raises:
      Refused: the engine ended before.
    """
    prompts = {request_id: index for index, request_id in enumerate(pieces.request_ids)}
    async for piece in pieces:
        answer.take(prompts[piece.request_id], piece)
    return answer.whole()


class EventStream(Response):
    """The answer piece by piece as server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, pieces: PieceStream, answer: Answer) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._pieces, self._answer = pieces, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.closing(self._pieces), contextlib.suppress(ClientDisconnect):
            await while_connected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events():
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        answer = self._answer
        prompts = {request_id: index for index, request_id in enumerate(self._pieces.request_ids)}
        for opening in answer.opening():
            yield _event(opening)
        try:
            async for piece in self._pieces:
                chunk = answer.take(prompts[piece.request_id], piece)
                if chunk is not None:
                    yield _event(chunk)
        except Refused as error:
            yield _event(of_refusal(error).body())
        else:
            for closing in answer.closing():
                yield _event(closing)
        yield b"data: [DONE]\n\n"


def _event(content: Json) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
