"""Evaluations measure something, and the metric that chooses the best checkpoint is among what they measure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from vlmrl.config.eval_set import EvalSet, ks
from vlmrl.config.fields import NAME
from vlmrl.config.keys import did_you_mean
from vlmrl.config.program import scores_itself
from vlmrl.config.run import LEARN, Mode, RunConfig
from vlmrl.config.task import tasks_of
from vlmrl.errors import ConfigError
from vlmrl.preflight.rules.reward import rewards_of
from vlmrl.record.splits import RESERVED

PAIR_METRICS = ("accuracy", "loss", "margin", "chosen_reward", "rejected_reward", "chosen_logprob", "rejected_logprob")
"""What is measured of held-out pairs, `eval/dpo/…`."""


def evaluation_has_work(config: RunConfig) -> None:
    """An evaluation has problems, and a target is compared with the main one."""
    evaluation, sets = config.orchestrator.eval, config.orchestrator.eval.sets
    if evaluation.problems > 0:
        return
    if config.mode is Mode.eval and not sets:
        raise ConfigError(
            "mode=eval evaluates orchestrator.eval.problems=0 problems, so nothing would be measured: set "
            "orchestrator.eval.problems=128"
        )
    if config.mode is Mode.rl and evaluation.every > 0 and not sets:
        raise ConfigError(
            f"orchestrator.eval.every={evaluation.every} evaluates orchestrator.eval.problems=0 problems, so nothing "
            "would be measured: set orchestrator.eval.problems=128, or orchestrator.eval.every=0 for no evaluation"
        )
    if config.mode is Mode.rl and evaluation.every > 0 and evaluation.target is not None:
        raise ConfigError(
            f"orchestrator.eval.target={evaluation.target} is compared with the main evaluation, which has "
            "orchestrator.eval.problems=0 problems, so it would never be met: set orchestrator.eval.problems=128, or "
            "orchestrator.eval.target=null"
        )


def sets_have_names(config: RunConfig) -> None:
    """The name of a set can be part of a key of metrics.jsonl, and means nothing else there."""
    for name in config.orchestrator.eval.sets:
        if name in RESERVED or name not in NAME:
            why = (
                f"eval/{name} means something else in metrics.jsonl" if name in RESERVED else f"it is not {NAME.demand}"
            )
            raise ConfigError(
                f"orchestrator.eval.sets.{name} has a name that no set can have, because {why}, so its metrics could "
                f"not be told apart: choose another name, e.g. orchestrator.eval.sets.{name or 'x'}_set"
            )


def sets_are_played(config: RunConfig) -> None:
    """A set has sampled or greedy answers."""
    for name, each in config.orchestrator.eval.sets.items():
        if each.samples == 0 and not each.greedy:
            key = f"orchestrator.eval.sets.{name}"
            raise ConfigError(
                f"{key}.samples=0 with {key}.greedy=false plays no answer, so nothing would be measured: set "
                f"{key}.samples=1, or {key}.greedy=true"
            )


def best_is_measured(config: RunConfig) -> None:
    """`trainer.keep_best` names a metric of the evaluations during training, and patience has one to compare."""
    metric, patience = config.trainer.keep_best, config.trainer.patience
    if metric is None:
        if patience is not None:
            raise ConfigError(
                f"trainer.patience={patience} has no trainer.keep_best, so it is not known what should improve: set "
                "trainer.keep_best=eval/reward, or drop trainer.patience"
            )
        return
    if config.mode not in LEARN:
        return
    known = list(_metrics(config))
    if not any(re.fullmatch(re.escape(each).replace("<name>", ".+"), metric) for each in known):
        raise ConfigError(
            f"trainer.keep_best={metric} is no metric of this run's evaluations, so no checkpoint would be the best "
            f"one{did_you_mean(metric, known)}: choose one of {', '.join(known)}"
            if known
            else f"trainer.keep_best={metric} has no value, because the run makes no evaluation while it trains: set "
            "orchestrator.eval.every=10, or drop trainer.keep_best"
        )


def _metrics(config: RunConfig) -> Iterator[str]:
    """The metrics of the evaluations during training; `<name>` stands for any name."""
    evaluation = config.orchestrator.eval
    if config.mode is Mode.sft:  # it plays held-out problems once, at its end
        yield from ["eval/demonstration_loss"] * (evaluation.every > 0 and evaluation.problems > 0)
        return
    if evaluation.every and evaluation.problems and config.mode is Mode.dpo:
        yield from (f"eval/dpo/{key}" for key in PAIR_METRICS)
    if evaluation.every and evaluation.problems and _is_scored(config):
        yield from ("eval/reward", "eval/reward_greedy", "eval/reward/<name>", "eval/task/<name>")
    for name, each in evaluation.sets.items():
        if evaluation.every or each.every:
            yield from (f"eval/{name}/{metric}" for metric in _set_metrics(each))


def _is_scored(config: RunConfig) -> bool:
    """Whether something says what an answer to the run's task is worth; with mode=rl something does."""
    return config.mode is Mode.rl or any(
        scores_itself(own) or rewards_of(config, config.task, own, key)[1].terms
        for key, own in tasks_of(config.task).items()
    )


def _set_metrics(each: EvalSet) -> Iterator[str]:
    if each.samples:
        yield "reward"
        yield from (f"pass@{k}" for k in ks(each.samples))
    if each.samples > 1:
        yield f"maj@{each.samples}"
    if each.greedy:
        yield from ("reward_greedy", "pass_greedy")
    yield from ("reward/<name>", "task/<name>")
    yield from (f"by/{column}/<name>" for column in each.by)
