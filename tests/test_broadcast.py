"""What process 0 says reaches all others, whole and in order, and nobody else."""

from __future__ import annotations

import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from sharding.broadcast import Receiver, Sender
from sharding.roll_call import StartError, listen

KEY = 4_000_000_000


def connected(num_processes: int, strangers: tuple[bytes, ...] = ()) -> tuple[Sender, list[Receiver]]:
    """Both ends, after some strangers have knocked."""
    listener = listen("127.0.0.1:0")
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    with ThreadPoolExecutor() as pool:
        sender = pool.submit(Sender, listener, num_processes, KEY, 20.0)
        for words in strangers:
            with socket.create_connection(listener.getsockname()) as stranger:
                stranger.sendall(words)
        receivers = [Receiver(address, rank, KEY, 20.0) for rank in range(1, num_processes)]
        return sender.result(), receivers


def test_messages_arrive_whole_and_in_order_at_all() -> None:
    sender, receivers = connected(3)
    messages = [b"", b"x", bytes(range(256)) * 20_000, b"last"]
    with ThreadPoolExecutor() as pool:
        found = [pool.submit(lambda end=end: [end.receive() for _ in messages]) for end in receivers]
        for message in messages:
            sender.send(message)
        assert [each.result() for each in found] == [messages, messages]
    sender.close()
    with pytest.raises(ConnectionError):
        receivers[0].receive()


def test_messages_of_several_threads_are_not_mixed() -> None:
    sender, (receiver,) = connected(2)
    threads = [threading.Thread(target=sender.send, args=(bytes([n]) * 300_000,)) for n in range(6)]
    for thread in threads:
        thread.start()
    found = [receiver.receive() for _ in threads]
    assert all(message == message[:1] * 300_000 for message in found)
    assert sorted(message[0] for message in found) == list(range(6))


def test_strangers_and_second_comers_hear_nothing() -> None:
    hello = struct.Struct("!II")
    strangers = (b"", b"GET / HTTP/1.1\r\n\r\n", hello.pack(KEY - 1, 1), hello.pack(KEY, 7))
    sender, (receiver,) = connected(2, strangers)
    sender.send(b"hello")
    assert receiver.receive() == b"hello"


def test_who_does_not_come_is_named() -> None:
    listener = listen("127.0.0.1:0")
    Receiver(f"127.0.0.1:{listener.getsockname()[1]}", 1, KEY, 20.0)
    with pytest.raises(StartError, match="missing after 1 s: processes 2, 3 of 4; see their output"):
        Sender(listener, 4, KEY, 1.0)


def test_any_process_may_ask_for_the_end_and_a_lost_one_does_not() -> None:
    sender, receivers = connected(3)
    assert not sender.is_asked_to_end()
    receivers[0].close()
    assert not sender.is_asked_to_end()
    receivers[1].ask_to_end()
    while not sender.is_asked_to_end():
        pass
    assert sender.is_asked_to_end()
