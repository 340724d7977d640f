"""Rank 0 lets in who has the key, whoever else connects, and in time."""

from __future__ import annotations

import pickle
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest

from vlmrl.ranks import handshake
from vlmrl.ranks.handshake import MAX_EXAMINED, Reception, connect, listen

KEY = bytes(range(32))
Address = tuple[str, int]


def leaves(address: Address) -> list[socket.socket]:
    socket.create_connection(address).close()
    return []


def resets(address: Address) -> list[socket.socket]:
    stranger = socket.create_connection(address)
    stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stranger.close()
    return []


def says(content: bytes) -> Callable[[Address], list[socket.socket]]:
    def say(address: Address) -> list[socket.socket]:
        stranger = socket.create_connection(address)
        stranger.sendall(content)
        return [stranger]

    return say


def stays(address: Address) -> list[socket.socket]:
    return [socket.create_connection(address)]


def stays_often(address: Address) -> list[socket.socket]:
    return [socket.create_connection(address) for _ in range(3 * MAX_EXAMINED)]


def drips(address: Address) -> list[socket.socket]:
    """A byte of a long answer now and then, so that no single read lasts long."""
    stranger = socket.create_connection(address)
    stranger.sendall(struct.pack("!i", 200))

    def drip() -> None:
        try:
            for _ in range(1000):
                stranger.sendall(b"\0")
                time.sleep(0.02)
        except OSError:
            pass

    threading.Thread(target=drip, daemon=True).start()
    return [stranger]


def knows_another_key(address: Address) -> list[socket.socket]:
    with pytest.raises(OSError, match="no handshake"):
        connect(address, bytes(32), 1, "stranger", time.monotonic() + 0.3)
    return []


STRANGERS: dict[str, Callable[[Address], list[socket.socket]]] = {
    "leaves": leaves,
    "resets": resets,
    "a browser": says(b"GET / HTTP/1.0\r\n\r\n"),
    "a long message": says(struct.pack("!i", 2**31 - 1) + bytes(1000)),
    "a negative length": says(struct.pack("!i", -1) + struct.pack("!Q", 2**63)),
    "a pickle": says(struct.pack("!i", 40) + pickle.dumps(print).ljust(40, b".")),
    "stays": stays,
    "stays often": stays_often,
    "drips": drips,
    "knows another key": knows_another_key,
}


@contextmanager
def receiving(*expected: int, seconds: float = 20.0) -> Iterator[tuple[Reception, Address, threading.Thread]]:
    """Rank 0, waiting for the `expected` ranks."""
    reception = Reception(KEY, set(expected))
    with listen("127.0.0.1") as listener:
        accepting = threading.Thread(target=reception.accept, args=(listener, time.monotonic() + seconds), daemon=True)
        accepting.start()
        yield reception, listener.getsockname()[:2], accepting
        accepting.join(seconds)


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_keeps_no_rank_out(stranger: str) -> None:
    with receiving(1, 2) as (reception, address, _):
        first = connect(address, KEY, 1, "one", time.monotonic() + 10)
        held = STRANGERS[stranger](address)
        second = connect(address, KEY, 2, "two", time.monotonic() + 10)
    assert {rank: about for rank, (_, about) in reception.arrived.items()} == {1: "one", 2: "two"}
    for rank, connection in ((1, first), (2, second)):
        reception.arrived[rank][0].send("hello")
        assert connection.recv() == "hello"
    for each in held:
        each.close()


def test_a_stranger_who_stays_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT_S", 1.0)
    with receiving(1) as (_, address, _), ThreadPoolExecutor() as pool:
        held = [*stays(address), *drips(address)]
        ends = [pool.submit(lambda each: each.recv(1000) and each.recv(1000), each) for each in held]
        for end in ends:
            with suppress(ConnectionResetError):
                assert end.result(60) == b"", "the challenge, and then the end"
        connect(address, KEY, 1, None, time.monotonic() + 10).close()
        for each in held:
            each.close()


def test_a_rank_that_does_not_come_is_named() -> None:
    with receiving(1, 2, seconds=2.0) as (reception, address, accepting):
        connect(address, KEY, 2, None, time.monotonic() + 10)
        accepting.join(10)
        assert reception.missing() == [1]


def test_a_rank_that_nobody_expects_is_not_let_in() -> None:
    with receiving(1) as (reception, address, _):
        with pytest.raises(OSError, match="no handshake"):
            connect(address, KEY, 7, None, time.monotonic() + 0.3)
        connect(address, KEY, 1, None, time.monotonic() + 10)
    assert reception.arrived.keys() == {1}


def test_one_host_needs_one_interface() -> None:
    with listen("127.0.0.1") as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    with listen("192.0.2.1") as listener:  # an address of nobody (RFC 5737): a name that is translated on the way
        assert listener.getsockname()[0] in ("::", "0.0.0.0")
