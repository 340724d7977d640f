"""Rollouts that an environment of verifiers plays: turns, rewards by name, agents that do not learn, and faults."""

from __future__ import annotations

import re

import psutil
import pytest

from support.agents import DirectEngine
from support.lockstep import text_of
from support.verifiers_here import ENVS, config_of, needs_verifiers, play
from vlmrl.errors import ConfigError
from vlmrl.tasks.base import NotInSplit
from vlmrl.tasks.loading import load_task
from vlmrl.types import Rollout, StopReason

pytestmark = [needs_verifiers, pytest.mark.slow]


@pytest.fixture(autouse=True)
def environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ENVS))


def children() -> list[str]:
    """The command lines of the guards that this process has started."""
    lines = (" ".join(each.cmdline()) for each in psutil.Process().children(recursive=True))
    return [line for line in lines if "guard.py" in line]


def test_turns_rewards_and_metrics_are_those_of_the_environment() -> None:
    rollouts = play(config_of("vf_squares"), group_size=2, engine=DirectEngine(lambda prompt: " A "))
    for rollout in rollouts:
        assert (rollout.stop_reason, rollout.error) == (StopReason.TERMINATED, None)
        assert [text_of(turn.prompt) for turn in rollout.turns] == [
            "user:#Which letter?>",
            "user:#Which letter?> A $user:#Which letter?>",
        ], "bridged from the sampled tokens, although the client has stripped the answer"
        assert {turn.branch for turn in rollout.turns} == {0}
        assert rollout.rewards == {"right": rollout.reward}
        assert rollout.metrics == {"answers": 2.0, "clients": 0.0}
        red = [[int(image.pixels[0, 0, 0]) == 255 for image in turn.prompt.images] for turn in rollout.turns]
        assert rollout.reward == sum(red[-1]) / 2, "A is the red one"
    assert children() == []


@pytest.mark.release
def test_what_is_not_trainable_is_left_out_and_a_weight_counts() -> None:
    (rollout,) = play(config_of("vf_debate"), 1)
    assert len(rollout.turns) == 1, "the judge has asked too"
    assert (rollout.reward, rollout.rewards) == (2.0, {"length": 2.0})


def test_a_tool_that_returns_a_picture_extends_the_conversation() -> None:
    """Verifiers' own harness and its tool server, over MCP."""

    def policy(prompt: str) -> str:
        return "done" if prompt.count("#") == 2 else '<peek_tools_peek {"box": 7}>'

    args = {"agent": {"harness": {"id": "null"}}}
    (rollout,) = play(config_of("vf_peek", args=args), 1, engine=DirectEngine(policy))
    assert (rollout.stop_reason, rollout.error, rollout.reward) == (StopReason.TERMINATED, None, 1.0)
    first, second = rollout.turns
    assert [tool.name for tool in first.tools] == ["peek_tools_peek"]
    assert {turn.branch for turn in rollout.turns} == {0}
    assert text_of(second.prompt).startswith(text_of(first.prompt) + '<peek_tools_peek {"box": 7}>$')
    assert [int(image.pixels[0, 0, 0]) for image in second.prompt.images] == [200, 70]


@pytest.mark.release
def test_one_tool_server_gives_pictures_to_all_episodes() -> None:
    """A card is drawn at each call, and the reward is for the letter of the card that the episode was shown."""

    def policy(prompt: str) -> str:
        return "A" if prompt.count("#") == 1 else "<card_tools_draw {}>"

    rollouts = play(config_of("vf_cards"), 2, group_size=6, engine=DirectEngine(policy))
    reds = []
    for rollout in rollouts:
        assert (rollout.stop_reason, rollout.error) == (StopReason.TERMINATED, None)
        first, second = rollout.turns
        assert (first.branch, second.branch) == (0, 0)
        assert text_of(second.prompt).startswith(text_of(first.prompt) + "<card_tools_draw {}>$")
        (card,) = second.prompt.images
        reds.append(float(card.pixels[0, 0, 0] == 255))
    assert [rollout.reward for rollout in rollouts] == reds, "A is the red one"
    assert 0 < sum(reds) < len(reds)


@pytest.mark.release
def test_an_episodes_http_clients_end_with_it() -> None:
    """Else each would hold a megabyte until the run ends."""
    args = {"taskset": {"counts": True}}
    rollouts = play(config_of("vf_squares", args=args), 5, engine=DirectEngine(lambda prompt: "A"), times=4)
    assert {rollout.error for rollout in rollouts} == {None}
    assert all(1 <= rollout.metrics["clients"] <= 5 for rollout in rollouts), "those of 15 episodes before are gone"


def test_an_episode_that_fails_costs_its_rollout() -> None:
    """The harness of one task raises."""
    rollouts = play(config_of("vf_squares", args={"taskset": {"raises": None}}), 3)
    position = int(rollouts[1].problem_id.split()[1])
    rollouts = play(config_of("vf_squares", args={"taskset": {"raises": position}}), 3)
    assert reasons(rollouts) == ["terminated", "task_error", "terminated"]
    assert rollouts[1].error is not None
    assert re.search("the episode failed: .*this task fails", rollouts[1].error)
    assert len(rollouts[1].turns) == 1


@pytest.mark.release
def test_a_budget_that_is_used_up_is_no_fault() -> None:
    rollouts = play(config_of("vf_squares"), 1, max_turns=1)
    assert reasons(rollouts) == ["max_turns"]


def test_an_episode_that_takes_too_long_is_ended_and_the_worker_goes_on() -> None:
    config = config_of("vf_squares", timeout_s=0.001)
    assert reasons(play(config, 1)) == ["task_timeout"]


@pytest.mark.parametrize(
    ("env", "args", "message"),
    [
        ("no_such_env", {}, "task.env=no_such_env cannot be loaded in task.python=.*no_such_env"),
        ("vf_squares", {"taskset": {"turns": "many"}}, "task.env=vf_squares cannot be loaded.*turns"),
    ],
)
def test_an_environment_that_cannot_be_loaded_is_refused(env: str, args: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.compile(message, re.DOTALL)):
        load_task(config_of(env, args=args), seed=0)


@pytest.mark.release
def test_the_splits_share_no_task() -> None:
    task = load_task(config_of("vf_squares"), seed=0)
    assert task.num_rows("train") == task.num_rows("eval") == 200
    found: dict[str, set[str]] = {"train": set(), "eval": set()}
    for split, ids in found.items():
        for index in range(200):
            try:
                ids.add(task.problem(split, index).id)  # type: ignore[arg-type]
            except NotInSplit:
                continue
    assert len(found["train"]) + len(found["eval"]) == 200
    assert not found["train"] & found["eval"]
    assert 5 < len(found["eval"]) < 60


def reasons(rollouts: list[Rollout]) -> list[str]:
    return [rollout.stop_reason.value for rollout in rollouts]
