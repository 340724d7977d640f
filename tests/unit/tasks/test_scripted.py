"""Scripted policies: what they get by the names of their parameters, and what they may return."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.environments import task_of
from vlmrl.errors import ConfigError
from vlmrl.tasks.scripted import ScriptedPolicy
from vlmrl.types import Message

ASKED = (Message.of("user", "How many?"),)


@pytest.fixture
def policy(tmp_path: Path) -> Callable[[str], ScriptedPolicy]:
    """A policy of this source, which is the body of a module."""

    def made(source: str) -> ScriptedPolicy:
        path = tmp_path / f"policy_{abs(hash(source))}.py"
        path.write_text(source)
        return ScriptedPolicy(f"{path}:policy")

    return made


@pytest.mark.parametrize(
    ("source", "answer"),
    [
        ("def policy(messages): return messages[0].content[0].text", "How many?"),
        ("def policy(env): return env['secret']", "seven"),
        ("def policy(env, messages, mood='good'): return f'{len(messages)} {env[\"secret\"]} {mood}'", "1 seven good"),
        ("def policy(**given): return ''.join(given)", ""),
        ("def policy(): return 'always'", "always"),
    ],
)
def test_a_policy_gets_what_its_parameters_name(
    policy: Callable[[str], ScriptedPolicy], source: str, answer: str
) -> None:
    assert policy(source).answer(ASKED, {"secret": "seven"}) == answer


@pytest.mark.parametrize("source", ["def policy(prompt): ...", "def policy(messages, model): ...", "policy = 3"])
def test_a_policy_that_cannot_be_called_is_refused(policy: Callable[[str], ScriptedPolicy], source: str) -> None:
    with pytest.raises(ConfigError, match=r"play\.policy=.*:policy (cannot be called|is a int)"):
        policy(source)


def test_an_answer_is_text(policy: Callable[[str], ScriptedPolicy]) -> None:
    with pytest.raises(TypeError, match="it returned 3, which is no text"):
        policy("def policy(env): return 3").answer(ASKED, None)


@pytest.mark.parametrize(
    ("returned", "answer"), [("2", "2"), ("'I think: right'", "I think: right"), ("env.s", "left")]
)
def test_a_game_takes_an_action_by_name_or_number(
    policy: Callable[[str], ScriptedPolicy], returned: str, answer: str
) -> None:
    """`env` is the environment itself: FrozenLake begins in field 0, and action 0 is left."""
    task: Any = task_of(env_id="FrozenLake-v1", actions=["left", "down", "2", "up"])
    episode = task.env(task.problem("train", 0))
    episode.reset()
    assert policy(f"def policy(env): return {returned}").answer(ASKED, episode) == answer
    with pytest.raises(ValueError, match="9 is none of the actions"):
        policy("def policy(env): return 9").answer(ASKED, episode)
    episode.close()
