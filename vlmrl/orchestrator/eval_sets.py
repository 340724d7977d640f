"""Play one named evaluation set (`orchestrator.eval.sets.<name>`) and compute its metrics.

    problems of the set ─▶ samples per problem ─▶ Asked ─▶ eval/<set>/reward, pass@k, maj@k, by/<column>/<value>, …
                        ─▶ one greedy answer   ─▶

Rollout ids begin with `eval_<set>/` and `eval_<set>-greedy/`. Sampling seeds follow from them, so the answers to a set
do not depend on the other sets of an evaluation, nor on which of them are due.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vlmrl.config.eval_set import EvalSet
from vlmrl.errors import ConfigError, UserFault
from vlmrl.orchestrator.eval_scores import by_value, scores, shown_value
from vlmrl.orchestrator.metrics import (
    by_task,
    mean_rewards,
    mean_task_metrics,
    replay_metrics,
    task_means,
    tool_metrics,
)
from vlmrl.orchestrator.rollout import RolloutRunner
from vlmrl.orchestrator.stream import Drawn, FixedProblems
from vlmrl.record.evaluation import Asked, SetResult
from vlmrl.record.splits import RecordedSplit, eval_split
from vlmrl.tasks.base import Reference
from vlmrl.types import DropReason, Group, Rollout


@dataclass(frozen=True)
class Played:
    """What playing a set gave."""

    result: SetResult
    metrics: Mapping[str, float]
    """`eval/<set>/…`."""
    rollouts: Mapping[RecordedSplit, Sequence[Rollout]]


@dataclass(eq=False)
class SetPlayer:
    """Plays one set."""

    name: str
    config: EvalSet
    runner: RolloutRunner
    """A runner of the set's own: its task, rewards, lengths and truncation of the distribution."""
    problems: FixedProblems
    temperature: float
    """Of the sampled answers."""
    every: int
    """Optimizer steps between evaluations; 0 for none during training."""
    at_once: int
    """Most rollouts that are played at the same time, so that a set of any size fits into memory."""
    answer_of: Callable[[str], str | None]
    """Completion → the answer as it votes in maj@k; None where it has none. May raise `UserFault`."""

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether to play the set after `step`: before the first step, every `every` steps, and after the last."""
        return self.every > 0 and (step % self.every == 0 or step == last_step)

    async def play(self, step: int) -> Played:
        """Play the set with the current weights, those after `step`. May be cancelled."""
        problems = await self.problems.first(self.config.problems, step)
        self._check_columns(problems)
        sampled = await self._play(step, problems, self.config.samples, self.temperature)
        greedy = await self._play(step, problems, 1, 0.0) if self.config.greedy else []
        asked = list(self._asked(problems, sampled, greedy))
        of_sampled, of_greedy = _rollouts(sampled), _rollouts(greedy)
        found = scores(asked, self.config.pass_at)
        by = {
            column: {value: scores(members, self.config.pass_at) for value, members in by_value(asked, column).items()}
            for column in self.config.by
        }
        result = SetResult(self.name, self.config.pass_at, tuple(asked), found, by, self._settings(len(problems)))
        metrics = {f"eval/{self.name}/{key}": value for key, value in self._metrics(result, of_sampled, of_greedy)}
        rollouts = {eval_split(self.name, "sampled"): of_sampled, eval_split(self.name, "greedy"): of_greedy}
        return Played(result, metrics, {split: played for split, played in rollouts.items() if played})

    def _check_columns(self, problems: Sequence[Drawn]) -> None:
        """Raise ConfigError where results are wanted by a column that no problem has."""
        known = list(dict.fromkeys(name for drawn in problems for name in _columns(drawn)))
        for column in self.config.by:
            if column not in known and any(drawn.problem is not None for drawn in problems):
                have = f"they have {', '.join(known)}" if known else "its task gives them none"
                raise ConfigError(
                    f"orchestrator.eval.sets.{self.name}.by={column} names a column that no problem of the set has, so "
                    f"there is nothing to group by; {have}: correct the name, or remove it"
                )

    async def _play(self, step: int, problems: Sequence[Drawn], samples: int, temperature: float) -> list[Group]:
        groups: list[Group] = []
        size = max(1, self.at_once // max(1, samples))
        for start in range(0, len(problems) if samples else 0, size):
            groups += await self.runner.run_groups(
                split=self.config.split.value,
                step=step,
                problems=problems[start : start + size],
                group_size=samples,
                temperature=temperature,
                first_group=start,
                label=f"eval_{self.name}",
            )
        return groups

    def _asked(self, problems: Sequence[Drawn], sampled: Sequence[Group], greedy: Sequence[Group]) -> Iterator[Asked]:
        for number, drawn in enumerate(problems):
            yield asked_of(
                drawn.problem_id,
                sampled[number].rollouts if sampled else (),
                greedy[number].rollouts if greedy else (),
                self._answer,
                {column: shown_value(_columns(drawn).get(column)) for column in self.config.by},
            )

    def _answer(self, rollout: Rollout) -> str | None:
        """The answer of a rollout as it votes. A fault has none."""
        if not rollout.turns or rollout.stop_reason.is_fault:
            return None
        try:
            return self.answer_of(rollout.turns[-1].text)
        except UserFault:  # the pattern that extracts it took too long
            return None

    def _metrics(
        self, result: SetResult, sampled: Sequence[Rollout], greedy: Sequence[Rollout]
    ) -> Iterator[tuple[str, float]]:
        for name, mean in result.scores.items():
            yield name, mean.value
            if mean.se is not None:
                yield f"{name}_se", mean.se
        for column, values in result.by.items():
            for value, found in values.items():
                if found:
                    yield f"by/{column}/{value}", found["reward" if "reward" in found else "reward_greedy"].value
        yield "problems", float(len(result.asked))
        for rollouts, suffix in ((sampled, ""), (greedy, "_greedy")):
            if rollouts:
                yield f"truncated{suffix}", sum(each.stop_reason.is_truncated for each in rollouts) / len(rollouts)
            means = mean_rewards(rollouts) | mean_task_metrics(rollouts) | by_task(rollouts, task_means)
            means |= tool_metrics(rollouts)
            for key, average in means.items():
                yield f"{key}{suffix}", average
        both = [*sampled, *greedy]
        if faults := sum(rollout.stop_reason.is_fault for rollout in both):
            yield "faults", float(faults)
        if unscored := sum(not _is_scored(rollout) for rollout in both):
            yield "unscored", float(unscored)
        yield from replay_metrics(both).items()

    def _settings(self, problems: int) -> dict[str, object]:
        config = self.config
        return {
            "split": config.split.value,
            "problems": problems,
            "samples": config.samples,
            "greedy": config.greedy,
            "temperature": self.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
            "max_new_tokens": self.runner.max_new_tokens,
        }


def _rollouts(groups: Sequence[Group]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group.rollouts]


def asked_of(
    problem_id: str,
    sampled: Sequence[Rollout],
    greedy: Sequence[Rollout],
    answer_of: Callable[[Rollout], str | None] | None = None,
    columns: Mapping[str, str] | None = None,
) -> Asked:
    """One problem and its answers. Rollouts that nothing scored are left out."""
    counted = [rollout for rollout in sampled if _is_scored(rollout)]
    best = [rollout for rollout in greedy if _is_scored(rollout)]
    return Asked(
        problem_id,
        tuple(rollout.reward for rollout in counted),
        tuple(map(answer_of, counted)) if answer_of is not None else (),
        best[0].reward if best else None,
        columns or {},
    )


def _is_scored(rollout: Rollout) -> bool:
    """Whether the rollout counts. Where nothing can score it, it says nothing about the policy."""
    return rollout.dropped is not DropReason.NO_REWARD


def _columns(drawn: Drawn) -> Mapping[str, object]:
    return drawn.problem.columns if isinstance(drawn.problem, Reference) else {}
