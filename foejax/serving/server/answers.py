"""Answers in the exact shapes of OpenAI's API: objects, and the chunks of streams."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from foejax.serving.engine import Piece
from foejax.serving.llm import Continuation
from foejax.serving.sequence import FinishReason
from foejax.serving.server.token_texts import TokenTexts
from foejax.serving.token_logprobs import TokenLogprobs

Json = dict[str, Any]


@dataclass(frozen=True)
class AnswerOptions:
    """What the request says about the form of its answer.

    Attributes:
      prompts: token ids.
      num_continuations: of each prompt.
      logprobs: likeliest tokens to tell at each place; None tells no log-probabilities.
      echoes: texts to put before the continuations of each prompt.
      token_ids: tell token ids too.
      include_usage: a stream ends with the numbers of tokens.
    """

    prompts: Sequence[Sequence[int]]
    num_continuations: int
    logprobs: int | None = None
    echoes: Sequence[str] | None = None
    token_ids: bool = False
    include_usage: bool = False


class Answer(ABC):
    """One answer in the making; choice `p * n + i` is continuation i of prompt p."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, model: str, options: AnswerOptions, texts: TokenTexts) -> None:
        self.options, self._texts = options, texts
        self._head = {"id": f"{self.id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        count = len(options.prompts) * options.num_continuations
        self._continuations = [Continuation() for _ in range(count)]
        self._prompt_logprobs: dict[int, Sequence[TokenLogprobs | None]] = {}

    def take(self, prompt: int, piece: Piece) -> Json | None:
        """Add a piece of the prompt of that index, and return it as a chunk; None for what goes into the next one."""
        choice = prompt * self.options.num_continuations + piece.index
        if piece.prompt_logprobs is not None:
            self._prompt_logprobs[prompt] = piece.prompt_logprobs
            return None
        continuation = self._continuations[choice]
        part = Continuation()
        part.extend(piece)
        chunk = self._chunk([self._part(choice, part, first=not continuation.tokens)])
        continuation.extend(piece)
        return chunk

    def opening(self) -> list[Json]:
        """Chunks before the first piece."""
        return []

    def closing(self) -> list[Json]:
        """Chunks after the last piece."""
        return [self._chunk([]) | {"usage": self._usage()}] if self.options.include_usage else []

    def whole(self) -> Json:
        """The answer that is not streamed."""
        choices = [self._choice(index, continuation) for index, continuation in enumerate(self._continuations)]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": self._usage()}

    @abstractmethod
    def _part(self, choice: int, part: Continuation, *, first: bool) -> Json:
        """A piece as an element of a chunk's choices; `first` where its continuation has no tokens yet."""

    @abstractmethod
    def _choice(self, choice: int, continuation: Continuation) -> Json:
        """A continuation as an element of the whole answer's choices."""

    def _chunk(self, choices: list[Json]) -> Json:
        usage = {"usage": None} if self.options.include_usage else {}
        return {**self._head, "object": self.chunk_object, "choices": choices, **usage}

    def _usage(self) -> Json:
        prompt = sum(map(len, self.options.prompts))
        completion = sum(len(continuation.tokens) for continuation in self._continuations)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    id_prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, options: AnswerOptions, texts: TokenTexts) -> None:
        super().__init__(model, options, texts)
        self._offsets = [0] * len(self._continuations)

    def _part(self, choice: int, part: Continuation, *, first: bool) -> Json:
        found = self._logprobs(choice, part, first)
        return self._form(choice, (self._echo(choice) if first else "") + part.text, part, found, first)

    def _choice(self, choice: int, continuation: Continuation) -> Json:
        self._offsets[choice] = 0
        found = self._logprobs(choice, continuation, True)
        return self._form(choice, self._echo(choice) + continuation.text, continuation, found, True)

    def _form(self, choice: int, text: str, part: Continuation, logprobs: Json | None, first: bool) -> Json:
        options = self.options
        form: Json = {
            "index": choice,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": _finish_reason(part.finish_reason),
        }
        if options.token_ids:
            form["token_ids"] = part.tokens
            form["prompt_token_ids"] = list(options.prompts[choice // options.num_continuations]) if first else None
        return form

    def _echo(self, choice: int) -> str:
        echoes = self.options.echoes
        return echoes[choice // self.options.num_continuations] if echoes else ""

    def _logprobs(self, choice: int, part: Continuation, first: bool) -> Json | None:
        """Of a continuation's next tokens; their offsets go on where those of the last call ended.

        An echoed prompt's tokens stand before those of the first part; the first of them has no log-probability.
        """
        if self.options.logprobs is None:
            return None
        places: list[tuple[int, TokenLogprobs | None]] = list(zip(part.tokens, part.logprobs or [], strict=True))
        if first and self.options.echoes is not None:
            prompt = choice // self.options.num_continuations
            tokens = self.options.prompts[prompt]
            # There are none where the request's time ran out before the prompt was scored.
            known = (None, *self._prompt_logprobs.get(prompt, [None] * (len(tokens) - 1)))
            # The echo may lack special tokens of the prompt's start, but where it ends the continuation begins.
            self._offsets[choice] = len(self._echo(choice)) - sum(len(self._texts.text(token)) for token in tokens)
            places = [*zip(tokens, known, strict=True), *places]
        found: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, own in places:
            text = self._texts.text(token)
            found["tokens"].append(text)
            found["token_logprobs"].append(own.logprob if own else None)
            found["top_logprobs"].append(self._top(text, own) if own else None)
            found["text_offset"].append(max(self._offsets[choice], 0))
            self._offsets[choice] += len(text)
        return found

    def _top(self, text: str, own: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens and the chosen one; of several with the same text the likeliest."""
        top: dict[str, float] = {}
        for token, logprob in zip(own.top_tokens, own.top_logprobs, strict=True):
            top.setdefault(self._texts.text(token), logprob)
        top.setdefault(text, own.logprob)
        return top


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    id_prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[Json]:
        """Who speaks, for each choice."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": choice, "delta": delta, "logprobs": None, "finish_reason": None}])
            for choice in range(len(self._continuations))
        ]

    def _part(self, choice: int, part: Continuation, *, first: bool) -> Json:
        return {
            "index": choice,
            "delta": {"content": part.text} if part.text or part.finish_reason is None else {},
            "logprobs": self._logprobs(part),
            "finish_reason": _finish_reason(part.finish_reason),
        }

    def _choice(self, choice: int, continuation: Continuation) -> Json:
        return {
            "index": choice,
            "message": {"role": "assistant", "content": continuation.text, "refusal": None},
            "logprobs": self._logprobs(continuation),
            "finish_reason": _finish_reason(continuation.finish_reason),
        }

    def _logprobs(self, part: Continuation) -> Json | None:
        if self.options.logprobs is None:
            return None
        content = []
        for token, own in zip(part.tokens, part.logprobs or [], strict=True):
            top = zip(own.top_tokens, own.top_logprobs, strict=True)
            content.append(self._token(token, own.logprob) | {"top_logprobs": [self._token(*one) for one in top]})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        text = self._texts.text(token)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def _finish_reason(reason: FinishReason | None) -> str | None:
    """OpenAI's names: a request whose time ran out was cut short like one that got too long."""
    return None if reason is None else str(FinishReason.STOP if reason == FinishReason.STOP else FinishReason.LENGTH)
