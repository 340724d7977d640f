"""The loop with the real runner on a clock of its own: when groups begin, and how old what they sample becomes.

The engine shares its rate among all requests, as a GPU that decodes many sequences at once nearly does. Everything runs
in one thread, so that a tick of the clock means the same for the engine, the trainer and the envs.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.lockstep import END, CharRenderer
from support.loop_world import GROUPS, SIBLINGS, World
from vlmrl.orchestrator import loop as loop_module
from vlmrl.orchestrator.envs.base import Closing
from vlmrl.orchestrator.rollout import RolloutRunner
from vlmrl.tasks.base import Reply, StepInfo
from vlmrl.types import Completion, EngineSession, EnvTime, Image, Message, Prompt, SamplingParams, StepResult

BATCH = GROUPS * SIBLINGS


@dataclass(eq=False)
class Request:
    left: float
    """Tokens to sample."""
    version: int
    """Of the weights when it began."""
    done: asyncio.Future[None]


@dataclass(eq=False)
class Clocked(World):
    """A world whose engine samples `rate` tokens per tick and whose trainer takes `train` ticks per step."""

    length: Callable[[str], int] = lambda rollout_id: 30
    """Tokens of a rollout's answer."""
    rate: float = 6.0
    train: int = 20
    tick: int = 0
    idle: list[int] = field(default_factory=list)
    """Ticks in which the trainer worked and nothing was sampled."""
    most_requests: int = 0
    steps_at: list[int] = field(default_factory=list)
    """Tick at which each step was published."""
    _requests: list[Request] = field(default_factory=list)
    _sleeping: list[tuple[int, asyncio.Future[None]]] = field(default_factory=list)

    # the clock
    async def ticks(self) -> None:
        while True:
            for _ in range(40):  # until everything waits for the clock
                await asyncio.sleep(0)
            self.tick += 1
            if not self._requests and self.tick > 1:
                self.idle.append(self.tick)
            for request in self._requests:
                request.left -= self.rate / len(self._requests)
            for request in [each for each in self._requests if each.left <= 1e-9]:
                self._requests.remove(request)
                if not request.done.cancelled():
                    request.done.set_result(None)
            for due, done in [each for each in self._sleeping if each[0] <= self.tick]:
                self._sleeping.remove((due, done))
                if not done.cancelled():
                    done.set_result(None)

    async def sleep(self, ticks: int) -> None:
        done = asyncio.get_running_loop().create_future()
        self._sleeping.append((self.tick + ticks, done))
        await done

    async def to_thread(self, function: Any, *args: Any) -> Any:
        if function == self.train_step:
            await self.sleep(self.train)
        return function(*args)

    # the trainer
    def train_step(self, samples: Any, demonstrations: Any = (), steps: Any = None) -> StepResult:
        self.happens(f"learn {self.version + 1}")
        self.learned.append(samples)
        self.version += 1
        return StepResult(self.version, {}, [])

    def vision_gap(self, step: int, samples: Any) -> dict[str, float]:
        return {}

    async def publish(self, version: int) -> None:
        await super().publish(version)
        self.steps_at.append(self.tick)

    # the engine
    def session(self, rollout_id: str, *, is_awaited: bool = True) -> EngineSession:
        return Session(self, rollout_id)

    # the envs
    closing = Closing()

    def new(self, problem: Any) -> Env:
        return Env(self, int(problem.id[len("train[") : -1]))

    async def settle(self) -> None:
        await self.closing.settle()

    async def prefetch(self, prompt: Prompt) -> None:
        self.happens(f"sent {int(prompt.images[0].num_tokens)}")

    def play(self, **how: Any) -> str:
        """Run the loop with a real runner."""
        neighbour: Any = self
        runner = RolloutRunner(
            envs=neighbour,
            renderer=CharRenderer(),
            engine=neighbour,
            seed=0,
            max_turns=1,
            max_new_tokens=1000,
            max_model_len=10_000,
            prefetch=self.prefetch,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio, "to_thread", self.to_thread)
            patch.setattr(loop_module, "rollout_metrics", lambda *_: {})
            patch.setattr(loop_module, "note_learned", lambda *_: None)
            with_clock(patch, self)
            return self.run(runner=runner, **how)


def with_clock(patch: pytest.MonkeyPatch, world: Clocked) -> None:
    """Let the clock run while the loop does."""
    run = loop_module.Loop.run

    async def run_with_clock(loop: Any) -> Any:
        clock = asyncio.create_task(world.ticks())
        try:
            return await run(loop)
        finally:
            clock.cancel()
            await asyncio.wait({clock})

    patch.setattr(loop_module.Loop, "run", run_with_clock)


@dataclass(eq=False)
class Session:
    world: Clocked
    rollout_id: str

    async def __aenter__(self) -> EngineSession:
        return self

    async def __aexit__(self, *exc: object) -> None: ...

    async def generate(self, prompt: Prompt, sampling: SamplingParams) -> Completion:
        world = self.world
        world.happens(f"begin {self.rollout_id}")
        length = world.length(self.rollout_id)
        request = Request(length, world.published, asyncio.get_running_loop().create_future())
        world._requests.append(request)
        world.most_requests = max(world.most_requests, len(world._requests))
        try:
            await request.done
        finally:
            if request in world._requests:
                world._requests.remove(request)
        versions = np.array([request.version, world.published], np.int64)
        return Completion(np.array([ord("y"), END]), np.zeros(2, np.float32), versions, "stop")


class Env:
    """One turn; the image has as many features as the problem's index + 1."""

    def __init__(self, world: Clocked, index: int) -> None:
        self.time = EnvTime()
        self.world, self.index = world, index
        self.is_ended = False

    async def reset(self) -> tuple[Message, ...]:
        self.world.happens(f"reset {self.index}")
        return (Message.of("user", Image(self.index + 1)),)

    async def step(self, text: str, info: StepInfo) -> Reply:
        return Reply(done=True, reward=float(next(COUNTER) % 2))

    def end(self) -> None:
        if not self.is_ended:
            self.is_ended = True
            self.world.happens(f"close {self.index}")


COUNTER = itertools.count()


def staleness(world: Clocked) -> list[int]:
    """Per sample that was learned: steps between the weights that began it and those that learned from it."""
    return [
        int(version - sample.versions[sample.loss_mask].min())
        for version, samples in enumerate(world.learned)
        for sample in samples
    ]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 60))
def test_the_bound_holds_for_every_group_under_any_schedule(
    max_staleness: int, seed: int, steps: int, train: int
) -> None:
    random = np.random.default_rng(seed)
    world = Clocked(length=lambda rollout_id: int(random.integers(1, 80)), train=train)
    assert world.play(steps=steps, max_staleness=max_staleness) == "finished"
    assert [len(samples) for samples in world.learned] == [BATCH] * steps, "none was dropped"
    assert 0 <= min(staleness(world)) <= max(staleness(world)) <= max_staleness
    assert world.most_requests <= max(1, max_staleness) * BATCH
    order = [event.split("/")[1:3] for event in world.events if event.startswith("begin")]
    assert [int(step) for step, _ in order] == sorted(int(step) for step, _ in order), "in the order of the stream"
    learned = [int(sample.rollout_id.split("/")[1]) for samples in world.learned for sample in samples]
    assert learned == [step for step in range(1, steps + 1) for _ in range(BATCH)], "a step learns from its own groups"
    opened = [event for event in world.events if event.startswith("reset")]
    assert len(opened) == len([event for event in world.events if event.startswith("close")]) == BATCH * steps


def test_the_engine_is_never_empty_and_steps_take_equal_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts take 30 ticks and training 20, so steps of 30 ticks are the limit. Batches that begin without waiting
    for places end together, so that steps take more and less time in turn."""
    world = Clocked()
    world.play(steps=9, max_staleness=1)
    times = [later - before for before, later in pairwise(world.steps_at)][2:]
    assert times == [30] * len(times)
    assert not [tick for tick in world.idle if world.steps_at[1] < tick < world.steps_at[-2]]

    lockstep = Clocked()
    monkeypatch.setattr(loop_module, "Admission", lambda places: None)
    lockstep.play(steps=9, max_staleness=1)
    times = [later - before for before, later in pairwise(lockstep.steps_at)][2:]
    assert max(times) > 1.5 * min(times), "steps alternate"


def test_a_group_begins_as_others_end() -> None:
    """One long answer in the first group does not keep the groups of the next step from playing beside it."""
    world = Clocked(length=lambda rollout_id: 200 if rollout_id == "train/000001/00/00" else 30)
    world.play(steps=3, max_staleness=1)
    second = world.events.index("begin train/000002/00/00")
    assert second < world.events.index("learn 1"), "while the long answer was still sampled"


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_what_needs_no_weights_is_made_while_the_step_before_is_learned(max_staleness: int) -> None:
    world = Clocked(train=50)
    world.play(steps=5, max_staleness=max_staleness)
    for step in range(max_staleness + 2, 6):
        needed = f"publish {step - 1 - max_staleness}"
        for index in range((step - 1) * GROUPS, step * GROUPS):
            for event in (f"reset {index}", f"sent {index + 1}"):
                last = max(place for place, each in enumerate(world.events) if each == event)
                assert last < world.events.index(needed), (event, needed)
        assert world.events.index(needed) < world.events.index(f"begin train/{step:06d}/00/00")


def test_a_run_that_ends_closes_what_it_opened() -> None:
    world = Clocked()
    world.during["learn 3"] = lambda: world.stop.set()
    assert world.play(steps=9, max_staleness=1) == "interrupted"
    resets = sum(event.startswith("reset") for event in world.events)
    assert resets == sum(event.startswith("close") for event in world.events) > 3 * BATCH
