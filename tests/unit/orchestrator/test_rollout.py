"""Rollouts with a scripted renderer, engine (tests/support/lockstep.py) and task, which are strict about their
protocols."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.lockstep import BROKEN, CharRenderer, LockstepEngine, Policy, text_of
from vlmrl.config.algorithm import Truncated
from vlmrl.errors import EngineError, EngineLostError, UserFault
from vlmrl.orchestrator import fences
from vlmrl.orchestrator.envs.threads import ThreadEnvs
from vlmrl.orchestrator.metrics import bridge_break_rate, history_metrics
from vlmrl.orchestrator.rollout import MAX_REPLAYS, RolloutRunner, sampling_seed
from vlmrl.orchestrator.samples import make_samples
from vlmrl.orchestrator.scoring import Scheme, Scorer
from vlmrl.orchestrator.stream import Drawn, ProblemStream
from vlmrl.orchestrator.task_threads import TASK_THREADS
from vlmrl.rewards.base import Attempt, Score
from vlmrl.rewards.loading import Term
from vlmrl.tasks import open_env
from vlmrl.tasks.base import Reply
from vlmrl.types import (
    ContractError,
    Group,
    Image,
    Message,
    Placeholder,
    Prompt,
    Rollout,
    StopReason,
    Text,
    ToolSpec,
    Video,
)

HI = (Message.of("user", "hi"),)


@dataclass(frozen=True)
class Row:
    id: str


Step: TypeAlias = Callable[[int, str], Any]
"""(0-based turn, completion) → a Reply, or anything else that a broken task returns."""


@dataclass
class ScriptedEnv:
    first: Any
    script: Step
    turn: int = -1

    def reset(self) -> Any:
        return self.first() if callable(self.first) else self.first

    def step(self, completion: str) -> Any:
        self.turn += 1
        return self.script(self.turn, completion)


class ScriptedTask:
    """Problem n has the id `row n`; its envs play the script."""

    def __init__(self, script: Step, first: Any = HI, row: Callable[[int], Any] = lambda index: Row(f"row {index}")):
        self.script, self.first, self.row = script, first, row

    def problem(self, split: str, index: int) -> Any:
        return self.row(index)

    def env(self, problem: Any) -> Any:
        return ScriptedEnv(self.first, self.script)


def user(*parts: str | Image) -> tuple[Message, ...]:
    return (Message.of("user", *parts),)


def two_turns(turn: int, said: str) -> Reply:
    """Reward 0.5 for each "yes"; done after two turns."""
    return Reply(
        turn_reward=float(said == "yes"),
        done=turn == 1,
        reward=0.5 * (turn + (said == "yes")),
        messages=() if turn == 1 else user("and ", Image(3), "?"),
        metrics={"turns": turn + 1},
    )


def make_runner(
    task: Any,
    *,
    policy: Policy = lambda rollout_id, prompt: "yes",
    renderer: Any = None,
    max_turns: int = 5,
    max_new_tokens: int = 8,
    max_model_len: int = 10_000,
    scorer: Scorer | None = None,
    timeout_s: float | None = None,
    stop: tuple[str, ...] = (),
) -> RolloutRunner:
    return RolloutRunner(
        stop=stop,
        scorer=scorer or Scorer(),
        envs=ThreadEnvs(task, timeout_s),
        renderer=renderer or CharRenderer(),
        engine=LockstepEngine(policy, max_model_len),
        seed=0,
        max_turns=max_turns,
        max_new_tokens=max_new_tokens,
        max_model_len=max_model_len,
    )


def engine_of(runner: RolloutRunner) -> LockstepEngine:
    assert isinstance(runner.engine, LockstepEngine)
    return runner.engine


async def drawn(runner: RolloutRunner, indices: Sequence[int] = (0,), split: Any = "train") -> list[Drawn]:
    return await ProblemStream(runner.envs.task, split).again(indices)


def play(runner: RolloutRunner, problems: Sequence[int] = (0,), group_size: int = 1, **how: Any) -> list[Group]:
    async def bounded() -> list[Group]:
        async with asyncio.timeout(30):  # a session that is closed late would hang
            return await runner.run_groups(
                **{"split": "train", "step": 7, "temperature": 1.0, **how},
                problems=await drawn(runner, problems, how.get("split", "train")),
                group_size=group_size,
            )

    groups = asyncio.run(bounded())
    assert engine_of(runner).open == []
    return groups


def play_one(runner: RolloutRunner) -> Rollout:
    ((rollout,),) = [group.rollouts for group in play(runner)]
    return rollout


# ── an episode ──────────────────────────────────────────────────────────────────────────────────────────────


def test_an_episode_of_two_turns_is_recorded_in_full() -> None:
    renderer = CharRenderer()
    rollout = play_one(make_runner(ScriptedTask(two_turns, first=user("see ", Image(2))), renderer=renderer))

    first, second = rollout.turns
    assert text_of(first.prompt) == "user:see ##>"
    assert text_of(second.prompt) == "user:see ##>yes$user:and ###?>"
    assert second.prompt.placeholders == (Placeholder(9, 2, "hash-2"), Placeholder(25, 3, "hash-3"))
    assert [t.text for t in rollout.turns] == ["yes", "yes"]
    assert [t.reward for t in rollout.turns] == [1.0, 1.0]
    assert [t.branch for t in rollout.turns] == [0, 0]
    assert [[m.role for m in t.messages] for t in rollout.turns] == [["user"], ["user"]]
    assert [[(m.role, len(m.content)) for m in history] for history in renderer.histories] == [
        [("user", 2), ("assistant", 1)]
    ]
    assert (rollout.stop_reason, rollout.reward, rollout.metrics) == (StopReason.TERMINATED, 1.0, {"turns": 2.0})
    assert (rollout.error, rollout.dropped, rollout.num_branches) == (None, None, 1)
    assert rollout.seconds > 0


def test_groups_siblings_and_names() -> None:
    groups = play(make_runner(ScriptedTask(two_turns)), problems=range(40, 43), group_size=2)
    assert [group.problem_id for group in groups] == ["row 40", "row 41", "row 42"]
    assert [[r.rollout_id for r in group.rollouts] for group in groups] == [
        [f"train/000007/{number:02d}/{index:02d}" for index in range(2)] for number in range(3)
    ]
    assert all(r.problem_id == g.problem_id for g in groups for r in g.rollouts)
    assert [r.index for r in groups[2].rollouts] == [0, 1]


def test_a_sampled_and_a_greedy_evaluation_of_one_step_differ_in_name() -> None:
    runner = make_runner(ScriptedTask(two_turns))
    for temperature, expected in ((0.7, "eval/000007/00/00"), (0.0, "eval-greedy/000007/00/00")):
        ((rollout,),) = [g.rollouts for g in play(runner, split="eval", temperature=temperature)]
        assert rollout.rollout_id == expected
        assert {sampling.temperature for _, sampling in engine_of(runner).batches[-1]} == {temperature}


def test_all_sessions_are_open_before_the_first_request_and_a_batch_holds_all_of_them() -> None:
    def policy(rollout_id: str, prompt: str) -> str:
        return "no" if rollout_id.endswith("/01") else "yes"

    def step(turn: int, said: str) -> Reply:
        return Reply(0.0, done=said == "no" or turn == 2, messages=user("?"))

    runner = make_runner(ScriptedTask(step), policy=policy)
    play(runner, problems=range(4), group_size=3)
    assert [len(batch) for batch in engine_of(runner).batches] == [12, 8, 8]


# ── budgets ─────────────────────────────────────────────────────────────────────────────────────────────────


def endless(turn: int, said: str) -> Reply:
    return Reply(turn_reward=0.25, done=False, reward=0.5, messages=user("?"))


def finished(turn: int, said: str) -> Reply:
    return Reply(turn_reward=0.25, done=True, reward=0.5)


def test_the_turn_budget_ends_an_episode_with_its_last_reward() -> None:
    rollout = play_one(make_runner(ScriptedTask(endless), max_turns=3))
    assert (rollout.stop_reason, len(rollout.turns), rollout.reward) == (StopReason.MAX_TURNS, 3, 0.5)


@pytest.mark.parametrize("step", [endless, finished])
def test_a_completion_that_is_cut_has_no_reward_and_is_the_last(step: Step) -> None:
    rollout = play_one(make_runner(ScriptedTask(step), policy=lambda *_: "a long answer", max_new_tokens=6))
    (turn,) = rollout.turns
    assert rollout.stop_reason is StopReason.MAX_NEW_TOKENS
    assert (turn.text, turn.reward, rollout.reward) == ("a long", 0.0, 0.5)


def test_a_done_task_is_terminated_even_at_the_last_turn() -> None:
    assert play_one(make_runner(ScriptedTask(finished), max_turns=1)).stop_reason is StopReason.TERMINATED


PROMPT = len("user:hi>")
SECOND_PROMPT = len("user:hi>yes$user:?>")


@pytest.mark.parametrize(
    ("max_model_len", "stop_reason", "texts"),
    [
        (PROMPT - 1, StopReason.CONTEXT_FULL, []),
        (PROMPT, StopReason.CONTEXT_FULL, []),
        # One or three tokens fit: the context cuts the completion, not max_new_tokens.
        (PROMPT + 1, StopReason.CONTEXT_FULL, ["y"]),
        (PROMPT + 3, StopReason.CONTEXT_FULL, ["yes"]),
        (PROMPT + 4, StopReason.CONTEXT_FULL, ["yes"]),
        (SECOND_PROMPT, StopReason.CONTEXT_FULL, ["yes"]),
        (SECOND_PROMPT + 2, StopReason.CONTEXT_FULL, ["yes", "ye"]),
        (SECOND_PROMPT + 4, StopReason.MAX_TURNS, ["yes", "yes"]),
    ],
)
def test_the_context_cuts_completions_and_never_prompts(
    max_model_len: int, stop_reason: StopReason, texts: list[str]
) -> None:
    rollout = play_one(make_runner(ScriptedTask(endless), max_model_len=max_model_len, max_turns=2))
    assert (rollout.stop_reason, [turn.text for turn in rollout.turns]) == (stop_reason, texts)
    assert rollout.reward == (0.5 if texts else 0.0)
    assert rollout.error is None


@pytest.mark.parametrize(
    ("max_frames", "bridges", "stop_reason", "turns"),
    [
        (None, True, StopReason.TERMINATED, 3),
        (9, True, StopReason.TERMINATED, 3),
        (8, True, StopReason.FRAMES_FULL, 2),
        (6, False, StopReason.FRAMES_FULL, 2),
        (5, True, StopReason.FRAMES_FULL, 1),
        (2, True, StopReason.FRAMES_FULL, 0),
    ],
)
def test_more_frames_than_an_episode_may_show_end_it(
    max_frames: int | None, bridges: bool, stop_reason: StopReason, turns: int
) -> None:
    """Each prompt shows three frames more, and the last one nine. What was earned before is kept."""
    video: Any = Video(3)

    def step(turn: int, said: str) -> Reply:
        return Reply(messages=(Message.of("user", video),), reward=float(turn + 1), done=turn == 2)

    task = ScriptedTask(step, (Message.of("user", video),))
    runner = make_runner(task, renderer=CharRenderer(bridges=bridges))
    runner.max_frames = max_frames
    rollout = play_one(runner)
    assert (rollout.stop_reason, len(rollout.turns), rollout.reward) == (stop_reason, turns, float(turns))
    assert rollout.error is None
    assert [turn.prompt.num_frames for turn in rollout.turns] == [3, 6, 9][:turns]
    assert stop_reason.is_truncated == (stop_reason is StopReason.FRAMES_FULL)


@pytest.mark.parametrize(
    ("truncated", "reward", "paid"),
    [("zero", 0.25, 0.0), ("zero", -0.25, -0.25), ("keep", 0.25, 0.25), ("mask", 0.25, 0.25)],
)
def test_the_record_has_what_a_cut_turn_is_paid(truncated: str, reward: float, paid: float) -> None:
    runner = make_runner(
        ScriptedTask(lambda turn, said: replace(endless(turn, said), turn_reward=reward)), max_new_tokens=3
    )
    runner.truncated = Truncated(truncated)
    rollout = play_one(runner)
    assert (rollout.stop_reason, rollout.turns[-1].reward) == (StopReason.MAX_NEW_TOKENS, paid)


@pytest.mark.parametrize("budget", [7, 80], ids=["at its last token", "before its end"])
def test_a_stop_string_ends_a_turn_and_not_the_episode(budget: int) -> None:
    """The task sees the text before it. The next prompt keeps what was sampled, so that both turns are one sample."""
    renderer = CharRenderer()
    said = {1: "ask now", 2: "a.now."}
    task = ScriptedTask(lambda turn, text: replace(two_turns(turn, text), messages=user("?") if turn == 0 else ()))
    policy: Policy = lambda _, prompt: said[prompt.count(">")]  # noqa: E731
    runner = make_runner(task, policy=policy, renderer=renderer, max_new_tokens=budget, stop=("now", "."))
    rollout = play_one(runner)
    first, second = rollout.turns
    assert (first.text, second.text) == ("ask ", "a")
    assert [(t.completion.finish_reason, t.completion.stop) for t in rollout.turns] == [("stop", "now"), ("stop", ".")]
    assert [len(t.completion.token_ids) for t in rollout.turns] == [7, 2]
    assert text_of(second.prompt) == "user:hi>ask nowuser:?>"
    assert [[m.content for m in history] for history in renderer.histories] == [[(Text("hi"),), (Text("ask now"),)]]
    assert (rollout.stop_reason, rollout.is_cut, rollout.num_branches) == (StopReason.TERMINATED, False, 1)
    (sample,) = make_samples(rollout)
    assert "".join(map(chr, sample.token_ids[sample.loss_mask])) == "ask nowa."


def test_a_completion_that_just_fits_is_not_cut() -> None:
    rollout = play_one(make_runner(ScriptedTask(finished), max_new_tokens=4))
    assert rollout.stop_reason is StopReason.TERMINATED


# ── faults ──────────────────────────────────────────────────────────────────────────────────────────────────


def raising(error: Exception) -> Callable[..., Any]:
    def function(*_: Any) -> Any:
        raise error

    return function


def on_second_turn(outcome: Callable[[], Any]) -> Step:
    return lambda turn, said: outcome() if turn == 1 else endless(turn, said)


def reply(**changes: Any) -> Reply:
    return Reply(**{"turn_reward": 0.0, "done": True, **changes})


TASK_FAULTS: list[tuple[Any, int, str]] = [
    (ScriptedTask(endless, row=raising(KeyError("row 0"))), 0, "KeyError: 'row 0'"),
    (ScriptedTask(endless, row=lambda index: Row(index)), 0, r"problem\('train', 0\).id is 0, not a str"),  # type: ignore[arg-type]
    (ScriptedTask(endless, first=raising(OSError("no file"))), 0, r"OSError: no file \(.*test_rollout.py:\d+, in func"),
    (ScriptedTask(endless, first=None), 0, r"reset\(\) returned None, not a tuple of Message"),
    (ScriptedTask(endless, first=()), 0, r"reset\(\) returned no message"),
    (ScriptedTask(endless, first=("hi",)), 0, "not a tuple of Message"),
    (ScriptedTask(endless, first=(Message("user", ("hi",)),)), 0, "a user message with a tuple of str"),  # type: ignore[arg-type]
    (ScriptedTask(endless, first=(Message.of("system", "hi"),)), 0, "does not end with a user message"),
    (ScriptedTask(on_second_turn(raising(ZeroDivisionError("x / 0")))), 2, "ZeroDivisionError: x / 0"),
    (ScriptedTask(on_second_turn(raising(StopIteration("end")))), 2, "StopIteration: end"),
    (ScriptedTask(on_second_turn(lambda: None)), 2, r"step\(\) returned a NoneType, not a Reply"),
    (ScriptedTask(on_second_turn(lambda: reply(metrics=None))), 2, "metrics=None, not a dict"),
    (ScriptedTask(on_second_turn(lambda: sys.exit(3))), 2, "SystemExit: 3"),
    (
        ScriptedTask(on_second_turn(lambda: reply(done=False))),
        2,
        r"step\(\) returned no message although the episode is not done",
    ),
    (
        ScriptedTask(on_second_turn(lambda: reply(done=False, messages=(Message.of("assistant", "I"),)))),
        2,
        "role 'assistant', not user or tool",
    ),
]


@pytest.mark.parametrize(("task", "turns", "error"), TASK_FAULTS)
def test_an_error_of_the_task_ends_its_rollout(task: Any, turns: int, error: str) -> None:
    rollout = play_one(make_runner(task))
    assert rollout.stop_reason is StopReason.TASK_ERROR
    assert (len(rollout.turns), rollout.reward) == (turns, 0.0)
    assert rollout.error is not None
    with pytest.raises(RuntimeError, match=error):
        raise RuntimeError(rollout.error)


def test_a_problem_that_cannot_be_made_is_the_fault_of_each_sibling_and_of_no_other_group() -> None:
    task = ScriptedTask(two_turns, row=lambda index: Row(["a", "b"][index]))
    bad, good = play(make_runner(task), problems=[2, 1], group_size=2)
    assert (bad.problem_id, [r.stop_reason for r in bad.rollouts]) == ("train[2]", [StopReason.TASK_ERROR] * 2)
    assert (good.problem_id, [r.stop_reason for r in good.rollouts]) == ("b", [StopReason.TERMINATED] * 2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, 10**400, "1.0", None, 1j])
@pytest.mark.parametrize("place", ["turn_reward", "reward", "metrics"])
def test_a_reward_that_is_not_a_finite_number_is_a_fault(place: str, value: Any) -> None:
    bad = reply(**{place: {"score": value} if place == "metrics" else value})
    rollout = play_one(make_runner(ScriptedTask(lambda turn, said: bad if turn == 1 else endless(turn, said))))
    assert rollout.stop_reason is StopReason.BAD_REWARD
    assert (rollout.reward, [turn.reward for turn in rollout.turns]) == (0.0, [0.25, 0.0])
    name = "metric 'score'" if place == "metrics" else place
    assert f"{name}={value!r}" in str(rollout.error)


@pytest.mark.parametrize("value", [1, True, np.True_, np.float32(1), np.float64(1), np.int64(1)])
def test_every_kind_of_finite_number_is_a_reward(value: Any) -> None:
    rollout = play_one(make_runner(ScriptedTask(lambda turn, said: reply(reward=value, metrics={"m": value}))))
    assert (type(rollout.reward), rollout.reward, rollout.metrics) == (float, 1.0, {"m": 1.0})


def test_a_broken_image_ends_its_rollout_and_keeps_the_turns_before() -> None:
    first = play_one(make_runner(ScriptedTask(endless, first=user(Image(BROKEN)))))
    later = play_one(make_runner(ScriptedTask(lambda turn, said: reply(done=False, messages=user(Image(BROKEN))))))
    for rollout, turns in ((first, 0), (later, 1)):
        assert (rollout.stop_reason, rollout.error) == (StopReason.IMAGE_ERROR, "an image is broken")
        assert len(rollout.turns) == turns


class Unspeakable(Exception):  # noqa: N818
    """Its text needs an attribute that nobody set."""

    def __str__(self) -> str:
        return str(self.detail)  # type: ignore[attr-defined]


@pytest.mark.parametrize("place", ["problem", "reset", "step"])
def test_an_error_without_a_text_costs_its_rollout_and_hangs_nothing(place: str) -> None:
    fails = raising(Unspeakable())
    task = {
        "problem": ScriptedTask(finished, row=fails),
        "reset": ScriptedTask(finished, first=fails),
        "step": ScriptedTask(fails),
    }[place]
    rollout = play_one(make_runner(task))
    assert rollout.stop_reason is StopReason.TASK_ERROR
    assert "Unspeakable" in str(rollout.error)
    assert rollout.traceback is not None


class PickyRenderer(CharRenderer):
    """Raises what a tokenizer or a package raises for odd content."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def _append(self, prompt: Prompt, messages: Sequence[Message]) -> Prompt:
        if any(part == Text("odd") for message in messages for part in message.content):
            raise self.error
        return super()._append(prompt, messages)


class OddContent(UserFault):
    """A fault that the renderer itself names."""


RENDER_FAULTS: list[tuple[BaseException, StopReason, str]] = [
    (TypeError("TextEncodeInput must be"), StopReason.TASK_ERROR, "rendering the messages raised TypeError: Text"),
    (Unspeakable(), StopReason.TASK_ERROR, "rendering the messages raised Unspeakable"),
    (SystemExit(1), StopReason.TASK_ERROR, "rendering the messages raised SystemExit: 1"),
    (asyncio.CancelledError(), StopReason.TASK_ERROR, "rendering the messages raised CancelledError"),
    (OddContent("a second system message"), StopReason.TASK_ERROR, "a second system message"),
    (ContractError("1 image went in"), StopReason.CONTRACT, "1 image went in"),
]


@pytest.mark.parametrize(("error", "stop_reason", "text"), RENDER_FAULTS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("turn", [0, 1])
def test_messages_that_cannot_be_rendered_cost_their_rollout_alone(
    error: BaseException, stop_reason: StopReason, text: str, turn: int
) -> None:
    words = iter(["odd", "even"])  # one for each sibling
    first = (lambda: user(next(words))) if turn == 0 else user("even")

    def step(at: int, said: str) -> Reply:
        return reply(done=at == 1, messages=user(next(words) if turn == 1 and at == 0 else "even"))

    (group,) = play(make_runner(ScriptedTask(step, first=first), renderer=PickyRenderer(error)), group_size=2)
    bad, good = sorted(group.rollouts, key=lambda rollout: not rollout.stop_reason.is_fault)
    assert (bad.stop_reason, len(bad.turns), bad.reward) == (stop_reason, turn, 0.0)
    assert str(bad.error).startswith(text)
    assert good.stop_reason is StopReason.TERMINATED


@pytest.mark.parametrize("fence", [open_env, fences])
def test_without_its_fence_a_fault_would_end_the_run(fence: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail."""
    monkeypatch.setattr(fence, "fenced", lambda *_: contextlib.nullcontext())
    task = ScriptedTask(raising(KeyError("row"))) if fence is open_env else ScriptedTask(finished, first=user("odd"))
    with pytest.raises(KeyError, match="row"):
        play(make_runner(task, renderer=PickyRenderer(KeyError("row"))))


def losing(times: int) -> Policy:
    """The server of rollout 01 is lost that often, each time in the second turn."""
    left = [times]

    def policy(rollout_id: str, prompt: str) -> str:
        if rollout_id.endswith("/01") and "?" in prompt and left[0]:
            left[0] -= 1
            raise EngineLostError("server 0 was restarted")
        return "yes"

    return policy


def test_a_rollout_that_a_lost_server_took_with_it_is_played_again_from_its_start() -> None:
    undisturbed = play(make_runner(ScriptedTask(two_turns)), group_size=3)[0].rollouts
    runner = make_runner(ScriptedTask(two_turns), policy=losing(MAX_REPLAYS))
    again = play(runner, group_size=3)[0].rollouts
    assert [rollout.replayed for rollout in again] == [0, MAX_REPLAYS, 0]
    assert [rollout.stop_reason for rollout in again] == [StopReason.TERMINATED] * 3
    assert [(r.reward, r.metrics, [text_of(t.prompt) for t in r.turns]) for r in again] == [
        (r.reward, r.metrics, [text_of(t.prompt) for t in r.turns]) for r in undisturbed
    ]
    seeds = [s.seed for batch in engine_of(runner).batches for rollout_id, s in batch if rollout_id.endswith("/01")]
    assert len(seeds) == 2 + 2 * MAX_REPLAYS
    assert len(set(seeds)) == 2, "a turn has the same seed each time, so the same tokens"


def test_a_server_that_is_lost_again_and_again_costs_the_rollout() -> None:
    (group,) = play(make_runner(ScriptedTask(two_turns), policy=losing(1000)), group_size=3)
    lost = group.rollouts[1]
    assert (lost.stop_reason, lost.error, lost.replayed) == (
        StopReason.ENGINE_ERROR,
        "server 0 was restarted",
        MAX_REPLAYS,
    )


def test_an_engines_error_for_one_request_ends_that_rollout_alone() -> None:
    def policy(rollout_id: str, prompt: str) -> str:
        if rollout_id.endswith("/01") and "?" in prompt:
            raise EngineError("HTTP 500")
        return "yes"

    (group,) = play(make_runner(ScriptedTask(two_turns), policy=policy), group_size=3)
    assert [r.stop_reason for r in group.rollouts] == [
        StopReason.TERMINATED,
        StopReason.ENGINE_ERROR,
        StopReason.TERMINATED,
    ]
    assert (group.rollouts[1].error, group.rollouts[1].reward, len(group.rollouts[1].turns)) == ("HTTP 500", 0.0, 1)


class ImageLosingRenderer(CharRenderer):
    async def first_turn(self, messages: Sequence[Message], tools: Sequence[ToolSpec] | None = None) -> Prompt:
        prompt = await super().first_turn(messages, tools)
        return Prompt(prompt.token_ids, prompt.placeholders, ())


class RetokenizingRenderer(CharRenderer):
    """Claims to extend a prompt, but renders the completion again without its last token."""

    async def next_turn(self, *conversation: Any) -> tuple[Prompt, bool]:
        _, _, history, new_messages, *_ = conversation
        return await self.first_turn([*history, *new_messages]), True


@pytest.mark.parametrize(
    ("renderer", "turns", "error"),
    [
        (ImageLosingRenderer(), 0, "1 placeholders but 0 images and videos"),
        (RetokenizingRenderer(), 1, "the prompt of turn 1 does not extend the turn before it"),
    ],
)
def test_tokens_and_pixels_that_disagree_are_a_named_fault(renderer: CharRenderer, turns: int, error: str) -> None:
    rollout = play_one(make_runner(ScriptedTask(two_turns, first=user(Image(2))), renderer=renderer))
    assert (rollout.stop_reason, rollout.error) == (StopReason.CONTRACT, error)
    assert len(rollout.turns) == turns


def test_a_contract_error_on_the_way_to_the_engine_is_a_named_fault() -> None:
    runner = make_runner(ScriptedTask(two_turns), policy=raising(ContractError("features differ")))
    assert play_one(runner).stop_reason is StopReason.CONTRACT


def test_a_bug_of_ours_is_raised_and_leaves_no_session_open() -> None:
    runner = make_runner(ScriptedTask(two_turns), policy=raising(AssertionError("slip")))
    with pytest.raises(AssertionError, match="slip"):  # raised once, not once per sibling
        play(runner, group_size=3)
    assert engine_of(runner).open == []


# ── branches ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_prompt_that_is_rendered_again_starts_a_branch() -> None:
    renderer = CharRenderer(bridges=False)
    rollout = play_one(make_runner(ScriptedTask(endless), renderer=renderer, max_turns=3))
    assert [turn.branch for turn in rollout.turns] == [0, 1, 2]
    assert [text_of(turn.prompt) for turn in rollout.turns] == [
        "user:hi>",
        "user:hiassistant:yesuser:?>",
        "user:hiassistant:yesuser:?assistant:yesuser:?>",
    ]
    assert bridge_break_rate([rollout]) == 1.0


def test_bridge_break_rate_is_the_share_of_later_turns() -> None:
    bridged = play_one(make_runner(ScriptedTask(endless), max_turns=4))
    broken = play_one(make_runner(ScriptedTask(endless), renderer=CharRenderer(bridges=False), max_turns=2))
    empty = play_one(make_runner(ScriptedTask(endless), max_model_len=1))
    assert bridge_break_rate([bridged, broken, empty]) == 1 / 4
    assert bridge_break_rate([empty]) == 0.0


def last_two_frames(turn: int, said: str) -> Reply:
    """From the second answer on, the policy sees the last answer and two messages of its own."""
    if turn == 0:
        return Reply(messages=user("and ", Image(1)))
    kept = (*user("so far: 1, ", Image(1)), Message.of("assistant", said), *user("now ", Image(turn)))
    return Reply(done=turn == 3, history=kept, reward=turn / 3)


def test_a_history_takes_the_place_of_the_conversation() -> None:
    seen: list[Attempt] = []

    class Watches:
        async def score(self, attempts: Sequence[Attempt]) -> list[Score]:
            seen.extend(attempts)
            return [0.5] * len(attempts)

    scorer = Scorer(Scheme((Term("watches", 1.0, lambda text: text, Watches()),)))
    renderer = CharRenderer()
    rollout = play_one(make_runner(ScriptedTask(last_two_frames), renderer=renderer, scorer=scorer))
    assert [text_of(turn.prompt) for turn in rollout.turns] == [
        "user:hi>",
        "user:hi>yes$user:and #>",
        "user:so far: 1, #assistant:yesuser:now #>",
        "user:so far: 1, #assistant:yesuser:now ##>",
    ]
    assert [(turn.branch, turn.starts_over) for turn in rollout.turns] == [(0, False), (0, False), (1, True), (2, True)]
    assert [len(renderer.histories), len(make_samples(rollout))] == [1, 3]  # one bridge; one sample per conversation
    assert (rollout.stop_reason, bridge_break_rate([rollout])) == (StopReason.TERMINATED, 0.0)
    assert history_metrics([rollout]) == {"history_cut_rate": 2 / 3}
    assert [message.role for message in seen[0].prompt] == ["user", "assistant", "user"]
    assert [len(rollout.messages_before(number)) for number in range(4)] == [0, 2, 0, 0]


def test_the_turn_after_a_history_goes_on_from_it() -> None:
    def script(turn: int, said: str) -> Reply:
        return Reply(history=user("anew")) if turn == 0 else Reply(messages=user("more"))

    rollout = play_one(make_runner(ScriptedTask(script), renderer=CharRenderer(bridges=False), max_turns=3))
    assert [text_of(turn.prompt) for turn in rollout.turns][1:] == ["user:anew>", "user:anewassistant:yesuser:more>"]
    assert [(turn.branch, turn.starts_over) for turn in rollout.turns] == [(0, False), (1, True), (2, False)]
    assert (bridge_break_rate([rollout]), history_metrics([rollout])) == (0.5, {"history_cut_rate": 0.5})


# ── seeds ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_seed_of_a_completion_does_not_depend_on_its_batch() -> None:
    seeds: list[dict[str, list[int]]] = []
    for group_size in (1, 3):
        runner = make_runner(ScriptedTask(two_turns))
        play(runner, group_size=group_size)
        mine: dict[str, list[int]] = {}
        for batch in engine_of(runner).batches:
            for rollout_id, sampling in batch:
                mine.setdefault(rollout_id, []).append(sampling.seed)
        seeds.append(mine)
    name = "train/000007/00/00"
    assert seeds[0][name] == seeds[1][name] == [sampling_seed(0, name, turn) for turn in range(2)]
    assert len({seed for turns in seeds[1].values() for seed in turns}) == 6


completions = st.tuples(st.integers(0, 2**64), st.text("abc", max_size=3), st.integers(0, 99))


@given(st.sets(completions, min_size=2, max_size=8))
def test_sampling_seeds_differ_and_fit_a_signed_64_bit_number(names: set[tuple[int, str, int]]) -> None:
    seeds = {sampling_seed(*name) for name in names}
    assert len(seeds) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)


# ── threads and cancellation ────────────────────────────────────────────────────────────────────────────────


def test_a_step_that_blocks_leaves_the_event_loop_free() -> None:
    stepping, released = threading.Event(), threading.Event()

    def step(turn: int, said: str) -> Reply:
        stepping.set()
        assert released.wait(30), "the event loop was blocked"
        return reply()

    async def main() -> list[Group]:
        runner = make_runner(ScriptedTask(step))
        problems = await drawn(runner)
        rollouts = asyncio.create_task(
            runner.run_groups(split="train", step=1, problems=problems, group_size=1, temperature=1.0)
        )
        while not stepping.is_set():
            await asyncio.sleep(0)
        released.set()
        return await rollouts

    ((rollout,),) = [group.rollouts for group in asyncio.run(main())]
    assert rollout.stop_reason is StopReason.TERMINATED


def test_siblings_may_block_at_once() -> None:
    together = threading.Barrier(TASK_THREADS, timeout=30)

    def step(turn: int, said: str) -> Reply:
        together.wait()
        return reply()

    (group,) = play(make_runner(ScriptedTask(step)), group_size=TASK_THREADS)
    assert {r.stop_reason for r in group.rollouts} == {StopReason.TERMINATED}


def test_no_more_threads_than_that_at_once() -> None:
    lock, now, most = threading.Lock(), [0], [0]

    def step(turn: int, said: str) -> Reply:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.005)
        with lock:
            now[0] -= 1
        return reply()

    (group,) = play(make_runner(ScriptedTask(step)), group_size=4 * TASK_THREADS)
    assert {r.stop_reason for r in group.rollouts} == {StopReason.TERMINATED}
    assert 1 < most[0] <= TASK_THREADS


@pytest.mark.parametrize("where", ["engine", "task"])
def test_cancellation_propagates_and_closes_every_session(where: str) -> None:
    reached, release = threading.Event(), threading.Event()

    def step(turn: int, said: str) -> Reply:
        reached.set()
        release.wait(30)
        return reply()

    class SilentEngine(LockstepEngine):
        def maybe_run(self) -> None:
            if self.open and len(self.waiting) == len(self.open):
                reached.set()

    async def main() -> RolloutRunner:
        runner = make_runner(ScriptedTask(step))
        if where == "engine":
            runner.engine = SilentEngine(lambda *_: "yes")
        problems = await drawn(runner)
        rollouts = asyncio.create_task(
            runner.run_groups(split="train", step=1, problems=problems, group_size=3, temperature=1.0)
        )
        while not reached.is_set():
            await asyncio.sleep(0)
        rollouts.cancel()
        with pytest.raises(asyncio.CancelledError):
            await rollouts
        release.set()
        return runner

    assert engine_of(asyncio.run(main())).open == []


# ── reward terms ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class AnsweredRow:
    id: str
    answer: str
    columns: dict[str, Any] = field(default_factory=dict)


class Equal:
    """A reward term that notes the group of each call."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    async def score(self, attempts: Sequence[Attempt]) -> Sequence[Score]:
        self.calls.append([attempt.rollout_id for attempt in attempts])
        return [float(attempt.completion == attempt.reference) for attempt in attempts]


def scored_runner(task: Any = None, **how: Any) -> tuple[RolloutRunner, Equal]:
    equal = Equal()
    task = task or ScriptedTask(
        lambda turn, said: Reply(done=True), row=lambda index: AnsweredRow(f"row {index}", str(index))
    )
    return make_runner(task, scorer=Scorer(Scheme((Term("equal", 1.0, str.strip, equal),))), **how), equal


def test_reward_terms_score_each_group_as_a_whole() -> None:
    runner, equal = scored_runner(policy=lambda rollout_id, prompt: rollout_id[-1])
    groups = play(runner, problems=(0, 1), group_size=2)
    assert [[rollout.reward for rollout in group.rollouts] for group in groups] == [[1.0, 0.0], [0.0, 1.0]]
    assert sorted(equal.calls) == [[f"train/000007/{number:02d}/{index:02d}" for index in (0, 1)] for number in (0, 1)]
    assert [group.problem.answer for group in groups] == ["0", "1"]
    assert [rollout.reference for group in groups for rollout in group.rollouts] == ["0", "0", "1", "1"]
    assert groups[0].rollouts[0].rewards == {"equal": 1.0}


def test_a_group_is_scored_while_others_are_playing() -> None:
    """A judge that takes seconds must not wait for the slowest rollout of the step."""
    second_may_end = threading.Event()

    def step(turn: int, said: str) -> Reply:
        if said == "slow":
            assert second_may_end.wait(10), "the other group was not scored meanwhile"
        return Reply(done=True)

    class Opens(Equal):
        async def score(self, attempts: Sequence[Attempt]) -> Sequence[Score]:
            second_may_end.set()
            return await super().score(attempts)

    runner, _ = scored_runner(ScriptedTask(step, row=lambda index: AnsweredRow(f"row {index}", "slow")))
    runner.scorer = Scorer(Scheme((Term("equal", 1.0, str.strip, Opens()),)))
    engine_of(runner).policy = lambda rollout_id, prompt: "slow" if "/01/" in rollout_id else "fast"
    groups = play(runner, problems=(0, 1))
    assert [group.rollouts[0].reward for group in groups] == [0.0, 1.0]
    assert all(group.rollouts[0].error is None for group in groups)


def test_a_group_whose_problem_fails_is_not_scored() -> None:
    def row(index: int) -> AnsweredRow:
        raise KeyError(index)

    runner, equal = scored_runner(ScriptedTask(lambda turn, said: Reply(done=True), row=row))
    ((rollout,),) = [group.rollouts for group in play(runner)]
    assert (rollout.stop_reason, equal.calls) == (StopReason.TASK_ERROR, [])


def test_an_engine_that_fails_ends_the_run_before_scoring() -> None:
    def policy(rollout_id: str, prompt: str) -> str:
        raise AssertionError("a bug of the engine")

    runner, equal = scored_runner(policy=policy)
    with pytest.raises(AssertionError, match="a bug of the engine"):
        play(runner, group_size=2)
    assert equal.calls == []
