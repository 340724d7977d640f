"""Rollouts: each one drives an Env through renderer and engine until the task is done, a budget cuts it, or it faults.

    reset ─▶ prompt ─▶ generate ─▶ decode ─▶ step ─▶ done? ──────────▶ rollout
                ▲                                      │ no
                └── next_turn ◀── reply's messages ◀───┘

Whatever goes wrong in one rollout becomes its `stop_reason` and `error`; the others go on. All rollouts of a call are
tasks of one event loop; only the task's own code leaves it, for a thread (`TaskThreads`).

Left out on purpose: retries (a fault is a figure, not a secret) and a time limit for a task's code.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import numbers
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from vlmrl.errors import EngineError
from vlmrl.orchestrator.samples import extends
from vlmrl.rendering.renderer import ImageError, Renderer
from vlmrl.tasks.base import Env, Problem, Reply, Split, Task
from vlmrl.types import (
    ContractError,
    EngineSession,
    Group,
    Image,
    InferenceEngine,
    Message,
    Rollout,
    SamplingParams,
    StopReason,
    Text,
    Turn,
    check_placeholders,
)

T = TypeVar("T")

THREADS = 32
"""Threads for the task's code: so many blocking resets and steps run at once."""

PATIENCE = 0.01
"""Seconds that one thread may take for the calls of a round before others help it."""

LARGEST = float(np.finfo(np.float32).max)
"""Rewards are float32 from here on; beyond it they are infinite."""


@dataclass(eq=False)
class RolloutRunner:
    """Plays problems of one task. Which tokens come out depends on the arguments, never on scheduling."""

    task: Task
    renderer: Renderer
    engine: InferenceEngine
    seed: int
    """The run's; each completion's seed is drawn from it by name (`sampling_seed`)."""
    max_turns: int
    """Turns of an episode."""
    max_new_tokens: int
    """Tokens per completion; fewer where the context leaves less."""
    max_model_len: int
    """Tokens of prompt plus completion."""
    _threads: TaskThreads = field(init=False, default_factory=lambda: TaskThreads())

    async def run_groups(
        self, *, split: Split, step: int, problem_indices: Sequence[int], group_size: int, temperature: float
    ) -> list[Group]:
        """One group of `group_size` siblings per problem, in the order of `problem_indices`; all play at once.

        Rollouts are called `<split>/<step>/<group>/<index>`, and `<split>-greedy/…` with `temperature=0.0`. Every
        session is open before the first one asks, since an engine may wait for all that are open to make one batch.
        What is nobody's fault but the run's (an error of the engine that is no `EngineError`) is raised.
        """
        label = split if temperature > 0 else f"{split}-greedy"
        groups = [
            Group(
                problem_id=f"{split}[{problem_index}]",
                rollouts=[
                    Rollout(
                        rollout_id=f"{label}/{step:06d}/{number:02d}/{index:02d}",
                        problem_id=f"{split}[{problem_index}]",
                        index=index,
                        turns=[],
                        reward=0.0,
                        metrics={},
                        stop_reason=StopReason.TERMINATED,
                    )
                    for index in range(group_size)
                ],
            )
            for number, problem_index in enumerate(problem_indices)
        ]
        async with AsyncExitStack() as scope:
            seats: dict[str, tuple[EngineSession, AsyncExitStack]] = {}
            for rollout in (rollout for group in groups for rollout in group.rollouts):
                closing = await scope.enter_async_context(AsyncExitStack())
                session = await closing.enter_async_context(self.engine.session(rollout.rollout_id))
                seats[rollout.rollout_id] = session, closing
            try:
                async with asyncio.TaskGroup() as playing:
                    for group, problem_index in zip(groups, problem_indices, strict=True):
                        problem = self._threads.run(partial(_problem, self.task, split, problem_index))
                        for rollout in group.rollouts:
                            session, closing = seats[rollout.rollout_id]
                            playing.create_task(self._run(rollout, problem, session, closing, temperature))
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None  # what no rollout can record; all of a batch say the same
        for group in groups:
            group.problem_id = group.rollouts[0].problem_id
        return groups

    async def _run(
        self,
        rollout: Rollout,
        problem: asyncio.Future[Problem],
        session: EngineSession,
        closing: AsyncExitStack,
        temperature: float,
    ) -> None:
        """Play one rollout, record how it ended, and close its session at once: the engine may be waiting for it."""
        started = time.perf_counter()
        async with closing:
            try:
                rollout.stop_reason = await self._play(rollout, await problem, session, temperature)
            except TaskCodeError as fault:
                _record_fault(rollout, fault.stop_reason, fault)
            except ImageError as error:
                _record_fault(rollout, StopReason.IMAGE_ERROR, error)
            except EngineError as error:
                _record_fault(rollout, StopReason.ENGINE_ERROR, error)
            except ContractError as error:
                _record_fault(rollout, StopReason.CONTRACT, error)
        rollout.seconds = time.perf_counter() - started

    async def _play(self, rollout: Rollout, problem: Problem, session: EngineSession, temperature: float) -> StopReason:
        """Fill turns, reward and metrics of `rollout` and say why it ended."""
        rollout.problem_id = problem.id
        env, new_messages = await self._threads.run(partial(_open, self.task, problem))
        history = list(new_messages)
        prompt = await self.renderer.first_turn(new_messages)
        branch = 0
        while True:
            check_placeholders(len(prompt.token_ids), prompt.placeholders, prompt.images)
            # Only the completion's budget shrinks: a prompt is never cut, so neither is a placeholder in it.
            budget = min(self.max_new_tokens, self.max_model_len - len(prompt.token_ids))
            if budget < 1:
                return StopReason.CONTEXT_FULL
            sampling = SamplingParams(
                max_new_tokens=budget,
                temperature=temperature,
                stop_token_ids=self.renderer.stop_token_ids,
                banned_token_ids=self.renderer.banned_token_ids,
                seed=sampling_seed(self.seed, rollout.rollout_id, len(rollout.turns)),
            )
            completion = await session.generate(prompt, sampling)
            text = self.renderer.decode(completion.token_ids)
            turn = Turn(prompt, completion, text, list(new_messages), branch, reward=0.0)
            # Before it is scored: a turn that the task chokes on is what its author wants to see in the record.
            rollout.turns.append(turn)
            reply = await self._threads.run(partial(_step, env, text))
            turn.reward, rollout.reward, rollout.metrics = reply.turn_reward, reply.reward, reply.metrics
            if completion.finish_reason == "length":
                # An answer that does not end is no answer: paid for what it holds so far, a policy learns to ramble on.
                turn.reward = 0.0
                return StopReason.MAX_NEW_TOKENS if budget == self.max_new_tokens else StopReason.CONTEXT_FULL
            if reply.done:
                return StopReason.TERMINATED
            if len(rollout.turns) == self.max_turns:
                return StopReason.MAX_TURNS
            history.append(Message.of("assistant", text))
            new_messages = reply.messages
            prompt, bridged = await self.renderer.next_turn(prompt, completion.token_ids, history, new_messages)
            history.extend(new_messages)
            branch = branch if bridged else branch + 1
            if bridged and not extends(prompt, turn.prompt, completion.token_ids):
                raise ContractError(f"the prompt of turn {len(rollout.turns)} does not extend the turn before it")


def sampling_seed(run_seed: int, rollout_id: str, turn: int) -> int:
    """Seed of one completion, in [0, 2**63): a hash of its name, so that no order of events can change it.

    63 bits, because engines take a signed 64-bit number.

    >>> sampling_seed(0, "train/000001/00/00", turn=0)
    4129019029007452288
    """
    digest = hashlib.blake2b(f"{run_seed}/{rollout_id}/{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def bridge_break_rate(rollouts: Sequence[Rollout]) -> float:
    """Share of later turns (all but a rollout's first) whose prompt could not extend the turn before; 0.0 of none."""
    later_turns = sum(max(0, len(rollout.turns) - 1) for rollout in rollouts)
    forks = sum(max(0, rollout.num_branches - 1) for rollout in rollouts)
    return forks / max(1, later_turns)


# ── the task's own code ─────────────────────────────────────────────────────────────────────────────────────


class TaskCodeError(Exception):
    """The task's code raised, or returned what its contract does not allow. Ends one rollout."""

    def __init__(self, stop_reason: StopReason, text: str) -> None:
        super().__init__(text)
        self.stop_reason = stop_reason


class TaskThreads:
    """Runs the task's code, which may block, off the event loop.

    Calls made in the same round of the event loop (siblings whose completions came in one batch) go to one thread, for
    a hop to a thread and back costs more than the step of a fast env. If that thread is not through after `PATIENCE`,
    the env is no fast one, and as many threads as there are calls left help, up to `THREADS`.

    The threads are daemons, and so no pool of the standard library: code that hangs must not keep an interrupted run
    from ending.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._busy = 0
        self._queue: deque[deque[tuple[Callable[[], Any], asyncio.Future[Any]]]] = deque()  # for when a thread is free

    def run(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """The future result of `call`; an exception of it becomes a `TaskCodeError`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._start)
        self._waiting.append((call, future))
        return future

    def _start(self) -> None:
        calls, self._waiting = self._waiting, deque()
        self._hop(calls)
        asyncio.get_running_loop().call_later(PATIENCE, self._help, calls)

    def _help(self, calls: deque[tuple[Callable[[], Any], asyncio.Future[Any]]]) -> None:
        for _ in range(min(len(calls), THREADS)):
            self._hop(calls)

    def _hop(self, calls: deque[tuple[Callable[[], Any], asyncio.Future[Any]]]) -> None:
        if self._busy == THREADS:
            self._queue.append(calls)
            return
        self._busy += 1
        loop = asyncio.get_running_loop()

        def work() -> None:
            outcomes = _work_off(calls)
            with contextlib.suppress(RuntimeError):  # the loop is closed: the run was interrupted meanwhile
                loop.call_soon_threadsafe(deliver, outcomes)

        def deliver(outcomes: list[tuple[asyncio.Future[Any], Any]]) -> None:
            self._busy -= 1
            for future, outcome in outcomes:
                if future.done():  # cancelled meanwhile
                    continue
                if isinstance(outcome, BaseException):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)
            if calls:
                self._queue.append(calls)
            if self._queue:
                self._hop(self._queue.popleft())

        threading.Thread(target=work, name="task", daemon=True).start()


def _work_off(calls: deque[tuple[Callable[[], Any], asyncio.Future[Any]]]) -> list[tuple[asyncio.Future[Any], Any]]:
    """Take calls and make them, until none is left or `PATIENCE` is over: what is done by then is wanted."""
    until = time.monotonic() + PATIENCE
    outcomes: list[tuple[asyncio.Future[Any], Any]] = []
    while calls and (not outcomes or time.monotonic() < until):
        try:
            call, future = calls.popleft()
        except IndexError:  # another thread took the last one
            break
        outcomes.append((future, _attempt(call)))
    return outcomes


def _attempt(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except TaskCodeError as fault:
        return fault
    except BaseException as error:  # noqa: BLE001 — somebody else's code: even its sys.exit() ends its own rollout only
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno}, in {where.name})"
        return TaskCodeError(StopReason.TASK_ERROR, text)


def _problem(task: Task, split: Split, index: int) -> Problem:
    problem = task.problem(split, index)
    _demand(isinstance(problem.id, str), f"problem({split!r}, {index}).id is {problem.id!r}, not a str")
    return problem


def _open(task: Task, problem: Problem) -> tuple[Env, tuple[Message, ...]]:
    env = task.env(problem)
    messages = env.reset()
    _check_messages("reset()", messages, ("system", "user", "assistant", "tool"))
    _demand(messages[-1].role in ("user", "tool"), "reset() does not end with a user message for the policy to answer")
    return env, messages


def _step(env: Env, text: str) -> Reply:
    """`env.step`, with figures made plain floats."""
    reply = env.step(text)
    _demand(isinstance(reply, Reply), f"step() gave a {type(reply).__name__}, not a Reply")
    _demand(isinstance(reply.metrics, dict), f"step() gave metrics={reply.metrics!r}, not a dict")
    if not reply.done:
        _check_messages("step()", reply.messages, ("user", "tool"))
    for name, value in {**reply.metrics, "turn_reward": reply.turn_reward, "reward": reply.reward}.items():
        if not (isinstance(value, numbers.Real) and abs(value) <= LARGEST):  # NaN is not ≤ anything
            raise TaskCodeError(StopReason.BAD_REWARD, f"step() gave {name}={value!r}, which is no finite number")
    return Reply(
        turn_reward=float(reply.turn_reward),
        done=bool(reply.done),
        reward=float(reply.reward),
        messages=reply.messages,
        metrics={name: float(value) for name, value in reply.metrics.items()},
    )


def _check_messages(source: str, messages: Any, roles: tuple[str, ...]) -> None:
    _demand(
        isinstance(messages, tuple) and all(isinstance(message, Message) for message in messages),
        f"{source} gave a {type(messages).__name__}, not a tuple of Message",
    )
    _demand(bool(messages), f"{source} gave no message and the episode is not done: the policy has nothing to answer")
    for message in messages:
        _demand(message.role in roles, f"{source} gave a message of role {message.role!r}, not {' or '.join(roles)}")
        _demand(
            isinstance(message.content, tuple) and all(isinstance(part, (Text, Image)) for part in message.content),
            f"{source} gave a message whose content is no tuple of Text and Image",
        )


def _demand(holds: bool, otherwise: str) -> None:
    """Raise a `TaskCodeError` where the contract of `vlmrl.tasks.base` does not hold."""
    if not holds:
        raise TaskCodeError(StopReason.TASK_ERROR, otherwise)


def _record_fault(rollout: Rollout, stop_reason: StopReason, error: Exception) -> None:
    rollout.stop_reason = stop_reason
    rollout.error = str(error)
    rollout.reward = 0.0
