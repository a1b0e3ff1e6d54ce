"""`foejax serve`: a model behind an OpenAI-compatible HTTP server."""

from __future__ import annotations

import argparse
import importlib
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foejax.commands.engine_options import engine_config_of
from foejax.config import ConfigError

if TYPE_CHECKING:
    from foejax.serving.llm import LLM

EXIT_CUT_OFF = 130
"""Stopped while requests ran."""
_PACKAGES = ("starlette", "uvicorn", "prometheus_client", "jinja2")


def run_serve(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Load, compile, serve until a signal, finish what runs; of several processes, process 0 has the server."""
    import jax

    if jax.process_index() == 0:
        return _lead(options)
    return _follow(options)


def _lead(options: argparse.Namespace) -> int:
    _check_packages()
    from foejax.serving.engine_thread import EngineThread
    from foejax.serving.processes import Leader
    from foejax.serving.server.app import ServedModel, make_app
    from foejax.serving.server.chat_template import ChatTemplate
    from foejax.serving.server.process import Server, bind, url_of

    with bind(options.host, options.port) as bound:  # an address in use is told before the minutes of loading
        folder = Path(options.folder)
        llm = _load(options)
        thread = EngineThread(llm.engine, max_waiting=options.max_waiting)
        model = ServedModel(
            name=options.name or folder.resolve().name,
            engine=thread,
            tokenizer=llm.tokenizer,
            chat_template=ChatTemplate.from_folder(folder, llm.tokenizer) if llm.tokenizer else None,
            request_timeout=options.request_timeout,
        )
        leader = llm.part if isinstance(llm.part, Leader) else None
        server = Server(
            make_app(model),
            thread,
            drain_timeout=options.drain_timeout,
            on_ready=lambda: print(f"serving {model.name} at {url_of(bound)}", flush=True),
            # A failed engine has left the others somewhere inside a step: all have to start anew.
            ends_too=lambda: leader is not None and (leader.is_asked_to_end() or thread.failure is not None),
        )
        all_answered = server.serve_at(bound)
        llm.release()
        return 0 if all_answered else EXIT_CUT_OFF


def _follow(options: argparse.Namespace) -> int:
    """Compute what process 0 serves; a signal here makes process 0 end as if it came there."""
    from foejax.serving.processes import Follower

    llm = _load(options)
    assert isinstance(llm.part, Follower)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_, part=llm.part: part.ask_to_end())
    llm.follow()
    return 0


def _load(options: argparse.Namespace) -> LLM:
    from foejax.serving.llm import LLM

    config = engine_config_of(options, score_prompts=True, report_experts=True)
    return LLM(Path(options.folder), config, devices=options.devices or 0, dtype=options.dtype)


def _check_packages() -> None:
    """
    Raises:
      ConfigError: the extra `serve` is not installed.
    """
    for package in _PACKAGES:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise ConfigError(f"serving needs {error.name}: pip install foejax[serve]") from error
