"""A connection that keeps silent when its far end is lost.

JAX ends a process with SIGABRT at the moment when its connection to process 0 breaks, before anybody can say who is
lost. It is therefore connected through this relay, which tells it nothing of the break: `roll_call` does, by name, and
JAX's own heartbeat remains as the last resort.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time

from sharding.roll_call import split_address


def relay_to(address: str, timeout: float) -> str:
    """Listen on the loopback, pass what comes there on to `address`, and return where to connect.

    Args:
      address: `host:port`; need not listen yet.
      timeout: seconds in which it must begin to.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_accept, args=(listener, address, timeout), name="relay", daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def _accept(listener: socket.socket, address: str, timeout: float) -> None:
    kept = []  # what is garbage is closed, and JAX must not see that
    while True:
        near, _ = listener.accept()
        far = _connect(address, timeout)
        if far is None:
            near.close()
            continue
        kept += [near, far]
        threading.Thread(target=_pass_on, args=(far, near), name="relay", daemon=True).start()
        threading.Thread(target=_pass_out, args=(near, far), name="relay", daemon=True).start()


def _connect(address: str, timeout: float) -> socket.socket | None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            far = socket.create_connection(split_address(address), timeout=timeout)
        except OSError:
            time.sleep(0.05)
        else:
            far.settimeout(None)
            return far
    return None


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)


def _pass_out(near: socket.socket, far: socket.socket) -> None:
    _pass_on(near, far)
    with contextlib.suppress(OSError):
        far.shutdown(socket.SHUT_WR)  # JAX has closed its end itself
