"""How rank 0 lets the other ranks in, and nobody else.

    anyone ── connects ──▶ rank 0: a challenge that only holders of the run's key can answer ─┬─ answered ─▶ a rank
                                                                                              └─ otherwise ─▶ closed

Every connection has a thread and a deadline of its own while it is examined, so one that closes, sends something else,
or stays silent costs the ranks nothing. Where too many wait, the oldest is closed: a rank needs milliseconds, so the
oldest is a stranger.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

HANDSHAKE_TIMEOUT_S = 10.0
"""Seconds in which a connection has to prove that it belongs to a rank."""

MAX_EXAMINED = 128
"""Connections that may be examined at the same time."""

KEEPALIVE = ((socket.SO_KEEPALIVE, 1), (socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
"""Socket options with which a host that vanishes without closing its connections is noticed within a minute."""

REFUSALS = (OSError, EOFError, AuthenticationError, AssertionError, ValueError)
"""What a handshake with someone who does not speak our language raises. multiprocessing checks the first bytes of a
challenge with `assert`."""


def listen(address: str) -> socket.socket:
    """A socket that listens on a free port of one address of this host; on all of its addresses where `address` is
    empty or is not an address of this host (a name that is translated on the way)."""
    if address:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with suppress(OSError):
            return socket.create_server((address, 0), family=family, backlog=MAX_EXAMINED)
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=MAX_EXAMINED, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=MAX_EXAMINED)


@dataclass(eq=False)
class Reception:
    """Accepts connections of ranks."""

    key: bytes
    expected: Set[int]
    """The ranks that will connect."""
    arrived: dict[int, tuple[Connection[Any, Any], Any]] = field(default_factory=dict)
    """Rank → its connection, and what it said about itself."""
    _examined: list[socket.socket] = field(default_factory=list)
    """Connections that have not proved anything yet, the oldest first."""
    _changing: threading.Lock = field(default_factory=threading.Lock)

    def missing(self) -> list[int]:
        """The ranks that have not connected."""
        with self._changing:
            return sorted(self.expected - self.arrived.keys())

    def accept(self, listener: socket.socket, until: float) -> None:
        """Accept connections until every expected rank is here or `time.monotonic()` is past `until`."""
        listener.settimeout(0.1)
        while self.missing() and time.monotonic() < until:
            try:
                incoming, _ = listener.accept()
            except TimeoutError:
                continue
            except OSError:  # it left before it was accepted, or there are no descriptors left
                self._close_oldest()
                time.sleep(0.01)
                continue
            with self._changing:
                self._examined.append(incoming)
                too_many = len(self._examined) > MAX_EXAMINED
            if too_many:
                self._close_oldest()
            threading.Thread(target=self._examine, args=(incoming,), daemon=True).start()
        with self._changing:
            for stranger in self._examined:
                _hang_up(stranger)

    def _examine(self, incoming: socket.socket) -> None:
        """Let `incoming` in if it belongs to an expected rank, and close it otherwise."""
        incoming.setblocking(True)
        connection: Connection[Any, Any] = Connection(incoming.dup().detach())
        try:
            with limited(incoming):
                deliver_challenge(connection, self.key)
                answer_challenge(connection, self.key)
                rank, about = connection.recv()
                keep_alive(incoming)
                is_expected = rank in self.expected
                connection.send(is_expected)
            if is_expected:
                with self._changing:
                    self.arrived[rank] = connection, about
        except REFUSALS:
            is_expected = False
        with self._changing:
            self._examined.remove(incoming)
        incoming.close()
        if not is_expected:
            connection.close()

    def _close_oldest(self) -> None:
        with self._changing:
            if self._examined:
                _hang_up(self._examined[0])


def connect(address: tuple[str, int], key: bytes, rank: int, about: object, until: float) -> Connection[Any, Any]:
    """Connect to the `Reception` at `address` as `rank`, which says `about` itself.

    Raises `OSError` where that fails until `time.monotonic()` is past `until`, and at once where nothing listens.
    """
    while True:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no handshake with {address[0]}:{address[1]}")
        outgoing = socket.create_connection(address, timeout=left)
        outgoing.setblocking(True)
        connection: Connection[Any, Any] = Connection(outgoing.dup().detach())
        try:
            with limited(outgoing):
                answer_challenge(connection, key)
                deliver_challenge(connection, key)
                connection.send((rank, about))
                keep_alive(outgoing)
                if connection.recv():
                    return connection
        except REFUSALS:  # rank 0 examines too many strangers, and closed this connection
            connection.close()
            time.sleep(0.1)
        finally:
            outgoing.close()


@contextmanager
def limited(peer: socket.socket) -> Iterator[None]:
    """Hang up after `HANDSHAKE_TIMEOUT_S`, however much the peer sends, unless the block ends first."""
    timer = threading.Timer(HANDSHAKE_TIMEOUT_S, _hang_up, (peer,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def keep_alive(peer: socket.socket) -> None:
    """Set `KEEPALIVE`."""
    for option, value in KEEPALIVE:
        peer.setsockopt(socket.SOL_SOCKET if option == socket.SO_KEEPALIVE else socket.IPPROTO_TCP, option, value)


def _hang_up(peer: socket.socket) -> None:
    with suppress(OSError):  # it has left by itself
        peer.shutdown(socket.SHUT_RDWR)
