"""`foejax serve`: a model behind an OpenAI-compatible HTTP server."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from foejax.commands.engine_options import engine_config_of
from foejax.config import ConfigError

EXIT_CUT_OFF = 130
"""Stopped while requests ran."""
_PACKAGES = ("starlette", "uvicorn", "prometheus_client", "jinja2")


def run_serve(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """Load, compile, serve until a signal, finish what runs."""
    _check_packages()
    from foejax.serving.engine_thread import EngineThread
    from foejax.serving.llm import LLM
    from foejax.serving.server.app import ServedModel, make_app
    from foejax.serving.server.chat_template import ChatTemplate
    from foejax.serving.server.process import Server, bind, url_of

    config = engine_config_of(options, score_prompts=True, report_experts=True)
    with bind(options.host, options.port) as bound:  # an address in use is told before the minutes of loading
        folder = Path(options.folder)
        llm = LLM(folder, config, devices=options.devices or 0, dtype=options.dtype)
        thread = EngineThread(llm.engine, max_waiting=options.max_waiting)
        model = ServedModel(
            name=options.name or folder.resolve().name,
            engine=thread,
            tokenizer=llm.tokenizer,
            chat_template=ChatTemplate.from_folder(folder, llm.tokenizer) if llm.tokenizer else None,
            request_timeout=options.request_timeout,
        )
        server = Server(
            make_app(model),
            thread,
            drain_timeout=options.drain_timeout,
            on_ready=lambda: print(f"serving {model.name} at {url_of(bound)}", flush=True),
        )
        return 0 if server.serve_at(bound) else EXIT_CUT_OFF


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
