"""The web application: OpenAI's routes over one engine thread."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from foejax.data import Tokenizer
from foejax.serving.engine_thread import EngineThread, PieceStream, Refused
from foejax.serving.sampling_params import SamplingParams
from foejax.serving.server.answers import Answer, AnswerOptions, ChatAnswer, CompletionAnswer, Json
from foejax.serving.server.chat_template import ChatTemplate
from foejax.serving.server.connection import EventStream, collect, read_body, while_connected
from foejax.serving.server.errors import ApiError, of_bad_value, of_refusal
from foejax.serving.server.metrics import make_registry
from foejax.serving.server.requests import ChatRequest, CompletionRequest, Prompt, parse
from foejax.serving.server.token_texts import TokenTexts

_LONG_TEXT = 1 << 14
"""Characters above which a text is encoded beside the event loop, so that others do not wait for it."""
_CLIENT_CLOSED = 499


@dataclass(frozen=True)
class ServedModel:
    """What is behind the routes.

    Attributes:
      name: by which clients ask for the model.
      tokenizer: None lets clients send and get token ids alone.
      chat_template: None answers no chats.
      request_timeout: seconds after which a request ends with what it has.
      created: when the server began, in seconds since 1970.
    """

    name: str
    engine: EngineThread
    tokenizer: Tokenizer | None = None
    chat_template: ChatTemplate | None = None
    request_timeout: float | None = None
    created: int = field(default_factory=lambda: int(time.time()))


def make_app(model: ServedModel) -> Starlette:
    """The application. The engine's thread is started and stopped by others."""
    api = _Api(model)
    app = Starlette(
        routes=[
            Route("/v1/completions", api.complete, methods=["POST"]),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/models", api.list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", api.show_model, methods=["GET"]),
            Route("/health", api.health, methods=["GET"]),
            Route("/metrics", api.metrics, methods=["GET"]),
        ],
        exception_handlers={
            ApiError: _answer_error,
            Refused: _answer_refusal,
            HTTPException: _answer_http_error,
            ClientDisconnect: _answer_nobody,
            Exception: _answer_own_error,
        },
    )
    app.router.redirect_slashes = False
    return app


class _Api:
    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._texts = TokenTexts(model.tokenizer)
        self._registry = make_registry(model.engine)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions"""
        asked = parse(CompletionRequest, await read_body(request))
        self._check(asked.model)
        prompts = [await self._encode(prompt) for prompt in asked.prompt]
        params = asked.to_params(
            max_tokens=_given(asked.max_tokens, 16),
            logprobs=asked.logprobs,
            prompt_logprobs=asked.logprobs if asked.echo else None,
        )
        pieces = self._submit(prompts, params, asked.max_tokens)
        options = AnswerOptions(
            prompts=prompts,
            num_continuations=params.n,
            logprobs=asked.logprobs,
            echoes=[self._read(prompt) for prompt in asked.prompt] if asked.echo else None,
            token_ids=bool(asked.return_token_ids),
            include_usage=asked.include_usage,
        )
        answer = CompletionAnswer(self._model.name, options, self._texts)
        return await self._answer(request, pieces, answer, stream=bool(asked.stream))

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        asked = parse(ChatRequest, await read_body(request))
        self._check(asked.model)
        template = self._model.chat_template
        if template is None:
            raise ApiError(400, "the model has no chat template: use /v1/completions", code="no_chat_template")
        prompt = template.encode([message.model_dump() for message in asked.messages])
        most = _given(asked.max_completion_tokens, asked.max_tokens)
        logprobs = _given(asked.top_logprobs, 0) if asked.logprobs else None
        params = asked.to_params(max_tokens=most, logprobs=logprobs, end_tokens=template.end_tokens)
        pieces = self._submit([prompt], params, most)
        options = AnswerOptions([prompt], params.n, logprobs, include_usage=asked.include_usage)
        answer = ChatAnswer(self._model.name, options, self._texts)
        return await self._answer(request, pieces, answer, stream=bool(asked.stream))

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models"""
        return JSONResponse({"object": "list", "data": [self._describe()]})

    async def show_model(self, request: Request) -> Response:
        """GET /v1/models/NAME"""
        self._check_name(request.path_params["name"])
        return JSONResponse(self._describe())

    async def health(self, request: Request) -> Response:
        """GET /health: 200 where a request would be taken, or would be once others are done; else 503."""
        self._model.engine.check_open(0)
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics"""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    def _describe(self) -> Json:
        model = self._model
        context = model.engine.engine.context
        described = {"id": model.name, "object": "model", "created": model.created, "owned_by": "foejax"}
        return described | {"max_model_len": context}

    def _check(self, name: str | None) -> None:
        """Refuse early what is refused anyway, before a prompt is encoded."""
        if name is not None:
            self._check_name(name)
        self._model.engine.check_open()

    def _check_name(self, name: str) -> None:
        if name != self._model.name:
            message = f"the model {name!r} does not exist: this server has {self._model.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        tokenizer = self._model.tokenizer
        if tokenizer is None:
            raise ApiError(400, "the model has no tokenizer: give prompts as token ids", param="prompt")
        if len(prompt) < _LONG_TEXT:
            return tokenizer.encode(prompt, start_of_document=True)
        return await asyncio.to_thread(tokenizer.encode, prompt, start_of_document=True)

    def _read(self, prompt: Prompt) -> str:
        """The text of a prompt."""
        if isinstance(prompt, str):
            return prompt
        return self._model.tokenizer.decode(prompt) if self._model.tokenizer else ""

    def _submit(self, prompts: Sequence[list[int]], params: SamplingParams, max_tokens: int | None) -> PieceStream:
        """
        Args:
          max_tokens: what the client asked for; all of them have to fit.
        """
        engine, longest = self._model.engine, max(map(len, prompts))
        context = engine.engine.context
        if longest >= context or (max_tokens is not None and longest + max_tokens > context):
            raise ApiError(
                400,
                f"the context is {context} tokens, the prompt has {longest} and max_tokens is {max_tokens}: together "
                "they must fit, with at least one token to generate",
                param="prompt" if longest >= context else "max_tokens",
                code="context_length_exceeded",
            )
        try:
            return engine.submit(prompts, params, timeout=self._model.request_timeout)
        except ValueError as error:
            raise of_bad_value(error, "prompt") from None

    async def _answer(self, request: Request, pieces: PieceStream, answer: Answer, *, stream: bool) -> Response:
        if stream:
            return EventStream(pieces, answer)
        with contextlib.closing(pieces):
            return JSONResponse(await while_connected(request.receive, collect(pieces, answer)))


def _given(value: int | None, default: int | None) -> int | None:
    return default if value is None else value


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _answer_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return await _answer_error(request, of_refusal(error))


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return await _answer_error(request, ApiError(error.status_code, message, headers=dict(error.headers or {})))


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED)


async def _answer_own_error(request: Request, error: Exception) -> Response:
    return await _answer_error(request, ApiError(500, "the server made a mistake", kind="server_error"))
