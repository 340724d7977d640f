"""How the ranks of a run connect to each other when they start.

    all ranks     ── name themselves in torch.distributed's store, and wait until all are there ──▶
    all ranks     init_process_group
    rank 0        ── where it listens, and a probe of its memory (messages.py), in the store ──▶
    rank r > 0    takes the key from rank 0's memory; on another host rank 0 sends it through torch.distributed
    rank r > 0    ── connects, proves that it has the key: its process id, whether it shares memory ──▶ rank 0

The store and torch.distributed's own connections take anyone in: they are torch's. What stands in the store is no
secret, and is read as JSON. The key is random and made for this run. Where all ranks are on one host it is in no file
and goes over no connection, and rank 0 listens on the loopback address only.

Everything has one deadline, after which the message names the ranks that are missing.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from vlmrl.errors import RankError
from vlmrl.ranks.handshake import Reception, connect, listen
from vlmrl.ranks.messages import KEY_BYTES, Probe, offer
from vlmrl.ranks.place import TORCHRUN, Place

MEETING_TIMEOUT_S = 180.0
"""Seconds that the ranks have to meet, from the first one's start. Imports on a busy shared file system differ by a
minute."""

NOTE_AFTER_S = 30.0
"""Seconds after which rank 0 says for whom it waits."""

TORCH_TIMEOUT = timedelta(minutes=30)
"""How long torch.distributed's own requests to the store may wait, as by default."""

POLL_S = 0.05


@dataclass(frozen=True)
class Arrival:
    """What a rank writes about itself into the store."""

    host: str
    pid: int
    machine: str
    """Equal for processes that see the same process ids and the same loopback address."""

    @staticmethod
    def own() -> Arrival:
        return Arrival(socket.gethostname(), os.getpid(), _machine())


@dataclass(frozen=True, eq=False)
class Peer:
    """Another rank."""

    rank: int
    connection: Connection[Any, Any]
    host: str
    pid: int
    shares_memory: bool
    """Whether it can map memory that rank 0 shares."""
    is_here: bool
    """Whether `pid` is its process id on this host too."""


@dataclass(frozen=True, eq=False)
class Meeting:
    """The connections of this process."""

    peers: list[Peer]
    """On rank 0: the other ranks, in order of rank. Empty on other ranks."""
    leader: Peer | None
    """On ranks other than 0: rank 0. None on rank 0."""
    store: TCPStore
    """torch.distributed's store, which rank 0 may serve for as long as it keeps this."""


def meet(place: Place) -> Meeting:
    """Start torch.distributed and connect every rank to rank 0. All ranks call this at the same time.

    The environment no longer names a rank afterwards, since processes that this one starts (vLLM) are no ranks.
    Raises `RankError` where ranks are missing after `MEETING_TIMEOUT_S`.
    """
    until = time.monotonic() + MEETING_TIMEOUT_S
    try:
        store = _open_store(place, until)
        arrivals = _assemble(store, place, until)
        _start_torch(store, place, arrivals, until)
        if place.rank == 0:
            meeting = Meeting(_accept_peers(store, place, arrivals, until), None, store)
        else:
            meeting = Meeting([], _connect_to_leader(store, place, arrivals, until), store)
    except (dist.DistError, OSError, ValueError) as error:  # ValueError: the store holds what no rank wrote
        raise RankError(
            f"rank {place.rank} on {socket.gethostname()} lost the other ranks while they met at "
            f"{place.address}:{place.port}: {_first_line(error)}. See the output of the other ranks; if they did not "
            "fail, another program may use this port."
        ) from error
    for name in [name for name in os.environ if name in TORCHRUN or name.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    return meeting


# ── the store ───────────────────────────────────────────────────────────────────────────────────────────────


def _open_store(place: Place, until: float) -> TCPStore:
    """Connect to the store. torchrun provides one; otherwise rank 0 does, on loopback where its address is one."""
    options: Any = {"world_size": place.size, "timeout": _left(until), "wait_for_workers": False}
    if place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        is_local = place.address == "localhost" or place.address.startswith("127.") or place.address == "::1"
        family = socket.AF_INET6 if place.address == "::1" else socket.AF_INET
        both = not is_local and socket.has_dualstack_ipv6()
        listener = socket.create_server(
            (place.address if is_local else "", place.port),
            family=socket.AF_INET6 if both else family,
            dualstack_ipv6=both,
            backlog=4096,
        )
        return TCPStore(place.address, place.port, is_master=True, master_listen_fd=listener.detach(), **options)
    while True:  # torch's own attempts print a stack for each second of waiting
        try:
            socket.create_connection((place.address, place.port), timeout=max(0.1, until - time.monotonic())).close()
            return TCPStore(place.address, place.port, is_master=False, **options)
        except OSError as error:
            if time.monotonic() > until:
                raise RankError(
                    f"rank {place.rank} on {socket.gethostname()} waited {MEETING_TIMEOUT_S:.0f} s for rank 0, which "
                    f"does not answer at {place.address}:{place.port} ({error}), so the run cannot begin: see the "
                    "output of rank 0 and the address and port that the launcher gave."
                ) from error
            time.sleep(POLL_S)


def _assemble(store: TCPStore, place: Place, until: float) -> list[Arrival]:
    """Write this rank into the store and wait for all of them → who they are, by rank."""
    store.set(f"vlmrl/arrived/{place.rank}", json.dumps(asdict(Arrival.own())))
    _wait_for_all(store, place, until, "arrived", lambda rank: f"rank {rank}", "did not start")
    return [Arrival(**json.loads(store.get(f"vlmrl/arrived/{rank}"))) for rank in range(place.size)]


def _wait_for_all(
    store: TCPStore, place: Place, until: float, key: str, name: Callable[[int], str], fault: str
) -> None:
    """Wait until each rank has written `key`. Raises `RankError` that names those which have not."""
    missing, started, noted = list(range(place.size)), time.monotonic(), place.rank != 0
    while missing := [rank for rank in missing if not store.check([f"vlmrl/{key}/{rank}"])]:
        names = ", ".join(name(rank) for rank in missing if rank != place.rank or len(missing) == 1)
        if time.monotonic() > until:
            raise RankError(
                f"{names} of {place.size} ranks {fault} within {MEETING_TIMEOUT_S:.0f} s, so the run cannot begin: "
                "see the output of these ranks and the number of processes that the launcher was given."
            )
        if not noted and time.monotonic() > started + NOTE_AFTER_S:
            print(f"waiting for {names} of {place.size} ranks", file=sys.stderr, flush=True)
            noted = True
        time.sleep(POLL_S)


# ── torch.distributed ───────────────────────────────────────────────────────────────────────────────────────


def _start_torch(store: TCPStore, place: Place, arrivals: list[Arrival], until: float) -> None:
    """Call init_process_group. It waits for half an hour where a rank is gone, so it runs in a thread of its own."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    errors: list[Exception] = []
    # A connection of its own: a request that waits keeps all others on the same connection waiting.
    torchs = store.clone()  # type: ignore[attr-defined]  # missing in the stub of torch 2.13
    torchs.set_timeout(TORCH_TIMEOUT)

    def join() -> None:
        try:
            dist.init_process_group(backend, store=torchs, rank=place.rank, world_size=place.size)
            torchs.set(f"vlmrl/joined/{place.rank}", "")
        except Exception as error:  # noqa: BLE001 — raised below, in the thread that meets
            errors.append(error)

    joining = threading.Thread(target=join, daemon=True)
    joining.start()
    while joining.is_alive() and time.monotonic() < until:
        joining.join(POLL_S)  # short, so that Ctrl-C is heard
    if errors:
        raise RankError(
            f"rank {place.rank} on {socket.gethostname()} cannot reach the other ranks through torch.distributed: "
            f"{_first_line(errors[0])}"
        ) from errors[0]

    def name(rank: int) -> str:
        return f"rank {rank} (process {arrivals[rank].pid} on {arrivals[rank].host})"

    try:
        _wait_for_all(store, place, until, "joined", name, "did not join torch.distributed")
    except RankError as error:
        if joining.is_alive():  # it would keep the interpreter from ending, and torch would abort with a stack
            os.write(sys.stderr.fileno(), f"error: {error}\n".encode())
            os._exit(1)
        raise


def _share_key(store: TCPStore, place: Place, key: bytes | None, until: float) -> bytes:
    """Give `key` to the ranks that have None, through torch.distributed. All ranks call this at the same time."""
    store.set(f"vlmrl/has_key/{place.rank}", str(key is not None))
    _wait_for_all(store, place, until, "has_key", lambda rank: f"rank {rank}", "did not look for the key")
    if all(store.get(f"vlmrl/has_key/{rank}") == b"True" for rank in range(place.size)):
        assert key is not None
        return key
    content = torch.frombuffer(bytearray(key or KEY_BYTES), dtype=torch.uint8)
    dist.broadcast(content, src=0)
    return content.numpy().tobytes()


# ── the connections to rank 0 ───────────────────────────────────────────────────────────────────────────────


def _accept_peers(store: TCPStore, place: Place, arrivals: list[Arrival], until: float) -> list[Peer]:
    key = secrets.token_bytes(KEY_BYTES)
    is_one_host = len({arrival.machine for arrival in arrivals}) == 1
    probe, file = offer(key)
    reception = Reception(key, set(range(1, place.size)))
    with listen("127.0.0.1" if is_one_host else place.address) as listener:
        address = "127.0.0.1" if is_one_host else place.address
        offered = {"address": address, "port": listener.getsockname()[1], "probe": asdict(probe)}
        store.set("vlmrl/leader", json.dumps(offered))
        _share_key(store, place, key, until)
        reception.accept(listener, until)
    if file is not None:
        os.close(file)
    if missing := reception.missing():
        names = ", ".join(f"rank {rank} (process {arrivals[rank].pid} on {arrivals[rank].host})" for rank in missing)
        raise RankError(
            f"{names} did not connect to rank 0 at {address}:{offered['port']} within {MEETING_TIMEOUT_S:.0f} s, so "
            "the run cannot begin: see the output of these ranks, and whether a firewall stands between the hosts."
        )
    own = arrivals[0].machine
    return [
        Peer(rank, connection, arrivals[rank].host, arrivals[rank].pid, shares_memory, arrivals[rank].machine == own)
        for rank, (connection, shares_memory) in sorted(reception.arrived.items())
    ]


def _connect_to_leader(store: TCPStore, place: Place, arrivals: list[Arrival], until: float) -> Peer:
    _wait_for_leader(store, arrivals[0], until)
    offered = json.loads(store.get("vlmrl/leader"))
    found = Probe(**offered["probe"]).read()
    key = _share_key(store, place, found, until)
    connection = connect((offered["address"], offered["port"]), key, place.rank, found is not None, until)
    leader = arrivals[0]
    is_here = leader.machine == arrivals[place.rank].machine
    return Peer(0, connection, leader.host, leader.pid, found is not None, is_here)


def _wait_for_leader(store: TCPStore, leader: Arrival, until: float) -> None:
    while not store.check(["vlmrl/leader"]):
        if time.monotonic() > until:
            raise RankError(
                f"rank 0 (process {leader.pid} on {leader.host}) did not open its connections within "
                f"{MEETING_TIMEOUT_S:.0f} s, so the run cannot begin: see its output."
            )
        time.sleep(POLL_S)


def _machine() -> str:
    """See `Arrival.machine`. In containers, processes of one computer may see neither each other nor the same
    loopback address."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    for kind in ("net", "pid"):
        with suppress(OSError):
            parts.append(os.readlink(f"/proc/self/ns/{kind}"))
    return " ".join(parts)


def _left(until: float) -> timedelta:
    return timedelta(seconds=max(1.0, until - time.monotonic()))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
