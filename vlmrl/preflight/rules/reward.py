"""Rewards, mixtures and evaluation sets: every answer can be scored, every name can be a key of the metrics."""

from __future__ import annotations

from vlmrl.config.algorithm import Credit
from vlmrl.config.clip_direction import ClipDirectionConfig
from vlmrl.config.fields import NAME
from vlmrl.config.gymnasium import GymnasiumConfig
from vlmrl.config.program import ProgramConfig, scores_itself
from vlmrl.config.reward import TERMS, FormatTerm, ImportedTerm, JudgeTerm, RewardConfig
from vlmrl.config.run import BY_REWARD, Mode, RunConfig
from vlmrl.config.small_print import SmallPrintConfig
from vlmrl.config.task import ColorCodewordConfig, MixtureConfig, TaskConfig, Workers, tasks_of
from vlmrl.errors import ConfigError

NEED_NO_ANSWER = (FormatTerm, ImportedTerm, JudgeTerm)
"""Terms that can score an answer without a reference answer to compare it with."""

OF_THE_RUN = ("max_fault_rate", "bad_rows", "max_bad_row_rate")
"""Settings of a task that hold for the run as a whole."""

OF_EACH_TASK = ("timeout_s", "workers", "num_workers")
"""Settings that say how the envs of one task run."""


def all_tasks(config: RunConfig) -> dict[str, TaskConfig]:
    """Key → config of the run's task and of the tasks that evaluation sets have of their own."""
    sets = config.orchestrator.eval.sets
    own = {f"orchestrator.eval.sets.{name}.task": each.own_task for name, each in sets.items()}
    return {"task": config.task} | {key: task for key, task in own.items() if task is not None}


def rewards_of(config: RunConfig, whole: TaskConfig, own: TaskConfig, key: str) -> tuple[str, RewardConfig]:
    """The key and the config of the rewards that a task is paid by: its own, those of its mixture, or the run's."""
    parent = key.partition(".tasks.")[0]
    for place, found in ((key, own.reward), (parent, whole.reward)):
        if found.terms:
            return f"{place}.reward", found
    return "reward", config.reward


def names_can_be_keys(config: RunConfig) -> None:
    """Names of reward terms, tasks and evaluation sets stand in keys of the metrics."""
    named = {"orchestrator.eval.sets": [*config.orchestrator.eval.sets], "reward.terms": [*config.reward.terms]}
    for key, task in all_tasks(config).items():
        if isinstance(task, MixtureConfig):
            named[f"{key}.tasks"] = [*task.tasks]
        for own_key, own in {key: task, **tasks_of(task, key)}.items():
            named[f"{own_key}.reward.terms"] = [*own.reward.terms]
    for key, names in named.items():
        for name in names:
            if name not in NAME:
                raise ConfigError(
                    f"{key} has the name {name!r}, and no metric could be called by it: choose {NAME.demand}"
                )


def mixture_has_tasks(config: RunConfig) -> None:
    """A mixture has tasks, each of another kind than a mixture, and weights of those tasks."""
    for key, mixture in all_tasks(config).items():
        if not isinstance(mixture, MixtureConfig):
            continue
        if not mixture.tasks:
            raise ConfigError(
                f"{key}.tasks names no task, so task=mixture has no problem: add each, +task@{key}.tasks.<name>=dataset"
            )
        for field in OF_EACH_TASK:
            if (value := getattr(mixture, field)) != getattr(TaskConfig(), field):
                shown = value.name if isinstance(value, Workers) else value
                raise ConfigError(
                    f"{key}.{field}={shown} has no effect, because each task of a mixture runs its own envs: set "
                    f"{key}.tasks.<name>.{field}"
                )
        for name, own in mixture.tasks.items():
            if isinstance(own, MixtureConfig):
                raise ConfigError(
                    f"{key}.tasks.{name} is a mixture itself, and metrics have one name per task: add its tasks to "
                    f"{key}.tasks, with the products of their weights in {key}.weights"
                )
            for field in OF_THE_RUN:
                if getattr(own, field) != getattr(TaskConfig(), field):
                    raise ConfigError(
                        f"{key}.tasks.{name}.{field} has no effect, because all tasks of a run are judged together: "
                        f"set {key}.{field}"
                    )
        for name, weight in mixture.weights.items():
            if name not in mixture.tasks:
                raise ConfigError(
                    f"{key}.weights.{name}={weight} is the weight of no task, so it has no effect: write that of "
                    f"{', '.join(mixture.tasks)}"
                )
            if not 0 < weight <= 1e9:
                raise ConfigError(
                    f"{key}.weights.{name}={weight} gives the task no share of the problems: set {key}.weights.{name} "
                    f"to a value above 0 and at most 1000000000, or leave the task out with ~{key}.tasks.{name}"
                )


def answers_are_scored(config: RunConfig) -> None:
    """A task that does not score itself has reward terms, and not all of their weights are 0."""
    if config.mode not in (*BY_REWARD, Mode.eval, Mode.replay):
        return
    for key, whole in all_tasks(config).items():
        for own_key, own in tasks_of(whole, key).items():
            reward_key, reward = rewards_of(config, whole, own, own_key)
            if not scores_itself(own) and not reward.terms:
                unpaid = f"{own_key}.result=none" if isinstance(own, ProgramConfig) else f"{own_key}.kind=dataset"
                where = "reward=exact" if own_key == "task" else f"+reward@{own_key}.reward.terms.exact=exact"
                raise ConfigError(
                    f"{unpaid} has no reward of its own, and reward names no term, so no answer could be "
                    f"scored: choose {where}, or another of {', '.join(TERMS)}"
                )
            weights = [term.weight for term in reward.terms.values()]
            if scores_itself(own):
                weights.append(reward.task_weight)
            if not any(weights):
                raise ConfigError(
                    f"{reward_key} has no weight but 0, so every reward would be 0: set a weight in {reward_key}.terms"
                    + ("" if not scores_itself(own) else f", or {reward_key}.task_weight=1")
                )


def terms_have_effect(config: RunConfig) -> None:
    """Reward terms score whole episodes, and most compare with an answer that the task gives."""
    for own_key, own in tasks_of(config.task).items():
        reward_key, reward = rewards_of(config, config.task, own, own_key)
        if reward.terms and config.algorithm.credit is not Credit.episode and config.mode in BY_REWARD:
            raise ConfigError(
                f"algorithm.credit={config.algorithm.credit.name} trains each turn on the rewards that the task gives "
                f"to turns, and the terms of {reward_key} score whole episodes, so they would have no effect: set "
                "algorithm.credit=episode, or leave the terms out (reward=[])"
            )
        if isinstance(config.task, ColorCodewordConfig | ClipDirectionConfig | GymnasiumConfig | SmallPrintConfig):
            for name, term in reward.terms.items():
                if not isinstance(term, NEED_NO_ANSWER):
                    raise ConfigError(
                        f"{reward_key}.terms.{name} compares an answer with that of a data set, and "
                        f"task={config.task.kind} scores itself, so the term would abstain from every rollout: leave "
                        "it out, or choose reward=format or a function of your own, whose values are added to the "
                        "task's reward"
                    )
