"""Errors in the shape of OpenAI's API."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from foejax.serving.engine_thread import Draining, EngineFailed, EngineStopped, QueueFull, Refused
from foejax.serving.sampling_params import SamplingParamsError

RETRY_AFTER = 1
"""Seconds after which a refused client may try again."""
_LONGEST_MESSAGE = 500


class ApiError(Exception):
    """An answer other than 200.

    Attributes:
      status: of HTTP.
      headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self._message, self._kind, self._param, self._code = message, kind, param, code

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        message = self._message if len(self._message) <= _LONGEST_MESSAGE else self._message[:_LONGEST_MESSAGE] + "..."
        return {"error": {"message": message, "type": self._kind, "param": self._param, "code": self._code}}


def of_refusal(error: Refused) -> ApiError:
    """429 of a full queue, 500 of a request that the engine's failure cut short, else 503."""
    retry = {"Retry-After": str(RETRY_AFTER)}
    match error:
        case QueueFull():
            return ApiError(429, str(error), kind="rate_limit_error", code="rate_limit_exceeded", headers=retry)
        case Draining():
            return ApiError(503, str(error), kind="server_error", code="draining", headers=retry)
        case EngineStopped():
            return ApiError(503, str(error), kind="server_error", code="stopped", headers=retry)
        case EngineFailed():
            return ApiError(503, str(error), kind="server_error", code="engine_failed")
    raise error


def of_bad_value(error: ValueError, param: str | None = None) -> ApiError:
    """400 that names the field where it is known."""
    if isinstance(error, SamplingParamsError):
        param = error.field
    return ApiError(400, str(error), param=param)


def of_validation(error: ValidationError) -> ApiError:
    """400 of the first field that does not fit."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = ".".join(map(str, first["loc"])) or None
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, param=param)
