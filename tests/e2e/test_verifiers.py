"""`task=verifiers` from the command line: the record of an episode is that of the same episode played by a Task."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.command_line import SHORT, Home
from support.verifiers_here import ENVS, PYTHON, needs_verifiers
from vlmrl.record.rollouts import read_rollouts

pytestmark = [needs_verifiers, pytest.mark.slow]

TASK = '''
"""The same episodes as a Task: squares of the letters that `args.letters` lists, problem by problem."""
import numpy as np
from vlmrl import Image, Message, Reply, Task

COLORS = {"A": (255, 0, 0), "B": (0, 255, 0), "C": (0, 0, 255)}

class Squares:
    def __init__(self, id, letters):
        self.id, self.letters = id, letters

class Env:
    def __init__(self, squares):
        self.left, self.right = list(squares.letters), []

    def ask(self):
        self.right.append(self.left.pop(0))
        pixels = np.full((32, 32, 3), COLORS[self.right[-1]], np.uint8)
        return (Message.of("user", Image(pixels), "Which letter?"),)

    def reset(self):
        return self.ask()

    def step(self, completion):
        return Reply(done=not self.left, messages=self.ask() if self.left else ())

class Mine(Task):
    def __init__(self, config, *, seed):
        self.letters = config.args["letters"]

    def problem(self, split, index):
        return Squares(f"{split} {index}", self.letters[index % len(self.letters)])

    def env(self, problem):
        return Env(problem)

    def demonstration(self, problem, *, random_answers, seed):
        raise NotImplementedError

    def texts(self):
        return ("Which letter?", "A B C")
'''

RUN = (
    *(*SHORT, "trainer.warmup.steps=0", "trainer.warmup.rl_weight=0", "trainer.max_steps=1", "task.max_turns=2"),
    "orchestrator.eval.every=0",
)


@dataclass(frozen=True)
class VerifiersHome(Home):
    """A folder from which the environments of the tests are found."""

    @property
    def environment(self) -> dict[str, str]:
        known = super().environment
        return {**known, "PYTHONPATH": os.pathsep.join([known["PYTHONPATH"], str(ENVS)])}


def letters_of(positions: list[int]) -> list[str]:
    """The letters of tasks of `vf_squares`, as its `load` draws them."""
    import random

    draw = random.Random(0)
    drawn = ["".join(draw.choice("ABC") for _ in range(2)) for _ in range(200)]
    return [drawn[position] for position in positions]


def rollouts_of(run: Path) -> list[Any]:
    return list(read_rollouts(run / "rollouts/step_000001.parquet"))


def test_tokens_pixels_and_logprobs_are_those_of_a_task(tmp_path: Path) -> None:
    home = VerifiersHome(tmp_path)
    (tmp_path / "my_squares.py").write_text(TASK)
    texts = "task.texts=['Which letter?','A B C']"
    theirs = home.made("theirs", ("task=verifiers", "task.env=vf_squares", f"task.python={PYTHON}", texts, *RUN))
    found = rollouts_of(theirs)
    assert {rollout["error"] for rollout in found} == {None}
    positions = [int(rollout["problem_id"].split()[1]) for rollout in found if rollout["index"] == 0]
    letters = ",".join(letters_of(positions))
    ours = home.made("ours", ("task=my_squares:Mine", f"+task.args.letters=[{letters}]", *RUN))
    expected = rollouts_of(ours)
    assert [rollout["rollout_id"] for rollout in found] == [rollout["rollout_id"] for rollout in expected]
    turns = 0
    for rollout, other in zip(found, expected, strict=True):
        if other["stop_reason"] == "max_new_tokens":  # a Task ends with an answer that is cut, a program goes on
            rollout["turns"] = rollout["turns"][: len(other["turns"])]
        for turn, same in zip(rollout["turns"], other["turns"], strict=True):
            for key in ("prompt_token_ids", "placeholders", "completion_ids", "versions", "finish_reason", "branch"):
                assert turn[key] == same[key], (rollout["rollout_id"], key)
            assert np.allclose(turn["logprobs"], same["logprobs"], rtol=0, atol=1e-5)
            turns += 1
    assert turns >= len(found)
    (step,) = (json.loads(line) for line in (theirs / "metrics.jsonl").read_text().splitlines())
    assert (step["bridge_break_rate"], step["turns/bridged"]) == (0.0, float(len(found)))
    assert step["mismatch_kl/mean"] < 1e-6
