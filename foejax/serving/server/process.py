"""The server's process: its socket, its signals, its end."""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from foejax.config import ConfigError
from foejax.serving.engine_thread import EngineThread

_LAST_WRITES = 2.0
"""Seconds in which answers that are ready still reach their clients."""
_LAST_STEP = 10.0
"""Seconds in which the engine's thread ends its step."""


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which does not listen yet; port 0 takes a free one.

    Raises:
      ConfigError: no such host, or the port is in use.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise ConfigError(f"{host} port {port}: {error.strerror}: choose another --host or --port") from error
    return bound


def url_of(bound: socket.socket) -> str:
    """Where clients find it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves until a signal, then finishes what runs while new requests get 503; a second signal ends it at once."""

    def __init__(
        self,
        app: ASGIApp,
        engine: EngineThread,
        *,
        drain_timeout: float,
        on_ready: Callable[[], None] = lambda: None,
        ends_too: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
          engine: its thread, which this starts and stops.
          drain_timeout: seconds for what runs when the first signal comes.
          on_ready: called when requests are taken.
          ends_too: asked ten times a second; True counts as a first signal.
        """
        super().__init__(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=int(_LAST_WRITES))
        )
        self._engine, self._drain_timeout = engine, drain_timeout
        self._on_ready, self._ends_too = on_ready, ends_too
        self._num_signals = 0
        self._drain_end = math.inf
        self._all_answered = False

    def serve_at(self, bound: socket.socket) -> bool:
        """Serve until it is over; whether every request that was taken got its answer."""
        self._engine.start()
        try:
            with contextlib.closing(bound):
                self.run(sockets=[bound])
            return self._all_answered
        finally:
            self._engine.stop(_LAST_STEP)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: noted here, acted on by the next tick, because a handler must not wait for a lock."""
        self._num_signals += 1

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: True ends the loop."""
        if self._drain_end == math.inf and (self._num_signals or self._ends_too()):
            self._engine.drain()
            self._drain_end = time.monotonic() + self._drain_timeout
        is_draining = self._drain_end < math.inf
        if is_draining and (self._engine.is_idle or self._num_signals > 1 or time.monotonic() >= self._drain_end):
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell those who still wait, and close."""
        self._all_answered = self._engine.is_idle and self._engine.failure is None
        self._engine.stop(0)
        self.force_exit = self.force_exit or self._num_signals > 1
        await super().shutdown(sockets)
