"""The fence around the task's messages, and how a fault is recorded in its rollout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vlmrl.errors import EngineError, ModelError, UserFault, fenced, safe_text
from vlmrl.rendering.renderer import ImageError
from vlmrl.rewards.base import RewardError
from vlmrl.tasks.border import TaskCodeError
from vlmrl.types import ContractError, Rollout, StopReason


class ContractFault(UserFault):
    """The task's messages cannot be rendered so that placeholder tokens and images match."""


@contextmanager
def rendering_fence() -> Iterator[None]:
    """The fence around the task's messages: the renderer, the tokenizer and the image decoders read them, and may raise
    anything for odd ones. What is missing for every message, such as a package, is no fault of one: `ModelError`
    passes."""
    missing: ModelError | None = None
    with fenced("rendering the messages"):
        try:
            yield
        except ContractError as error:
            raise ContractFault(str(error)) from error
        except ModelError as error:
            missing = error
    if missing is not None:
        raise missing


def record_fault(rollout: Rollout, error: UserFault | EngineError | ContractError) -> None:
    """Record why a rollout failed; its reward is 0.0."""
    rollout.stop_reason = stop_reason_of(error)
    rollout.error = error.text if isinstance(error, UserFault) else safe_text(error)
    rollout.traceback = error.traceback if isinstance(error, UserFault) else None
    rollout.reward = 0.0


def stop_reason_of(error: UserFault | EngineError | ContractError) -> StopReason:
    """The reason under which a fault is recorded."""
    if isinstance(error, TaskCodeError | RewardError):
        return error.stop_reason
    if isinstance(error, ImageError):
        return StopReason.IMAGE_ERROR
    if isinstance(error, EngineError):
        return StopReason.ENGINE_ERROR
    if isinstance(error, (ContractError, ContractFault)):
        return StopReason.CONTRACT
    return StopReason.TASK_ERROR
