"""The policy computes what transformers' own forward computes, for the tiny checkpoints of all families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL.Image import fromarray
from torch import Tensor
from transformers import AutoModelForImageTextToText

from support.families import FAMILIES
from support.families.loading import load_processor
from support.families.prompts import prompt_and_batch
from vlmrl.models.attention.plan import plan_tree
from vlmrl.models.attention.prefix_tree import Segment, image_ends
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy
from vlmrl.models.vision_encoder import alike, image_parameters
from vlmrl.types import ImageItem, Prompt, mm_token_type_ids

Folder = Callable[[str], Path]

OTHER_PLACES = {"ovis2"}
"""Ovis 2 also replaces the tokens around an image, which features in place of image tokens cannot do."""

COMPUTED = [
    name
    for name, recipe in FAMILIES.items()
    if recipe.image_token and not recipe.needs_torchvision and name not in OTHER_PLACES
]


def load(folder: Path) -> Any:
    auto: Any = AutoModelForImageTextToText
    return auto.from_pretrained(folder).eval()


def policy_of(model: Any) -> Policy:
    merge = getattr(model.config.vision_config, "spatial_merge_size", 1)
    kind = "mrope" if hasattr(model.base_model, "get_rope_index") else "sequential"
    return Policy(model, position_function(kind, merge), [])


def logprobs(policy: Policy, prompt: Prompt) -> Tensor:
    """float32 [tokens, vocabulary] of the whole prompt as one sequence."""
    length = len(prompt.token_ids)
    rows_of_prompt, types = np.arange(length), mm_token_type_ids(length, prompt.placeholders)
    segment = Segment(-1, rows_of_prompt, rows_of_prompt, image_ends(types))
    features = policy.encode_items(prompt.images)
    assert features is not None
    rows = [np.arange(features.first[i.hash], features.first[i.hash] + i.num_tokens) for i in prompt.images]
    hidden = policy.hidden_states(
        torch.from_numpy(prompt.token_ids),
        torch.from_numpy(policy.positions(length, prompt.placeholders, prompt.mm_items)),
        torch.from_numpy(types),
        plan_tree([segment], torch.device("cpu"), policy.rules),
        features,
        torch.from_numpy(np.concatenate(rows)),
    )
    return policy.log_probs(hidden, 1.0)


@pytest.mark.parametrize("name", COMPUTED)
def test_logprobs_are_those_of_transformers(family_folder: Folder, name: str) -> None:
    """Two images of different sizes; each is processed alone, and both are encoded at once."""
    model = load(family_folder(name))
    prompt, batch = prompt_and_batch(name, load_processor(family_folder(name)), model.config.image_token_id)
    with torch.no_grad():
        theirs = model(**batch).logits[0].float().log_softmax(-1)
        ours = logprobs(policy_of(load(family_folder(name))), prompt)
    # Rounding: 5.8e-5 was seen, on one of two processors. In float64 Qwen3.5 is within 1e-8 (test_recurrent.py).
    assert float((ours - theirs).abs().max()) < 1e-4
    assert float((ours - theirs).abs().mean()) < 2e-6


@pytest.mark.parametrize("name", COMPUTED)
def test_the_gradient_reaches_what_makes_the_features(family_folder: Folder, name: str) -> None:
    model = load(family_folder(name))
    prompt, _ = prompt_and_batch(name, load_processor(family_folder(name)), model.config.image_token_id)
    ours = logprobs(policy_of(model), prompt)
    chosen = ours[torch.arange(len(prompt.token_ids) - 1), torch.from_numpy(prompt.token_ids[1:])]
    chosen.sum().backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in image_parameters(model)]
    assert any(gradient is not None and bool(gradient.any()) for gradient in gradients)
    tower = model.get_encoder(modality="image")
    of_tower = {id(parameter) for parameter in tower.parameters()}
    assert {id(parameter) for parameter in image_parameters(model)} >= of_tower


def test_pictures_of_two_sizes_are_encoded_one_after_the_other(family_folder: Folder) -> None:
    """Padding one of them to the other's size, as the processor does for a batch, would be another picture."""
    model = load(family_folder("mistral3"))
    prompt, _ = prompt_and_batch("mistral3", load_processor(family_folder("mistral3")), model.config.image_token_id)
    assert alike(prompt.images) == [[0], [1]]
    assert alike([prompt.images[0], prompt.images[1], prompt.images[0]]) == [[0, 2], [1]]


def test_an_image_of_one_token(family_folder: Folder) -> None:
    """transformers drops the first dimension of Mistral 3's features where it is 1."""
    model = load(family_folder("mistral3"))
    processor = load_processor(family_folder("mistral3"))
    (small,) = (fromarray(np.full((8, 8, 3), 200, np.uint8)),)
    outputs = processor(text=[processor.image_token], images=[small], return_tensors="np")
    kwargs = {name: outputs[name] for name in ("pixel_values", "image_sizes")}
    tokens = int((outputs["input_ids"] == model.config.image_token_id).sum())
    assert tokens == 1
    features = policy_of(model).encode_items([ImageItem("a", np.zeros((8, 8, 3), np.uint8), kwargs, tokens)])
    assert features is not None
    assert features.levels[0].shape == (1, model.config.text_config.hidden_size)
