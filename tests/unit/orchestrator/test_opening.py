"""Groups that are opened ahead: the same rollouts, each env reset and closed once, whatever happens in between."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.counted_envs import KINDS, counts
from support.played_envs import answer, config_of, counted, play, runner_of
from vlmrl.orchestrator.envs.base import Envs
from vlmrl.orchestrator.envs.processes import ProcessEnvs
from vlmrl.orchestrator.envs.threads import ThreadEnvs
from vlmrl.orchestrator.rollout import RolloutRunner
from vlmrl.orchestrator.stream import Drawn, ProblemStream
from vlmrl.types import Group, Prompt, Rollout, StopReason


def content(rollouts: Sequence[Rollout]) -> list[Any]:
    """What is recorded of rollouts, apart from times."""
    return [
        (
            rollout.rollout_id,
            rollout.stop_reason,
            rollout.error,
            rollout.reward,
            rollout.env_time.resets,
            rollout.replayed,
            [(turn.prompt.token_ids.tolist(), turn.completion.token_ids.tolist()) for turn in rollout.turns],
        )
        for rollout in rollouts
    ]


def opened_and_played(envs: Envs, problems: Sequence[int], group_size: int = 2, **how: Any) -> list[Rollout]:
    async def main() -> list[Group]:
        runner = replace(runner_of(envs, answer), **how)
        try:
            drawn = await opened(runner, problems, group_size)
            async with asyncio.timeout(60):
                return await runner.run_groups(
                    split="train", step=1, problems=drawn, group_size=group_size, temperature=1.0
                )
        finally:
            await envs.stop()

    return [rollout for group in asyncio.run(main()) for rollout in group.rollouts]


async def opened(runner: RolloutRunner, problems: Sequence[int], group_size: int) -> list[Drawn]:
    drawn = await ProblemStream(runner.envs.task, "train").again(problems)
    return [runner.open_ahead(each, group_size) for each in drawn]


@pytest.mark.parametrize("workers", ["thread", "process"])
def test_opened_groups_play_as_others_do_and_every_env_is_closed_once(tmp_path: Path, workers: str) -> None:
    """Every kind of episode, those that fail in their reset too."""
    plain, ahead = tmp_path / "plain", tmp_path / "ahead"
    for folder in (plain, ahead):
        folder.mkdir()
    expected = play(ThreadEnvs(counted(plain)), range(len(KINDS)))
    envs: Envs = ThreadEnvs(counted(ahead))
    if workers == "process":
        envs = ProcessEnvs(config_of(ahead, num_workers=2), counted(ahead), seed=0)
    assert content(opened_and_played(envs, range(len(KINDS)))) == content(expected)
    opened_envs, closed = counts(ahead)
    assert closed == opened_envs == Counter(dict.fromkeys(opened_envs, 1))
    assert len(opened_envs) == 2 * len(KINDS), "each env was made once"


def test_envs_are_reset_and_prompts_are_sent_before_a_rollout_begins(tmp_path: Path) -> None:
    sent: list[Prompt] = []

    async def prefetch(prompt: Prompt) -> None:
        sent.append(prompt)

    async def main() -> None:
        runner = replace(runner_of(ThreadEnvs(counted(tmp_path, "done")), answer), prefetch=prefetch)
        drawn = await opened(runner, [0, 0], 3)
        async with asyncio.timeout(60):
            while len(sent) < 6:
                await asyncio.sleep(0.001)
        assert len(counts(tmp_path)[0]) == 6
        assert {len(prompt.images) for prompt in sent} == {1}
        groups = await runner.run_groups(split="train", step=1, problems=drawn, group_size=3, temperature=1.0)
        assert len(sent) == 6, "a later turn is not sent ahead"
        first = [rollout.turns[0].prompt for group in groups for rollout in group.rollouts]
        assert {id(prompt) for prompt in first} == {id(prompt) for prompt in sent}, "not rendered again"

    asyncio.run(main())


@pytest.mark.parametrize("wait", [False, True], ids=["at once", "after they were reset"])
def test_groups_that_are_not_played_are_closed(tmp_path: Path, wait: bool) -> None:
    async def main() -> None:
        envs = ThreadEnvs(counted(tmp_path, "slow in reset" if not wait else "done"))
        runner = runner_of(envs, answer)
        drawn = await opened(runner, [0, 0], 2)
        async with asyncio.timeout(60):
            while len(counts(tmp_path)[0]) < 4:
                await asyncio.sleep(0.001)
            if wait:
                await asyncio.wait({opening.first_turn for each in drawn for opening in each.openings})
            await runner.discard(drawn)
        await envs.stop()

    asyncio.run(main())
    opened_envs, closed = counts(tmp_path)
    assert closed == opened_envs
    assert len(opened_envs) == 4


def test_an_env_whose_worker_died_meanwhile_is_played_again(tmp_path: Path) -> None:
    """Another rollout's crash takes envs with it that were opened for a later step."""

    async def main() -> list[Rollout]:
        envs = ProcessEnvs(config_of(tmp_path, "done", "exits", num_workers=1), counted(tmp_path, "done", "exits"), 0)
        runner = runner_of(envs, answer)
        try:
            later = await opened(runner, [0, 0], 2)
            await asyncio.wait({opening.first_turn for each in later for opening in each.openings})
            crash = await ProblemStream(envs.task, "train").again([1])
            async with asyncio.timeout(60):
                how: Any = {"split": "train", "temperature": 1.0}
                (lost,) = await runner.run_groups(step=1, problems=crash, group_size=1, **how)
                assert lost.rollouts[0].stop_reason is StopReason.TASK_ERROR
                groups = await runner.run_groups(step=2, problems=later, group_size=2, **how)
            return [rollout for group in groups for rollout in group.rollouts]
        finally:
            await envs.stop()

    rollouts = asyncio.run(main())
    assert [rollout.stop_reason for rollout in rollouts] == [StopReason.TERMINATED] * 4
    assert [rollout.replayed for rollout in rollouts] == [1] * 4


def test_a_bug_of_ours_ends_the_run(tmp_path: Path) -> None:
    async def prefetch(prompt: Prompt) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        opened_and_played(ThreadEnvs(counted(tmp_path, "done")), [0], prefetch=prefetch)
