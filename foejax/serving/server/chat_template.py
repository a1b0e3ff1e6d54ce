"""Conversations as the text, and the tokens, that a model was tuned on."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from foejax.config import ConfigError
from foejax.data import Tokenizer
from foejax.serving.server.errors import ApiError

logger = logging.getLogger(__name__)

_TEMPLATE_FILE = "chat_template.jinja"
_SETTINGS_FILE = "tokenizer_config.json"
_GENERATION_FILE = "generation_config.json"
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_BREAK = "\ufdd0"
"""A code point that is no character: it breaks up special tokens that a message spells."""


class ChatTemplate:
    """A chat template in Jinja, as Hugging Face's tokenizers carry it.

    The template's special tokens become special; the same letters in a message are ordinary text, so that nobody can
    speak for somebody else.

    Attributes:
      end_tokens: any of them ends the model's turn.
    """

    def __init__(
        self, source: str, tokenizer: Tokenizer, *, special: dict[str, str], end_tokens: Sequence[int] = ()
    ) -> None:
        """
        Args:
          source: the template.
          special: text of `bos_token` and so on, for the template.

        Raises:
          ConfigError: the source is not a template.
        """
        self.end_tokens = tuple(end_tokens)
        self._tokenizer, self._special = tokenizer, special
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: time.strftime(form)}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"the chat template is not valid Jinja: {error}") from error
        longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
        self._any_special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @classmethod
    def from_folder(cls, folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template in chat_template.jinja or tokenizer_config.json; None where there is none, or a broken one."""
        settings, generation = _read_json(folder / _SETTINGS_FILE), _read_json(folder / _GENERATION_FILE)
        path = folder / _TEMPLATE_FILE
        source = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not isinstance(source, str):
            return None
        special = {name: _content(settings[name]) for name in _SPECIAL if settings.get(name)}
        ends = generation.get("eos_token_id", [])
        ends = {
            *(ends if isinstance(ends, list) else [ends]),
            tokenizer.special_tokens.get(special.get("eos_token", "")),
        }
        try:
            return cls(source, tokenizer, special=special, end_tokens=sorted(ends - {None}))
        except ConfigError as error:
            logger.warning("%s: %s; chat completions are off", folder, error)
            return None

    def encode(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to where the model's answer begins.

        Raises:
          ApiError: the template does not take such messages.
        """
        try:
            text = self._template.render(
                messages=_map_texts(messages, self._guard), add_generation_prompt=True, **self._special
            )
        except Exception as error:  # templates fail in all ways on messages that they do not expect
            raise ApiError(
                400, f"the model's chat template refuses the messages: {error}", param="messages", code="chat_template"
            ) from error
        if _BREAK not in text:
            return self._tokenizer.encode_with_special_tokens(text)
        tokens, end = [], 0
        for match in self._any_special.finditer(text):
            tokens += self._encode_plain(text[end : match.start()])
            tokens.append(self._tokenizer.special_tokens[match.group()])
            end = match.end()
        return tokens + self._encode_plain(text[end:])

    def _guard(self, text: str) -> str:
        text = text.replace(_BREAK, "")
        return self._any_special.sub(lambda match: match.group()[0] + _BREAK + match.group()[1:], text)

    def _encode_plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text.replace(_BREAK, ""))


class _Generation(Extension):
    """`{% generation %}`, which marks what an assistant says for training: here just its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _map_texts(value: Any, change: Any) -> Any:
    """A JSON value with every text changed, keys left alone."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_texts(item, change) for key, item in value.items()}
    return [_map_texts(item, change) for item in value] if isinstance(value, (list, tuple)) else value


def _content(token: Any) -> str:
    """A special token as tokenizer_config.json has it: its text, or an object around it."""
    return str(token["content"] if isinstance(token, dict) else token)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}): copy it again") from error
    return content if isinstance(content, dict) else {}


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
