"""An agent of smolagents as a program: its tool calls and pictures become the turns of a rollout."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from support import agents
from support.agents import DirectEngine
from support.lockstep import text_of
from vlmrl.config.program import ProgramConfig
from vlmrl.types import StopReason

PYTHON = os.environ.get("VLMRL_SMOLAGENTS_PYTHON")
AGENT = Path(agents.__file__).with_name("other_packages") / "smol_agent.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="VLMRL_SMOLAGENTS_PYTHON does not name a Python with smolagents"),
]


def test_an_agent_calls_a_tool_and_answers() -> None:
    def policy(prompt: str) -> str:
        return '<final_answer {"answer": "42"}>' if prompt.endswith("42>") else '<double {"number": 21}>'

    assert PYTHON is not None
    config = ProgramConfig(command=shlex.join([PYTHON, str(AGENT)]), timeout_s=120.0)
    (rollout,) = agents.play(config, engine=DirectEngine(policy), max_model_len=100_000, max_new_tokens=60)
    assert rollout.stop_reason is StopReason.TERMINATED, rollout.error
    assert rollout.reward == 1.0
    assert [turn.text for turn in rollout.turns] == ['<double {"number": 21}>', '<final_answer {"answer": "42"}>']
    assert {tool.name for tool in rollout.turns[0].tools} == {"double", "final_answer"}
    assert [len(turn.prompt.images) for turn in rollout.turns] == [1, 2], "it shows its picture again at each step"
    # smolagents writes its own past calls into the prompt as another text, so each step is a branch of its own.
    assert "Calling tools:\n[{'id': 'call_0_0'" in text_of(rollout.turns[1].prompt)
    assert [(turn.branch, turn.starts_over) for turn in rollout.turns] == [(0, False), (1, True)]
