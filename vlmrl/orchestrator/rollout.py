"""Play rollouts: drive an Env through renderer and engine until the task is done, a budget ends it, or it fails.

    reset ─▶ prompt ─▶ generate ─▶ decode ─▶ step ─▶ done? ──────────▶ rollout
                ▲                                      │ no
                │                                      │    (toolbox.py replies to an answer with tool calls)
                ├── next_turn ◀── reply's messages ◀───┤
                └── first_turn ◀─ reply's history ◀────┘   a new branch

A rollout that a program plays (task=program) has no env: the program sends prompts to the chat endpoint and reads the
answers there (vlmrl/orchestrator/programs). What the policy sampled becomes the same turns.

An error in one rollout becomes its `stop_reason`, `error` and `traceback`; the other rollouts go on. The user's code
and data are handled behind three fences: the task's code in `vlmrl.tasks.border`, the task's messages in
fences.py, and reward functions in scoring.py, which scores each group once its siblings have been played.
Whatever else is raised is a bug of ours and ends the run. All rollouts of a call run in one event loop; the envs run
elsewhere (vlmrl/orchestrator/envs). However a rollout ends, its env is closed.

A rollout that a server of the run or another rollout's crash took with it is played again, with the same seeds
(`EngineLostError`, `EnvLostError`). Left out on purpose: retries of faults (they are counted in the metrics, not
hidden).
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial

from vlmrl.config.algorithm import Truncated
from vlmrl.errors import EngineError, EngineLostError, UserFault
from vlmrl.inference.stop_strings import answer_before, text_before
from vlmrl.orchestrator.admission import Admission, Place
from vlmrl.orchestrator.envs.base import EnvHandle, EnvLostError, Envs, ProgramHandle, Seat
from vlmrl.orchestrator.fences import record_fault, rendering_fence
from vlmrl.orchestrator.opening import FirstTurn, Opening
from vlmrl.orchestrator.sampling import WHOLE, OwnSampling, Truncation
from vlmrl.orchestrator.scoring import Scorer
from vlmrl.orchestrator.stream import Drawn
from vlmrl.orchestrator.toolbox import Toolbox
from vlmrl.rendering.renderer import Renderer
from vlmrl.tasks.base import Problem, Reply, Split, StepInfo
from vlmrl.tasks.border import get_reference
from vlmrl.tasks.mixture import MixedProblem
from vlmrl.tasks.programs.problems import played_outside
from vlmrl.types import (
    ContractError,
    EngineSession,
    Group,
    InferenceEngine,
    Message,
    Prompt,
    Rollout,
    StopReason,
    ToolUse,
    Turn,
    check_placeholders,
    extends,
)

MAX_REPLAYS = 3
"""How often a rollout is played again after a server of the run was lost. Then it is recorded as `engine_error`."""


@dataclass(eq=False)
class RolloutRunner:
    """Plays problems of one task. The sampled tokens depend on the arguments only, never on scheduling."""

    envs: Envs
    renderer: Renderer
    engine: InferenceEngine
    seed: int
    """The run's seed; the seed of each completion is derived from it (`sampling_seed`)."""
    max_turns: int
    """Most turns of an episode; a task of a mixture has a number of its own."""
    max_new_tokens: int
    """Most tokens of a completion; fewer where the context has less room."""
    max_model_len: int
    """Most tokens of prompt plus completion."""
    max_frames: int | None = None
    """Most frames of all videos of a prompt together; None for no limit."""
    truncated: Truncated = Truncated.zero
    """What a cut answer is paid."""
    scorer: Scorer = field(default_factory=Scorer)
    """The reward terms; by default none, so that a rollout keeps the task's own reward."""
    truncation: Truncation = WHOLE
    """Which tokens are sampled from; an evaluation set has its own."""
    stop: tuple[str, ...] = ()
    """As in `SamplingParams`: `orchestrator.stop`."""
    tools: Toolbox | None = None
    """The tools that the policy may call; None without any."""
    prefetch: Callable[[Prompt], Awaitable[None]] | None = None
    """Sends the images of a prompt to the engine before its request; None for an engine in this process."""

    async def run_groups(
        self,
        *,
        split: Split,
        step: int,
        problems: Sequence[Drawn],
        group_size: int,
        temperature: float,
        first_group: int = 0,
        label: str | None = None,
        admission: Admission | None = None,
    ) -> list[Group]:
        """Play one group of `group_size` siblings per problem: all at once, or each as soon as `admission` has places
        for it. Groups are in the order of `problems`, whose openings are used up.

        A rollout's id is `<label>/<step>/<group>/<index>`, with `<label>-greedy` where `temperature=0.0`; the label is
        the split unless another is given, and groups are numbered from `first_group`. All sessions are opened before
        the first request, because an engine may wait for every open session to make one batch.

        Raises any error that no single rollout caused, such as an engine's error that is not an `EngineError`.
        """
        label = (label or split) + ("" if temperature > 0 else "-greedy")
        groups = [
            Group(
                problem_id=drawn.problem_id,
                problem=drawn.problem,
                rollouts=[
                    Rollout.unplayed(f"{label}/{step:06d}/{number:02d}/{index:02d}", split, drawn.index, index)
                    for index in range(group_size)
                ],
            )
            for number, drawn in enumerate(problems, start=first_group)
        ]
        async with AsyncExitStack() as scope:
            sessions: dict[str, tuple[EngineSession, AsyncExitStack]] = {}
            for rollout, drawn in (
                (each, drawn) for group, drawn in zip(groups, problems, strict=True) for each in group.rollouts
            ):
                closing = await scope.enter_async_context(AsyncExitStack())
                # A program may take any time between two requests, so no batch waits for it.
                opened = self.engine.session(rollout.rollout_id, is_awaited=played_outside(drawn.problem) is None)
                session = await closing.enter_async_context(opened)
                sessions[rollout.rollout_id] = session, closing
            try:
                async with asyncio.TaskGroup() as playing:
                    for number, (group, drawn) in enumerate(zip(groups, problems, strict=True), start=first_group):
                        place = None if admission is None else admission.place(step, number, group_size)
                        playing.create_task(self._play_group(group, drawn, sessions, temperature, place))
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None  # the engine failed: every rollout of the batch has this error
            finally:
                await self.discard(problems)
        return groups

    def open_ahead(self, drawn: Drawn, group_size: int) -> Drawn:
        """Begin to reset the envs of a group, to render their first prompts and to send their images ahead, in the
        background → the problem with its openings. Faults are raised when the group is played. A program cannot be
        opened, because it sends its prompts itself."""
        problem = drawn.problem
        if problem is None or played_outside(problem) is not None:
            return drawn
        openings: list[Opening] = []
        for _ in range(group_size):
            env = self.envs.new(problem)
            assert not isinstance(env, ProgramHandle), "its problem says that a program plays it"
            openings.append(Opening(env, asyncio.create_task(self._open(env))))
        return replace(drawn, openings=tuple(openings))

    async def discard(self, problems: Sequence[Drawn]) -> None:
        """Close the envs of groups that were opened, where their rollouts have not done so, and wait for envs that are
        being closed."""
        await asyncio.gather(*(opening.discard() for drawn in problems for opening in drawn.openings))
        await self.envs.settle()

    async def _open(self, env: EnvHandle) -> FirstTurn:
        first_turn = await self._first_turn(env)
        if self.prefetch is not None:
            await self.prefetch(first_turn[1])
        return first_turn

    async def _first_turn(self, env: EnvHandle) -> FirstTurn:
        messages = await env.reset()
        with rendering_fence():
            prompt = await self.renderer.first_turn(messages, () if self.tools is None else self.tools.specs)
            check_placeholders(len(prompt.token_ids), prompt.placeholders, prompt.mm_items)
        return messages, prompt

    async def _play_group(
        self,
        group: Group,
        drawn: Drawn,
        sessions: Mapping[str, tuple[EngineSession, AsyncExitStack]],
        temperature: float,
        place: Place | None,
    ) -> None:
        """Play the siblings of a group once it has a place, and score them while others are still playing."""
        if place is not None:
            await place.enter()
        try:
            async with asyncio.TaskGroup() as playing:
                for rollout in group.rollouts:
                    task = playing.create_task(self._run(rollout, drawn, *sessions[rollout.rollout_id], temperature))
                    if place is not None:
                        task.add_done_callback(place.leave)
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        await self.scorer.score(group)

    async def _run(
        self,
        rollout: Rollout,
        drawn: Drawn,
        session: EngineSession,
        closing: AsyncExitStack,
        temperature: float,
    ) -> None:
        """Play one rollout, record how it ended, and close its session at once: the engine may wait for open sessions
        before it makes the next batch."""
        started = time.perf_counter()
        async with closing:
            try:
                if drawn.problem is None:
                    raise drawn.fault or AssertionError("a problem that was not drawn")
                rollout.problem_id = drawn.problem_id
                if isinstance(drawn.problem, MixedProblem):
                    rollout.task = drawn.problem.task
                if (reference := get_reference(drawn.problem)) is not None:
                    rollout.reference = reference[0]
                opening = drawn.openings[rollout.index] if drawn.openings else None
                rollout.stop_reason = await self._play_until_served(
                    rollout, drawn.problem, session, temperature, opening
                )
            except (UserFault, EngineError, ContractError) as error:
                record_fault(rollout, error)
        rollout.seconds = time.perf_counter() - started

    async def _play_until_served(
        self,
        rollout: Rollout,
        problem: Problem,
        session: EngineSession,
        temperature: float,
        opening: Opening | None,
    ) -> StopReason:
        """`_play`, and again from the start where a server of the run was lost with one of its requests, or a worker
        process with its env."""
        envs_lost = 0
        while True:
            try:
                return await self._play(rollout, problem, session, temperature, opening)
            except EngineLostError:
                if rollout.replayed - envs_lost == MAX_REPLAYS:
                    raise
            except EnvLostError:  # as often as it takes: each time, another rollout was charged with it
                envs_lost += 1
            rollout.replayed += 1
            opening = None
            rollout.turns, rollout.reward, rollout.metrics = [], 0.0, {}

    async def _play(
        self,
        rollout: Rollout,
        problem: Problem,
        session: EngineSession,
        temperature: float,
        opening: Opening | None,
    ) -> StopReason:
        """Fill turns, reward and metrics of `rollout`; return why it ended. Its env is closed in the background."""
        env = self.envs.new(problem) if opening is None else opening.env
        rollout.env_time = env.time
        rollout.tool_use = None if self.tools is None else ToolUse()
        try:
            if isinstance(env, ProgramHandle):
                return await env.play(rollout, self._seat(rollout, problem, session, temperature))
            first_turn = self._first_turn(env) if opening is None else opening.first_turn
            return await self._play_env(env, first_turn, rollout, problem, session, temperature)
        finally:
            env.end()

    async def _play_env(
        self,
        env: EnvHandle,
        first_turn: Awaitable[FirstTurn],
        rollout: Rollout,
        problem: Problem,
        session: EngineSession,
        temperature: float,
    ) -> StopReason:
        new_messages, prompt = await first_turn
        history = list(new_messages)
        tools = () if self.tools is None else self.tools.specs
        own = self._own_sampling(temperature)
        branch, starts_over = 0, False
        while True:
            if self.max_frames is not None and prompt.num_frames > self.max_frames:
                return StopReason.FRAMES_FULL
            # Only the completion's budget shrinks. A prompt is never cut, so its placeholders stay whole.
            budget = min(self.max_new_tokens, self.max_model_len - len(prompt.token_ids))
            if budget < 1:
                return StopReason.CONTEXT_FULL
            sampling = own.params(budget, sampling_seed(self.seed, rollout.rollout_id, len(rollout.turns)))
            completion = await session.generate(prompt, sampling)
            written = self.renderer.decode(completion.token_ids)
            text = text_before(written, completion.stop)
            turn = Turn(prompt, completion, text, list(new_messages), branch, 0.0, starts_over=starts_over, tools=tools)
            # Before the task scores it: if the task raises, its author needs to see this turn in the record.
            rollout.turns.append(turn)
            is_cut = completion.finish_reason == "length"
            answer = None
            if self.tools is not None:
                parsed = self.renderer.parse(completion.token_ids, tools, prompt)
                answer = answer_before(parsed, completion.stop)
            info = StepInfo(len(rollout.turns), len(completion.token_ids), is_cut, answer)
            reply = await self._reply(env, rollout, info)
            turn.reward, rollout.reward, rollout.metrics = reply.turn_reward, reply.reward, reply.metrics
            if is_cut:
                if self.truncated is Truncated.zero:  # advantages.py does the same with the reward of the episode
                    turn.reward = min(turn.reward, 0.0)
                return StopReason.MAX_NEW_TOKENS if budget == self.max_new_tokens else StopReason.CONTEXT_FULL
            if reply.done:
                return StopReason.TERMINATED
            if len(rollout.turns) == self._most_turns(problem):
                return StopReason.MAX_TURNS
            starts_over = reply.history is not None
            new_messages = reply.messages if reply.history is None else reply.history
            # A stop string stays in the conversation: its tokens were sampled, and the next prompt has them.
            history = [] if starts_over else [*history, Message.of("assistant", written)]
            prompt, bridged = await self._next_prompt(turn, len(rollout.turns), history, new_messages)
            history.extend(new_messages)
            branch = branch if bridged else branch + 1

    async def _reply(self, env: EnvHandle, rollout: Rollout, info: StepInfo) -> Reply:
        """What the last turn of `rollout` gets: the results of its tool calls, or what the env says of its answer. The
        env gets an answer that was cut, because it is the last one."""
        answer, turn = info.answer, rollout.turns[-1]
        if answer is None or info.is_cut or not (answer.calls or answer.broken):
            return await env.step(turn.text, info)
        assert self.tools is not None, "answers are parsed where there are tools"
        assert rollout.tool_use is not None, "a rollout with tools counts its calls"
        messages = await self.tools.reply(answer, turn.prompt, rollout.tool_use, turn.text)
        return Reply(messages=messages, reward=rollout.reward, metrics=rollout.metrics)

    def _own_sampling(self, temperature: float) -> OwnSampling:
        """How the run samples."""
        return OwnSampling(
            temperature,
            self.renderer.stop_token_ids,
            self.renderer.banned_token_ids,
            self.truncation,
            stop=self.stop,
        )

    def _seat(self, rollout: Rollout, problem: Problem, session: EngineSession, temperature: float) -> Seat:
        """What a program plays with."""
        return Seat(
            self.renderer,
            session,
            self._own_sampling(temperature),
            partial(sampling_seed, self.seed, rollout.rollout_id),
            self._most_turns(problem),
            self.max_new_tokens,
            self.max_model_len,
            self.max_frames,
        )

    def _most_turns(self, problem: Problem) -> int:
        return problem.max_turns if isinstance(problem, MixedProblem) else self.max_turns

    async def _next_prompt(
        self, turn: Turn, number: int, history: Sequence[Message], new_messages: Sequence[Message]
    ) -> tuple[Prompt, bool]:
        """The prompt of turn `number`, and whether it extends `turn`, the one before it. Without a `history` the
        conversation starts over."""
        with rendering_fence():
            if not history:
                prompt, bridged = await self.renderer.first_turn(new_messages, turn.tools), False
            else:
                prompt, bridged = await self.renderer.next_turn(
                    turn.prompt, turn.completion.token_ids, history, new_messages, turn.tools
                )
            if bridged and not extends(prompt, turn.prompt, turn.completion.token_ids):
                raise ContractError(f"the prompt of turn {number} does not extend the turn before it")
            check_placeholders(len(prompt.token_ids), prompt.placeholders, prompt.mm_items)
        return prompt, bridged


def sampling_seed(run_seed: int, rollout_id: str, turn: int) -> int:
    """Seed of one completion, in [0, 2**63): a hash of run seed, rollout and turn, so that it does not depend on the
    order of requests. 63 bits, because engines take a signed 64-bit number.

    >>> sampling_seed(0, "train/000001/00/00", turn=0)
    4129019029007452288
    """
    digest = hashlib.blake2b(f"{run_seed}/{rollout_id}/{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
