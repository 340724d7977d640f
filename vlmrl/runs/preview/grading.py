r"""What the rewards say of the reference answer and of an empty one.

    reference "5" ─▶ "5", "\boxed{5}", "<answer>5</answer>", … ─▶ every reward term ─▶ the best value of each
    ""            ───────────────────────────────────────────────▶                  ─▶ its value

A reward that does not give the right answer its maximum cannot be learned from, and that is how most broken rewards are
found. The reference is written in each form that an extraction or a format asks for, because the data seldom is.

Left out on purpose: the judge. It costs money, and its mood is no fault of the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from vlmrl.config.reward import FormatTerm, JudgeTerm, RewardConfig, RewardTerm
from vlmrl.config.run import RunConfig
from vlmrl.config.task import MixtureConfig, TaskConfig
from vlmrl.errors import UserFault, safe_text
from vlmrl.orchestrator.scoring import Scorer
from vlmrl.orchestrator.task_threads import TaskThreads
from vlmrl.rewards.base import Attempt
from vlmrl.rewards.extract import last_boxed, last_tagged
from vlmrl.runs.preview.seen import SeenProblem
from vlmrl.tasks.base import StepInfo, Task
from vlmrl.tasks.open_env import OpenEnv, finished

OWN = "the task's own reward"
"""Stands for the reward of a task that scores itself, next to the names of terms."""

LONGEST_REFERENCE = 20_000
"""Characters of a reference that are written into an answer."""


@dataclass(frozen=True)
class Candidate:
    """One way to write the reference answer."""

    form: str
    text: str


@dataclass(frozen=True)
class Graded:
    """What the rewards say of one problem's reference."""

    candidates: tuple[Candidate, ...]
    values: tuple[Mapping[str, float | None], ...]
    """Of each candidate: term → value. None: the term abstains, or failed."""
    empty: Mapping[str, float | None]
    """Of the empty answer."""
    unwrapped: Mapping[str, float | None]
    """Of the reference without the box or the tag that it stands in; empty where it stands in none."""
    faults: tuple[str, ...]

    def best(self, term: str) -> float | None:
        """The best value of a term over the ways to write the reference."""
        return _best(term, self.values)

    def bare(self, term: str) -> float | None:
        """The value of the reference as the data writes it."""
        return self.values[0].get(term) if self.values else None


class Grader:
    """Scores texts as a run would."""

    def __init__(self, config: RunConfig, task: Task) -> None:
        self._task = task
        self._tag = config.reward.extract.tag
        threads = TaskThreads()
        self._scorer = Scorer.of(_without_judges(config.reward), _task_without_judges(config.task), threads.run)

    async def grade(self, seen: SeenProblem) -> Graded | None:
        """What the rewards say of a problem's reference; None where the problem has none."""
        candidates = candidates_of(seen, self._tag)
        if not candidates:
            return None
        inner = unwrapped(candidates[0].text, self._tag)
        texts = [*(candidate.text for candidate in candidates), ""]
        faults: list[str] = []
        values = await self.score(seen, texts, faults)
        rewritten = []
        if inner is not None:
            bare = dataclasses.replace(seen, reference=inner)
            rewritten = await self.score(bare, [each.text for each in candidates_of(bare, self._tag)], faults)
        best = {name: _best(name, rewritten) for value in rewritten for name in value}
        return Graded(candidates, tuple(values[:-1]), values[-1], best, tuple(dict.fromkeys(faults)))

    async def score(self, seen: SeenProblem, texts: Sequence[str], faults: list[str]) -> list[dict[str, float | None]]:
        """The value of each term for each text as the answer to a problem. What fails is added to `faults`."""
        attempts = [
            Attempt(
                rollout_id=f"preview/{number}",
                problem_id=seen.problem_id,
                prompt=seen.messages,
                completion=text,
                answer=None,
                reference=seen.reference,
                columns=seen.columns,
                images=seen.images,
            )
            for number, text in enumerate(texts)
        ]
        verdicts = await self._scorer.judge(seen.task, attempts)
        faults += [verdict.fault.text for verdict in verdicts if verdict.fault is not None]
        values = [dict(verdict.values) for verdict in verdicts] or [{} for _ in texts]
        if not seen.is_reference:  # a task that scores itself
            for text, value in zip(texts, values, strict=True):
                value[OWN] = self._own_reward(seen, text, faults)
        return values

    def _own_reward(self, seen: SeenProblem, text: str, faults: list[str]) -> float | None:
        """The task's own reward for the answers of a demonstration, or for `text` at every turn."""
        demonstration = seen.demonstration or ()
        answers = demonstration if demonstration and text == demonstration[-1] else (text,)
        try:
            with OpenEnv(self._task, seen.problem) as env:
                finished(env.reset())
                for turn, answer in enumerate(answers, 1):
                    reply = finished(env.step(answer, StepInfo.of_text(answer, turn)))
                    if reply.done:
                        break
        except UserFault as fault:
            faults.append(fault.text)
            return None
        return reply.reward


def candidates_of(seen: SeenProblem, tag: str) -> tuple[Candidate, ...]:
    r"""The ways to write the right answer: first as the data has it.

    A problem without a reference and without a demonstration has none.
    """
    answer = short_answer(seen.reference)
    said = seen.demonstration[-1] if seen.demonstration else None
    if answer is None and said is None:
        return ()
    texts = {} if said is None else {"as the data writes it": said}
    if answer is not None:
        texts |= {
            "the answer alone": answer,
            "boxed": f"\\boxed{{{answer}}}",
            "in a tag": f"<{tag}>{answer}</{tag}>",
            "after a thought": f"<think>\n…\n</think>\n{answer}",
            "a thought and a tag": f"<think>\n…\n</think>\n<{tag}>{answer}</{tag}>",
            "a thought and a box": f"<think>\n…\n</think>\n\\boxed{{{answer}}}",
        }
    by_text = {text: form for form, text in reversed(texts.items())}
    return tuple(Candidate(form, text) for form, text in texts.items() if by_text[text] == form)


def short_answer(reference: Any) -> str | None:
    """A reference as a model would write it: the first of several accepted texts, JSON for boxes; None for none.

    >>> short_answer(["4", "four"]), short_answer([10, 20, 30, 40]), short_answer(None)
    ('4', '[10,20,30,40]', None)
    """
    if reference is None:
        return None
    if isinstance(reference, list | tuple) and reference and all(isinstance(each, str) for each in reference):
        reference = reference[0]
    if isinstance(reference, str | int | float):
        return safe_text(reference)[:LONGEST_REFERENCE]
    return orjson.dumps(reference, default=_plain, option=orjson.OPT_NON_STR_KEYS).decode()[:LONGEST_REFERENCE]


def unwrapped(text: str, tag: str) -> str | None:
    r"""The content of the box or the tag that a text ends with; None where it has neither.

    >>> unwrapped(r"It is \boxed{4}", "answer"), unwrapped("4", "answer")
    ('4', None)
    """
    return last_tagged(text, tag) or last_boxed(text)


def terms_of(config: RunConfig, task: str) -> dict[str, RewardTerm]:
    """The reward terms by which a task of the run is scored, without judges."""
    own = config.task.tasks[task] if isinstance(config.task, MixtureConfig) and task else config.task
    terms = own.reward.terms or config.task.reward.terms or config.reward.terms
    return {name: term for name, term in terms.items() if not isinstance(term, JudgeTerm)}


def needs_reference(term: RewardTerm) -> bool:
    """Whether the right answer must get the maximum of a term. A format says nothing of right and wrong."""
    return not isinstance(term, FormatTerm) and term.weight > 0


def _best(term: str, values: Sequence[Mapping[str, float | None]]) -> float | None:
    """The largest value of a term; None where it abstains everywhere."""
    return max((value for each in values if (value := each.get(term)) is not None), default=None)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else safe_text(value)


def _without_judges(reward: RewardConfig) -> RewardConfig:
    terms = {name: term for name, term in reward.terms.items() if not isinstance(term, JudgeTerm)}
    return dataclasses.replace(reward, terms=terms)


def _task_without_judges(task: TaskConfig) -> TaskConfig:
    changed = dataclasses.replace(task, reward=_without_judges(task.reward))
    if isinstance(changed, MixtureConfig):
        tasks = {name: _task_without_judges(own) for name, own in changed.tasks.items()}
        changed = dataclasses.replace(changed, tasks=tasks)
    return changed
