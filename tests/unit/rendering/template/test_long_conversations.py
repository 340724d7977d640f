"""A conversation of many turns with images costs linear time: a bridge hands over what is new."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.families import FAMILIES
from support.families.conversations import pictures
from support.template_renderer import template_renderer
from support.tiny_renderer import first, following
from vlmrl.rendering.renderer import FamilyRenderer
from vlmrl.rendering.template.chat_template import ChatTemplate
from vlmrl.rendering.template.encoder import Encoder
from vlmrl.types import Image, Message, Prompt

PICTURES = pictures()


def played(renderer: FamilyRenderer, turns: int) -> Prompt:
    messages = [Message.of("system", "rules"), Message.of("user", "first ", Image(PICTURES[0]))]
    prompt = first(renderer, messages)
    for turn in range(turns):
        ids = np.array([40 + turn % 20, renderer.stop_token_ids[0]])
        messages.append(Message.of("assistant", renderer.decode(ids)))
        new = [Message.of("user", Image(PICTURES[turn % 2]), f"turn {turn}")]
        prompt, bridged = following(renderer, prompt, ids, messages, new)
        assert bridged, turn
        messages += new
    return prompt


def test_twice_the_turns_cost_twice_the_text(
    family_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    characters = 0

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, given: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal characters
            made = method(self, given, *args, **kwargs)
            characters += len(made) if isinstance(made, str) else len(given)
            return made

        return call

    monkeypatch.setattr(ChatTemplate, "text", counted(ChatTemplate.text))
    monkeypatch.setattr(Encoder, "encode", counted(Encoder.encode))
    costs = []
    for turns in (100, 200):
        renderer = template_renderer(family_folder("internvl"), FAMILIES["internvl"].image_token)
        characters = 0
        prompt = played(renderer, turns)
        assert len(prompt.images) == turns + 1
        costs.append(characters)
    assert costs[1] < 2.2 * costs[0], costs
