"""The tiny model's tokenizer and image processor, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.tiny_renderer import MODEL, PLACEHOLDER_TOKENS, VOCAB_SIZE
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.models.checkpoints.load import load_image_processor, load_tokenizer, resolve_checkpoint
from vlmrl.rendering.renderer import Renderer, make_renderer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLMRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        return resolve_checkpoint(MODEL, ("Map the color of each square to a letter: red A, green B.", "Squares:"))


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def image_processor(folder: Path) -> Any:
    return load_image_processor(folder)


@pytest.fixture
def renderer(tokenizer: Any, image_processor: Any) -> Renderer:
    return make_renderer(RendererConfig(), MODEL, tokenizer, image_processor, VOCAB_SIZE, PLACEHOLDER_TOKENS)
