"""The ranks of one run: how they meet, how rank 0 leads the others, and how all of them end together.

    rank 0                                                      ranks 1 …
    the whole command line, orchestrator, engine, monitor       follow(): wait for work, do it, answer
    together("train_step", a share for each rank) ── work ────▶ worker.train_step(share)
             its own share                        ══ torch.distributed: gradients, weights ══
             ◀──────────────────────────────────── answer ─────

Work and answers are pickled over one connection per rank, with a key that only this run knows; the arrays of a share go
through shared memory where there is some (messages.py). The connection is also how a death is noticed: it closes with
the process. A rank that fails says why before it goes. Rank 0 then ends the run with that reason, also when it stands
in a collective that nobody will ever join; the others end when rank 0 does.

Ctrl-C, SIGTERM and a queue's signals are rank 0's: it finishes the step and saves, and needs the others for both, so
they pay no heed.

Left out on purpose: going on with fewer ranks. `resume=` does that, with any number of them.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vlmrl.errors import RankError, VlmrlError
from vlmrl.ranks.messages import Outbox, offer, receive
from vlmrl.ranks.place import TORCHRUN, Place, find_place, joined

T = TypeVar("T")
log = logging.getLogger(__name__)

REASON_S = 5.0
"""Seconds that rank 0 waits, when a collective has failed, for the connection to say whose fault it was."""

GRACE_S = 60.0
"""Seconds that rank 0 has to end in order when a rank is lost: servers are stopped, the records closed. A collective
that hangs may keep it from that."""

LEAVE_S = 20.0
"""Seconds that a rank has to come to an end when it is told to."""

KEEPALIVE = ((socket.SO_KEEPALIVE, 1), (socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))
"""A host that vanishes without closing its connections is noticed within a minute."""

LEAVE = "leave"


@dataclass(eq=False)
class _Link:
    """Rank 0's connection to one other rank."""

    rank: int
    connection: Connection[Any, Any]
    outbox: Outbox
    answers: queue.SimpleQueue[tuple[bool, Any]] = field(default_factory=queue.SimpleQueue)
    """(whether it did its work, the answer or what went wrong)."""
    reader: threading.Thread | None = None


class RankGroup:
    """This process's part in the run. Made by `join`."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.lost: str | None = None
        """Why a rank is gone that should be there."""
        self._links: list[_Link] = []
        self._to_leader: Connection[Any, Any] | None = None
        self._work: queue.SimpleQueue[tuple[str, tuple[Any, ...]] | RankError] = queue.SimpleQueue()
        self._leaving = False
        self._on_lost: Callable[[], None] | None = None
        self._losing = threading.Lock()
        self._is_lost = threading.Event()
        self._meet()

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def size(self) -> int:
        return self.place.size

    # ── rank 0 ──────────────────────────────────────────────────────────────────────────────────────────────

    def together(self, name: str, arguments: Sequence[tuple[Any, ...]], own: Callable[[], T]) -> list[T]:
        """Have rank r do `name` with `arguments[r - 1]`, do `own` meanwhile → the results by rank.

        Raises `RankError` where a rank is gone, and what `own` raises.
        """
        with self.meanwhile(name, arguments) as answers:
            result = own()
        return [result, *answers]

    @contextmanager
    def meanwhile(self, name: str, arguments: Sequence[tuple[Any, ...]]) -> Iterator[list[Any]]:
        """The same, for what is done in the block; the list has the other ranks' answers at its end."""
        for link, each in zip(self._links, arguments, strict=True):
            self._send(link, (name, each))
        answers: list[Any] = []
        try:
            yield answers
        except RuntimeError as error:  # what a collective says of a peer that is gone tells nobody anything
            self._raise_if_lost(wait=REASON_S, cause=error)
            raise
        for link in self._links:
            done, answer = link.answers.get()
            link.outbox.answered()
            if not done:
                raise RankError(answer)
            answers.append(answer)

    def on_lost(self, callback: Callable[[], None] | None) -> None:
        """Call `callback` when a rank is lost, in another thread, or at once if one is. None: nobody any more."""
        with self._losing:
            self._on_lost = callback
            lost = self.lost
        if lost is not None and callback is not None:
            callback()

    def leave(self) -> None:
        """Rank 0: the run is over. Returns when the others are gone, or should be."""
        self._leaving = True
        for link in self._links:
            try:
                link.outbox.send((LEAVE, ()))
            except OSError:
                continue  # it is gone
        if self.lost is None:  # else it may wait for a rank that is gone
            self.part()
        for link in self._links:
            assert link.reader is not None
            link.reader.join(LEAVE_S)

    def part(self) -> None:
        """Give up torch.distributed; all ranks do so at the same time. One that cannot is left to the process's end."""
        parting = threading.Thread(target=dist.destroy_process_group, daemon=True)
        parting.start()
        parting.join(LEAVE_S / 2)

    def _send(self, link: _Link, message: tuple[str, tuple[Any, ...]]) -> None:
        self._raise_if_lost()
        try:
            link.outbox.send(message)
        except OSError as error:
            self._raise_if_lost(wait=REASON_S, cause=error)
            raise

    def _raise_if_lost(self, *, wait: float = 0.0, cause: BaseException | None = None) -> None:
        self._is_lost.wait(wait)
        if self.lost is not None:
            raise RankError(self.lost) from cause

    def _read_answers(self, link: _Link, host: str, pid: int) -> None:
        reason = "it was killed, or its host is gone"
        try:
            while True:
                done, answer = link.connection.recv()
                if not done:
                    reason, second_hand = answer
                    if second_hand:  # whose fault it was is about to be known
                        self._is_lost.wait(REASON_S)
                    break
                link.answers.put((True, answer))
        except (EOFError, OSError):
            pass
        if not self._leaving:
            self._lose(f"rank {link.rank} (process {pid} on {host}) has ended: {reason}")
        link.answers.put((False, self.lost))

    def _lose(self, reason: str) -> None:
        with self._losing:
            if self.lost is not None:
                return
            self.lost = reason
            self._is_lost.set()
            callback = self._on_lost
        log.error(reason)
        threading.Thread(target=self._end_at_last, daemon=True).start()
        if callback is not None:
            callback()

    def _end_at_last(self) -> None:
        threading.Event().wait(GRACE_S)
        os.write(sys.stderr.fileno(), f"error: {self.lost}\n".encode())
        os._exit(1)

    # ── the other ranks ─────────────────────────────────────────────────────────────────────────────────────

    def work(self) -> tuple[str, tuple[Any, ...]]:
        """The next work, or `LEAVE`. Raises `RankError` where it could not be read."""
        message = self._work.get()
        if isinstance(message, RankError):
            raise message
        return message

    def answer(self, result: Any) -> None:
        """What came of the work."""
        assert self._to_leader is not None
        self._to_leader.send((True, result))

    def fail(self, error: Exception) -> None:
        """Tell rank 0 why this rank ends."""
        assert self._to_leader is not None
        # A collective fails with such an error where another rank is gone.
        second_hand = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
        try:
            self._to_leader.send((False, (f"{type(error).__name__}: {error}".rstrip(": "), second_hand)))
        except OSError:
            return  # nobody is there to be told

    def _read_work(self) -> None:
        assert self._to_leader is not None
        try:
            while not self._leaving:
                try:
                    message = receive(self._to_leader)
                except RankError as error:
                    self._work.put(error)
                    continue
                self._leaving = message[0] == LEAVE
                self._work.put(message)
        except MemoryError as error:  # rank 0 must be told, or it waits for an answer; half a message cannot be skipped
            self.fail(error)
            os._exit(1)
        except (EOFError, OSError):
            os._exit(1)  # rank 0 is gone; what this rank does is for nobody, and may wait for it forever
        threading.Event().wait(LEAVE_S)
        os._exit(1)  # it stands in a collective that rank 0 has left

    # ── meeting ─────────────────────────────────────────────────────────────────────────────────────────────

    def _meet(self) -> None:
        place = self.place
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        os.environ |= dict(
            zip(TORCHRUN, map(str, (place.rank, place.size, place.local_rank, place.address, place.port)), strict=True)
        )
        dist.init_process_group(backend)
        for name in [name for name in os.environ if name in TORCHRUN or name.startswith("TORCHELASTIC_")]:
            del os.environ[name]  # what this process starts (vLLM) is no rank of ours
        key = secrets.token_bytes(32)
        listener = Listener(("", 0), backlog=place.size, authkey=key) if place.rank == 0 else None
        probe, file = offer() if place.rank == 0 else (None, None)
        told: list[Any] = [(listener.address[1], key, probe) if listener is not None else None]
        dist.broadcast_object_list(told, device=torch.device("cpu"))
        if listener is None:
            port, key, probe = told[0]
            self._to_leader = Client((place.address, port), authkey=key)
            _keep_alive(self._to_leader)
            self._to_leader.send((place.rank, socket.gethostname(), os.getpid(), probe.is_readable()))
            threading.Thread(target=self._read_work, daemon=True).start()
            return
        found: dict[int, tuple[Connection[Any, Any], str, int, bool]] = {}
        while len(found) < place.size - 1:
            connection = listener.accept()
            _keep_alive(connection)
            rank, *about = connection.recv()
            found[rank] = (connection, *about)
        listener.close()
        if file is not None:
            os.close(file)
        for rank, (connection, host, pid, shares_memory) in sorted(found.items()):
            link = _Link(rank, connection, Outbox(connection, shares_memory=shares_memory))
            link.reader = threading.Thread(target=self._read_answers, args=(link, host, pid), daemon=True)
            self._links.append(link)
        for link in self._links:
            assert link.reader is not None
            link.reader.start()


def _keep_alive(connection: Connection[Any, Any]) -> None:
    with socket.socket(fileno=os.dup(connection.fileno())) as shared:
        for option, value in KEEPALIVE:
            shared.setsockopt(socket.SOL_SOCKET if option == socket.SO_KEEPALIVE else socket.IPPROTO_TCP, option, value)


_group: RankGroup | None = None


def group() -> RankGroup | None:
    """This process's group; None where it is a run alone."""
    return _group


@contextmanager
def init_from_environment() -> Iterator[RankGroup | None]:
    """Join the other ranks, if the environment says that there are any (place.py); leave them at the end.

    Within it, again: the same group. Rank 0 gets here first of all, before its arguments are looked at, so that the
    others end with it whatever is wrong with them.
    """
    global _group
    if _group is not None:
        yield _group
        return
    place = find_place()
    if place.size == 1:
        yield None
        return
    _group = RankGroup(place)
    joined(place)
    try:
        yield _group
    finally:
        if place.rank == 0:
            _group.leave()
        _group = None
        joined(None)


def follow(group: RankGroup, make: Callable[..., object]) -> int:
    """What a rank other than 0 does: wait for work and do it, until rank 0 says that the run is over → exit code.

    `make` is the first work of each run: its result does the work that follows.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    worker: object = None
    try:
        while True:
            name, arguments = group.work()
            if name == LEAVE:
                group.part()
                return 0
            if name == "make":
                worker = None  # two models need not have room
                worker = make(*arguments)
                group.answer(None)
            else:
                group.answer(getattr(worker, name)(*arguments))
    except Exception as error:  # whatever it is, rank 0 must be told
        if not isinstance(error, VlmrlError):
            traceback.print_exception(error)
        log.error("this rank ends by an exception", exc_info=error)
        group.fail(error)
        if not torch.cuda.is_available():
            dist.destroy_process_group()  # gloo: who waits for this rank fails at once. NCCL would wait for the others
        while group.work()[0] != LEAVE:  # not before rank 0: a launcher that sees one rank fail ends the others
            pass
        return 1
