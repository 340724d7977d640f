"""Make supervised samples from a task's demonstrations, for the warm-up before RL and for `mode=sft`.

    task.problem ─▶ task.demonstration ─▶ renderer ─▶ short enough? ─▶ TrainingSample
                              any of these fails ─────────────────────▶ a fault, recorded; the step goes on without it
                              … for a problem from a row, or NoProblem ▶ passed over; the next one is taken

With random answers (`demonstrations=random`), the warm-up teaches only when to answer and in which format. What the
images show must be learned from the reward.

The loss is on the answers alone: assistant messages that `reset` already gives (few-shot examples) are part of the
prompt. In RL they have no loss either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vlmrl.config.trainer import Demonstrations, SFTConfig
from vlmrl.errors import ConfigError, TaskError, UserFault
from vlmrl.orchestrator.fences import rendering_fence, stop_reason_of
from vlmrl.orchestrator.fit import bad_row, too_long
from vlmrl.orchestrator.stream import Drawn, PassWatch
from vlmrl.rendering.renderer import Renderer
from vlmrl.tasks.base import FromRow, NoProblem, Problem, Task
from vlmrl.tasks.border import get_num_rows, get_problem
from vlmrl.tasks.demonstrations import NoDemonstrationsError, get_demonstration
from vlmrl.types import (
    BoolArray,
    DropReason,
    Message,
    Prompt,
    Rollout,
    Trainer,
    TrainingSample,
    mm_token_type_ids,
)

FIRST_PROBLEM = 1 << 40
"""Index of the first training problem for supervised steps. RL starts at index 0, so no problem is used for both."""

AFTER_WARMUP = 1 << 20
"""Demonstrations that join RL steps (`trainer.warmup.rl_weight`) are numbered from this supervised step on."""


@dataclass(frozen=True)
class Made:
    """What the task has given for one step, without sampling."""

    rollouts: list[Rollout] = field(default_factory=list)
    """All of it, without turns: which problem each belongs to, and the faults."""
    absent: list[tuple[int, NoProblem]] = field(default_factory=list)
    """Indices that were passed over, because they have no problem or the problem gives nothing to learn."""

    @property
    def faults(self) -> list[Rollout]:
        """Those that the user's code or data does not allow to be learned from."""
        return [rollout for rollout in self.rollouts if rollout.stop_reason.is_fault]


@dataclass(frozen=True)
class Demonstrated(Made):
    """The demonstrations of one step."""

    samples: list[TrainingSample] = field(default_factory=list)
    """Those that can be learned from."""


def first_index(num_rows: int | None) -> int:
    """The index of demonstration 0: `FIRST_PROBLEM`, or the first pass over the rows that begins after it.

    >>> first_index(None) == FIRST_PROBLEM, first_index(1000) % 1000
    (True, 0)
    """
    return FIRST_PROBLEM if num_rows is None else -(-FIRST_PROBLEM // num_rows) * num_rows


def demonstrate(
    task: Task, renderer: Renderer, config: SFTConfig, *, step: int, numbers: Iterable[int], seed: int, seq_len: int
) -> Demonstrated:
    """The samples of supervised step `step` (0-based), of at most `seq_len` tokens each. `numbers` are those of the
    demonstrations to try, in order; as many are taken as a step needs. The result depends only on the arguments.

    Raises `TaskError` where the task has no demonstrations, `BadRowsError` where a whole pass over the rows has none,
    `ConfigError` where the renderer cannot render any.
    """
    made = Demonstrated()
    first = first_index(get_num_rows(task, "train"))

    def take(sample_id: str, index: int, problem: Problem, is_row: bool) -> None:
        own_seed = demonstration_seed(seed, index - first)
        prompt, learned = _demonstration(task, renderer, config, problem, own_seed, seq_len, is_row)
        made.samples.append(supervised_sample(sample_id, prompt, learned))

    indices = (first + number for number in numbers)
    take_problems(task, made, indices, config.batch_size, f"sft/{step:06d}", take, NoDemonstrationsError)
    return made


def take_problems(
    task: Task,
    made: Made,
    indices: Iterable[int],
    count: int,
    prefix: str,
    take: Callable[[str, int, Problem, bool], None],
    missing: type[UserFault],
) -> None:
    """Add to `made` what `take` makes of training problems, in the order of `indices`, until there are `count`
    rollouts. They are named `<prefix>/000` and so on. `take` gets the rollout's id, the index, the problem, and whether
    it is a row.

    Where `take` raises `missing`, the task gives nothing of this kind: `TaskError`. `BadRowsError` where a whole pass
    over the rows gives nothing.
    """
    num_rows = get_num_rows(task, "train")
    watch = PassWatch("train", num_rows)
    for index in indices:
        number = len(made.rollouts)
        rollout = Rollout.unplayed(f"{prefix}/{number:03d}", "train", index, number)
        try:
            problem, rollout.problem_id = get_problem(task, "train", index)
            take(rollout.rollout_id, index, problem, num_rows is not None or isinstance(problem, FromRow))
        except missing as error:
            raise TaskError(error.text) from error
        except NoProblem as absent:
            made.absent.append((index, absent))
            watch.passed_over(absent)
            continue
        except UserFault as fault:
            rollout.stop_reason, rollout.dropped = stop_reason_of(fault), DropReason.FAULT
            rollout.error, rollout.traceback = fault.text, fault.traceback
        watch.found()
        made.rollouts.append(rollout)
        if len(made.rollouts) == count:
            break


def _demonstration(
    task: Task, renderer: Renderer, config: SFTConfig, problem: Problem, seed: int, seq_len: int, is_row: bool = False
) -> tuple[Prompt, BoolArray]:
    """Prompt, and bool [P]: the tokens with a loss. Raises `UserFault` where the demonstration cannot be rendered or is
    too long, `BadRow` instead for a problem that comes from a row."""
    random_answers = config.demonstrations is Demonstrations.random
    messages, given = get_demonstration(task, problem, random_answers=random_answers, seed=seed)
    try:
        prompt, learned = rendered(renderer, messages, given)
    except UserFault as fault:
        if is_row:
            raise bad_row(problem, fault.text) from None
        raise
    if len(prompt.token_ids) > seq_len:
        if is_row:
            raise bad_row(problem, too_long(prompt, "demonstration", f"trainer.seq_len={seq_len}", "which do not fit"))
        raise UserFault(
            f"demonstration() has {len(prompt.token_ids)} tokens, more than trainer.seq_len={seq_len}: "
            "shorten it, or raise trainer.seq_len"
        )
    return prompt, learned


def held_out(
    task: Task, renderer: Renderer, config: SFTConfig, drawn: Sequence[Drawn], *, seed: int, seq_len: int
) -> list[TrainingSample]:
    """The samples of held-out problems, for a loss that is measured and not learned from. A problem without a
    demonstration of at most `seq_len` tokens is left out."""
    samples: list[TrainingSample] = []
    for number, one in enumerate(drawn):
        if one.problem is None:
            continue
        try:
            prompt, learned = _demonstration(
                task, renderer, config, one.problem, demonstration_seed(seed, one.index), seq_len
            )
        except (NoDemonstrationsError, NoProblem, UserFault):
            continue
        samples.append(supervised_sample(f"sft-eval/{number:03d}", prompt, learned))
    return samples


def loss_of(trainer: Trainer, samples: Sequence[TrainingSample]) -> float:
    """Mean negative log-likelihood of the loss tokens of `samples`, in nats per token; nothing is learned."""
    logprobs = np.concatenate(trainer.logprobs(samples))
    return -float(np.mean(logprobs, dtype=np.float64))


def demonstration_seed(seed: int, number: int) -> int:
    """The seed of the random answers of demonstration `number`, in [0, 2**64)."""
    digest = hashlib.blake2b(f"demonstration/{seed}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def rendered(renderer: Renderer, messages: tuple[Message, ...], given: int) -> tuple[Prompt, BoolArray]:
    """A conversation as a prompt, and bool [P]: the tokens with a loss, in answers after the first `given` messages.

    Raises `UserFault`, and `ConfigError` where no conversation can be rendered."""
    refused: ConfigError | None = None
    with rendering_fence():
        try:
            return renderer.render_conversation(messages, given)
        except ConfigError as error:  # the config's fault, not that of this demonstration
            refused = error
    assert refused is not None
    raise refused


def supervised_sample(rollout_id: str, prompt: Prompt, learned: BoolArray) -> TrainingSample:
    """A rendered conversation as a sample; `learned` is bool [P], the tokens with a loss."""
    length = len(prompt.token_ids)
    return TrainingSample(
        rollout_id=rollout_id,
        token_ids=prompt.token_ids,
        mm_token_type_ids=mm_token_type_ids(length, prompt.placeholders),
        loss_mask=learned,
        advantages=np.zeros(length, np.float32),
        inference_logprobs=np.zeros(length, np.float32),
        versions=np.where(learned, 0, -1),
        placeholders=prompt.placeholders,
        mm_items=prompt.mm_items,
    )
