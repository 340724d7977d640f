"""The ranks of one run: how rank 0 leads the others, and how all of them end together.

    rank 0                                                      ranks 1 …
    the whole command line, orchestrator, engine, monitor       follow(): receive a command, run it, answer
    together(a command per rank, own) ────── command ─────────▶ command.run(worker)
             own()                        ══ torch.distributed: gradients, weights ══
             ◀────────────────────────────── answer ───────────

Commands and answers are pickled over one connection per rank (meeting.py); large arrays of a command go through shared
memory where the two processes share some (messages.py). The connection also reveals a death, because it closes with the
process. A rank that fails sends its reason before it ends. Rank 0 then ends the run with that reason, even while it
waits in a collective that the failed rank will never join. The other ranks end when rank 0 does.

A process that hangs closes nothing, so both sides of a connection send beats (heartbeat.py). A rank that is not heard
for a minute is lost, and so is one whose command stands still for half an hour. A process on the same host is killed
then, because it would otherwise outlive the run.

Only rank 0 reacts to signals that end a run (`LEADERS_SIGNALS`): it finishes the step and saves, and needs the other
ranks for both, so they ignore these signals.

Left out on purpose: continuing with fewer ranks. `resume=` continues a run with any number of ranks.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vlmrl.errors import RankError, VlmrlError, format_error, safe_text
from vlmrl.ranks import heartbeat
from vlmrl.ranks.commands import Command, Leave, Message
from vlmrl.ranks.heartbeat import Beats, Pace, Watch
from vlmrl.ranks.link import Answer, Beat, Failure, Link
from vlmrl.ranks.meeting import meet
from vlmrl.ranks.messages import Outbox, receive
from vlmrl.ranks.place import Place, find_place, remember_place

AnswerT = TypeVar("AnswerT")
OwnT = TypeVar("OwnT")
WorkerT = TypeVar("WorkerT")
log = logging.getLogger(__name__)

REASON_WAIT_S = 5.0
"""Seconds that rank 0 waits, after a collective has failed, for a connection to report which rank failed and why."""

SHUTDOWN_GRACE_S = 60.0
"""Seconds that rank 0 has to shut down in order (stop servers, close records) after a rank is lost. Then the process is
ended by force, since a collective that hangs may keep it from ending."""

LEAVE_TIMEOUT_S = 20.0
"""Seconds that a rank has to end after it is told to leave."""


LEADERS_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGXCPU,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
"""Signals to which only rank 0 reacts."""


class RankGroup:
    """The rank group of a run, as seen from this process. Built by `init_from_environment`."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.lost: str | None = None
        """Which rank ended early, and why; None while all ranks are alive."""
        self._messages: queue.SimpleQueue[Message | RankError] = queue.SimpleQueue()
        """On ranks other than 0: what rank 0 sent, or why it could not be read."""
        self._leaving = False
        self._working = False
        """On ranks other than 0: whether a command is not answered yet."""
        self._on_lost: Callable[[], None] | None = None
        self._turn = threading.Lock()
        """Held by the thread whose commands the ranks run."""
        self._losing = threading.Lock()
        self._is_lost = threading.Event()
        self._meeting = meeting = meet(place)
        self._links = [Link(peer, Outbox(peer.connection, shares_memory=peer.shares_memory)) for peer in meeting.peers]
        self._leader: Link | None = None
        if meeting.leader is not None:
            self._leader = Link(meeting.leader, Outbox(meeting.leader.connection, shares_memory=False))
            self._start(self._leader, self._read_messages, self._end_without_leader, self._tell_standing(self._leader))
        for link in self._links:
            self._start(link, partial(self._read_answers, link), partial(self._end_silent, link), link.beat)

    @staticmethod
    def _start(link: Link, read: Callable[[], None], on_silence: Callable[[], None], beat: Callable[[], None]) -> None:
        """Start the threads of a connection."""
        link.watch = Watch(on_silence)
        link.beats = Beats(beat)
        link.reader = threading.Thread(target=read, daemon=True)
        link.reader.start()

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def size(self) -> int:
        return self.place.size

    # ── rank 0 ──────────────────────────────────────────────────────────────────────────────────────────────

    def together(
        self, commands: Sequence[Command[Any, AnswerT]], own: Callable[[], OwnT]
    ) -> tuple[OwnT, list[AnswerT]]:
        """Send `commands[r - 1]` to each rank r > 0 and call `own` meanwhile → its result, and the answers by rank.

        Calls of several threads wait for each other. Raises `RankError` where a rank is lost, and what `own` raises.
        """
        with self._turn:
            return self._together(commands, own)

    def _together(
        self, commands: Sequence[Command[Any, AnswerT]], own: Callable[[], OwnT]
    ) -> tuple[OwnT, list[AnswerT]]:
        for link, command in zip(self._links, commands, strict=True):
            self._send(link, command)
        try:
            result = own()
        except RuntimeError as error:  # a collective's error does not say which peer is gone, or why
            self._raise_if_lost(wait=REASON_WAIT_S, cause=error)
            error.add_note("\n".join(f"{link} is at {link.standing.where}" for link in self._links if link.standing))
            raise
        answers: list[AnswerT] = []
        for link in self._links:
            done, answer = link.answers.get()
            link.outbox.answered()
            if not done:
                raise RankError(answer)
            answers.append(answer)
        return result, answers

    def on_lost(self, callback: Callable[[], None] | None) -> None:
        """Call `callback` when a rank is lost, in another thread, or at once if one is lost already. None: call nothing
        from now on."""
        with self._losing:
            self._on_lost = callback
            lost = self.lost
        if lost is not None and callback is not None:
            callback()

    def leave(self) -> None:
        """End the group: tell all other ranks to leave, and wait up to `LEAVE_TIMEOUT_S` for each to end."""
        self._leaving = True
        for link in self._links:
            link.close()
            if link.sending.acquire(timeout=1.0):  # otherwise a message is stuck half way to a rank that hangs
                with suppress(OSError):  # this rank has ended already
                    link.outbox.send(Leave())
                link.sending.release()
        if self.lost is None:  # otherwise this could wait for the lost rank forever
            self.part()
        for link in self._links:
            assert link.reader is not None
            link.reader.join(LEAVE_TIMEOUT_S)

    def part(self) -> None:
        """Shut torch.distributed down; all ranks do so at the same time. Where that hangs, return after half of
        `LEAVE_TIMEOUT_S`."""
        parting = threading.Thread(target=dist.destroy_process_group, daemon=True)
        parting.start()
        parting.join(LEAVE_TIMEOUT_S / 2)

    def _send(self, link: Link, message: Message) -> None:
        self._raise_if_lost()
        try:
            link.send(message)
        except OSError as error:
            self._raise_if_lost(wait=REASON_WAIT_S, cause=error)
            raise

    def _raise_if_lost(self, *, wait: float = 0.0, cause: BaseException | None = None) -> None:
        self._is_lost.wait(wait)
        if self.lost is not None:
            raise RankError(self.lost) from cause

    def _read_answers(self, link: Link) -> None:
        """Queue the answers of one rank until its connection closes; then report the rank as lost."""
        assert link.watch is not None
        reason = "has ended: it was killed, or its host is gone"
        try:
            while True:
                message = receive(link.peer.connection, link.watch.heard)
                if isinstance(message, Failure):
                    reason = f"has ended: {message.reason}"
                    if message.is_second_hand:  # the rank that caused it is about to report
                        self._is_lost.wait(REASON_WAIT_S)
                    break
                if isinstance(message, Answer):
                    link.standing = None
                    link.answers.put((True, message.result))
                elif isinstance(message, Beat):
                    link.standing = message.standing
                    self._end_if_it_stands_still(link)
        except (EOFError, OSError):
            pass
        link.close()
        if not self._leaving:
            self._lose(f"{link} {reason}")
        link.answers.put((False, self.lost))

    def _end_silent(self, link: Link) -> None:
        self._lose(f"{link} has not been heard for {heartbeat.SILENCE_LIMIT_S:.0f} s: it is stopped, or its host hangs")
        link.kill()
        link.answers.put((False, self.lost))

    def _end_if_it_stands_still(self, link: Link) -> None:
        at = link.standing
        if at is not None and not at.waits and at.seconds >= heartbeat.STANDSTILL_LIMIT_S:
            self._lose(f"{link} has not moved for {at.seconds:.0f} s from {at.where}")
            link.kill()
            link.answers.put((False, self.lost))

    def _lose(self, reason: str) -> None:
        with self._losing:
            if self.lost is not None:
                return
            self.lost = reason
            self._is_lost.set()
            callback = self._on_lost
        log.error(reason)
        threading.Thread(target=self._end_after_grace, daemon=True).start()
        if callback is not None:
            callback()

    def _end_after_grace(self) -> None:
        threading.Event().wait(SHUTDOWN_GRACE_S)
        os.write(sys.stderr.fileno(), f"error: {self.lost}\n".encode())
        os._exit(1)

    # ── the other ranks ─────────────────────────────────────────────────────────────────────────────────────

    def next_message(self) -> Message:
        """Wait for the next message from rank 0. Raises `RankError` where its arrays could not be read."""
        self._working = False
        message = self._messages.get()
        if isinstance(message, RankError):
            raise message
        self._working = True
        return message

    def answer(self, result: object) -> None:
        """Send the result of the last command to rank 0."""
        assert self._leader is not None
        self._leader.send(Answer(result))

    def fail(self, error: BaseException) -> None:
        """Tell rank 0 why this rank ends."""
        assert self._leader is not None
        # A collective raises a RuntimeError where another rank is gone.
        is_second_hand = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
        with suppress(OSError):  # rank 0 has ended already
            self._leader.send(Failure(f"{type(error).__name__}: {safe_text(error)}".rstrip(": "), is_second_hand))

    def _tell_standing(self, leader: Link) -> Callable[[], None]:
        """What the beats of this rank send."""
        pace = Pace()

        def tell() -> None:
            standing = pace.standing()
            leader.beat(standing if self._working else None)

        return tell

    def _end_without_leader(self) -> None:
        """Rank 0 hangs. This rank may wait for it in a collective, so nothing but the end of the process helps."""
        assert self._leader is not None
        text = (
            f"error: {self._leader} has not been heard for {heartbeat.SILENCE_LIMIT_S:.0f} s: it is stopped, or its "
            f"host hangs, so rank {self.rank} on {socket.gethostname()} ends\n"
        )
        os.write(sys.stderr.fileno(), text.encode())
        self._leader.kill()
        os._exit(1)

    def _read_messages(self) -> None:
        assert self._leader is not None
        assert self._leader.watch is not None
        try:
            while not self._leaving:
                try:
                    message = receive(self._leader.peer.connection, self._leader.watch.heard)
                except RankError as error:
                    self._messages.put(error)
                    continue
                if isinstance(message, Beat):
                    continue
                self._leaving = isinstance(message, Leave)
                self._messages.put(message)
        except MemoryError as error:
            # The rest of a half-read message cannot be skipped, and rank 0 would wait for an answer.
            self.fail(error)
            os._exit(1)
        except (EOFError, OSError):
            os._exit(1)  # rank 0 is gone, and the work of this rank may wait for rank 0 forever
        self._leader.close()
        threading.Event().wait(LEAVE_TIMEOUT_S)
        os._exit(1)  # this rank still waits in a collective that rank 0 has left


_rank_group: RankGroup | None = None


def joined_group() -> RankGroup | None:
    """The rank group that this process has joined; None in a run of one process."""
    return _rank_group


@contextmanager
def init_from_environment() -> Iterator[RankGroup | None]:
    """Join the other ranks that the environment names (place.py), and leave them at the end. None: there are none.

    A nested call yields the same group. Rank 0 joins before it parses its arguments, so that the other ranks end with
    it whatever is wrong with the arguments.
    """
    global _rank_group
    if _rank_group is not None:
        yield _rank_group
        return
    place = find_place()
    if place.size == 1:
        yield None
        return
    _rank_group = RankGroup(place)
    remember_place(place)
    try:
        yield _rank_group
    finally:
        if place.rank == 0:
            _rank_group.leave()
        _rank_group = None
        remember_place(None)


def follow(rank_group: RankGroup, worker: WorkerT) -> int:
    """Run the commands of rank 0 with `worker` until rank 0 sends `Leave` → exit code. For ranks other than 0."""
    for number in LEADERS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    try:
        while not isinstance(message := rank_group.next_message(), Leave):
            rank_group.answer(message.run(worker))
        rank_group.part()
        return 0
    except BaseException as error:  # noqa: BLE001 — rank 0 must learn of every error; a user's loss may call sys.exit()
        if not isinstance(error, VlmrlError):
            print(format_error(error), end="", file=sys.stderr)
        log.error("this rank ends by an exception\n%s", format_error(error).rstrip())
        rank_group.fail(error)
        if not torch.cuda.is_available():
            # gloo: ranks that wait for this one fail at once. With NCCL, this call would wait for the others.
            dist.destroy_process_group()
        while not isinstance(rank_group.next_message(), Leave):
            pass  # do not end before rank 0: a launcher that sees one rank fail kills the others
        return 1
