"""How the ranks of a run connect to each other when they start.

    all ranks     init_process_group ─▶ broadcast from rank 0: port, key, shared-memory probe
    rank r > 0    ── connects to that port with that key: its rank, host, process id, whether it can read the probe ──▶
    rank 0        accepts one connection per other rank

The key is random, made for this run, and reaches the other ranks only through torch.distributed.
"""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import torch
import torch.distributed as dist

from vlmrl.ranks.messages import offer
from vlmrl.ranks.place import TORCHRUN, Place

KEEPALIVE = ((socket.SO_KEEPALIVE, 1), (socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
"""Socket options with which a host that vanishes without closing its connections is noticed within a minute."""


@dataclass(frozen=True, eq=False)
class Peer:
    """A rank other than 0, as rank 0 sees it."""

    rank: int
    connection: Connection[Any, Any]
    host: str
    pid: int
    shares_memory: bool
    """Whether it can map memory that rank 0 shares."""


@dataclass(frozen=True, eq=False)
class Meeting:
    """The connections of this process."""

    peers: list[Peer]
    """On rank 0: the other ranks, in order of rank. Empty on other ranks."""
    to_leader: Connection[Any, Any] | None
    """On ranks other than 0: the connection to rank 0. None on rank 0."""


def meet(place: Place) -> Meeting:
    """Start torch.distributed and connect every rank to rank 0. All ranks call this at the same time.

    The environment no longer names a rank afterwards, since processes that this one starts (vLLM) are no ranks.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    os.environ |= dict(
        zip(TORCHRUN, map(str, (place.rank, place.size, place.local_rank, place.address, place.port)), strict=True)
    )
    dist.init_process_group(backend)
    for name in [name for name in os.environ if name in TORCHRUN or name.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    return Meeting(_accept_peers(place), None) if place.rank == 0 else Meeting([], _connect_to_leader(place))


def _accept_peers(place: Place) -> list[Peer]:
    key = secrets.token_bytes(32)
    listener = Listener(("", 0), backlog=place.size, authkey=key)
    probe, file = offer()
    dist.broadcast_object_list([(listener.address[1], key, probe)], device=torch.device("cpu"))
    peers: dict[int, Peer] = {}
    while len(peers) < place.size - 1:
        connection = listener.accept()
        _keep_alive(connection)
        rank, host, pid, shares_memory = connection.recv()
        peers[rank] = Peer(rank, connection, host, pid, shares_memory)
    listener.close()
    if file is not None:
        os.close(file)
    return [peer for _, peer in sorted(peers.items())]


def _connect_to_leader(place: Place) -> Connection[Any, Any]:
    received: list[Any] = [None]
    dist.broadcast_object_list(received, device=torch.device("cpu"))
    port, key, probe = received[0]
    connection = Client((place.address, port), authkey=key)
    _keep_alive(connection)
    connection.send((place.rank, socket.gethostname(), os.getpid(), probe.is_readable()))
    return connection


def _keep_alive(connection: Connection[Any, Any]) -> None:
    with socket.socket(fileno=os.dup(connection.fileno())) as shared:
        for option, value in KEEPALIVE:
            shared.setsockopt(socket.SOL_SOCKET if option == socket.SO_KEEPALIVE else socket.IPPROTO_TCP, option, value)
