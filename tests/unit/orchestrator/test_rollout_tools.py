"""Episodes with tool calls: what the policy sees next, what the env is asked, and what is recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from support.lockstep import CharRenderer, LockstepEngine
from vlmrl.config.tool import ImportedTool, ZoomTool
from vlmrl.orchestrator.envs.threads import ThreadEnvs
from vlmrl.orchestrator.metrics import bridge_break_rate, bridged_turns, tool_metrics
from vlmrl.orchestrator.rollout import RolloutRunner
from vlmrl.orchestrator.samples import make_samples
from vlmrl.orchestrator.stream import ProblemStream
from vlmrl.orchestrator.toolbox import Toolbox
from vlmrl.tasks.base import Reply, StepInfo
from vlmrl.tools.loading import load_tools
from vlmrl.types import Answer, BrokenCall, Image, IntArray, Message, Prompt, Rollout, StopReason, ToolCall, ToolSpec

PICTURE = np.zeros((8, 8, 3), np.uint8)
PICTURE[:4, :4] = 200
"""Its upper left quarter is bright."""


class CallRenderer(CharRenderer):
    """An answer `!` calls zoom, `!!` calls it twice, `?` is a broken call; anything else calls nothing."""

    def parse(self, completion_ids: IntArray, tools: Sequence[ToolSpec] = (), prompt: Prompt | None = None) -> Answer:
        text = self.decode(completion_ids)
        call = ToolCall("zoom", {"image": 1, "box": [0, 0, 500, 500]})
        broken = (BrokenCall(text, "is not valid JSON"),) if text == "?" else ()
        return Answer(text, calls=(call,) * (len(text) if set(text) == {"!"} else 0), broken=broken)


@dataclass(frozen=True)
class Question:
    id: str = "row 0"


class Asking:
    """One picture and one answer, which is right when it is `yes`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, StepInfo]] = []

    def problem(self, split: str, index: int) -> Question:
        return Question()

    def env(self, problem: Question) -> Asking:
        return self

    def reset(self) -> tuple[Message, ...]:
        return (Message.of("user", "look ", Image(PICTURE)),)

    def step(self, completion: str, info: StepInfo) -> Reply:
        self.asked.append((completion, info))
        return Reply(done=True, reward=float(completion == "yes"))


def play(
    *answers: str, max_turns: int = 4, bridges: bool = True, max_new_tokens: int = 8
) -> tuple[Rollout, Asking, LockstepEngine]:
    """The rollout of a policy that gives these answers, one after the other."""
    task, left = Asking(), list(answers)
    policy: Callable[[str, str], str] = lambda rollout_id, prompt: left.pop(0)  # noqa: E731
    engine = LockstepEngine(policy, 10_000)
    runner = RolloutRunner(
        envs=ThreadEnvs(task),  # type: ignore[arg-type]
        renderer=CallRenderer(bridges=bridges),
        engine=engine,
        seed=0,
        max_turns=max_turns,
        max_new_tokens=max_new_tokens,
        max_model_len=10_000,
        tools=Toolbox(load_tools({"zoom": ZoomTool(), "hang": ImportedTool(target="support.own_tools:hang")})),
    )

    async def played() -> Any:
        problems = await ProblemStream(task, "train").again([0])  # type: ignore[arg-type]
        async with asyncio.timeout(30):
            return await runner.run_groups(split="train", step=1, problems=problems, group_size=1, temperature=1.0)

    ((rollout,),) = [group.rollouts for group in asyncio.run(played())]
    return rollout, task, engine


def text_of(prompt: Prompt) -> str:
    return "".join(map(chr, prompt.token_ids))


def test_a_call_is_answered_by_its_tool_and_the_env_sees_the_answer_only() -> None:
    rollout, task, _ = play("!", "yes")
    assert (rollout.stop_reason, rollout.reward) == (StopReason.TERMINATED, 1.0)
    assert [text_of(turn.prompt) for turn in rollout.turns] == ["user:look #>", "user:look #>!$tool:Image 2: #>"]
    assert [image.pixels.shape for image in rollout.turns[1].prompt.images] == [(8, 8, 3), (8, 8, 3)]
    assert rollout.turns[1].prompt.images[1].pixels.min() == 200
    ((answer, info),) = task.asked
    assert (answer, info.turn, info.answer) == ("yes", 2, Answer("yes"))
    assert [tool.name for tool in rollout.turns[0].tools] == ["zoom", "hang"]
    assert rollout.tool_use is not None
    assert (rollout.tool_use.calls, rollout.tool_use.by_name) == (1, {"zoom": 1})
    assert (bridge_break_rate([rollout]), bridged_turns([rollout])) == (0.0, 1)
    (sample,) = make_samples(rollout)
    assert sample.loss_mask.sum() == 2 + 4  # "!$" and "yes$", and nothing of the tool's reply


def test_a_broken_call_gets_a_reply() -> None:
    rollout, task, _ = play("?", "yes")
    assert text_of(rollout.turns[1].prompt) == "user:look #>?$tool:This tool call is not valid JSON.>"
    assert rollout.tool_use is not None
    assert (rollout.tool_use.calls, rollout.tool_use.broken, len(task.asked)) == (1, 1, 1)


def test_the_turns_are_a_limit_on_the_calls() -> None:
    rollout, task, _ = play("!", "!", "!", max_turns=3)
    assert (rollout.stop_reason, rollout.reward, len(rollout.turns)) == (StopReason.MAX_TURNS, 0.0, 3)
    assert task.asked == []


def test_a_call_that_is_cut_is_the_last_answer() -> None:
    rollout, task, _ = play("!!", max_new_tokens=1)
    assert rollout.stop_reason is StopReason.MAX_NEW_TOKENS
    assert [info.is_cut for _, info in task.asked] == [True]
    assert rollout.tool_use is not None
    assert rollout.tool_use.calls == 0


def test_where_no_bridge_is_possible_a_branch_begins() -> None:
    rollout, _, _ = play("!", "yes", bridges=False)
    assert text_of(rollout.turns[1].prompt) == "user:look #assistant:!tool:Image 2: #>"
    assert (bridge_break_rate([rollout]), bridged_turns([rollout])) == (1.0, 0)


def test_metrics_of_the_calls() -> None:
    with_calls, _, _ = play("!!", "?", "yes")
    without, _, _ = play("yes")
    metrics = tool_metrics([with_calls, without])
    assert {key: value for key, value in metrics.items() if key != "tools/seconds"} == {
        "tools/calls": 1.5,
        "tools/rollouts": 0.5,
        "tools/broken": pytest.approx(1 / 3),
        "tools/errors": 0.0,
        "tools/timeouts": 0.0,
        "tools/calls/zoom": 1.0,
    }
    assert tool_metrics([]) == {}
