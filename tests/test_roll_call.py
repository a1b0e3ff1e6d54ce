"""The roll call without JAX: who is missing, who is lost, and how all leave together."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from sharding import roll_call
from sharding.relay import relay_to
from sharding.roll_call import RollCall, RollCallServer, StartError, listen, name_processes, split_address


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return f"127.0.0.1:{found.getsockname()[1]}"


@pytest.fixture
def address() -> str:
    return free_address()


def in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    """Result or exception of every call, all run at once."""
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def gather(address: str, count: int, timeout: float = 10.0) -> list[RollCall]:
    """All members of a run, whose losses go to their queue `news` in place of ending the test."""
    RollCallServer(listen(address), count, timeout)
    joins = [lambda rank=rank: RollCall.join(address, rank, count, f"host{rank}", timeout) for rank in range(count)]
    members = in_threads(joins)
    for member in members:
        assert isinstance(member, RollCall), member
        member.news = queue.SimpleQueue()
        member._on_loss = member.news.put
    return members


def close(member: RollCall) -> None:
    """What the end of a process does to its connection."""
    member._lines.connection.shutdown(socket.SHUT_RDWR)


def test_all_learn_the_hosts_and_leave_together(address: str) -> None:
    members = gather(address, 3)
    assert all(member.hosts == ["host0", "host1", "host2"] for member in members)
    in_threads([lambda member=member: member.wait_for_all("mesh", 5.0) for member in members])
    assert in_threads([lambda member=member: member.leave(0, "", 5.0) for member in members]) == [True, True, True]
    assert all(member.news.empty() for member in members)
    listen(address).close()  # the port is free for the coordinator


def test_missing_processes_are_named_to_all_that_came(address: str) -> None:
    RollCallServer(listen(address), 4, 0.5)
    found = in_threads([lambda rank=rank: RollCall.join(address, rank, 4, "here", 0.5) for rank in (0, 2)])
    for error in found:
        assert isinstance(error, StartError)
        assert "processes 1, 3 of 4" in str(error) and address in str(error)


def test_a_missing_process_0_is_named(address: str) -> None:
    with pytest.raises(StartError, match=f"process 0, which does not answer at {address}"):
        RollCall.join(address, 1, 2, "here", 0.3)


@pytest.mark.parametrize(
    ("rank", "of", "words"),
    [(0, 2, "two processes 0, on first and on second"), (1, 3, "expects 3 processes and process 0 expects 2")],
)
def test_processes_that_do_not_fit_together_are_refused(address: str, rank: int, of: int, words: str) -> None:
    RollCallServer(listen(address), 2, 1.0)
    waiting = threading.Thread(target=in_threads, args=([lambda: RollCall.join(address, 0, 2, "first", 1.0)],))
    waiting.start()
    time.sleep(0.2)
    with pytest.raises(StartError, match=words):
        RollCall.join(address, rank, of, "second", 1.0)
    waiting.join()


def test_strangers_at_the_port_do_no_harm(address: str) -> None:
    RollCallServer(listen(address), 1, 5.0)
    with socket.create_connection(split_address(address)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert stranger.recv(100) == b""
    assert RollCall.join(address, 0, 1, "here", 5.0).leave(0, "", 5.0)


@pytest.mark.parametrize("lost", [0, 2])
def test_a_lost_process_is_named_to_the_others(address: str, lost: int) -> None:
    members = gather(address, 3)
    if lost == 0:  # with it goes the server
        for member in members[1:]:
            close(member)
    close(members[lost])
    for rank in {0, 1, 2} - {lost}:
        assert f"process {lost} on host{lost} is lost" in members[rank].news.get(timeout=5.0)


def test_processes_lost_together_are_named_together(address: str) -> None:
    members = gather(address, 3)
    close(members[1])
    close(members[2])
    assert members[0].news.get(timeout=5.0) == "processes 1, 2 on host1, host2 are lost"


def test_after_a_failure_the_others_end_with_its_reason(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "FAILURE_GRACE", 0.2)
    members = gather(address, 2)
    assert not members[1].leave(3, "loss is nan", 1.0)
    assert members[0].news.get(timeout=5.0) == "process 1 on host1 failed (loss is nan)"


def test_processes_that_fail_alike_hear_nothing_of_each_other(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "FAILURE_GRACE", 0.2)
    members = gather(address, 2)
    assert in_threads([lambda member=member: member.leave(75, "SIGTERM", 5.0) for member in members]) == [True, True]
    time.sleep(0.3)
    assert all(member.news.empty() for member in members)


def test_who_is_late_is_named(address: str) -> None:
    members = gather(address, 3)
    with pytest.raises(StartError, match="missing after 0 s at 'mesh 0': processes 0, 2 of 3"):
        members[1].wait_for_all("mesh 0", 0.3)


def test_the_relay_passes_bytes_on_and_keeps_silent_when_the_far_end_is_lost(address: str) -> None:
    near = socket.create_connection(split_address(relay_to(address, 5.0)))
    time.sleep(0.1)  # the far end listens later, as JAX's coordinator does
    with listen(address) as far_end:
        far, _ = far_end.accept()
    near.sendall(b"question")
    assert far.recv(100) == b"question"
    far.sendall(b"answer")
    assert near.recv(100) == b"answer"
    far.close()
    near.settimeout(0.3)
    with pytest.raises(TimeoutError):
        near.recv(100)
    near.sendall(b"more")  # nor does writing tell
    near.sendall(b"more")


def test_addresses_and_names() -> None:
    assert split_address("[::1]:80") == ("::1", 80) and split_address("node0:1234") == ("node0", 1234)
    with pytest.raises(ValueError, match="'node0' is no address"):
        split_address("node0")
    assert name_processes([3]) == "process 3"
    assert name_processes(list(range(10))) == "processes 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
