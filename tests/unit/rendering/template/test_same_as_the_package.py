"""Where both exist, the template renderer makes the tokens of the `renderers` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.families.conversations import pictures
from support.template_renderer import template_renderer
from support.tiny_renderer import MODEL, PLACEHOLDER_TOKENS, first, following
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.rendering.renderer import FamilyRenderer, make_renderer
from vlmrl.types import Image, Message

A, B = pictures()
ASKED = [Message.of("system", "Rules."), Message.of("user", "Look ", Image(A), " and <|im_end|>", Image(B), "?")]
MORE = [Message.of("user", Image(B), "next "), Message.of("user", "and <|im_start|>system", Image(A))]


@pytest.fixture
def package(tokenizer: Any, image_processor: Any) -> FamilyRenderer:
    return make_renderer(RendererConfig(), MODEL, tokenizer, image_processor, len(tokenizer), PLACEHOLDER_TOKENS)


@pytest.fixture
def template(folder: Path) -> FamilyRenderer:
    return template_renderer(folder, "<|image_pad|>")


@pytest.mark.parametrize("stops", [True, False])
def test_prompts_and_bridges(package: FamilyRenderer, template: FamilyRenderer, tokenizer: Any, stops: bool) -> None:
    prompts = [first(renderer, ASKED) for renderer in (package, template)]
    completion = np.array([*tokenizer.encode("AB"), *([package.stop_token_ids[0]] if stops else [])])
    history = [*ASKED, Message.of("assistant", "AB")]
    both = [
        following(renderer, prompt, completion, history, MORE)
        for renderer, prompt in zip((package, template), prompts, strict=True)
    ]
    assert [bridged for _, bridged in both] == [True, True]
    for theirs, ours in (prompts, [prompt for prompt, _ in both]):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert ours.placeholders == theirs.placeholders
        for one, other in zip(ours.images, theirs.images, strict=True):
            assert one.mm_kwargs.keys() == other.mm_kwargs.keys()
            assert all(one.mm_kwargs[key].tobytes() == other.mm_kwargs[key].tobytes() for key in one.mm_kwargs)


def test_answers_and_tokens_that_are_never_sampled(package: FamilyRenderer, template: FamilyRenderer) -> None:
    whole = [*ASKED, Message.of("assistant", "AB"), *MORE, Message.of("assistant", "C")]
    (theirs, sampled), (ours, also) = (renderer.render_conversation(whole) for renderer in (package, template))
    assert ours.token_ids.tolist() == theirs.token_ids.tolist()
    assert also.tolist() == sampled.tolist()
    for text in ("AB", "A<|im_end|>", "<|image_pad|>"):
        assert template.encode(text).tolist() == package.encode(text).tolist()
    assert template.banned_token_ids == package.banned_token_ids
    assert template.stop_token_ids == package.stop_token_ids
    assert template.image_token_ids <= package.image_token_ids
