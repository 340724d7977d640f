"""The tiny checkpoints of model families are what they say."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from support.families import FAMILIES, build
from support.families.conversations import pictures, processed
from support.families.loading import load_processor
from support.families.vocabulary import trained
from vlmrl.models.checkpoints.load import load_tokenizer

Folder = Callable[[str], Path]

WITH_IMAGES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            recipe.needs_torchvision and find_spec("torchvision") is None,
            reason="its image processor needs torchvision",
        ),
    )
    for name, recipe in FAMILIES.items()
    if recipe.image_token is not None
]

SAME_IMAGE_TOKEN = [
    {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"},
    {"llava", "llava_next", "llava_onevision", "idefics2", "idefics3", "smolvlm", "lfm2_vl"},
    {"gemma4", "gemma4_vision", "glm4v"},
    {"mistral3", "pixtral"},
]
"""Families that really spell it the same."""

SAME_TEMPLATE = [{"qwen3_vl", "qwen3_vl_moe"}, {"qwen3_5", "qwen3_5_moe"}]
"""Sizes of one series, with one chat format."""


@pytest.fixture(scope="module")
def inputs(family_folder: Folder) -> Callable[..., Any]:
    """`inputs("gemma3", images)`: the processor's outputs for the conversation."""
    return lambda name, images: processed(load_processor(family_folder(name)), images)


@pytest.fixture(scope="module")
def model_of(family_folder: Folder) -> Callable[[str], Any]:
    loaded: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in loaded:
            from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

            auto: Any = AutoModelForImageTextToText if FAMILIES[name].image_token else AutoModelForCausalLM
            loaded[name], info = auto.from_pretrained(family_folder(name), output_loading_info=True)
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
        return loaded[name].eval()

    return load


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tokenizer_that_transformers_loads_is_the_one_in_the_folder(family_folder: Folder, name: str) -> None:
    text = "Hello  world\n\n\n\nthe square é 🎉 1234 A" + "".join(FAMILIES[name].vocabulary.special)
    written = Tokenizer.from_file(str(family_folder(name) / "tokenizer.json"))
    loaded = load_tokenizer(family_folder(name))
    ids = written.encode(text, add_special_tokens=False).ids
    assert loaded.encode(text, add_special_tokens=False) == ids
    assert loaded.decode(ids) == text


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_is_tiny(model_of: Callable[[str], Any], name: str) -> None:
    assert 50_000 < sum(parameter.numel() for parameter in model_of(name).parameters()) < 1_000_000


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_image_tokens_are_as_many_as_features(
    inputs: Callable[..., Any], model_of: Callable[[str], Any], name: str
) -> None:
    batch, model = inputs(name, pictures()), model_of(name)
    tokens = int((batch["input_ids"] == _image_token_id(model)).sum())
    vision = {key: value for key, value in batch.items() if key not in {"input_ids", "attention_mask"}}
    with torch.no_grad():
        features = model.model.get_image_features(**vision, return_dict=True).pooler_output
    rows = sum(len(part) for part in features) if isinstance(features, list | tuple) else _rows(features)
    assert rows == tokens > 0


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_logprobs_depend_on_the_pixels(inputs: Callable[..., Any], model_of: Callable[[str], Any], name: str) -> None:
    model = model_of(name)
    seen, other = inputs(name, pictures(0)), inputs(name, pictures(1))
    apart = (_logprobs(model, seen) - _logprobs(model, other)).abs()
    first = int((seen["input_ids"][0] == _image_token_id(model)).nonzero()[0])
    assert float(apart[first:].mean()) > 0.1
    assert float(apart.max()) > 0.5


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_the_order_of_two_images_matters(inputs: Callable[..., Any], model_of: Callable[[str], Any], name: str) -> None:
    model = model_of(name)
    images = [picture.resize((96, 96)) for picture in pictures()]
    apart = (_logprobs(model, inputs(name, images)) - _logprobs(model, inputs(name, images[::-1]))).abs()
    assert float(apart.max()) > 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_seed_writes_the_same_bytes(family_folder: Folder, tmp_path: Path, name: str) -> None:
    first, second = _bytes(family_folder(name)), _bytes(build(name, tmp_path / name))
    assert first == second
    other = _bytes(build(name, tmp_path / "other", seed=1))
    assert {file for file in first if first[file] != other[file]} == {"model.safetensors"}


def test_no_family_uses_what_belongs_to_another(family_folder: Folder) -> None:
    for pair in combinations(FAMILIES, 2):
        assert _differ(*(family_folder(name) / "tokenizer.json" for name in pair))
        same = any(set(pair) <= group for group in SAME_TEMPLATE)
        assert _differ(*(family_folder(name) / "chat_template.jinja" for name in pair)) != same, pair
        tokens = {FAMILIES[name].image_token for name in pair}
        assert len(tokens) == 2 or tokens == {None} or any(set(pair) <= group for group in SAME_IMAGE_TOKEN), pair


def _image_token_id(model: Any) -> int:
    return int(model.config.image_token_id)


def _rows(features: Tensor) -> int:
    return features.flatten(0, -2).shape[0]


def _logprobs(model: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        logprobs: Tensor = model(**batch).logits[0].log_softmax(-1)
    return logprobs


def _differ(file: Path, other: Path) -> bool:
    return file.read_bytes() != other.read_bytes()


def _bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen3_5"])
def test_a_vocabulary_that_has_seen_a_text_needs_few_tokens_for_it(name: str) -> None:
    text = "Reply with all letters so far, in order."
    before, after = (trained(FAMILIES[name].vocabulary, name, texts) for texts in ((), (text,)))
    assert 2 * len(after.encode(text).ids) < len(before.encode(text).ids)
    assert after.decode(after.encode(text).ids) == text
