"""Wrappers that measure what a run does at each moment: sampling, the task's code, rendering, scoring.

    TimedThreads ────────┐
    TimedEnvs ───────────┤
    TimedRenderer ───────┼──▶ Activity: seconds in which each kind was the first of an order
    TimedScorer ─────────┤
    TimedEngine ─────────┘──▶ Answer per completion

Many rollouts run at a time, so the seconds of their calls add up to more than a step has. `Activity` divides the wall
clock instead: each moment belongs to one kind, the first of its order that is going on. The embedded engine waits
until every open session has a request, so its order begins with what it waits for; a server samples meanwhile.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from vlmrl.orchestrator.envs.base import EnvHandle, Envs, ProgramHandle, Seat
from vlmrl.orchestrator.rollout import RolloutRunner
from vlmrl.orchestrator.scoring import Scorer
from vlmrl.orchestrator.stream import ProblemStream
from vlmrl.orchestrator.task_threads import TaskThreads
from vlmrl.rendering.renderer import Renderer
from vlmrl.runs.bench.limits import Answer
from vlmrl.runs.wrapped_engine import WrappedEngine, WrappedSession
from vlmrl.tasks.base import Problem, Reply, StepInfo
from vlmrl.types import (
    Completion,
    EngineSession,
    EnvTime,
    Group,
    InferenceEngine,
    IntArray,
    Message,
    Prompt,
    Rollout,
    SamplingParams,
    StopReason,
    ToolSpec,
)

T = TypeVar("T")

DRAWING, TASK, RENDERING, SAMPLING, SCORING = "drawing", "task", "rendering", "sampling", "scoring"
PROGRAMS = "programs"
"""A program plays (task=program, task=verifiers), and nothing else goes on."""
KINDS = (DRAWING, TASK, RENDERING, SAMPLING, SCORING, PROGRAMS)

ENGINE_WAITS = (TASK, RENDERING, SAMPLING, SCORING, DRAWING, PROGRAMS)
"""The order for an engine that samples once every rollout has a request."""
ENGINE_GOES_ON = (SAMPLING, TASK, RENDERING, SCORING, DRAWING, PROGRAMS)
"""The order for servers, which sample while other rollouts do something else."""


class Activity:
    """Divides the wall clock among kinds of work. All methods are called from the event loop's thread.

    >>> now = iter([0.0, 1.0, 2.0, 4.0, 7.0]).__next__
    >>> activity = Activity(ENGINE_WAITS, clock=now)
    >>> with activity.during(SAMPLING):  # from second 0 to 4
    ...     with activity.during(TASK):  # from second 1 to 2
    ...         pass
    >>> {kind: seconds for kind, seconds in activity.seconds().items() if seconds}
    {'task': 1.0, 'sampling': 3.0}

    The seconds while the trainer waits for rollouts are also kept apart: envs and prompts of the next step are opened
    while it trains.
    """

    def __init__(self, order: Sequence[str], clock: Callable[[], float] = time.perf_counter) -> None:
        self._order = order
        self._clock = clock
        self._running = dict.fromkeys(KINDS, 0)
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._awaited = dict.fromkeys(KINDS, 0.0)
        self._waits = False
        self._since: float | None = None

    @contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Enter this while something of this kind is going on."""
        self.begin(kind)
        try:
            yield
        finally:
            self.end(kind)

    def begin(self, kind: str) -> None:
        self._add()
        self._running[kind] += 1

    def end(self, kind: str) -> None:
        self._add()
        self._running[kind] -= 1

    def seconds(self) -> dict[str, float]:
        """Seconds of each kind until now. Those in which nothing was going on are in none."""
        self._add()
        return dict(self._seconds)

    def awaited(self) -> dict[str, float]:
        """The same, of the time in which the trainer waited for rollouts."""
        self._add()
        return dict(self._awaited)

    @contextmanager
    def trainer_waits(self) -> Iterator[None]:
        """Enter this while the trainer waits for rollouts."""
        self._add()
        self._waits = True
        try:
            yield
        finally:
            self._add()
            self._waits = False

    def _add(self) -> None:
        now = self._clock()
        first = next((kind for kind in self._order if self._running[kind]), None)
        if first is not None and self._since is not None:
            self._seconds[first] += now - self._since
            self._awaited[first] += (now - self._since) * self._waits
        self._since = now


class TimedThreads(TaskThreads):
    """The threads in which problems are drawn."""

    def __init__(self, activity: Activity) -> None:
        super().__init__()
        self._activity = activity

    def run(self, call: Callable[[], T]) -> asyncio.Future[T]:
        future = super().run(call)
        self._activity.begin(DRAWING)
        future.add_done_callback(lambda _: self._activity.end(DRAWING))
        return future


class TimedEnvs:
    """`Envs` whose resets and steps count as the task's code. A program that plays by itself counts where nothing else
    goes on, since it mostly waits for answers."""

    def __init__(self, envs: Envs, activity: Activity) -> None:
        self.task = envs.task
        self._envs = envs
        self._activity = activity

    def new(self, problem: Problem) -> EnvHandle | ProgramHandle:
        handle = self._envs.new(problem)
        if isinstance(handle, ProgramHandle):
            return _TimedProgram(handle, self._activity)
        return _TimedEnv(handle, self._activity)

    async def settle(self) -> None:
        await self._envs.settle()

    async def stop(self) -> None:
        await self._envs.stop()


class _TimedEnv:
    def __init__(self, env: EnvHandle, activity: Activity) -> None:
        self._env = env
        self._activity = activity
        self.time: EnvTime = env.time

    async def reset(self) -> tuple[Message, ...]:
        with self._activity.during(TASK):
            return await self._env.reset()

    async def step(self, text: str, info: StepInfo) -> Reply:
        with self._activity.during(TASK):
            return await self._env.step(text, info)

    def end(self) -> None:
        self._env.end()


class _TimedProgram:
    def __init__(self, program: ProgramHandle, activity: Activity) -> None:
        self._program = program
        self._activity = activity
        self.time: EnvTime = program.time
        self.noise = program.noise

    async def play(self, rollout: Rollout, seat: Seat) -> StopReason:
        self._program.noise = self.noise
        with self._activity.during(PROGRAMS):
            return await self._program.play(rollout, seat)

    def end(self) -> None:
        self._program.end()


class TimedRenderer:
    """A `Renderer` whose prompts are timed; everything else is the renderer's own."""

    def __init__(self, renderer: Renderer, activity: Activity) -> None:
        self._renderer = renderer
        self._activity = activity

    def __getattr__(self, name: str) -> Any:
        return getattr(self._renderer, name)

    async def first_turn(self, messages: Sequence[Message], tools: Sequence[ToolSpec] | None = None) -> Prompt:
        with self._activity.during(RENDERING):
            return await self._renderer.first_turn(messages, tools)

    async def next_turn(
        self,
        previous: Prompt,
        completion_ids: IntArray,
        history: Sequence[Message],
        new_messages: Sequence[Message],
        tools: Sequence[ToolSpec] | None = None,
    ) -> tuple[Prompt, bool]:
        with self._activity.during(RENDERING):
            return await self._renderer.next_turn(previous, completion_ids, history, new_messages, tools)


class TimedScorer:
    """A `Scorer` whose reward terms are timed; everything else is the scorer's own."""

    def __init__(self, scorer: Scorer, activity: Activity) -> None:
        self._scorer = scorer
        self._activity = activity

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)

    async def score(self, group: Group) -> None:
        with self._activity.during(SCORING):
            await self._scorer.score(group)


class TimedEngine(WrappedEngine):
    """An engine whose requests are timed, and whose answers are noted for the limit of sampling."""

    def __init__(self, engine: InferenceEngine, activity: Activity, *, ends_answers: bool) -> None:
        """`ends_answers`: report every completion as stopped. Random weights end no answer by themselves, so episodes
        would never reach their second turn."""
        super().__init__(engine)
        self.activity = activity
        self.ends_answers = ends_answers
        self.answers: list[Answer] = []

    def session(self, rollout_id: str, *, is_awaited: bool = True) -> _TimedSession:
        return _TimedSession(self, rollout_id, self._engine.session(rollout_id, is_awaited=is_awaited))


class _TimedSession(WrappedSession):
    def __init__(self, engine: TimedEngine, rollout_id: str, session: EngineSession) -> None:
        super().__init__(session)
        self._engine = engine
        self._step = rollout_id.split("/")[1]
        self._turns = 0
        self._computed = 0

    async def generate(self, prompt: Prompt, sampling: SamplingParams) -> Completion:
        with self._engine.activity.during(SAMPLING):
            completion = await self._session.generate(prompt, sampling)
        length, new = len(prompt.token_ids), len(completion.token_ids)
        hashes = tuple(item.hash for item in prompt.mm_items)
        self._engine.answers.append(
            Answer(
                wave=(self._step, self._turns),
                prompt=hash((prompt.token_ids.tobytes(), hashes)),
                prompt_tokens=length,
                fresh_tokens=max(0, length - self._computed),
                new_tokens=new,
            )
        )
        self._turns += 1
        self._computed = length + new
        return dataclasses.replace(completion, finish_reason="stop") if self._engine.ends_answers else completion


def timed(runner: RolloutRunner, engine: TimedEngine) -> RolloutRunner:
    """The runner with everything in it timed by the engine's activity."""
    activity = engine.activity
    return dataclasses.replace(
        runner,
        envs=TimedEnvs(runner.envs, activity),
        renderer=cast("Renderer", TimedRenderer(runner.renderer, activity)),
        engine=engine,
        scorer=cast("Scorer", TimedScorer(runner.scorer, activity)),
    )


def time_drawing(problems: ProblemStream, activity: Activity) -> None:
    """Time how long problems are drawn, from now on."""
    problems.threads = TimedThreads(activity)


def difference(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each kind between two calls of `Activity.seconds`."""
    return {kind: after[kind] - before[kind] for kind in after}
