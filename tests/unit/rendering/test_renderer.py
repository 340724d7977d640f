"""The renderer equals transformers' chat template and image processor, and keeps its contract with rollouts."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from support.tiny_renderer import MODEL, PLACEHOLDER_TOKENS, VOCAB_SIZE, first, following
from vlmrl.config.model import ModelConfig
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.errors import ConfigError
from vlmrl.models.checkpoints.load import load_image_processor, load_tokenizer
from vlmrl.models.families import family_of
from vlmrl.rendering.renderer import ImageError, Renderer, make_renderer, renderer_name
from vlmrl.types import ContractError, Image, ImageItem, IntArray, Message, Prompt, Text, check_placeholders

SIZES = [(32, 32), (64, 32), (32, 96), (100, 45), (200, 70), (9, 3)]
"""Width × height in pixels; the last three are resized."""


class CountingProcessor:
    """The real image processor. Records the thread of each call."""

    def __init__(self, image_processor: Any) -> None:
        self._image_processor = image_processor
        self.merge_size = image_processor.merge_size
        self.threads: list[int] = []

    def __call__(self, **arguments: Any) -> Any:
        self.threads.append(threading.get_ident())
        return self._image_processor(**arguments)


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def conversation(turns: int, images: int, seed: int = 0) -> list[Message]:
    """A system message, then user and assistant messages in turn; the last one is the user's."""
    rng = np.random.default_rng(seed)
    messages = [Message.of("system", "Map the color of each square.")]
    for turn in range(turns):
        if turn:
            messages.append(Message.of("assistant", f"A{turn}B\nC"))
        parts: list[str | Image] = ["Squares:"]
        for i in range(images):
            parts.append(Image(picture(int(rng.integers(1 << 30)), SIZES[(turn + i) % len(SIZES)])))
            parts.append(" and " if i % 2 else "\n")
        messages.append(Message.of("user", *parts))
    return messages


def reference(messages: Sequence[Message], tokenizer: Any, image_processor: Any, prompt: bool) -> tuple[list[int], Any]:
    """Token ids and the processor's output, the way transformers' Qwen3VLProcessor makes them (it itself needs
    torchvision): the chat template's text, each <|image_pad|> repeated, then one tokenization of the whole."""
    chat = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image"}
                for part in message.content
            ],
        }
        for message in messages
    ]
    pixels = [part.source for message in messages for part in message.content if isinstance(part, Image)]
    output = image_processor(images=pixels, return_tensors="np") if pixels else {"image_grid_thw": np.empty((0, 3))}
    pieces = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt).split("<|image_pad|>")
    text = pieces[0]
    for grid, piece in zip(output["image_grid_thw"], pieces[1:], strict=True):
        text += "<|image_pad|>" * (int(grid.prod()) // image_processor.merge_size**2) + piece
    return tokenizer.encode(text, add_special_tokens=False), output


def assert_same_pixels(prompt: Prompt, output: Any) -> None:
    for name in output:
        if prompt.images:
            np.testing.assert_array_equal(
                np.concatenate([image.mm_kwargs[name] for image in prompt.images]), output[name]
            )
        else:
            assert not len(output[name])


def completion(renderer: Renderer, tokenizer: Any, text: str, stop: bool = True) -> IntArray:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return np.array([*ids, renderer.stop_token_ids[0]] if stop else ids, np.int64)


# ── parity ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("images", [0, 1, 2, 3, 4])
def test_a_prompt_is_the_chat_template_and_the_image_processor(
    renderer: Renderer, tokenizer: Any, image_processor: Any, turns: int, images: int
) -> None:
    messages = conversation(turns, images)
    ids, output = reference(messages, tokenizer, image_processor, prompt=True)
    prompt = first(renderer, messages)
    assert prompt.token_ids.tolist() == ids
    assert prompt.token_ids.dtype == np.int64
    assert len(prompt.images) == turns * images
    assert_same_pixels(prompt, output)
    in_placeholders = np.zeros(len(ids), bool)
    for p in prompt.placeholders:
        in_placeholders[p.offset : p.offset + p.length] = True
    np.testing.assert_array_equal(in_placeholders, prompt.token_ids == tokenizer.convert_tokens_to_ids("<|image_pad|>"))


def test_tool_messages_are_the_chat_templates(renderer: Renderer, tokenizer: Any, image_processor: Any) -> None:
    messages = [
        *conversation(1, 1),
        Message.of("assistant", "look it up"),
        Message.of("tool", "first ", Image(picture(5))),
        Message.of("tool", "second"),
        Message.of("user", "well?"),
        Message.of("assistant", "again"),
        Message.of("tool", "third"),
    ]
    ids, output = reference(messages, tokenizer, image_processor, prompt=True)
    prompt = first(renderer, messages)
    assert prompt.token_ids.tolist() == ids
    assert_same_pixels(prompt, output)


@pytest.mark.parametrize("images", [0, 2])
def test_a_conversation_marks_what_the_policy_would_have_sampled(
    renderer: Renderer, tokenizer: Any, image_processor: Any, images: int
) -> None:
    messages = [*conversation(3, images), Message.of("assistant", "the end")]
    ids, output = reference(messages, tokenizer, image_processor, prompt=False)
    prompt, sampled = renderer.render_conversation(messages)
    assert prompt.token_ids.tolist() == ids
    assert_same_pixels(prompt, output)
    assert sampled.dtype == np.bool_
    assert sampled.shape == prompt.token_ids.shape
    assert tokenizer.decode(prompt.token_ids[sampled]) == "A1B\nC<|im_end|>A2B\nC<|im_end|>the end<|im_end|>"


def test_bridging_equals_rendering_the_whole_conversation(
    renderer: Renderer, tokenizer: Any, image_processor: Any
) -> None:
    """If the sampled tokens are the tokenizer's own for that text, bridging and rendering give the same prompt."""
    whole = conversation(3, 2)
    prompt = first(renderer, whole[:2])
    for turn in (1, 2):
        answer = whole[2 * turn]
        ids = completion(renderer, tokenizer, "".join(part.text for part in answer.content if isinstance(part, Text)))
        prompt, bridged = following(renderer, prompt, ids, whole[: 2 * turn + 1], whole[2 * turn + 1 : 2 * turn + 2])
        assert bridged
        expected, output = reference(whole[: 2 * turn + 2], tokenizer, image_processor, prompt=True)
        assert prompt.token_ids.tolist() == expected
        assert_same_pixels(prompt, output)
        rendered = first(renderer, whole[: 2 * turn + 2])
        assert prompt.placeholders == rendered.placeholders
        assert prompt.images == rendered.images


# ── later turns ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stop", [True, False], ids=["stopped", "cut by its budget"])
def test_a_bridge_keeps_what_was_sampled_token_for_token(renderer: Renderer, tokenizer: Any, stop: bool) -> None:
    messages = conversation(1, 2)
    previous = first(renderer, messages)
    # The same text in other tokens than the tokenizer's own: a full render would change them.
    ids = [tokenizer.convert_tokens_to_ids(letter) for letter in "Squares"]
    assert tokenizer.encode("Squares", add_special_tokens=False) != ids
    sampled = np.array([*ids, renderer.stop_token_ids[0]] if stop else ids, np.int64)
    new = [Message.of("user", "Squares:", Image(picture(7, (64, 64))))]
    prompt, bridged = following(renderer, previous, sampled, [*messages, Message.of("assistant", "Squares")], new)
    assert bridged
    before = [*previous.token_ids, *sampled]
    assert prompt.token_ids[: len(before)].tolist() == before
    assert prompt.placeholders[:2] == previous.placeholders
    assert prompt.images[:2] == previous.mm_items
    assert [p.length for p in prompt.placeholders] == [1, 2, 4]
    added = tokenizer.decode(prompt.token_ids[len(before) :])
    expected = "\n<|im_start|>user\nSquares:<|vision_start|>" + 4 * "<|image_pad|>"
    expected += "<|vision_end|><|im_end|>\n<|im_start|>assistant\n"
    assert added == (expected if stop else "<|im_end|>" + expected)


def test_a_turn_that_cannot_be_extended_is_rendered_again(
    renderer: Renderer, tokenizer: Any, image_processor: Any
) -> None:
    """In this grammar, reasoning that was cut before its end tag cannot be continued."""
    messages = conversation(1, 2)
    previous = first(renderer, messages)
    ids = completion(renderer, tokenizer, "<think>hm")
    history = [*messages, Message.of("assistant", renderer.decode(ids))]
    new = [Message.of("user", "Squares:", Image(picture(7)))]
    prompt, bridged = following(renderer, previous, ids, history, new)
    assert not bridged
    expected, output = reference([*history, *new], tokenizer, image_processor, prompt=True)
    assert prompt.token_ids.tolist() == expected
    assert_same_pixels(prompt, output)


def test_new_assistant_messages_are_rendered_again(renderer: Renderer, tokenizer: Any) -> None:
    messages = conversation(1, 1)
    new = [Message.of("user", "a"), Message.of("assistant", "b"), Message.of("user", "c")]
    history = [*messages, Message.of("assistant", "A")]
    prompt, bridged = following(renderer, first(renderer, messages), completion(renderer, tokenizer, "A"), history, new)
    assert not bridged
    assert prompt.token_ids.tolist() == first(renderer, [*history, *new]).token_ids.tolist()


def test_a_sampled_image_token_is_not_a_placeholder(renderer: Renderer, tokenizer: Any) -> None:
    """Image tokens are banned. If one is sampled all the same, the sample is dropped; the renderer does not fail."""
    messages = conversation(1, 1)
    (stray,) = [id for id in renderer.image_token_ids if tokenizer.convert_ids_to_tokens(id) == "<|image_pad|>"]
    ids = np.array([stray, renderer.stop_token_ids[0]], np.int64)
    previous = first(renderer, messages)
    prompt, bridged = following(renderer, previous, ids, messages, [Message.of("user", Image(picture(3)))])
    assert bridged
    assert len(prompt.placeholders) == 2
    assert prompt.placeholders[1].offset > len(previous.token_ids) + 2


# ── memo ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_siblings_share_renders_and_images(tokenizer: Any, image_processor: Any) -> None:
    counting = CountingProcessor(image_processor)
    renderer = make_renderer(RendererConfig(), MODEL, tokenizer, counting, VOCAB_SIZE, PLACEHOLDER_TOKENS)

    async def sibling() -> tuple[Prompt, Prompt]:
        messages = conversation(1, 3)  # new parts and new pictures, equal pixels
        prompt = await renderer.first_turn(messages)
        ids = completion(renderer, tokenizer, "AB")
        new = [Message.of("user", Image(picture(4)), Image(picture(4)))]
        return prompt, (await renderer.next_turn(prompt, ids, [*messages, Message.of("assistant", "AB")], new))[0]

    async def group() -> list[tuple[Prompt, Prompt]]:
        return list(await asyncio.gather(*(sibling() for _ in range(16))))

    pairs = asyncio.run(group())
    for prompts in zip(*pairs, strict=True):
        assert len({prompt.token_ids.tobytes() for prompt in prompts}) == 1
        assert len({prompt.placeholders for prompt in prompts}) == 1
        assert all(a is b for prompt in prompts for a, b in zip(prompt.images, prompts[0].images, strict=True))
    second = pairs[0][1]
    assert second.images[3] is second.images[4], "the same image twice is the same item twice"
    assert second.placeholders[3].offset != second.placeholders[4].offset
    assert len(counting.threads) == 4
    assert threading.get_ident() not in counting.threads


def test_equal_token_ids_with_other_images_are_other_prompts(renderer: Renderer, tokenizer: Any) -> None:
    """Two squares of one size differ only in their pixels; the memo must tell them apart."""
    ids = completion(renderer, tokenizer, "A")
    new = [Message.of("user", Image(picture(9)))]
    seen = []
    for seed in (1, 2):
        messages = [Message.of("user", Image(picture(seed)))]
        prompt = first(renderer, messages)
        longer, _ = following(renderer, prompt, ids, messages, new)
        assert longer.images[0] is prompt.images[0]
        seen.append((prompt, longer))
    (prompt_a, longer_a), (prompt_b, longer_b) = seen
    np.testing.assert_array_equal(longer_a.token_ids, longer_b.token_ids)
    assert prompt_a.images[0] is not prompt_b.images[0]
    assert longer_a.placeholders[0].hash != longer_b.placeholders[0].hash


def test_a_memoized_render_is_read_only_and_repeats_itself(renderer: Renderer, tokenizer: Any) -> None:
    messages = conversation(2, 2)
    ids = completion(renderer, tokenizer, "AB")
    new = [Message.of("user", "more", Image(picture(8)))]
    prompt = first(renderer, messages)
    longer, _ = following(renderer, prompt, ids, messages, new)
    before = prompt.token_ids.tolist(), longer.token_ids.tolist()
    with pytest.raises(ValueError, match="read-only"):
        prompt.token_ids[0] = 0
    longer.token_ids[:] = 0  # its own array, which a caller may change
    again = first(renderer, messages)
    assert again.token_ids.tolist() == before[0]
    assert following(renderer, again, ids, messages, new)[0].token_ids.tolist() == before[1]


def test_where_a_message_ends_matters_to_the_memo(renderer: Renderer) -> None:
    one = first(renderer, [Message.of("user", "ab")])
    assert first(renderer, [Message.of("user", "a", "b")]).token_ids.tolist() == one.token_ids.tolist()
    assert (
        first(renderer, [Message.of("user", "a"), Message.of("user", "b")]).token_ids.tolist() != one.token_ids.tolist()
    )
    assert first(renderer, [Message.of("system", "ab")]).token_ids.tolist() != one.token_ids.tolist()


def test_a_text_that_spells_a_hash_is_not_that_image(renderer: Renderer) -> None:
    image = Image(picture(1))
    shown = first(renderer, [Message.of("user", image)])
    spelled = first(renderer, [Message.of("user", shown.images[0].hash)])
    assert spelled.images == ()
    assert len(shown.images) == 1


# ── tokens that may be sampled ──────────────────────────────────────────────────────────────────────────────


def test_banned_and_stop_tokens(renderer: Renderer, tokenizer: Any) -> None:
    assert [tokenizer.convert_ids_to_tokens(id) for id in renderer.stop_token_ids] == ["<|im_end|>"]
    banned = set(renderer.banned_token_ids)
    assert len(banned) == len(renderer.banned_token_ids)
    assert banned.isdisjoint(renderer.stop_token_ids)
    names = {tokenizer.convert_ids_to_tokens(id) for id in banned if id < len(tokenizer)}
    assert names == set(tokenizer.all_special_tokens) - {"<|im_end|>"}
    assert {id for id in banned if id >= len(tokenizer)} == set(range(len(tokenizer), VOCAB_SIZE))
    assert renderer.image_token_ids <= banned
    assert {tokenizer.convert_ids_to_tokens(id) for id in renderer.image_token_ids} == {
        "<|image_pad|>",
        "<|video_pad|>",
    }
    for letter in "ABCDEFGHI":
        assert tokenizer.convert_tokens_to_ids(letter) not in banned


@pytest.mark.parametrize("text", ["AC", " AC ", "A\n\nC", "<think>red</think> A", "<tool_call>\nx", "é漢"])
def test_decode_is_what_the_policy_wrote(renderer: Renderer, tokenizer: Any, text: str) -> None:
    assert renderer.decode(completion(renderer, tokenizer, text)) == text
    assert renderer.decode(completion(renderer, tokenizer, text, stop=False)) == text


# ── faults ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("source", [b"no image", PILImage.new("RGB", (300, 1)), "/no/such/file.png"])
def test_a_broken_image_is_an_image_error_everywhere(renderer: Renderer, tokenizer: Any, source: Any) -> None:
    good, broken = conversation(1, 1), [Message.of("user", Image(source))]
    prompt = first(renderer, good)
    with pytest.raises(ImageError):
        first(renderer, broken)
    with pytest.raises(ImageError):
        following(renderer, prompt, completion(renderer, tokenizer, "A"), good, broken)
    with pytest.raises(ImageError):
        renderer.render_conversation(broken)
    assert first(renderer, good).token_ids.tolist() == prompt.token_ids.tolist()


def test_an_image_that_the_chat_format_drops_is_not_dropped_silently(renderer: Renderer) -> None:
    with pytest.raises(ContractError, match="1 images went into the renderer and 0 came out"):
        first(renderer, [Message.of("system", "See: ", Image(picture(1))), Message.of("user", "?")])


@pytest.mark.parametrize("messages", [[Message.of("user", "<|image_pad|>")], [Message.of("user", "?<|video_pad|>")]])
def test_text_that_spells_an_image_token_is_a_contract_error(
    renderer: Renderer, tokenizer: Any, messages: list[Message]
) -> None:
    with pytest.raises(ContractError, match="1 image tokens but 0 placeholder positions"):
        first(renderer, messages)
    good = conversation(1, 1)
    with pytest.raises(ContractError, match="1 image tokens but 0 placeholder positions"):
        following(renderer, first(renderer, good), completion(renderer, tokenizer, "A"), good, messages)


# ── other renderers ─────────────────────────────────────────────────────────────────────────────────────────


def test_names() -> None:
    assert renderer_name(RendererConfig(), MODEL) == "qwen3-vl"
    assert renderer_name(RendererConfig(name="qwen3-vl"), MODEL) == "qwen3-vl"
    text_only = ModelConfig(name="some/text-model", vlm=None)
    assert renderer_name(RendererConfig(name="qwen3"), text_only) == "qwen3"


def test_a_text_only_model_takes_the_same_path(tokenizer: Any) -> None:
    config = ModelConfig(name="some/text-model", vlm=None)
    renderer = make_renderer(RendererConfig(name="qwen3"), config, tokenizer, None, VOCAB_SIZE, PLACEHOLDER_TOKENS)
    messages = [Message.of("system", "Be brief."), Message.of("user", "A", " or B?")]
    prompt = first(renderer, messages)
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nA or B?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompt.token_ids) == text
    assert renderer.image_token_ids == frozenset()
    assert [tokenizer.convert_ids_to_tokens(id) for id in renderer.stop_token_ids] == ["<|im_end|>"]
    whole, sampled = renderer.render_conversation([*messages, Message.of("assistant", "A")])
    assert tokenizer.decode(whole.token_ids[sampled]).endswith("A<|im_end|>")
    with pytest.raises(ImageError, match="text-only"):
        first(renderer, [Message.of("user", Image(picture(1)))])


def test_every_token_of_a_text_has_a_row_in_the_embedding(tokenizer: Any, image_processor: Any) -> None:
    with pytest.raises(ConfigError, match=r"the token .* with the id 40, and the model's embedding has 40 rows"):
        make_renderer(RendererConfig(), MODEL, tokenizer, image_processor, 40, PLACEHOLDER_TOKENS)


def test_a_renderer_from_a_folder_of_the_users_own(folder: Path, tmp_path: Path) -> None:
    """Nothing depends on the name or the path of the checkpoint."""
    own = Path(shutil.copytree(folder, tmp_path / "My Model"))
    tokenizer, processor = load_tokenizer(own), load_image_processor(own)
    renderer = make_renderer(RendererConfig(), MODEL, tokenizer, processor, VOCAB_SIZE, PLACEHOLDER_TOKENS)
    prompt = first(renderer, conversation(2, 2))
    check_placeholders(len(prompt.token_ids), prompt.placeholders, prompt.mm_items)
    assert len(prompt.images) == 4


@pytest.mark.parametrize(("width", "height"), [(64, 32), (33, 70), (500, 300)])
def test_the_size_of_a_processed_image(tokenizer: Any, image_processor: Any, width: int, height: int) -> None:
    """It has as many pixels as the patches that the processor made, in the proportions of the original."""
    family = family_of(MODEL.vlm)
    renderer = make_renderer(
        RendererConfig(),
        MODEL,
        tokenizer,
        image_processor,
        VOCAB_SIZE,
        family.placeholder_tokens,
        family.processed_size,
    )
    (item,) = renderer.items([Image(np.zeros((height, width, 3), np.uint8))])
    assert item.processed_size is not None
    patches = len(item.mm_kwargs["pixel_values"])
    assert item.processed_size[0] * item.processed_size[1] == patches * image_processor.patch_size**2
    assert (item.processed_size[0] > item.processed_size[1]) == (width > height)
    assert isinstance(item, ImageItem)
    assert item.pixels.shape[:2] == (height, width)
