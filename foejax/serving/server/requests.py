"""What clients may ask for: OpenAI's fields, the usual further ones of open servers, and nothing else counts.

Types are strict, null is the default, unknown fields are ignored. Fields that would change the answer and that the
engine does not have are refused unless they are neutral.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator
from pydantic_core import from_json

from foejax.serving.sampling_params import SamplingParams
from foejax.serving.server.errors import ApiError, of_bad_value, of_validation

_MOST_STOPS = 16
_LONGEST_STOP = 256
_MOST_STOP_TOKENS = 256

Prompt = str | list[int]
Request = TypeVar("Request", bound=BaseModel)


def _as_list(value: Any) -> Any:
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


def _read_prompts(value: Any) -> list[Prompt]:
    """A text, texts, token ids, or lists of token ids, as a list."""
    listed = [value] if isinstance(value, str) or _is_token_list(value) else value
    if not isinstance(listed, list) or not listed:
        raise ValueError("give a text, a list of texts, a list of token ids, or a list of such lists")
    if not all(isinstance(prompt, str) for prompt in listed) and not all(map(_is_token_list, listed)):
        raise ValueError("give a text, a list of texts, a list of token ids, or a list of such lists, none empty")
    return listed


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _read_content(value: Any) -> str:
    """A text, or the text parts of a message one after another."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise ValueError("give a text or a list of parts")
    texts = [part.get("text") for part in value if part.get("type") == "text"]
    if len(texts) < len(value) or not all(isinstance(text, str) for text in texts):
        raise ValueError('only parts like {"type": "text", "text": "..."} are understood')
    return "".join(texts)


def _refuse_unless_neutral(value: Any) -> None:
    if value not in (None, 0, [], {}, "", "none", "auto", {"type": "text"}):
        raise ValueError("this server does not have it: leave it out")


Stops = Annotated[
    list[Annotated[str, Field(max_length=_LONGEST_STOP)]], BeforeValidator(_as_list), Field(max_length=_MOST_STOPS)
]
Unsupported = Annotated[None, PlainValidator(_refuse_unless_neutral)]


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    model_config = ConfigDict(strict=True)
    include_usage: bool | None = None


class SamplingRequest(BaseModel):
    """Fields that completions and chat completions share; see `SamplingParams`."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    n: int | None = None
    stop: Stops = []
    stop_token_ids: Annotated[list[int], BeforeValidator(_as_list), Field(max_length=_MOST_STOP_TOKENS)] = []
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Unsupported = None
    presence_penalty: Unsupported = None
    logit_bias: Unsupported = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream=true")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def to_params(
        self,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        end_tokens: tuple[int, ...] = (),
    ) -> SamplingParams:
        """
        Args:
          end_tokens: further ones that end the text, unless it is to go on past its end.

        Raises:
          ApiError: a value is out of range.
        """
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0 if self.top_k == -1 else self.top_k,  # -1 is "all" elsewhere
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "n": self.n,
            "ignore_eos": self.ignore_eos,
        }
        stop_token_ids = (*self.stop_token_ids, *(() if self.ignore_eos else end_tokens))
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                seed=self.seed,
                stop=tuple(self.stop),
                stop_token_ids=stop_token_ids,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
            )
        except ValueError as error:
            raise of_bad_value(error) from None


class CompletionRequest(SamplingRequest):
    """Body of /v1/completions.

    Attributes:
      echo: put the prompt before its continuation.
      return_token_ids: add `token_ids` and `prompt_token_ids` to the choices.
    """

    prompt: Annotated[list[Prompt], PlainValidator(_read_prompts)]
    logprobs: int | None = None
    echo: bool | None = None
    return_token_ids: bool | None = None
    suffix: Unsupported = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if self.best_of is not None and self.best_of != (1 if self.n is None else self.n):
            raise ValueError("best_of: this server returns all continuations: leave it out or set it to n")
        return self


class Message(BaseModel):
    """One message of a conversation; further fields go to the chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[str, PlainValidator(_read_content)] = ""


class ChatRequest(SamplingRequest):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Unsupported = None
    functions: Unsupported = None
    tool_choice: Unsupported = None
    function_call: Unsupported = None
    response_format: Unsupported = None

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs=true")
        return self


def parse(kind: type[Request], body: bytes) -> Request:
    """Read a request.

    Raises:
      ApiError: not JSON, or not such a request.
    """
    try:
        content = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise of_validation(error) from None
