"""Sampling on all ranks of a run: each batch of the embedded engine is dealt to them, and each samples its share.

    rank 0   RankedGenerator.run(requests) ── SampleShare ──▶ rank r: RankSampler.sample(share)
                 own share, by its own Generator                          by a Generator of that rank
             ◀────────────────── completions, rows computed, or the error ──

A session stays where its first request was sampled: its turns are in the KV cache there. Siblings are dealt together,
because they share their prompt. A completion depends on its own seed, so the number of ranks decides about the order of
sums alone, not about the tokens.

Every rank computes with its own copy of the weights. Where these are sliced (`trainer.sharding`), they are gathered
first (`Learner.sample`), once per batch, since ranks make different numbers of passes.

Left out on purpose: stop strings on other ranks. Only rank 0 has the renderer that turns tokens into text, so it
samples the requests that have some.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Protocol, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np

from vlmrl.errors import VlmrlError
from vlmrl.inference.embedded.generator import Generator, Intake
from vlmrl.inference.embedded.requests import Request, SessionCache
from vlmrl.ranks.commands import Command
from vlmrl.types import Completion, MMItem, Prompt, SamplingParams


@dataclass(frozen=True, eq=False)
class Asked:
    """A request as it is sent to another rank."""

    session: int
    """Number of the session."""
    most: int
    """See `SessionCache.most`."""
    prompt: Prompt
    sampling: SamplingParams


@dataclass(frozen=True, eq=False)
class Answered:
    """What a rank has sampled."""

    completions: list[Completion]
    rows: dict[str, float]
    """See `Generator.take_counters`."""
    error: VlmrlError | None = None
    """Why there are no completions."""


class RankSampler:
    """Samples the shares of one rank. Its methods are called one at a time."""

    def __init__(self, generator: Generator, *, weights_move: bool) -> None:
        """`weights_move`: whether the weights are at other addresses in each batch."""
        self._generator, self._weights_move = generator, weights_move
        self._sessions: dict[int, SessionCache] = {}
        """By their numbers."""

    def sample(self, share: SampleShare) -> Answered:
        """The completions of `share`, in order."""
        if share.starts_anew:
            self.clear()
        for number in share.closed:
            self._sessions.pop(number, None)
        requests = [
            Request(each.prompt, each.sampling, self._sessions.setdefault(each.session, SessionCache(each.most)))
            for each in share.asked
        ]
        return _sampled(self._generator, requests, share.version, self._weights_move)

    def clear(self) -> None:
        """Forget all sessions, and give the memory of the caches to the trainer."""
        self._sessions.clear()
        self._generator.clear_cache()


class HasSampler(Protocol):
    """The state of a rank other than 0, as far as it samples."""

    def sample(self, share: SampleShare) -> Answered: ...


@dataclass(frozen=True, eq=False)
class SampleShare(Command[HasSampler, Answered]):
    """Sample a part of a batch."""

    asked: tuple[Asked, ...]
    version: int
    """Policy version of the weights."""
    closed: tuple[int, ...]
    """Sessions of this rank that have ended."""
    starts_anew: bool
    """Whether nothing of before is to be read."""

    def run(self, worker: HasSampler) -> Answered:
        return worker.sample(self)


Together: TypeAlias = Callable[[Sequence[SampleShare], Callable[[], Answered]], tuple[Answered, list[Answered]]]
"""Runs a command on each other rank, and a function here, all with whole weights → the function's result, and the
answers by rank."""


@dataclass(frozen=True)
class _Place:
    rank: int
    number: int


class RankedGenerator:
    """As `Generator`, on all ranks; implements `BatchSampler`."""

    def __init__(self, own: Generator, ranks: int, together: Together, *, weights_move: bool) -> None:
        """`own`: that of rank 0; `weights_move`: see `RankSampler`."""
        self._own, self._ranks, self._together, self._weights_move = own, ranks, together, weights_move
        self._places: WeakKeyDictionary[SessionCache, _Place] = WeakKeyDictionary()
        self._sent: list[set[int]] = [set() for _ in range(ranks)]
        """Per rank, the sessions that it holds."""
        self._next = 0
        self._starts_anew = False
        self._rows: dict[str, float] = {}

    def take_counters(self) -> dict[str, float]:
        found, self._rows = self._own.take_counters() | self._rows, {}
        return found

    @property
    def cached_slots(self) -> int:
        return self._own.cached_slots

    def clear_cache(self) -> None:
        """Have the next batch start with empty caches. The other ranks clear theirs with it, or before they train
        (`Follower.make_room`)."""
        self._own.clear_cache()
        self._places.clear()
        self._sent = [set() for _ in range(self._ranks)]
        self._starts_anew = True

    def run(self, requests: Sequence[Request], version: int, intake: Intake | None = None) -> list[Completion]:
        assert intake is None, "a batch of several ranks takes no further requests"
        self._deal([request for request in requests if request.session not in self._places])
        shares: list[list[int]] = [[] for _ in range(self._ranks)]
        for index, request in enumerate(requests):
            shares[self._places[request.session].rank if not request.sampling.stop else 0].append(index)
        commands = [self._command(rank, [requests[i] for i in shares[rank]], version) for rank in range(1, self._ranks)]
        own = [requests[i] for i in shares[0]]
        self._starts_anew = False
        first, others = self._together(commands, lambda: _sampled(self._own, own, version, self._weights_move))
        found: dict[int, Completion] = {}
        for answer, share in zip([first, *others], shares, strict=True):
            if answer.error is not None:
                raise answer.error
            found |= zip(share, answer.completions, strict=True)
            for name, count in answer.rows.items():
                self._rows[name] = self._rows.get(name, 0.0) + count
        return [found[index] for index in range(len(requests))]

    def _deal(self, fresh: Sequence[Request]) -> None:
        """Give each new session a rank."""
        ordered = sorted({id(request.session): request for request in fresh}.values(), key=_prompt_key)
        sizes = siblings(ordered)
        for request, rank in zip(ordered, dealt(sizes, self._ranks), strict=True):
            self._places[request.session] = _Place(rank, self._next)
            self._next += 1

    def _command(self, rank: int, requests: Sequence[Request], version: int) -> SampleShare:
        alive = {place.number for place in self._places.values() if place.rank == rank}
        closed = tuple(sorted(self._sent[rank] - alive))
        numbers = [self._places[request.session].number for request in requests]
        self._sent[rank] = (self._sent[rank] & alive) | set(numbers)
        light = _without_pictures([request.prompt for request in requests])
        asked = tuple(
            Asked(number, request.session.most, prompt, request.sampling)
            for number, request, prompt in zip(numbers, requests, light, strict=True)
        )
        return SampleShare(asked, version, closed, self._starts_anew)


def siblings(requests: Sequence[Request]) -> list[int]:
    """How many neighbors have the same prompt, group by group."""
    return [len(list(group)) for _, group in groupby(requests, key=_prompt_key)]


def dealt(groups: Sequence[int], ranks: int) -> list[int]:
    """The rank of each member of groups of so many: neighbors, about as many per rank, and a group together unless that
    would move a bound by more than a quarter of a rank's share.

    >>> dealt([3, 5], 2), dealt([4, 4, 4], 2), dealt([1], 2)
    ([0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1], [0])
    """
    total = sum(groups)
    bounds = np.cumsum([0, *groups])
    cuts = []
    for rank in range(1, ranks):
        even = rank * total / ranks
        nearest = int(bounds[np.abs(bounds - even).argmin()])
        cuts.append(nearest if abs(nearest - even) <= total / (4 * ranks) else int(even + 0.5))
    ranks_of: list[int] = np.searchsorted(cuts, np.arange(total), side="right").tolist()
    return ranks_of


def _sampled(generator: Generator, requests: Sequence[Request], version: int, weights_move: bool) -> Answered:
    """An error of the run is an answer, too: the other ranks wait for one, and rank 0 raises it."""
    try:
        completions = generator.run(requests, version) if requests else []
    except VlmrlError as error:
        return Answered([], {}, error)
    finally:
        if weights_move:
            generator.forget_weights()
    return Answered(completions, generator.take_counters())


def _prompt_key(request: Request) -> tuple[bytes, tuple[str, ...]]:
    return request.prompt.token_ids.tobytes(), tuple(item.hash for item in request.prompt.mm_items)


def _without_pictures(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts without the pictures for people, which no model reads. Prompts and items that stand here several
    times stay one object each, so they are sent once."""
    items: dict[int, MMItem] = {}
    found: dict[int, Prompt] = {}
    for prompt in prompts:
        for item in prompt.mm_items:
            if id(item) not in items:
                items[id(item)] = item.without_picture()
        if id(prompt) not in found:
            found[id(prompt)] = replace(prompt, mm_items=tuple(items[id(item)] for item in prompt.mm_items))
    return [found[id(prompt)] for prompt in prompts]
