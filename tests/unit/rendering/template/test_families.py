"""The template renderer against transformers' own `apply_chat_template`, for the tiny checkpoint of each family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers.utils import chat_template_utils

from support.families import FAMILIES
from support.families.conversations import pictures
from support.template_renderer import REFUSED, WITH_IMAGES, ByTransformers, ids_of, image_positions, template_renderer
from support.tiny_renderer import first, following
from vlmrl.errors import ConfigError
from vlmrl.rendering.renderer import FamilyRenderer
from vlmrl.rendering.template.chat_template import TODAY
from vlmrl.rendering.template.template_format import TemplateFormat
from vlmrl.types import Image, IntArray, Message, extends

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
"""transformers' own processor of GLM-4V."""

TEXT_ONLY = [name for name, recipe in FAMILIES.items() if recipe.image_token is None]

RULES = Message.of("system", "Answer in one word.")
A, B = pictures()
C, D = (picture.resize((picture.height, picture.width + 40)) for picture in pictures(1))

ASKED = [RULES, Message.of("user", "Look: ", Image(A), " and ", Image(B), " which?")]
ANSWER = "The answer is red."
FORKS = {
    "gemma4_vision": "the empty thinking of a prompt is not written before earlier answers",
    "llava": "the token with which a policy ends its answer is not written",
    "pixtral": "the system message moves to the last user message",
    "qwen3_5": "thinking is removed from earlier answers, also the empty one",
    "qwen3_5_moe": "thinking is removed from earlier answers, also the empty one",
}
"""Families whose templates change earlier turns → how."""

MORE = [Message.of("user", Image(C), "next\nline ", Image(D))]

Renderers = Callable[[str], FamilyRenderer]
References = Callable[[str], ByTransformers]


@pytest.fixture(scope="module")
def renderer_of(family_folder: Callable[[str], Path]) -> Renderers:
    return cache(lambda name: template_renderer(family_folder(name), FAMILIES[name].image_token))


@pytest.fixture(scope="module")
def reference_of(family_folder: Callable[[str], Path]) -> References:
    def reference(name: str) -> ByTransformers:
        in_parts = name not in {"glm4v", "pixtral", *TEXT_ONLY}
        return ByTransformers(family_folder(name), has_images=name in WITH_IMAGES, in_parts=in_parts)

    return cache(reference)


@pytest.fixture(autouse=True)
def same_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes the date that the renderer takes."""
    monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: TODAY))


def is_alone(renderer: FamilyRenderer) -> bool:
    """Whether the processor treats an image in another way in the company of others."""
    return any("in the company of others" in sentence for sentence in renderer.surprises)


def around(renderer: FamilyRenderer) -> tuple[str, str]:
    """What a policy samples before and after the text of an answer."""
    assert isinstance(renderer.chat_format, TemplateFormat)
    return renderer.chat_format.turns.sampled_prefix, renderer.chat_format.closing


def answered(renderer: FamilyRenderer, reference: ByTransformers, text: str = ANSWER) -> IntArray:
    """The tokens of a policy that answers as the template writes answers."""
    before, after = around(renderer)
    return np.array(reference.tokenizer.encode(before + text + after, add_special_tokens=False))


@pytest.mark.parametrize("name", WITH_IMAGES)
@pytest.mark.parametrize("conversation", [ASKED, [RULES, Message.of("user", "no image")]])
def test_ids_and_placeholders(
    renderer_of: Renderers, reference_of: References, name: str, conversation: list[Message]
) -> None:
    renderer, reference = renderer_of(name), reference_of(name)
    prompt = first(renderer, conversation)
    theirs = ids_of(reference.inputs(conversation, generate=True, alone=is_alone(renderer)))
    assert prompt.token_ids.tolist() == theirs
    image_token_id = reference.tokenizer.get_vocab()[FAMILIES[name].image_token or ""]
    assert image_positions(prompt).tolist() == [at for at, id in enumerate(theirs) if id == image_token_id]


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_pixels_are_equal_to_the_bit(renderer_of: Renderers, reference_of: References, name: str) -> None:
    renderer = renderer_of(name)
    both = reference_of(name).inputs(ASKED, generate=True, alone=is_alone(renderer))
    images = first(renderer, ASKED).images
    assert {name for image in images for name in image.mm_kwargs} == set(both) - {
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "mm_token_type_ids",
    }
    for kwarg in images[0].mm_kwargs:
        check_same([image.mm_kwargs[kwarg] for image in images], both[kwarg].numpy())


def check_same(alone: Sequence[np.ndarray], both: np.ndarray) -> None:
    """The arrays of single images are those of a batch: one after another, or padded to the same size."""
    for axis in (0, 1):
        tails = {array.shape[:axis] + array.shape[axis + 1 :] for array in alone}
        whole = np.concatenate(alone, axis) if len(tails) == 1 else None
        if whole is not None and whole.shape == both.shape:
            np.testing.assert_array_equal(whole, both)
            return
    if both.shape[0] == 1:  # the images of one conversation
        alone, both = [array[0] for array in alone], both[0]
    for own, batched in zip(alone, both, strict=True):
        np.testing.assert_array_equal(own[0], batched[tuple(slice(size) for size in own.shape[1:])])


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_two_turns_of_two_images(renderer_of: Renderers, reference_of: References, name: str) -> None:
    renderer, reference = renderer_of(name), reference_of(name)
    prompt = first(renderer, ASKED)
    completion = answered(renderer, reference)
    history = [*ASKED, Message.of("assistant", renderer.decode(completion))]
    longer, bridged = following(renderer, prompt, completion, history, MORE)
    assert bridged == (name not in FORKS)
    assert not bridged or extends(longer, prompt, completion)
    written = [*ASKED, Message.of("assistant", ANSWER), *MORE]
    theirs = ids_of(reference.inputs(written, generate=True, alone=is_alone(renderer)))
    # What was sampled stays; the tokens of a text depend on what is before it, so those of the answer may differ.
    sampled = slice(len(prompt.token_ids), len(prompt.token_ids) + len(completion)) if bridged else slice(0, 0)
    added = longer.token_ids[sampled.stop :].tolist()
    assert theirs[-len(added) :] == added
    assert reference.tokenizer.decode(theirs) == reference.tokenizer.decode(longer.token_ids)
    assert [image.pixels.shape[:2] for image in longer.images] == [(p.height, p.width) for p in (A, B, C, D)]


SYSTEM_MESSAGE_GOES_WITH_THE_LAST_QUESTION = {"pixtral"}
"""Families whose template drops the system message of a conversation that ends with an answer; that is refused."""

WITHOUT_AN_END = {"glm4v", "janus", "llava"}
"""Families whose template does not close the last answer of a conversation."""

NEVER_CLOSED = {"llava"}
"""Families whose template does not close any answer."""


@pytest.mark.parametrize("name", [*WITH_IMAGES, *TEXT_ONLY])
def test_the_policy_samples_what_the_template_adds_for_an_answer(
    renderer_of: Renderers, reference_of: References, name: str
) -> None:
    renderer, reference = renderer_of(name), reference_of(name)
    alone = is_alone(renderer)
    shown = ASKED if name in WITH_IMAGES else [RULES, Message.of("user", "which?")]
    shown = shown[name in SYSTEM_MESSAGE_GOES_WITH_THE_LAST_QUESTION :]
    whole = [*shown, Message.of("assistant", ANSWER), Message.of("user", "and?"), Message.of("assistant", "blue")]
    prompt, sampled = renderer.render_conversation(whole)
    stop = renderer.stop_token_ids[0]
    theirs = ids_of(reference.inputs(whole, generate=False, alone=alone))
    ours = prompt.token_ids.tolist()
    assert ours == theirs or (name in WITHOUT_AN_END and ours[-1] == stop and theirs[: len(ours) - 1] == ours[:-1])
    # The last answer: what the template adds to the prompt at which a policy would be asked, up to the stop token.
    asked = ids_of(reference.inputs(whole[:-1], generate=True, alone=alone))
    begin = len(asked) if prompt.token_ids[: len(asked)].tolist() == asked else None
    _, last = renderer.render_conversation(whole, given=len(whole) - 1)
    places = np.flatnonzero(last)
    assert begin is None or places[0] == begin
    assert prompt.token_ids[places[-1]] == stop
    before, after = around(renderer)
    text = str(reference.tokenizer.decode(prompt.token_ids[places]))
    assert text.strip() in (f"{before}blue{after}".strip(), f"blue{after}")
    # The earlier one: from where the conversations with and without it part, to its stop token.
    first_answer = np.flatnonzero(sampled & ~last)
    assert first_answer.tolist() == list(range(first_answer[0], first_answer[-1] + 1))
    assert name in NEVER_CLOSED or prompt.token_ids[first_answer[-1]] == stop
    said = str(reference.tokenizer.decode(prompt.token_ids[first_answer]))
    end = "" if name in NEVER_CLOSED else after
    assert said.strip() in (f"{before}{ANSWER}{end}".strip(), f"{ANSWER}{end}")


def test_a_processor_that_changes_the_text_around_an_image_is_refused(family_folder: Callable[[str], Path]) -> None:
    """Idefics 2 adds a space behind an image, and drops a token between two images."""
    for name in REFUSED:
        with pytest.raises(ConfigError, match="depending on the text next to it"):
            template_renderer(family_folder(name), FAMILIES[name].image_token)


def test_the_mask_is_exact(renderer_of: Renderers, reference_of: References) -> None:
    """The difference of the prompt without and the conversation with the answer, token by token."""
    renderer, reference = renderer_of("qwen2_5_vl"), reference_of("qwen2_5_vl")
    whole = [*ASKED, Message.of("assistant", ANSWER), Message.of("user", "and?"), Message.of("assistant", "blue")]
    prompt, sampled = renderer.render_conversation(whole)
    expected = np.zeros(len(prompt.token_ids), np.bool_)
    for answer in (2, 4):
        begin = len(ids_of(reference.inputs(whole[:answer], generate=True)))
        end = len(ids_of(reference.inputs(whole[: answer + 1], generate=False)))
        expected[begin : end - 1] = True  # the line break after <|im_end|> is not sampled
    assert sampled.tolist() == expected.tolist()
