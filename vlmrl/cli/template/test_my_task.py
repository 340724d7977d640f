"""Tests of my_task. They need no model: python -m pytest"""

from my_task import MyTask

from vlmrl import ImportedTaskConfig, check_task

TASK = MyTask(ImportedTaskConfig(target="my_task:MyTask", args={"level": 3}), seed=0)


def test_it_keeps_the_contract():
    assert check_task(TASK, max_turns=1) == []


def test_only_the_right_colour_is_rewarded():
    problem = TASK.problem("train", 0)
    rewards = {answer: TASK.env(problem).step(answer).reward for answer in ("red", "green", "blue", "")}
    assert rewards == {"red": 1.0, "green": 0.0, "blue": 0.0, "": 0.0}
