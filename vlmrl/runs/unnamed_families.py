"""What checkpoints of families without a file in conf/model/vlm need more than others: a fence and a first prompt."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vlmrl.config.model import ModelConfig
from vlmrl.errors import ModelError, UserFault, VlmrlError, headline
from vlmrl.preflight.auto_model import known_families
from vlmrl.rendering.renderer import Renderer
from vlmrl.types import ContractError, Image, Message, Prompt

log = logging.getLogger(__name__)

WIDTH, HEIGHT = 80, 48
"""Pixels of the image of the first prompt."""


@contextmanager
def files_of(folder: Path) -> Iterator[None]:
    """Whatever the tokenizer, processor and chat template of `folder` raise inside becomes a `ModelError`, and the
    traceback goes to the log."""
    try:
        yield
    except VlmrlError:
        raise
    except UserFault as fault:
        raise ModelError(f"the processor or the chat template of {folder} does not serve: {fault.text}") from fault
    except Exception as error:  # code and files of any family
        log.exception("%s", folder)
        raise ModelError(
            f"no renderer can be made of the tokenizer, the processor and the chat template of {folder} "
            f"({headline(error)}): use the files that belong to the checkpoint, or choose another renderer with "
            "orchestrator.renderer.name"
        ) from error


def first_prompt(config: ModelConfig, folder: Path, renderer: Renderer) -> Prompt | None:
    """A prompt with an image of noise; None for a text-only model, and for families that are tested by name. Raises
    `ModelError` where none can be made."""
    if config.vlm is None or config.vlm.family in known_families():
        return None
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    with files_of(folder):
        try:
            prompt, _ = renderer.render_conversation([Message.of("user", Image(noise), "What is this?")])
        except ContractError as error:
            raise ModelError(f"no prompt with an image can be made with the files of {folder}: {error}") from error
    return prompt
