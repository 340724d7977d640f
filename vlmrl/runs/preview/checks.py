"""Find what is wrong with the data, the prompts and the rewards, from a sample of problems.

Each check is a function of what was seen, and returns its warnings. A check speaks where the sample shows the fault, so
a small sample may miss a rare one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from vlmrl.config.reward import ExtractConfig, Extraction, RewardTerm
from vlmrl.config.run import RunConfig
from vlmrl.config.task import MixtureConfig
from vlmrl.errors import safe_repr
from vlmrl.runs.preview.box_checks import box_findings
from vlmrl.runs.preview.findings import FEW, SHOWN_ROWS, Code, Finding, named
from vlmrl.runs.preview.grading import OWN, Graded, needs_reference, terms_of
from vlmrl.runs.preview.image_roots import ImagesNotFound
from vlmrl.runs.preview.sample import Sample
from vlmrl.runs.preview.seen import SeenProblem
from vlmrl.tasks.base import Split
from vlmrl.types import Text

IMAGE_COLUMN = re.compile("image|img|picture|photo", re.IGNORECASE)
"""The name of a column that probably holds pictures."""

TOP = 1 - 1e-6
"""From here on a value counts as 1, the maximum of the built-in rewards."""


@dataclass(frozen=True)
class Seen:
    """What the checks look at."""

    config: RunConfig
    samples: dict[Split, Sample]
    images_not_found: ImagesNotFound | None

    @property
    def problems(self) -> list[SeenProblem]:
        return [problem for sample in self.samples.values() for problem in sample.problems]

    @property
    def graded(self) -> list[tuple[SeenProblem, Graded]]:
        """Problems with what the rewards say of their reference."""
        return [
            (problem, sample.graded[problem.problem_id])
            for sample in self.samples.values()
            for problem in sample.problems
            if problem.problem_id in sample.graded
        ]

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks that were seen: `""` without a mixture."""
        return sorted({problem.task for problem in self.problems})


def findings_of(seen: Seen) -> list[Finding]:
    """Every warning, the most severe kinds first."""
    found = [
        *_no_problems(seen),
        *_missing_images(seen),
        *_refused(seen),
        *_lengths(seen),
        *(finding for task in seen.tasks for finding in box_findings(seen.config, task, seen.problems)),
        *_rewards(seen),
        *_answers(seen),
        *_images(seen),
        *_duplicates(seen),
    ]
    return sorted(found, key=lambda finding: list(Code).index(finding.code))


def _no_problems(seen: Seen) -> Iterator[Finding]:
    for split, sample in seen.samples.items():
        is_asked = split == "train" or (seen.config.orchestrator.eval.every and seen.samples["train"].problems)
        if not sample.problems and is_asked:
            why = sample.refused[0].reason if sample.refused else "all belong to the other split"
            what = "a run has nothing to train on" if split == "train" else "an evaluation has nothing to play"
            yield Finding(
                Code.NO_PROBLEMS,
                f"none of the {sample.looked_at} rows of the {split} split that were looked at can be used, so {what}: "
                f"{why}",
            )


def _missing_images(seen: Seen) -> Iterator[Finding]:
    missing = seen.images_not_found
    if missing is None:
        return
    looked_at = sum(sample.looked_at for sample in seen.samples.values())
    if missing.candidate is not None:
        remedy = f"{missing.candidate} has it: set task.{missing.kind}_root={missing.candidate}"
    else:
        remedy = f"set task.{missing.kind}_root to the folder from which the paths start"
    yield Finding(
        Code.IMAGES_MISSING,
        f"the {missing.kind}s of {missing.count} of {looked_at} rows are not where the rows say ({missing.first}), so "
        f"these rows are left out: {remedy}",
        missing.rows[:SHOWN_ROWS],
    )


def _refused(seen: Seen) -> Iterator[Finding]:
    missing = set(seen.images_not_found.rows) if seen.images_not_found else set()
    for split, sample in seen.samples.items():
        others = [each for each in sample.refused if f"{each.source}:{each.row}" not in missing]
        if others and sample.problems:
            count = Counter(each.reason for each in others).most_common(1)[0]
            yield Finding(
                Code.ROWS_REFUSED,
                f"{len(others)} of {sample.looked_at} rows of the {split} split are refused, so a run leaves them out; "
                f"most often: {count[0]}",
                tuple(f"{each.source}:{each.row}" for each in others[:SHOWN_ROWS]),
            )


def _lengths(seen: Seen) -> Iterator[Finding]:
    config = seen.config
    room = min(config.inference.max_model_len, config.trainer.seq_len)
    name = "trainer.seq_len" if config.trainer.seq_len <= config.inference.max_model_len else "inference.max_model_len"
    counts = [sample.counts for sample in seen.samples.values()]
    lengths = [pair for each in counts for pair in zip(each.tokens, each.image_tokens, strict=True)]
    long = [(tokens, images) for tokens, images in lengths if tokens >= room]
    if long:
        most, images = max(long)
        shrink = " or show smaller images (model.vlm.max_pixels)" if images else ""
        yield Finding(
            Code.PROMPT_TOO_LONG,
            f"{len(long)} of {len(lengths)} prompts fill {name}={room} and leave no room for an answer, so they "
            f"are left out; the longest has {most} tokens, {images} of them of images: set {name}={_rounded(most)} or "
            f"more{shrink}",
            named(problem for problem in seen.problems if problem.tokens >= room),
        )
    limit = config.orchestrator.max_new_tokens
    answers = {name: count for sample in seen.samples.values() for name, count in sample.answer_tokens.items()}
    cut = [problem for problem in seen.problems if answers.get(problem.problem_id, 0) > limit]
    if cut:
        most = max(answers[problem.problem_id] for problem in cut)
        yield Finding(
            Code.ANSWER_TOO_LONG,
            f"{len(cut)} of {len(answers)} reference answers have more than "
            f"orchestrator.max_new_tokens={limit} tokens, so the policy is cut off before it can give them; the "
            f"longest has {most}: set orchestrator.max_new_tokens={_rounded(most)} or more",
            named(cut),
        )


def _rounded(tokens: int) -> int:
    """The next power of two, which leaves some room."""
    return 1 << tokens.bit_length()


# ── rewards ─────────────────────────────────────────────────────────────────────────────────────────────────


def _rewards(seen: Seen) -> Iterator[Finding]:
    for task in seen.tasks:
        graded = [(problem, grade) for problem, grade in seen.graded if problem.task == task]
        if not graded:
            continue
        faults = Counter(fault for _, grade in graded for fault in grade.faults)
        for fault, count in faults.most_common(1):
            yield Finding(
                Code.REWARD_FAILS,
                f"a reward failed for the answers of {count} of {len(graded)} problems, and a rollout whose reward "
                f"fails is not learned from: {fault}",
                task=task,
            )
        terms: dict[str, RewardTerm | None] = dict(terms_of(seen.config, task))
        if any(not problem.is_reference for problem, _ in graded):
            terms[OWN] = None
        silent = [problem for problem, grade in graded if all(grade.best(name) is None for name in terms)]
        if terms and len(silent) > FEW * len(graded):
            yield Finding(
                Code.REWARD_MAX,
                f"every reward term abstains from the reference answers of {len(silent)} of {len(graded)} problems "
                f"({safe_repr(silent[0].reference):.80}), so their rollouts are dropped as no_reward: choose a "
                "reward for answers of this kind",
                named(silent),
                task,
            )
        for name, term in terms.items():
            yield from _of_term(seen, task, name, term, graded)


def _of_term(
    seen: Seen, task: str, name: str, term: RewardTerm | None, graded: list[tuple[SeenProblem, Graded]]
) -> Iterator[Finding]:
    said = name if term is None else f"reward.terms.{name}"
    asked = term is None or needs_reference(term)
    judged = [(problem, grade, best) for problem, grade in graded if (best := grade.best(name)) is not None]
    if not judged:
        return
    missed = [(problem, grade, best) for problem, grade, best in judged if best < TOP]
    if asked and len(missed) > FEW * len(judged):
        yield _missed(seen, task, said, name, missed, len(judged))
    elif asked:
        yield from _unasked_form(seen, task, said, name, term, judged)
    paid = [problem for problem, grade, best in judged if (grade.empty.get(name) or 0.0) >= best]
    if (term is None or term.weight > 0) and len(paid) > FEW * len(judged):
        yield Finding(
            Code.REWARD_EMPTY,
            f"{said} pays an empty answer as well as the right one for {len(paid)} of {len(judged)} problems, so "
            "nothing can be learned from them: correct the reward or the references",
            named(paid),
            task,
        )


def _missed(
    seen: Seen, task: str, said: str, name: str, missed: list[tuple[SeenProblem, Graded, float]], count: int
) -> Finding:
    """A reward that does not give the reference its maximum; where the form of the reference explains it, that."""
    problem, _, best = missed[0]
    wrapped = sum((each.unwrapped.get(name) or 0.0) >= TOP for _, each, _ in missed)
    example = f"{safe_repr(problem.reference):.80} of {problem.problem_id} gets {best:g}"
    if wrapped > len(missed) / 2:
        return Finding(
            Code.ANSWER_FORM,
            f"{said} does not give the reference answers of the data their maximum for {len(missed)} of {count} "
            f"problems, because the references stand in a box or in a tag ({example}), and answers are compared with "
            "all of it: write the references without it",
            named(each for each, _, _ in missed),
            task,
        )
    return Finding(
        Code.REWARD_MAX,
        f"{said} gives the reference answer less than 1 for {len(missed)} of {count} problems, however it is written "
        f"({example}), so the right answer is not what is learned: compare the references with what this reward "
        f"expects, or choose another one",
        named(each for each, _, _ in missed),
        task,
    )


def _unasked_form(
    seen: Seen,
    task: str,
    said: str,
    name: str,
    term: RewardTerm | None,
    judged: list[tuple[SeenProblem, Graded, float]],
) -> Iterator[Finding]:
    """Answers as the data writes them get nothing, and no prompt says which form they should have."""
    if term is None:
        return
    extract = term.extract if term.extract.kind is not None else _shared(seen.config, task)
    bare = [(problem, grade) for problem, grade, best in judged if (grade.bare(name) or 0.0) < TOP]
    unasked = [(problem, grade) for problem, grade in bare if not _asks_for(problem, extract)]
    if len(unasked) <= FEW * len(judged):
        return
    grade = unasked[0][1]
    works = next(
        candidate.text
        for candidate, value in zip(grade.candidates, grade.values, strict=True)
        if (value.get(name) or 0.0) >= TOP
    )
    kind = (extract.kind or Extraction.whole).name
    yield Finding(
        Code.ANSWER_FORM,
        f"reward.extract.kind={kind} finds no right answer in {len(unasked)} of {len(judged)} answers as the data "
        f"writes them ({grade.candidates[0].text!r:.80}), only in {works!r:.80}, and no prompt asks for that form, so "
        "the policy would have to find it by chance: set reward.extract.kind to the form of the data, or ask for the "
        "form in task.system_prompt or task.template",
        named(each for each, _ in unasked),
        task,
    )


def _shared(config: RunConfig, task: str) -> ExtractConfig:
    own = config.task.tasks[task] if isinstance(config.task, MixtureConfig) and task else config.task
    return own.reward.extract if own.reward.terms else config.reward.extract


def _asks_for(problem: SeenProblem, extract: ExtractConfig) -> bool:
    """Whether a prompt speaks of the form in which the extraction looks for an answer."""
    text = "\n".join(part.text for message in problem.messages for part in message.content if isinstance(part, Text))
    match extract.kind:
        case Extraction.boxed:
            return "boxed" in text or "fbox" in text
        case Extraction.tag:
            return f"<{extract.tag}>" in text
        case _:
            return False


# ── answers, images, duplicates ─────────────────────────────────────────────────────────────────────────────


def _answers(seen: Seen) -> Iterator[Finding]:
    for task in seen.tasks:
        answers = [
            safe_repr(each.reference) for each in seen.problems if each.task == task and each.reference is not None
        ]
        if len(answers) >= 8 and len(set(answers)) == 1:
            yield Finding(
                Code.SAME_ANSWER,
                f"all {len(answers)} problems have the reference answer {answers[0]:.80}, so a policy learns to say it "
                "without looking: is task.columns.answer the right column?",
                task=task,
            )


def _images(seen: Seen) -> Iterator[Finding]:
    """Rows have pictures, and no prompt shows one."""
    if seen.config.model.vlm is None or any(each.images or each.frames for each in seen.problems):
        return
    columns = {
        name
        for problem in seen.problems
        for name, value in problem.columns.items()
        if isinstance(value, bytes) or (value and IMAGE_COLUMN.search(name))
    }
    if columns:
        named = ", ".join(sorted(columns))
        yield Finding(
            Code.NO_IMAGES,
            f"none of {len(seen.problems)} prompts shows an image, though the rows have {named}, so "
            "the policy learns from texts alone: set task.columns.images to the column that holds them",
        )


def _duplicates(seen: Seen) -> Iterator[Finding]:
    for split, sample in seen.samples.items():
        total, different = len(sample.counts.tokens), len(sample.counts.by_both)
        if total - different > FEW * max(1, total):
            yield Finding(
                Code.DUPLICATES,
                f"{total} problems of the {split} split hold {different} different ones by text and pixels, so some "
                "are played more often than others: remove the copies",
                tuple(sample.counts.repeated),
            )
    train, held_out = (seen.samples[split].counts.by_both for split in ("train", "eval"))
    if leaked := sum(count for key, count in held_out.items() if key in train):
        yield Finding(
            Code.LEAK,
            f"{leaked} of {held_out.total()} problems of the evaluation are also trained on, by text and pixels, so "
            "the held-out reward is too good: remove them from one of the two",
            named(problem for problem in seen.samples["eval"].problems if problem.key in train),
        )
