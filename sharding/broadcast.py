"""What process 0 tells the others, in order, over TCP: work that nobody knows of before it comes.

Who waits for a message runs nothing on its devices, so that hours without one cost nothing and time out nowhere.
`hosts.open_broadcast` makes both ends. Plain Python without JAX. Nothing is encrypted, as with the roll call; whoever
does not know the key is sent nothing.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time

from sharding.roll_call import StartError, name_processes, split_address

_HELLO = struct.Struct("!II")
"""key, rank"""
_SIZE = struct.Struct("!Q")
_HELLO_TIMEOUT = 5.0
"""Seconds in which one who connects says who it is."""


class Sender:
    """Process 0's end."""

    def __init__(self, listener: socket.socket, num_processes: int, key: int, timeout: float) -> None:
        """Wait until all others are there.

        Args:
          listener: where they connect; closed afterwards.
          num_processes: this one included.
          key: from 0 to 2**32 - 1; they know it.
          timeout: seconds.

        Raises:
          StartError: some are not there in time; names them.
        """
        self._connections: dict[int, socket.socket] = {}
        self._sending = threading.Lock()
        self._is_asked_to_end = False
        deadline = time.monotonic() + timeout
        with listener:
            while missing := [rank for rank in range(1, num_processes) if rank not in self._connections]:
                listener.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    self.close()
                    who = f"{name_processes(missing)} of {num_processes}"
                    raise StartError(f"missing after {timeout:.0f} s: {who}; see their output") from None
                self._admit(connection, missing, key)

    def _admit(self, connection: socket.socket, missing: list[int], key: int) -> None:
        try:
            connection.settimeout(_HELLO_TIMEOUT)
            found, rank = _HELLO.unpack(_receive_exactly(connection, _HELLO.size))
            if found != key or rank not in missing:
                raise ConnectionError("not one of ours")
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            connection.close()
        else:
            self._connections[rank] = connection

    def send(self, message: bytes) -> None:
        """Send to all others; from any thread.

        Raises:
          ConnectionError: one is gone.
        """
        framed = _SIZE.pack(len(message)) + message
        with self._sending:
            for connection in self._connections.values():
                connection.sendall(framed)

    def is_asked_to_end(self) -> bool:
        """Whether some other process has called `ask_to_end`; does not wait."""
        waiting = [] if self._is_asked_to_end else select.select([*self._connections.values()], [], [], 0)[0]
        for connection in waiting:
            with contextlib.suppress(OSError):
                self._is_asked_to_end |= bool(connection.recv(1))
        return self._is_asked_to_end

    def close(self) -> None:
        """Hang up."""
        for connection in self._connections.values():
            connection.close()


class Receiver:
    """The end of every other process."""

    def __init__(self, address: str, rank: int, key: int, timeout: float) -> None:
        """Connect to process 0.

        Args:
          address: `host:port`.
          rank: of this process.
          key: as process 0 knows it.
          timeout: seconds.

        Raises:
          OSError: nobody answers there.
        """
        self._connection = socket.create_connection(split_address(address), timeout=timeout)
        self._connection.settimeout(None)
        self._connection.sendall(_HELLO.pack(key, rank))

    def receive(self) -> bytes:
        """The next message, however long it takes.

        Raises:
          ConnectionError: process 0 has hung up.
        """
        (size,) = _SIZE.unpack(_receive_exactly(self._connection, _SIZE.size))
        return _receive_exactly(self._connection, size)

    def ask_to_end(self) -> None:
        """Ask process 0 to bring the work to its end; may be called in a signal handler."""
        with contextlib.suppress(OSError):
            self._connection.send(b"!")

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise ConnectionError("process 0 has closed the connection over which it says what comes next")
        view = view[count:]
    return bytes(data)
