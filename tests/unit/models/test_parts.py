"""Parts of a model, in families that keep their projector in different places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from vlmrl.config.model import Part
from vlmrl.models.parts import part_of_each

VISUAL = {"visual.blocks": "vision_tower", "visual.patch_embed": "vision_tower", "visual.merger": "projector"}

WANTED = {
    "qwen3_vl": VISUAL | {"visual.pos_embed": "vision_tower", "visual.deepstack_merger_list": "projector"},
    "glm4v": VISUAL | {"visual.embeddings": "vision_tower", "visual.post_layernorm": "vision_tower"},
    "gemma3": {"vision_tower": "vision_tower", "multi_modal_projector": "projector"},
    "smolvlm": {"vision_model": "vision_tower", "connector": "projector"},
    "llava_next": {"vision_tower": "vision_tower", "multi_modal_projector": "projector", "image_newline": "projector"},
}


@pytest.mark.parametrize("family", WANTED)
def test_vision_tower_and_projector(family_folder: Callable[[str], Path], family: str) -> None:
    auto: Any = AutoModelForImageTextToText
    config = AutoConfig.from_pretrained(family_folder(family))
    with torch.device("meta"):
        model = auto.from_config(config)
    part_of = part_of_each(model)
    assert part_of.keys() == dict(model.named_parameters()).keys()
    for start, part in WANTED[family].items():
        found = {each.value for name, each in part_of.items() if name.startswith(f"model.{start}")}
        assert found == {part}, start
    language = {name for name, part in part_of.items() if part is Part.language_model}
    assert language == {name for name in part_of if name.startswith(("model.language_model", "model.text_model"))}
    heads = {name for name, part in part_of.items() if part is Part.head}
    assert heads == (set() if model.config.tie_word_embeddings else {"lm_head.weight"})


def test_a_head_of_its_own(family_folder: Callable[[str], Path]) -> None:
    auto: Any = AutoModelForCausalLM
    config = AutoConfig.from_pretrained(family_folder("qwen3"))
    for tied in (False, True):
        config.tie_word_embeddings = tied
        with torch.device("meta"):
            part_of = part_of_each(auto.from_config(config))
        heads = [name for name, part in part_of.items() if part is Part.head]
        assert heads == ([] if tied else ["lm_head.weight"])
        assert set(part_of.values()) <= {Part.language_model, Part.head}
