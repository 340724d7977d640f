"""Episodes of Gymnasium environments: actions, rewards, frames, and what the policy is shown."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest

from support.environments import GRID, LAKE, Counter, task_of
from vlmrl.config.gymnasium import InvalidAnswer
from vlmrl.errors import ConfigError
from vlmrl.tasks.environments.episode import Episode
from vlmrl.tasks.environments.simulator import scaled
from vlmrl.tasks.environments.task import Start
from vlmrl.types import Image, Message, Text, Video

COUNTER: dict[str, Any] = {"env_id": "support.environments:Counter-v0"}


def opened(start: int = 0, **settings: Any) -> tuple[Episode, tuple[Message, ...]]:
    episode = task_of(**settings).env(Start(start))
    return episode, episode.reset()


def frames(messages: tuple[Message, ...]) -> list[np.ndarray]:
    return [part.source for message in messages for part in message.content if isinstance(part, Image)]


def reds(messages: tuple[Message, ...]) -> list[int]:
    return [int(frame[0, 0, 0]) for frame in frames(messages)]


def said(messages: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [
        (message.role, "|".join(part.text if isinstance(part, Text) else "[]" for part in message.content))
        for message in messages
    ]


def test_a_frozen_lake_is_crossed() -> None:
    """The frames are those that Gymnasium draws, and the rewards those that it pays."""
    episode, first = opened(**LAKE, success_at=1.0)
    lake = gymnasium.make("FrozenLake-v1", is_slippery=False, render_mode="rgb_array")
    lake.reset(seed=0)
    assert said(first) == [("user", "[]|Choose one of: left, down, right, up")]
    assert np.array_equal(frames(first)[0], np.asarray(lake.render()))
    for number, answer in [(1, "down"), (1, "Down."), (2, "I go right"), (1, "down"), (2, "not left: right")]:
        reply = episode.step(answer)
        lake.step(number)
        assert (reply.turn_reward, reply.reward, reply.done) == (0.0, 0.0, False)
        assert said(reply.messages) == [("user", "[]")]
        assert np.array_equal(frames(reply.messages)[0], np.asarray(lake.render()))
    reply = episode.step("right")
    assert (reply.turn_reward, reply.reward, reply.done) == (1.0, 1.0, True)
    assert reply.metrics == {"return": 1.0, "turns": 6.0, "invalid": 0.0, "success": 1.0}
    episode.close()
    lake.close()


def test_a_hole_ends_the_episode_without_reward() -> None:
    episode, _ = opened(**LAKE, success_at=1.0)
    assert not episode.step("right").done
    reply = episode.step("down")
    assert (reply.turn_reward, reply.reward, reply.done, reply.metrics["success"]) == (0.0, 0.0, True, 0.0)
    episode.close()


def test_rewards_add_up_until_max_turns() -> None:
    episode, _ = opened(**COUNTER, max_turns=3)
    replies = [episode.step(answer) for answer in ("0", "1", "0")]
    assert [(reply.turn_reward, reply.reward, reply.done) for reply in replies] == [
        (1.0, 1.0, False),
        (1.0, 2.0, False),
        (1.0, 3.0, True),
    ]
    assert "success" not in replies[-1].metrics
    episode.close()


def test_an_action_is_repeated_until_the_episode_is_over() -> None:
    episode, _ = opened(**COUNTER, frame_skip=4)
    reply = episode.step("1")
    assert (reply.reward, reds(reply.messages)) == (4.0, [4])
    assert episode.step("2").reward == 4.0 + 5.0  # the first of the four ends it
    episode.close()


def test_actions_are_numbered_from_the_spaces_start() -> None:
    settings: dict[str, Any] = {**COUNTER, "env_kwargs": {"start": 5}}
    episode, first = opened(**settings)
    assert said(first)[0][1].endswith("5, 6, 7")
    assert not episode.step("5").done
    assert episode.step("7").done
    episode.close()
    named, _ = opened(**settings, actions=["stay", "wait", "end"])
    assert named.step("end").done
    named.close()


@pytest.mark.parametrize(
    ("invalid", "replies"),
    [
        (InvalidAnswer.stay, [(-0.5, -0.5, False), (1.0, 0.5, False), (-0.5, 0.0, True)]),
        (InvalidAnswer.end, [(-0.5, -0.5, True)]),
    ],
)
def test_an_answer_that_names_no_action(invalid: InvalidAnswer, replies: list[tuple[float, float, bool]]) -> None:
    episode, first = opened(**COUNTER, invalid=invalid, invalid_reward=-0.5, max_turns=3)
    for answer, expected in zip(("what?", "1", "3"), replies, strict=False):
        reply = episode.step(answer)
        assert (reply.turn_reward, reply.reward, reply.done) == expected
        if answer == "what?" and not reply.done:
            assert said(reply.messages) == [("user", "[]|This was none of: 0, 1, 2")]
            assert frames(reply.messages)[0] is frames(first)[0]  # nothing has happened
    assert reply.metrics["invalid"] == pytest.approx(2 / 3 if len(replies) == 3 else 1.0)
    episode.close()


def test_shaping_adds_the_growth_of_the_potential_to_the_turn_alone() -> None:
    episode, _ = opened(**COUNTER, shaping="support.environments:lives")
    reply = episode.step("0")
    assert (reply.turn_reward, reply.reward) == (1.0 + 10.0, 1.0)
    assert episode.step("2").turn_reward == 5.0 + 10.0
    episode.close()


# ── what the policy is shown ────────────────────────────────────────────────────────────────────────────────


def test_a_shown_frame_does_not_change() -> None:
    """`Counter` draws all its frames into one array."""
    episode, first = opened(start=7, **COUNTER)
    second = episode.step("0").messages
    third = episode.step("0").messages
    assert reds((*first, *second, *third)) == [0, 1, 2]
    assert frames(first)[0][0, 0, 1] == 7
    episode.close()


def test_the_conversation_starts_over_with_the_last_frames() -> None:
    episode, first = opened(
        **COUNTER,
        history=2,
        system_prompt="Play.",
        prompt="{{ turn }}: {{ frame }} after {{ past | map(attribute='action') | join('+') }}",
        reply="{{ turn }}: {{ frame }} {{ action }} {{ valid }}",
    )
    assert said(first) == [("system", "Play."), ("user", "1:|[]|after")]
    reply = episode.step("1")
    assert (reply.history, said(reply.messages)) == (None, [("user", "2:|[]|1 True")])
    reply = episode.step("well, 0")
    assert reply.messages == ()
    assert reply.history is not None
    assert said(reply.history) == [
        ("system", "Play."),
        ("user", "2:|[]|after 1"),
        ("assistant", "well, 0"),
        ("user", "3:|[]|0 True"),
    ]
    assert reds(reply.history) == [1, 2]
    reply = episode.step("?")
    assert reply.history is not None
    assert said(reply.history)[1:] == [
        ("user", "3:|[]|after 1+0"),
        ("assistant", "?"),
        ("user", "4:|[]|none False"),
    ]
    assert episode.step("2").history is None
    episode.close()


def test_one_frame_of_history_is_the_prompt_alone() -> None:
    episode, _ = opened(**COUNTER, history=1)
    for turn, past in enumerate(("0", "0, 1", "0, 1, none")):
        reply = episode.step(("0", "1", "?")[turn])
        assert reply.history is not None
        assert said(reply.history) == [("user", f"[]|So far: {past}. Choose one of: 0, 1, 2")]
    episode.close()


def test_a_frame_is_scaled_to_its_longer_side() -> None:
    _, first = opened(**COUNTER, frame_size=4)
    assert frames(first)[0].shape == (2, 4, 3)
    checks = np.indices((6, 6)).sum(0) % 2 * np.uint8(255)
    assert scaled(np.stack([checks] * 3, -1).astype(np.uint8), 3).tolist() == [[[128] * 3] * 3] * 3
    assert scaled(np.eye(2, dtype=np.uint8)[..., None].repeat(3, -1), 4)[..., 0].tolist() == [
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 1],
        [0, 0, 1, 1],
    ]


def film(messages: tuple[Message, ...]) -> list[int]:
    """The counts that the frames of a video show; their pixels' red."""
    (video,) = [part for part in messages[-1].content if isinstance(part, Video)]
    source: Any = video.source
    assert (video.fps, video.times) == (None, None), "all of them are shown"
    return source[:, 0, 0, 0].tolist()  # type: ignore[no-any-return]


def test_a_film_shows_an_action_from_the_frame_before_it_to_the_last() -> None:
    episode, first = opened(**COUNTER, film=True, frame_skip=3)
    assert frames(first)[0][0, 0, 0] == 0, "the first turn shows an image"
    assert film(episode.step("1").messages) == [0, 1, 2, 3]
    assert film(episode.step("0").messages) == [3, 4, 5, 6]
    still = episode.step("nonsense").messages
    assert [frame[0, 0, 0] for frame in frames(still)] == [6], "without an action, the present frame is an image"
    assert film(episode.step("1").messages) == [6, 7, 8, 9]
    assert episode.step("2").done
    episode.close()


def test_a_film_of_the_last_turns_stays_in_the_conversation_that_starts_over() -> None:
    episode, _ = opened(**COUNTER, film=True, history=1)
    episode.step("1")
    reply = episode.step("1")
    assert reply.history is not None
    assert film(reply.history) == [1, 2]
    episode.close()


def test_a_film_is_noise_in_the_blind_control() -> None:
    def shown(*answers: str) -> list[bytes]:
        episode, _ = opened(**COUNTER, film=True, noise=True)
        found = [episode.step(answer).messages[-1].content for answer in answers]
        episode.close()
        return [part.source.tobytes() for content in found for part in content if isinstance(part, Video)]

    assert shown("0", "1") == shown("1", "0")
    assert len({*shown("0", "1")}) == 2


def test_noise_depends_on_the_seed_and_the_turn_alone() -> None:
    def shown(start: int, *answers: str) -> list[bytes]:
        episode, first = opened(start=start, **GRID, noise=True)
        found = [first, *(episode.step(answer).messages for answer in answers)]
        episode.close()
        return [frames(messages)[0].tobytes() for messages in found]

    turned, walked = shown(3, "left", "nonsense"), shown(3, "forward", "forward")
    assert turned == walked
    assert len({*turned, *shown(4, "left", "nonsense")}) == 6


def test_the_mission_of_minigrid_is_in_the_prompt() -> None:
    episode, first = opened(**GRID)
    assert said(first)[0][1] == "[]|get to the green goal square Choose one of: left, right, forward"
    episode.close()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"prompt": "Go."}, "task.prompt does not use frame, so the policy would see nothing: write {{ frame }} where"),
        ({"reply": "{{ frame }} {{ lives }}"}, "task.reply uses lives (line 1, character 16), which no turn has, so"),
        ({"prompt": "{{ frame"}, "task.prompt cannot be read as a Jinja template"),
        ({"reply": "moves.jinja"}, "task.reply=moves.jinja is no file here"),
        ({"actions": ["a", "b", "c", "d"]}, "task.actions=[a,b,c,d] has 4 names, and the environment has 3 actions"),
        ({"actions": ["up", "UP"]}, "task.actions=[up,UP] has up more than once (upper and lower case are the same)"),
    ],
)
def test_a_prompt_or_a_name_that_cannot_be_used_is_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        task_of(**COUNTER, **settings)
    assert str(error.value).startswith(problem)


def test_a_frame_that_is_shown_twice_costs_the_rollout() -> None:
    episode = task_of(**COUNTER, prompt="{{ frame }}{{ frame }}").env(Start(0))
    with pytest.raises(ValueError, match=r"task\.prompt shows the frame 2 times in turn 1, and not once"):
        episode.reset()
    episode.close()


def test_fewer_names_leave_actions_out() -> None:
    episode, _ = opened(**COUNTER, actions=["walk"])
    assert episode.step("2").metrics["invalid"] == 1.0
    assert episode.step("walk").reward == 1.0
    episode.close()


def test_every_simulator_is_closed_once() -> None:
    task = task_of(**COUNTER)
    Counter.opened = Counter.closed = 0
    for answers in ([], ["0"], ["2"], ["?", "0"]):
        episode = task.env(Start(0))
        episode.reset()
        for answer in answers:
            episode.step(answer)
        episode.close()
        episode.close()
    task.env(Start(0)).close()  # never reset: nothing was opened
    task.texts()
    task.data_table()
    assert (Counter.opened, Counter.closed) == (4 + 4 + 128, 4 + 4 + 128)
