"""Make supervised samples from a task's demonstrations, for the warm-up before RL and for `mode=sft`.

    task.problem ─▶ task.demonstration ─▶ renderer ─▶ short enough? ─▶ TrainingSample
                              any of these fails ─────────────────────▶ a fault, recorded; the step goes on without it

With random answers (`demonstrations=random`), the warm-up teaches only when to answer and in which format. What the
images show must be learned from the reward.

The loss is on the answers alone: assistant messages that `reset` already gives (few-shot examples) are part of the
prompt. In RL they have no loss either.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from vlmrl.config.trainer import Demonstrations, SFTConfig
from vlmrl.errors import ConfigError, TaskError, UserFault
from vlmrl.orchestrator.rollout import rendering_fence, stop_reason_of
from vlmrl.rendering.renderer import Renderer
from vlmrl.tasks.base import Task
from vlmrl.tasks.border import NoDemonstrationsError, get_demonstration, get_problem
from vlmrl.types import (
    BoolArray,
    DropReason,
    Message,
    Prompt,
    Rollout,
    TrainingSample,
    mm_token_type_ids,
)

FIRST_PROBLEM = 1 << 40
"""Index of the first training problem for supervised steps. RL starts at index 0, so no problem is used for both."""

AFTER_WARMUP = 1 << 20
"""Demonstrations that join RL steps (`trainer.warmup.rl_weight`) are numbered from this supervised step on."""


@dataclass(frozen=True)
class Demonstrated:
    """The demonstrations of one step."""

    samples: list[TrainingSample] = field(default_factory=list)
    """Those that can be learned from."""
    rollouts: list[Rollout] = field(default_factory=list)
    """All of them, without turns: which problem each belongs to, and the faults."""

    @property
    def faults(self) -> list[Rollout]:
        """Those that the user's code or data does not allow to be learned from."""
        return [rollout for rollout in self.rollouts if rollout.stop_reason.is_fault]


def demonstrate(
    task: Task, renderer: Renderer, config: SFTConfig, *, step: int, first: int, seed: int, seq_len: int
) -> Demonstrated:
    """The samples of supervised step `step` (0-based), whose first demonstration has the number `first`; of at most
    `seq_len` tokens each. The result depends only on the arguments.

    Raises `TaskError` where the task has no demonstrations, `ConfigError` where the renderer cannot render any.
    """
    made = Demonstrated()
    for i in range(config.batch_size):
        number = first + i
        index = FIRST_PROBLEM + number
        rollout = Rollout.unplayed(f"sft/{step:06d}/{i:03d}", "train", index, i)
        made.rollouts.append(rollout)
        try:
            problem, rollout.problem_id = get_problem(task, "train", index)
            messages, given = get_demonstration(
                task,
                problem,
                random_answers=config.demonstrations is Demonstrations.random,
                seed=demonstration_seed(seed, number),
            )
            prompt, learned = _rendered(renderer, messages, given)
            if len(prompt.token_ids) > seq_len:
                raise UserFault(
                    f"demonstration() has {len(prompt.token_ids)} tokens, more than trainer.seq_len={seq_len}: "
                    "shorten it, or raise trainer.seq_len"
                )
        except NoDemonstrationsError as error:
            raise TaskError(error.text) from error
        except UserFault as fault:
            rollout.stop_reason, rollout.dropped = stop_reason_of(fault), DropReason.FAULT
            rollout.error, rollout.traceback = fault.text, fault.traceback
        else:
            made.samples.append(_sample(rollout.rollout_id, prompt, learned))
    return made


def demonstration_seed(seed: int, number: int) -> int:
    """The seed of the random answers of demonstration `number`, in [0, 2**64)."""
    digest = hashlib.blake2b(f"demonstration/{seed}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _rendered(renderer: Renderer, messages: tuple[Message, ...], given: int) -> tuple[Prompt, BoolArray]:
    """Prompt, and bool [P]: the tokens with a loss. Raises `UserFault`, and `ConfigError` where no demonstration can be
    rendered."""
    refused: ConfigError | None = None
    with rendering_fence():
        try:
            return renderer.render_conversation(messages, given)
        except ConfigError as error:  # the config's fault, not that of this demonstration
            refused = error
    assert refused is not None
    raise refused


def _sample(rollout_id: str, prompt: Prompt, learned: BoolArray) -> TrainingSample:
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
        images=prompt.images,
    )
