"""Check whether a task keeps the contract of `vlmrl.tasks.base`, before you spend a run on it:

    python -m vlmrl.tasks.check my_package.my_module:Counting max_turns=2 args.level=3
    python -m vlmrl mode=check task=my_package.my_module:Counting task.max_turns=2 task.args.level=3

The first is short for the second, so settings are read as in a run. In your tests:
`assert check_task(Counting(config, seed=0), max_turns=2) == []`.

    task ─▶ contract/observation.py: make problems, play episodes ─▶ contract/rules.py: judge ─▶ one Finding per rule

The check makes problems of both splits and plays each to its end with three scripts: the answers of the task's own
demonstration, the answers of a random demonstration, and nonsense. The first rules say whether anything can be judged
at all; if one of them fails, the later rules are not checked.

Left out on purpose: whether the rewards make sense, whether envs can be used from several threads at once, and whether
another process gets the same problems (a problem that depends on `hash()` of a string would differ).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vlmrl.config.task import ColorCodewordConfig, TaskConfig, tasks_of
from vlmrl.errors import UserFault, fenced
from vlmrl.tasks.base import Task
from vlmrl.tasks.contract.observation import Observed, observe
from vlmrl.tasks.contract.rules import RULES, Rule
from vlmrl.tasks.loading import load_task
from vlmrl.tasks.mixture import keys_at


@dataclass(frozen=True)
class Finding:
    """The result of one rule."""

    rule: str
    status: Literal["ok", "FAIL", "--"]
    """`--` means not checked."""
    text: str


def find(task: Any, problems: int, max_turns: int) -> list[Finding]:
    """Check a task with so many problems per split; returns one finding per rule, in the order of `RULES`."""
    observed = observe(task, problems, max_turns)
    findings: list[Finding] = []
    gate: str | None = None
    for rule in RULES:
        if gate is not None:
            findings.append(Finding(rule.name, "--", f"not checked until {gate} is fixed"))
            continue
        findings.append(judge(rule, observed))
        if rule.gate and findings[-1].status == "FAIL":
            gate = rule.name
    return findings


def judge(rule: Rule, observed: Observed) -> Finding:
    """Apply one rule."""
    try:
        with fenced(rule.name):  # the values that it compares are the user's
            if (reason := rule.unchecked(observed)) is not None:
                return Finding(rule.name, "--", f"not checked: {reason}")
            violations = list(rule.violations(observed))
    except UserFault as fault:
        violations = [fault.text]
    if not violations:
        return Finding(rule.name, "ok", rule.promise)
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    return Finding(rule.name, "FAIL", f"{one_line(violations[0])}{more}. To do: {rule.remedy}")


def one_line(text: str) -> str:
    return " ".join(text.split())  # whatever the task's exception says


def check_task(task: Task, problems: int = 8, max_turns: int = 100) -> list[str]:
    """The broken rules of the contract, one line each with what to do; empty if the task keeps it.

    `problems` is the number of problems to play per split. `max_turns` is the run's `task.max_turns`, by which every
    episode must have ended.

    >>> from vlmrl.tasks.color_codeword import ColorCodeword
    >>> task = ColorCodeword(ColorCodewordConfig(), seed=0)
    >>> check_task(task)
    []
    >>> for violation in check_task(task, max_turns=1): print(violation[:58])
    ends: train 0, nonsense: not done after 1 turns (and 47 mo
    """
    assert problems >= 1, problems
    assert max_turns >= 1, max_turns
    return [f"{f.rule}: {f.text}" for f in find(task, problems, max_turns) if f.status == "FAIL"]


def report(findings: list[Finding]) -> str:
    """The findings as text, one line per rule."""
    width = max(len(finding.rule) for finding in findings)
    return "\n".join(f"{finding.status:<4}  {finding.rule:<{width}}  {finding.text}" for finding in findings)


def print_findings(tasks: Mapping[str, TaskConfig]) -> int:
    """Check the tasks, which stand at these keys, and print one line per rule; returns 0 if every rule holds, else 1.

    Raises ConfigError where no task can be made: there is none of that name, it refuses its settings, or its own code
    raises.
    """
    failed = False
    single = {own_key: own for key, config in tasks.items() for own_key, own in tasks_of(config, key).items()}
    for key, own in single.items():
        if len(single) > 1 or key != "task":
            print(key)
        with keys_at(key):
            findings = find(load_task(own, seed=0), problems=8, max_turns=own.max_turns)
        print(report(findings))
        failed |= any(finding.status == "FAIL" for finding in findings)
    return int(failed)


def command(arguments: list[str]) -> list[str]:
    """The arguments of `python -m vlmrl` that do the same.

    >>> command(["my_package.my_module:Counting", "max_turns=2", "args.level=3"])
    ['mode=check', 'task=my_package.my_module:Counting', 'task.max_turns=2', 'task.args.level=3']
    """
    parser = argparse.ArgumentParser(
        prog="python -m vlmrl.tasks.check", description="Check a task against the contract of vlmrl.tasks.base."
    )
    parser.add_argument("target", metavar="package.module:Class", help="import path of the Task class")
    parser.add_argument(
        "settings",
        metavar="key=value",
        nargs="*",
        help="as in a run, without the leading 'task.': max_turns=2 args.level=3",
    )
    options = parser.parse_args(arguments)
    target = "color_codeword" if options.target == ColorCodewordConfig.target else options.target
    return ["mode=check", f"task={target}", *(f"task.{setting}" for setting in options.settings)]


if __name__ == "__main__":
    os.execv(sys.executable, [sys.executable, "-m", "vlmrl", *command(sys.argv[1:])])
