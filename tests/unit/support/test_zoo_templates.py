"""The chat templates of the tiny checkpoints say what the real families' templates say."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from support.families import FAMILIES
from support.families.conversations import conversation, pictures
from support.families.loading import load_processor
from vlmrl.models.checkpoints.load import load_tokenizer

Folder = Callable[[str], Path]

QWEN = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What colour is it?<|im_end|>\n"
    "<|im_start|>assistant\nred<|im_end|>\n"
    "<|im_start|>user\nAnd <|vision_start|><|image_pad|><|vision_end|> this?<|im_end|>\n<|im_start|>assistant\n"
)
QWEN_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"

PROMPTS = {
    "qwen2_vl": QWEN_SYSTEM + QWEN,
    "qwen2_5_vl": QWEN_SYSTEM + QWEN,
    "qwen3_vl": QWEN,
    "qwen3_vl_moe": QWEN,
    "qwen3_5": QWEN + "<think>\n",
    "qwen3_5_moe": QWEN + "<think>\n",
    "gemma3": (
        "<bos><start_of_turn>user\n<start_of_image>What colour is it?<end_of_turn>\n<start_of_turn>model\nred"
        "<end_of_turn>\n<start_of_turn>user\nAnd<start_of_image>this?<end_of_turn>\n<start_of_turn>model\n"
    ),
    "gemma4": (
        "<bos><|turn>user\n<|image|>What colour is it?<turn|>\n<|turn>model\nred<turn|>\n"
        "<|turn>user\nAnd<|image|>this?<turn|>\n<|turn>model\n"
    ),
    "gemma4_vision": (
        "<bos><|turn>user\n<|image|>What colour is it?<turn|>\n<|turn>model\nred<turn|>\n"
        "<|turn>user\nAnd<|image|>this?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    ),
    "internvl": (
        "<|im_start|>user\n<IMG_CONTEXT>\nWhat colour is it?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
        "<|im_start|>user\nAnd <IMG_CONTEXT>\n this?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "idefics3": (
        "<|begin_of_text|>User:<image>What colour is it?<end_of_utterance>\nAssistant: red<end_of_utterance>\n"
        "User: And <image> this?<end_of_utterance>\nAssistant:"
    ),
    "smolvlm": (
        "<|im_start|>User:<image>What colour is it?<end_of_utterance>\nAssistant: red<end_of_utterance>\n"
        "User: And <image> this?<end_of_utterance>\nAssistant:"
    ),
    "llava_next": "[INST] <image>\nWhat colour is it? [/INST] red</s> [INST] <image>\nAnd  this? [/INST]",
    "llava_onevision": (
        "<|im_start|>user\n<image>\nWhat colour is it?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
        "<|im_start|>user\n<image>\nAnd  this?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "glm4v": (
        "[gMASK]<sop><|user|>\n<|begin_of_image|><|image|><|end_of_image|>What colour is it?<|assistant|>\n"
        "[{'type': 'text', 'text': 'red'}]<|user|>\n"
        "And <|begin_of_image|><|image|><|end_of_image|> this?<|assistant|>\n"
    ),
    "pixtral": "<s>[INST][IMG]What colour is it?[/INST]red</s>[INST]And [IMG] this?[/INST]",
    "aya_vision": (
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|><image>What colour is it?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>red<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|><image>And  this?<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    ),
    "ovis2": QWEN_SYSTEM
    + (
        "<|im_start|>user\n<image>\nWhat colour is it?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
        "<|im_start|>user\nAnd <image>\n this?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "lfm2_vl": (
        "<|startoftext|><|im_start|>user\n<image>What colour is it?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
        "<|im_start|>user\nAnd <image> this?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llava": "USER: <image>\nWhat colour is it? ASSISTANT: red USER: <image>\nAnd   this? ASSISTANT:",
    "idefics2": (
        "User:<image>What colour is it?<end_of_utterance>\nAssistant: red<end_of_utterance>\n"
        "User: And <image> this?<end_of_utterance>\nAssistant:"
    ),
    "janus": (
        "<|User|>: <image_placeholder>\nWhat colour is it?\n\n<|Assistant|>: red<｜end▁of▁sentence｜>"
        "<|User|>: And \n<image_placeholder>\n this?\n\n<|Assistant|>:"
    ),
}
"""Rendered with the templates that `Recipe.template_source` names. GLM's prints an assistant's list of parts as
Python does; llava_onevision, llava_next and aya_vision move images to the front of their turn."""

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": " Which  colour?\n"}
ANSWER = {"role": "assistant", "content": "red"}
THOUGHT = {"role": "assistant", "content": "red", "reasoning_content": "It is not blue."}

CONVERSATIONS = {
    "question": [QUESTION],
    "system": [SYSTEM, QUESTION],
    "two turns": [QUESTION, ANSWER, QUESTION],
    "answered": [SYSTEM, QUESTION, ANSWER],
    "thoughts": [QUESTION, THOUGHT],
    "thoughts of an earlier turn": [QUESTION, THOUGHT, QUESTION],
}

RENDERERS = {
    "qwen3_vl": ("renderers.qwen3_vl", "Qwen3VLRenderer"),
    "qwen3_5": ("renderers.qwen35", "Qwen35Renderer"),
    "gemma4": ("renderers.gemma4", "Gemma4Renderer"),
    "qwen3": ("renderers.qwen3", "Qwen3Renderer"),
    "llama3": ("renderers.llama_3", "Llama3Renderer"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_template_renders_what_its_source_renders(family_folder: Folder, name: str) -> None:
    template = (family_folder(name) / "chat_template.jinja").read_text()
    tokenizer: Any = load_tokenizer(family_folder(name))
    rendered = tokenizer.apply_chat_template(
        conversation(pictures()), chat_template=template, add_generation_prompt=True, tokenize=False
    )
    assert rendered == PROMPTS[name]


def test_mistral_gives_a_conversation_without_a_system_message_one_with_a_date(family_folder: Folder) -> None:
    tokenizer: Any = load_tokenizer(family_folder("mistral3"))
    given = tokenizer.apply_chat_template([SYSTEM, QUESTION, ANSWER, QUESTION], tokenize=False)
    assert given == (
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST] Which  colour?\n[/INST]red</s>[INST] Which  colour?\n[/INST]"
    )
    assert "The current date is 20" in tokenizer.apply_chat_template([QUESTION], tokenize=False)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", RENDERERS)
def test_a_template_agrees_with_the_renderers_package(
    family_folder: Folder, name: str, messages: list[dict[str, Any]]
) -> None:
    tokenizer: Any = load_tokenizer(family_folder(name))
    renderer = _renderer(name)(tokenizer)
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, date_string="26 Jul 2024"
    )
    assert renderer.render_ids(messages, add_generation_prompt=True) == ids


@pytest.mark.parametrize("name", [name for name in RENDERERS if FAMILIES[name].image_token is not None])
def test_images_are_expanded_as_the_renderers_package_expands_them(family_folder: Folder, name: str) -> None:
    processor = load_processor(family_folder(name))
    messages = conversation(pictures())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        rendered = _renderer(name)(processor.tokenizer, processor=processor).render(
            messages, add_generation_prompt=True
        )
    made = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert [list(rendered.token_ids)] == [list(ids) for ids in made["input_ids"]]


def test_every_template_has_a_public_source() -> None:
    assert {recipe.template_source[0] for recipe in FAMILIES.values()} <= {"packaged", "transcribed"}


def _renderer(name: str) -> Any:
    module, renderer = RENDERERS[name]
    return getattr(import_module(module), renderer)
