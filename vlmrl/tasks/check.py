"""Check whether a task keeps the contract of `vlmrl.tasks.base`, before you spend a run on it:

    python -m vlmrl.tasks.check my_package.my_module:Counting max_turns=2 args.level=3
    python -m vlmrl mode=check task=my_package.my_module:Counting task.max_turns=2 task.args.level=3

or in your tests: `assert check_task(Counting(config, seed=0), max_turns=2) == []`.

    task ─▶ contract/observation.py: make problems, play episodes ─▶ contract/rules.py: judge ─▶ one Finding per rule

The check makes problems of both splits and plays each to its end with three scripts: the answers of the task's own
demonstration, the answers of a random demonstration, and nonsense. The first rules say whether anything can be judged
at all; if one of them fails, the later rules are not checked.

Left out on purpose: whether the rewards make sense, whether envs can be used from several threads at once, and whether
another process gets the same problems (a problem that depends on `hash()` of a string would differ).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any, Literal, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vlmrl.config.task import ColorCodewordConfig, ImportedTaskConfig, TaskConfig
from vlmrl.errors import ConfigError, VlmrlError
from vlmrl.tasks.base import Task
from vlmrl.tasks.contract.observation import observe
from vlmrl.tasks.contract.rules import RULES
from vlmrl.tasks.loading import load_task


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
        if rule.of_demonstrations and all(seen.demonstration is None for seen in observed.all_problems()):
            findings.append(
                Finding(rule.name, "--", "not checked: demonstration() is not defined, so the task has no warm-up")
            )
            continue
        violations = list(rule.violations(observed))
        if violations:
            more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
            found = " ".join(violations[0].split())  # one line, whatever the task's exception says
            findings.append(Finding(rule.name, "FAIL", f"{found}{more}. To do: {rule.remedy}"))
            gate = rule.name if rule.gate else None
        else:
            findings.append(Finding(rule.name, "ok", rule.promise))
    return findings


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


def print_findings(config: TaskConfig) -> int:
    """Check the task that `config` names and print one line per rule; returns 0 if every rule holds, else 1.

    Raises ConfigError where there is no such task.
    """
    findings = find(load_task(config, seed=0), problems=8, max_turns=config.max_turns)
    print(report(findings))
    return int(any(finding.status == "FAIL" for finding in findings))


def parse_config(target: str, overrides: list[str]) -> TaskConfig:
    """The `task` group of a run of `target` with `key=value` settings.

    Raises ConfigError for a key or value that the schema does not take.

    >>> config = parse_config("my_package.my_module:Counting", ["max_turns=2", "args.level=3"])
    >>> config.kind, config.max_turns, config.args
    ('imported', 2, {'level': 3})
    """
    schema = ColorCodewordConfig if target == ColorCodewordConfig.target else ImportedTaskConfig
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"{override!r} is not of the form key=value, so it sets nothing: write e.g. max_turns=2")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema(target=target)), OmegaConf.from_dotlist(overrides))
        config = cast("TaskConfig", OmegaConf.to_object(merged))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(
            f"{' '.join(overrides)} does not fit {schema.__name__} ({str(error).splitlines()[0]}), so the task cannot "
            "be made: correct the key or the value; settings of a task of your own start with args."
        ) from error
    if config.max_turns < 1:
        raise ConfigError(f"max_turns={config.max_turns} leaves no turn to play: set it to 1 or more")
    return config


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 the contract holds, 1 it does not, 2 there is no such task."""
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
    try:
        return print_findings(parse_config(options.target, options.settings))
    except VlmrlError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
