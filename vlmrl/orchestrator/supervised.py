"""Make supervised samples from a task's demonstrations, for the warm-up before RL and for `mode=sft`.

With random answers (`demonstrations=random`), the warm-up teaches only when to answer and in which format. What the
images show must be learned from the reward.
"""

from __future__ import annotations

import hashlib

import numpy as np

from vlmrl.config.trainer import Demonstrations, SFTConfig
from vlmrl.errors import TaskError
from vlmrl.rendering.renderer import Renderer
from vlmrl.tasks.base import Task
from vlmrl.types import TrainingSample, mm_token_type_ids

FIRST_PROBLEM = 1 << 40
"""Index of the first training problem for supervised steps. RL starts at index 0, so no problem is used for both."""

AFTER_WARMUP = 1 << 20
"""Demonstrations that join RL steps (`trainer.warmup.rl_weight`) are numbered from this supervised step on."""


def demonstration_samples(
    task: Task, renderer: Renderer, config: SFTConfig, *, step: int, seed: int
) -> list[TrainingSample]:
    """Make the samples of supervised step `step` (0-based). The result depends only on the arguments.

    Raises `TaskError` where the task has no demonstrations or its code raises.
    """
    samples = []
    for i in range(config.batch_size):
        number = step * config.batch_size + i
        digest = hashlib.blake2b(f"demonstration/{seed}/{number}".encode(), digest_size=8).digest()
        try:
            messages = task.demonstration(
                task.problem("train", FIRST_PROBLEM + number),
                random_answers=config.demonstrations is Demonstrations.random,
                seed=int.from_bytes(digest, "big"),
            )
            prompt, sampled = renderer.render_conversation(messages)
        except NotImplementedError as error:
            raise TaskError(str(error)) from error
        except Exception as error:  # user code may raise anything
            raise TaskError(
                f"{type(task).__name__}.demonstration raised {type(error).__name__}: {error}, so supervised steps have "
                "no samples: fix it, or set trainer.warmup.steps=0"
            ) from error
        length = len(prompt.token_ids)
        samples.append(
            TrainingSample(
                rollout_id=f"sft/{step:06d}/{i:03d}",
                token_ids=prompt.token_ids,
                mm_token_type_ids=mm_token_type_ids(length, prompt.placeholders),
                loss_mask=sampled,
                advantages=np.zeros(length, np.float32),
                inference_logprobs=np.zeros(length, np.float32),
                versions=np.where(sampled, 0, -1),
                placeholders=prompt.placeholders,
                images=prompt.images,
            )
        )
    return samples
