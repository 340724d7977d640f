"""Score the rollouts of a group by the reward terms of the config (`reward=`), once its siblings have been played.

    group ─▶ Attempts ─extract─▶ Reward.score of each term ─▶ rollout.rewards ─▶ rollout.reward

    reward = task_weight · (the task's own reward) + Σ weight · value

as in TRL: the terms are added, and a term that abstains is left out. The task's own reward (of color_codeword, of a
task of your own) is a term like any other, whose weight is `task_weight`; a row of a data set has none. Where a problem
has no reward of its own and every term abstains, or there is none, its rollout is dropped as `no_reward`.

A term sees the last answer of a rollout, and everything before it as the prompt, also in a task of several turns. It
does not see rollouts that failed. A term that raises makes a fault of the rollout (`reward_error`), or of the group
where it judges all siblings in one call; a value that is no finite number does too (`bad_reward`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmrl.config.program import ProgramConfig, scores_itself
from vlmrl.config.reward import RewardConfig
from vlmrl.config.task import MixtureConfig, TaskConfig, tasks_of
from vlmrl.errors import UserFault, fenced, safe_repr
from vlmrl.rewards.base import Attempt, BadValueError, RewardError, RunBlocking, Score, Scored, SeenImage
from vlmrl.rewards.loading import Term, load_terms
from vlmrl.tasks.border import LARGEST_REWARD, TaskCodeError, get_reference
from vlmrl.types import DropReason, Group, Prompt, Rollout, StopReason


@dataclass(frozen=True)
class Scheme:
    """How the rollouts of one task are paid."""

    terms: tuple[Term, ...] = ()
    task_weight: float = 1.0
    """Factor on the task's own reward."""
    is_scored: bool = True
    """False: no term scores the rollouts, and the task does not either."""
    by_terms_alone: bool | None = None
    """Whether the task pays nothing itself. None: that depends on the problem, of which a `Reference` has no reward of
    its own."""


@dataclass(frozen=True)
class Verdict:
    """What the terms say of one rollout."""

    values: dict[str, float | None]
    """Term → value before its weight; None where it abstains."""
    metrics: dict[str, float]
    """`<term>/<name>` → a metric that the term returned."""
    fault: UserFault | None = None
    """The first term that failed."""


def is_scored(reward: RewardConfig, task: TaskConfig) -> bool:
    """Whether anything says how good an answer is: a reward term, or a task that scores itself."""
    return any(
        scores_itself(own) or own.reward.terms or task.reward.terms or reward.terms for own in tasks_of(task).values()
    )


class Scorer:
    """The reward terms of a run, or of a task that is evaluated by itself."""

    def __init__(self, scheme: Scheme | None = None, of_task: Mapping[str, Scheme] | None = None) -> None:
        """`of_task` has the schemes of those tasks of a mixture that have terms of their own, by name. Without a scheme
        a rollout keeps the task's own reward."""
        self._scheme = scheme or Scheme()
        self._of_task = dict(of_task or {})

    @staticmethod
    def of(reward: RewardConfig, task: TaskConfig, run_blocking: RunBlocking, key: str = "task") -> Scorer:
        """The scorer of the task at `key`. The task's own terms replace those of `reward`. Raises ConfigError."""

        def scheme_of(own: TaskConfig, own_key: str) -> Scheme | None:
            alone = not scores_itself(own) if isinstance(own, ProgramConfig) else None
            if own.reward.terms:
                terms = load_terms(own.reward, run_blocking, f"{own_key}.reward")
                return Scheme(terms, own.reward.task_weight, by_terms_alone=alone)
            if not is_scored(shared_reward, own):
                return Scheme(is_scored=False)
            return None if alone is None else dataclasses.replace(run_scheme, by_terms_alone=alone)

        shared_reward = task.reward if task.reward.terms else reward
        run_scheme = Scheme(load_terms(reward, run_blocking), reward.task_weight)
        shared = scheme_of(task, key) or run_scheme
        tasks = task.tasks if isinstance(task, MixtureConfig) else {}
        schemes = {name: scheme_of(own, f"{key}.tasks.{name}") for name, own in tasks.items()}
        return Scorer(shared, {name: scheme for name, scheme in schemes.items() if scheme is not None})

    @property
    def has_terms(self) -> bool:
        return any(scheme.terms for scheme in (self._scheme, *self._of_task.values()))

    async def score(self, group: Group) -> None:
        """Fill `rewards` and `reward` of the rollouts of a group that was played, in place."""
        played = [rollout for rollout in group.rollouts if rollout.turns and not rollout.stop_reason.is_fault]
        if not played:
            return
        scheme = self._of_task.get(played[0].task, self._scheme)
        if not scheme.terms:
            for rollout in () if scheme.is_scored else played:
                rollout.dropped = DropReason.NO_REWARD
            return
        try:
            reference = get_reference(group.problem)
            attempts = [attempt_of(rollout, reference) for rollout in played]
        except UserFault as fault:
            for rollout in played:
                record_fault(rollout, fault)
            return
        for rollout, verdict in zip(played, await self.judge(played[0].task, attempts), strict=True):
            alone = reference is not None if scheme.by_terms_alone is None else scheme.by_terms_alone
            _pay(rollout, verdict, scheme, is_scored_by_terms=alone)

    async def judge(self, task: str, attempts: Sequence[Attempt]) -> list[Verdict]:
        """What the terms of `task` (the name in a mixture, or empty) say of the siblings of one group. All terms work
        at the same time."""
        terms = self._of_task.get(task, self._scheme).terms
        scores = await asyncio.gather(*(_scores(term, attempts) for term in terms))
        return [_verdict(terms, of_attempt) for of_attempt in zip(*scores, strict=True)]


def attempt_of(rollout: Rollout, reference: tuple[Any, Mapping[str, Any]] | None) -> Attempt:
    """A played rollout as a term sees it. `reference` is the answer and the columns of its problem."""
    last = rollout.turns[-1]
    return Attempt(
        rollout_id=rollout.rollout_id,
        problem_id=rollout.problem_id,
        prompt=(*rollout.messages_before(len(rollout.turns) - 1), *last.messages),
        completion=last.text,
        answer=None,
        reference=None if reference is None else reference[0],
        columns={} if reference is None else reference[1],
        images=seen_images(last.prompt),
        completion_ids=tuple(last.completion.token_ids.tolist()),
    )


def seen_images(prompt: Prompt) -> tuple[SeenImage, ...]:
    """The sizes of a prompt's images."""
    sizes = [(image.pixels.shape[1], image.pixels.shape[0], image.processed_size) for image in prompt.images]
    return tuple(SeenImage(width, height, *(processed or (width, height))) for width, height, processed in sizes)


def record_fault(rollout: Rollout, fault: UserFault) -> None:
    """Make a fault of a rollout that was played."""
    rollout.stop_reason = (
        fault.stop_reason if isinstance(fault, RewardError | TaskCodeError) else StopReason.REWARD_ERROR
    )
    rollout.error, rollout.traceback, rollout.reward = fault.text, fault.traceback, 0.0


async def _scores(term: Term, attempts: Sequence[Attempt]) -> list[Score]:
    """The scores of one term. Whatever its code raises becomes the score of the attempts that it was called for."""
    scores: dict[int, Score] = {}
    asked: dict[int, Attempt] = {}
    for number, attempt in enumerate(attempts):
        try:
            asked[number] = dataclasses.replace(attempt, answer=term.extract(attempt.completion))
        except UserFault as fault:  # a pattern that took too long
            scores[number] = fault
    try:
        with fenced("the reward", RewardError):
            given = await term.reward.score(list(asked.values())) if asked else []
            scores.update(zip(asked, given, strict=True))
    except UserFault as fault:
        scores.update(dict.fromkeys(asked, fault))
    return [scores[number] for number in range(len(attempts))]


def _verdict(terms: Sequence[Term], scores: Sequence[Score]) -> Verdict:
    verdict = Verdict({}, {})
    for term, score in zip(terms, scores, strict=True):
        try:
            if isinstance(score, UserFault):
                raise score
            scored = score if isinstance(score, Scored) else Scored(score)
            verdict.values[term.name] = None if scored.value is None else _finite("the value", scored.value)
            verdict.metrics.update(
                {f"{term.name}/{name}": _finite(f"the metric {name}", value) for name, value in scored.metrics.items()}
            )
        except UserFault as fault:
            kind = BadValueError if isinstance(fault, BadValueError) else RewardError
            named = kind(f"reward.terms.{term.name}: {fault.text}", fault.traceback)
            return dataclasses.replace(verdict, fault=named)
    return verdict


def _finite(what: str, value: Any) -> float:
    """A value as a float; also that of numpy, of a tensor with one element, and of bool."""
    number = math.nan
    if not isinstance(value, str | bytes):
        with fenced(what, BadValueError):
            number = float(value)
    if not abs(number) <= LARGEST_REWARD:
        raise BadValueError(f"{what} is {safe_repr(value)}, which is not a finite number")
    return number


def _pay(rollout: Rollout, verdict: Verdict, scheme: Scheme, *, is_scored_by_terms: bool) -> None:
    """Set the reward of a rollout. `is_scored_by_terms`: its problem has no reward of its own."""
    rollout.rewards = rollout.rewards | verdict.values
    if verdict.fault is not None:
        record_fault(rollout, verdict.fault)
        return
    rollout.metrics = rollout.metrics | verdict.metrics
    values = [(term.weight, verdict.values[term.name]) for term in scheme.terms]
    total = scheme.task_weight * rollout.reward
    total += math.fsum(weight * value for weight, value in values if value is not None)
    if not abs(total) <= LARGEST_REWARD:
        record_fault(rollout, BadValueError(f"the sum of weight times value over the reward terms is {total!r}"))
        return
    rollout.reward = total
    if is_scored_by_terms and all(value is None for _, value in values):
        rollout.reward, rollout.dropped = 0.0, DropReason.NO_REWARD
