"""Make the players of the named evaluation sets (`orchestrator.eval.sets`) of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from vlmrl.config.eval_set import EvalSet
from vlmrl.config.inference import VllmConfig
from vlmrl.config.orchestrator import EvalConfig
from vlmrl.config.reward import ExtractConfig, RewardConfig
from vlmrl.config.run import RunConfig
from vlmrl.config.task import TaskConfig
from vlmrl.monitor.monitor import Monitor
from vlmrl.orchestrator.envs.make import make_envs
from vlmrl.orchestrator.eval_sets import SetPlayer
from vlmrl.orchestrator.programs.chat import EndpointOfRun
from vlmrl.orchestrator.rollout import RolloutRunner
from vlmrl.orchestrator.sampling import Truncation
from vlmrl.orchestrator.scoring import Scorer, is_scored
from vlmrl.orchestrator.stream import FixedProblems
from vlmrl.orchestrator.task_threads import TaskThreads
from vlmrl.preflight.rules.video import rows_are_shown
from vlmrl.rewards.extract import extractor, last_boxed, last_tagged
from vlmrl.runs.problems import ProblemSource
from vlmrl.tasks.loading import load_task
from vlmrl.tasks.mixture import keys_at

QUEUED_BY_SERVERS = 4096
"""Rollouts that are played at the same time with vLLM, whose servers queue what does not fit."""


def scored_evaluation(config: RunConfig) -> EvalConfig:
    """The main evaluation; without problems where nothing scores the answers (mode=sft on data without reward=)."""
    evaluation = config.orchestrator.eval
    return evaluation if is_scored(config.reward, config.task) else dataclasses.replace(evaluation, problems=0)


def make_set_players(
    config: RunConfig, runner: RolloutRunner, problems: ProblemSource, monitor: Monitor, logs: Path
) -> tuple[SetPlayer, ...]:
    """One player per set whose answers are scored, in the order of the config. `runner` and `problems` are those of the
    run's task, `logs` is the run's folder of logs.

    Raises ConfigError where the task or a reward of a set cannot be made.
    """
    return tuple(
        _player(name, each, config, runner, problems, monitor, logs)
        for name, each in config.orchestrator.eval.sets.items()
        if is_scored(config.reward, each.own_task or config.task)
    )


def _player(
    name: str,
    own: EvalSet,
    config: RunConfig,
    runner: RolloutRunner,
    problems: ProblemSource,
    monitor: Monitor,
    logs: Path,
) -> SetPlayer:
    key = f"orchestrator.eval.sets.{name}"
    task_config = config.task
    orchestrator = config.orchestrator
    if own.own_task is not None:
        task_config = own.own_task
        with keys_at(f"{key}.task"):
            task = load_task(task_config, seed=config.seed)
            rows_are_shown(config, task)
        scorer = Scorer.of(config.reward, task_config, TaskThreads().run, f"{key}.task")
        endpoint = EndpointOfRun.of(config)
        envs = make_envs(task_config, task, endpoint, seed=config.seed, logs=logs / name)
        problems = ProblemSource.of(config, task_config, envs, runner.renderer, monitor)
        runner = dataclasses.replace(runner, envs=envs, scorer=scorer, max_turns=task_config.max_turns)
    runner = dataclasses.replace(
        runner,
        max_new_tokens=own.max_new_tokens or orchestrator.max_new_tokens,
        truncation=Truncation(own.top_p, own.top_k),
    )
    return SetPlayer(
        name=name,
        config=own,
        runner=runner,
        problems=FixedProblems(problems.stream("eval", own.split.value, once=True)),
        temperature=orchestrator.temperature if own.temperature is None else own.temperature,
        every=orchestrator.eval.every if own.every is None else own.every,
        at_once=_at_once(config),
        answer_of=voting_answer(config.reward, task_config),
    )


def _at_once(config: RunConfig) -> int:
    """The embedded engine holds the keys and values of every rollout, so a set gets no more of them than a step or the
    main evaluation."""
    orchestrator = config.orchestrator
    if isinstance(config.inference, VllmConfig):
        return QUEUED_BY_SERVERS
    return max(orchestrator.groups_per_step * orchestrator.group_size, orchestrator.eval.problems)


def voting_answer(reward: RewardConfig, task: TaskConfig) -> Callable[[str], str | None]:
    r"""The function that finds the answer which votes in maj@k: as `reward.extract` says, or else the first term with
    an extraction of its own.

    Without any, it is the last `\boxed{…}`, else the last `<answer>…</answer>`, else the whole completion.
    """
    own = task.reward if task.reward.terms else reward
    for config in (own.extract, *(term.extract for term in own.terms.values())):
        if config.kind is not None:
            return extractor(config, key="reward.extract")
    return _plain_answer


def _plain_answer(completion: str) -> str | None:
    for found in (last_boxed(completion), last_tagged(completion, ExtractConfig().tag)):
        if found is not None:
            return found
    return completion.strip()
