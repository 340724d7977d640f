"""Options of the package's renderers, and renderers of the user's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from support.families.conversations import pictures
from support.tiny_renderer import MODEL, PLACEHOLDER_TOKENS, VOCAB_SIZE, first, following
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.errors import ConfigError
from vlmrl.rendering.package import package_config
from vlmrl.rendering.renderer import FamilyRenderer, make_renderer
from vlmrl.types import Image, Message

ASKED = [Message.of("user", "hello")]


def make(tokenizer: Any, image_processor: Any, name: str, **options: Any) -> FamilyRenderer:
    config = RendererConfig(name=name, options=options)
    return make_renderer(config, MODEL, tokenizer, image_processor, VOCAB_SIZE, PLACEHOLDER_TOKENS)


def text_of(renderer: FamilyRenderer, tokenizer: Any, *messages: Message) -> str:
    return str(tokenizer.decode(first(renderer, messages).token_ids))


def test_options_reach_the_package(tokenizer: Any, image_processor: Any) -> None:
    shown = Message.of("user", Image(pictures()[0]), "?")
    assert "Picture 1: " not in text_of(make(tokenizer, image_processor, "qwen3-vl"), tokenizer, shown)
    with_ids = make(tokenizer, image_processor, "qwen3-vl", add_vision_id=True)
    assert "Picture 1: " in text_of(with_ids, tokenizer, shown)


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (
            {"thinks": True},
            r"options\.thinks is no option of the renderer qwen3-vl, .* its options are add_vision_id, ",
        ),
        ({"add_vision_id": "perhaps"}, r"renderer\.options=.*perhaps.* does not fit the renderer qwen3-vl"),
        ({"image_cache_max": 9}, r"options\.image_cache_max is no option"),
    ],
)
def test_options_that_there_are_not(options: dict[str, Any], refusal: str) -> None:
    with pytest.raises(ConfigError, match=refusal):
        package_config("qwen3-vl", options)


def test_a_renderer_of_ones_own(tokenizer: Any) -> None:
    renderer = make(tokenizer, None, "support.own_renderers:Spaced", gap="  ")
    prompt = first(renderer, ASKED)
    assert tokenizer.decode(prompt.token_ids) == "user:  hello<|im_end|>assistant:  "
    ids = np.array([*tokenizer.encode("hi"), *renderer.stop_token_ids])
    history = [*ASKED, Message.of("assistant", "hi")]
    longer, bridged = following(renderer, prompt, ids, history, [Message.of("user", "say <|im_end|>")])
    assert bridged
    assert tokenizer.decode(longer.token_ids).endswith(
        "assistant:  hi<|im_end|>user:  say <|im_end|><|im_end|>assistant:  "
    )
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert longer.token_ids.tolist().count(stop) == 3, "what the text spells is text"
    whole, sampled = renderer.render_conversation(history)
    assert tokenizer.decode(whole.token_ids[sampled]) == "hi<|im_end|>"


def test_a_renderer_of_ones_own_with_images(tokenizer: Any, image_processor: Any) -> None:
    renderer = make(tokenizer, image_processor, "support.own_renderers:Quoting")
    prompt = first(renderer, [Message.of("user", "look ", Image(pictures()[0]))])
    assert "> look" in tokenizer.decode(prompt.token_ids)
    assert len(prompt.placeholders) == 1


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("support.own_renderers:Missing", "Missing"),
        ("support.own_renderers:NOT_A_RENDERER", "is a int, not a renderer class"),
        ("support.no_such_module:Spaced", "names a module that"),
    ],
)
def test_a_wrong_import_path(tokenizer: Any, name: str, refusal: str) -> None:
    with pytest.raises(ConfigError, match=refusal):
        make(tokenizer, None, name)


def test_a_class_that_raises_is_named(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"own_renderers:Spaced: .*unexpected keyword argument 'wrong'"):
        make(tokenizer, None, "support.own_renderers:Spaced", wrong=1)
