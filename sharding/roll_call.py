"""Who takes part in a run of several processes, and who has gone: names for what JAX's own start-up leaves unnamed.

Process 0 holds one TCP connection to every process, itself included, for as long as the run lasts. A connection that
closes without a goodbye is a lost process; everybody hears which one and ends. Lines of JSON, both ways:

  to process 0       {"join": 1, "of": 2, "host": "a"}   {"at": "start"}   {"who": "start"}   {"bye": 0, "reason": ""}
  from process 0     {"hosts": ["a", "b"]}   {"absent": [1]}   {"refused": "..."}   {"passed": "start"}
                     {"late": [1]}   {"lost": [1]}   {"failed": 1, "reason": "..."}   {"done": true}

Plain Python without JAX. Nothing is encrypted and nobody is asked for a password, as with JAX's own coordinator: the
port belongs into a network that is trusted.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import selectors
import socket
import threading
import time
from typing import Any

EXIT_LOST = 69  # EX_UNAVAILABLE of sysexits.h
"""Exit code of a process that ends because another one is lost or has failed."""
HOST_TIMEOUT = 30
"""Seconds after which a host that answers no more counts as lost; a process that ends is noticed at once."""
FAILURE_GRACE = 10.0
"""Seconds that the others have to end by themselves after one process has failed."""

_TOGETHER = 0.3
"""Seconds in which processes are lost together, as with a host, and are named together."""
_MAX_LINE = 1 << 20


class StartError(ConnectionError):
    """Not all processes of a run have come; the message names those that are missing."""


class RollCallServer:
    """Process 0's side: one thread that answers all processes until each has said goodbye.

    Args:
      listener: from `listen`; closed once all are there, so that JAX's coordinator can take its port.
      num_processes: how many are expected.
      timeout: seconds until those that have not come are missing.
    """

    def __init__(self, listener: socket.socket, num_processes: int, timeout: float) -> None:
        self._listener, self._num_processes = listener, num_processes
        self._deadline: float | None = time.monotonic() + timeout
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._connections: dict[int, socket.socket] = {}
        self._hosts: dict[int, str] = {}
        self._arrived: dict[str, set[int]] = {}
        self._gone: set[int] = set()
        self._lost: set[int] = set()
        self._is_over = False
        threading.Thread(target=self._serve, name="roll_call", daemon=True).start()

    def _serve(self) -> None:
        while not self._is_over:
            left = None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)
            for key, _ in self._selector.select(left):
                if key.fileobj is self._listener:
                    with contextlib.suppress(OSError):  # gone again, or the listener closed in this very round
                        connection, _ = self._listener.accept()
                        _keep_alive(connection)
                        self._selector.register(connection, selectors.EVENT_READ, _Lines(connection))
                else:
                    self._read(key.data)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._time_is_up()
        self._listener.close()

    def _read(self, lines: _Lines) -> None:
        try:
            for message in lines.receive():
                self._answer(lines, message)
        except (OSError, ValueError, KeyError, TypeError):  # a lost peer, or one that does not speak this language
            self._selector.unregister(lines.connection)
            lines.connection.close()
            if lines.rank is None or lines.rank in self._gone:
                return
            if len(self._hosts) < self._num_processes:  # left before the start: it may come again
                del self._connections[lines.rank], self._hosts[lines.rank]
            else:
                self._lost.add(lines.rank)
                self._deadline = self._deadline or time.monotonic() + _TOGETHER

    def _answer(self, lines: _Lines, message: dict[str, Any]) -> None:
        if "join" in message:
            self._admit(lines, int(message["join"]), int(message["of"]), str(message["host"]))
        elif lines.rank is None:
            raise ValueError("not a member")
        elif "at" in message:
            arrived = self._arrived.setdefault(message["at"], set())
            arrived.add(lines.rank)
            if len(arrived) == self._num_processes:
                self._tell({"passed": message["at"]})
        elif "who" in message:
            arrived = self._arrived.get(message["who"], set())
            _send(lines.connection, {"late": [rank for rank in range(self._num_processes) if rank not in arrived]})
        elif "bye" in message:
            self._gone.add(lines.rank)
            if message["bye"]:
                self._tell({"failed": lines.rank, "reason": str(message["reason"])})
            if len(self._gone) == self._num_processes:
                self._tell({"done": True})
                self._is_over = True

    def _admit(self, lines: _Lines, rank: int, of: int, host: str) -> None:
        refusal = None
        if of != self._num_processes:
            refusal = f"process {rank} on {host} expects {of} processes and process 0 expects {self._num_processes}"
        elif not 0 <= rank < of:
            refusal = f"process {rank} on {host} is outside 0..{of - 1}"
        elif rank in self._hosts:
            refusal = f"there are two processes {rank}, on {self._hosts[rank]} and on {host}"
        if refusal:
            _send(lines.connection, {"refused": f"{refusal}: give every process its own id and the same count"})
            return
        lines.rank = rank
        self._connections[rank], self._hosts[rank] = lines.connection, host
        if len(self._hosts) == self._num_processes:
            self._deadline = None
            self._selector.unregister(self._listener)
            self._listener.close()
            self._tell({"hosts": [self._hosts[rank] for rank in range(self._num_processes)]})

    def _time_is_up(self) -> None:
        if self._lost:
            self._tell({"lost": sorted(self._lost)})
        else:
            self._tell({"absent": [rank for rank in range(self._num_processes) if rank not in self._hosts]})
        self._is_over = True

    def _tell(self, message: dict[str, Any]) -> None:
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                _send(connection, message)


class RollCall:
    """One process's membership, from `join` to `leave`.

    Attributes:
      hosts: name of the host of every process.
    """

    def __init__(self, lines: _Lines, rank: int, hosts: list[str], messages: list[dict[str, Any]]) -> None:
        self.hosts = hosts
        self._lines, self._rank = lines, rank
        self._passed: set[str] = set()
        self._late: list[int] | None = None
        self._failure: str | None = None
        self._follow_at = 0.0
        self._has_left = self._has_failed = self._is_done = self._is_closed = False
        self._change = threading.Condition()
        self._on_loss = self._end_process
        threading.Thread(target=self._watch, args=(messages,), name="roll_call_watch", daemon=True).start()

    @classmethod
    def join(cls, address: str, rank: int, num_processes: int, host: str, timeout: float) -> RollCall:
        """Report to process 0 and wait until all processes have come.

        Args:
          address: `host:port` of process 0, which listens there within the timeout.
          timeout: seconds; process 0 names those that are missing after its own.

        Raises:
          StartError: process 0 does not answer, processes are missing, or two claim one place.
        """
        connection = _connect(address, timeout)
        lines = _Lines(connection)
        try:
            _send(connection, {"join": rank, "of": num_processes, "host": host})
            connection.settimeout(timeout + 10.0)  # process 0 may have begun to wait later than this one
            while not (messages := lines.receive()):
                pass
            answer = messages[0]
        except (OSError, ValueError) as error:
            reason = f"process 0 at {address} ended before all {num_processes} processes had come"
            raise StartError(f"{reason}: see its output") from error
        if "refused" in answer:
            raise StartError(answer["refused"])
        if "absent" in answer:
            raise StartError(
                f"missing after {timeout:.0f} s: {name_processes(answer['absent'])} of {num_processes}; "
                f"see whether every process was started and can reach {address}"
            )
        connection.settimeout(None)
        return cls(lines, rank, answer["hosts"], messages[1:])

    def wait_for_all(self, name: str, timeout: float) -> None:
        """Return when every process has called this with the same name; a name is used once.

        Raises:
          StartError: some did not come within the timeout; names them.
        """
        _send(self._lines.connection, {"at": name})
        with self._change:
            if self._change.wait_for(lambda: name in self._passed, timeout):
                return
            _send(self._lines.connection, {"who": name})
            self._change.wait_for(lambda: self._late is not None, timeout=10.0)
        late = name_processes(self._late or [0])
        raise StartError(f"missing after {timeout:.0f} s at {name!r}: {late} of {len(self.hosts)}; see their output")

    def leave(self, code: int, reason: str, timeout: float) -> bool:
        """Say goodbye and wait for the others to do so too; whether all have.

        Args:
          code: exit code to come; after one that is not 0 the others have `FAILURE_GRACE` seconds left.
          reason: what they say when they end for it.
        """
        with self._change:
            self._has_left, self._has_failed = True, code != 0
        with contextlib.suppress(OSError):
            _send(self._lines.connection, {"bye": code, "reason": reason})
        with self._change:
            self._change.wait_for(lambda: self._is_done or self._is_closed, timeout)
            return self._is_done

    def _watch(self, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            self._hear(message)
        while not self._is_closed:
            failure_counts = self._failure is not None and not self._has_left
            left = max(self._follow_at - time.monotonic(), 0.0) if failure_counts else None
            try:
                if select.select([self._lines.connection], [], [], left)[0]:
                    for message in self._lines.receive():
                        self._hear(message)
                elif self._failure is not None and not self._has_left:
                    self._on_loss(self._failure)
            except (OSError, ValueError):
                with self._change:
                    self._is_closed = True
                    self._change.notify_all()
        if not self._has_left:
            self._on_loss(f"{self._describe([0])} is lost")

    def _hear(self, message: dict[str, Any]) -> None:
        if "lost" in message and not self._has_failed:
            self._on_loss(f"{self._describe(message['lost'])} {'is' if len(message['lost']) == 1 else 'are'} lost")
        elif "failed" in message and self._failure is None:
            self._failure = f"{self._describe([message['failed']])} failed ({message['reason']})"
            self._follow_at = time.monotonic() + FAILURE_GRACE
        with self._change:
            self._is_done |= "done" in message
            self._is_closed |= "lost" in message
            self._late = message.get("late", self._late)
            self._passed |= {message["passed"]} if "passed" in message else set()
            self._change.notify_all()

    def _describe(self, ranks: list[int]) -> str:
        return f"{name_processes(ranks)} on {', '.join(dict.fromkeys(self.hosts[rank] for rank in ranks))}"

    def _end_process(self, what: str) -> None:
        way_out = "start the same command again, a run goes on from its last checkpoint"
        os.write(2, f"foejax: error: {what}, so process {self._rank} ends: {way_out}\n".encode())
        with contextlib.suppress(OSError):
            _send(self._lines.connection, {"bye": EXIT_LOST, "reason": what})
        if self._rank == 0:
            time.sleep(1.0)  # who has not heard it yet would take process 0 for lost
        os._exit(EXIT_LOST)


def listen(address: str) -> socket.socket:
    """A listener on the port of `address`: on the loopback alone for a loopback address, else on every interface.

    Raises:
      StartError: the port is taken.
    """
    host, port = split_address(address)
    try:
        if is_loopback(host):
            return socket.create_server((host, port), backlog=1024, family=_family(host))
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), backlog=1024, family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise StartError(f"process 0 cannot listen at {address}: {error.strerror}; choose another port") from error


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port`, of `[::1]:port` too.

    Raises:
      ValueError: it is not such an address.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"coordinator={address!r} is no address: write host:port, for example 10.0.0.1:12345")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine reach the host."""
    return host in ("localhost", "::1") or host.startswith("127.")


def name_processes(ranks: list[int]) -> str:
    """`process 3` or `processes 1, 2`; of many the first eight."""
    shown = ", ".join(str(rank) for rank in ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"process {shown}" if len(ranks) == 1 else f"processes {shown}"


class _Lines:
    """JSON lines that come in on a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.rank: int | None = None
        self._rest = b""

    def receive(self) -> list[dict[str, Any]]:
        """What one read brings; OSError when the peer is gone, ValueError for anything but JSON objects."""
        data = self.connection.recv(1 << 16)
        if not data:
            raise ConnectionError("closed")
        *whole, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE:
            raise ValueError("not a line")
        return [dict(json.loads(line)) for line in whole]


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _connect(address: str, timeout: float) -> socket.socket:
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection = socket.create_connection(split_address(address), timeout=max(deadline - time.monotonic(), 0.1))
            _keep_alive(connection)
            return connection
        except OSError as error:
            if time.monotonic() >= deadline:
                raise StartError(
                    f"missing after {timeout:.0f} s: process 0, which does not answer at {address} "
                    f"({error.strerror or error}); see whether it was started and whether the address is right"
                ) from error
            time.sleep(0.05)


def _keep_alive(connection: socket.socket) -> None:
    """Let the kernel find out within HOST_TIMEOUT that the other host is gone."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", HOST_TIMEOUT // 3),
        ("TCP_KEEPINTVL", HOST_TIMEOUT // 6),
        ("TCP_KEEPCNT", 4),
        ("TCP_USER_TIMEOUT", HOST_TIMEOUT * 1000),
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
