"""The renderer: the only part that turns messages into token ids, and images into pixels and placeholders.

    first turn    messages ───────────────────────────▶ Prompt          rendered
    later turns   Prompt + completion + new messages ─▶ longer Prompt   bridged: the old tokens, extended by new ones
                  … where that is impossible ─────────▶ another Prompt  rendered again: a new branch

The `renderers` package knows the token grammar of each model family. The modules here add what a trainer needs:

    images.py           the pixels of an image, however it is handed in, and a named error for what is wrong with it
    image_store.py      each distinct image decoded, hashed and processed once, off the event loop
    messages.py         our messages ↔ the package's, with stand-ins in place of images
    processors.py       the image processors: the real one, and the one that answers for stand-ins
    memo_tokenizer.py   tokens of recent pieces of text
    renderer.py         memoized renders (sibling rollouts share prompts), the contract between tokens and pixels
                        asserted on every prompt, and the tokens that may not be sampled

Left out on purpose: tool specifications and tool calls as structure (they are text here), video.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Hashable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from vlmrl.caches.lru import ByteLRU
from vlmrl.config.model import ModelConfig
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.errors import ConfigError, UserFault, safe_repr
from vlmrl.rendering.image_store import ImageStore
from vlmrl.rendering.images import ImageError
from vlmrl.rendering.memo_tokenizer import MemoTokenizer
from vlmrl.rendering.messages import content_key, images_of, images_to_package, to_package
from vlmrl.rendering.processors import PlaceholderTokens, ProcessImage, StandInProcessor
from vlmrl.types import (
    BoolArray,
    ContractError,
    Image,
    ImageItem,
    IntArray,
    Message,
    Placeholder,
    Prompt,
    check_placeholders,
    extends,
)

__all__ = ["FamilyRenderer", "ImageError", "Renderer", "make_renderer", "renderer_name"]

MEMO_BYTES = 64 << 20
"""Renders, and as many bytes of bridges, that are kept for the sibling rollouts of a few steps. Tokens only."""


class Renderer(Protocol):
    """Messages to tokens and pixels, and completions back to text."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """A completion ends when one of these is sampled."""
        ...

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        """Tokens that must never be sampled: every special token except the end of turn, and ids that the tokenizer
        does not know."""
        ...

    @property
    def image_token_ids(self) -> frozenset[int]:
        """Placeholder tokens. A sample in which the policy sampled one is unusable."""
        ...

    async def first_turn(self, messages: Sequence[Message]) -> Prompt:
        """The prompt of a conversation. Raises `ImageError` and `ContractError`."""
        ...

    async def next_turn(
        self,
        previous: Prompt,
        completion_ids: IntArray,
        history: Sequence[Message],
        new_messages: Sequence[Message],
    ) -> tuple[Prompt, bool]:
        """The prompt after a completion. `history` is everything before `new_messages`, assistant texts included.

        True: bridged, that is, the prompt begins with `previous` and `completion_ids` (int64 [C]). False: the whole
        conversation was rendered again and a new branch begins. Raises `ImageError` and `ContractError`.
        """
        ...

    def images(self, parts: Sequence[Image]) -> tuple[ImageItem, ...]:
        """The processed images, one per part, as prompts hold them. Blocks while new ones are processed. Raises
        `ImageError`."""
        ...

    def decode(self, completion_ids: IntArray) -> str:
        """The text of a completion, without special tokens."""
        ...

    def render_conversation(self, messages: Sequence[Message], given: int = 0) -> tuple[Prompt, BoolArray]:
        """A whole conversation with assistant turns, and bool [P]: True on tokens that a policy would have sampled, in
        messages after the first `given` ones.

        Blocks while new images are processed. Raises `ImageError`, `ContractError`, and `UserFault` where one of these
        tokens can never be sampled.
        """
        ...


def renderer_name(config: RendererConfig, model: ModelConfig) -> str:
    """The renderer's name in the `renderers` package; `auto` is the first of `model.vlm.renderers`.

    `preflight` has refused `auto` for a model that lists no renderer, and a renderer that does not serve the family.
    """
    if config.name != "auto":
        return config.name
    assert model.vlm is not None, "preflight refuses orchestrator.renderer.name=auto without model.vlm"
    return model.vlm.renderers[0]


def make_renderer(
    config: RendererConfig,
    model: ModelConfig,
    tokenizer: Any,
    image_processor: Any,
    vocab_size: int,
    placeholder_tokens: PlaceholderTokens,
) -> Renderer:
    """The renderer of a model.

    `vocab_size` is the size of the model's embedding, which may exceed the tokenizer's. `image_processor` is None for a
    text-only model. `placeholder_tokens` is the family's (`family_of(model.vlm).placeholder_tokens`). `preflight` has
    refused names that the package does not have.
    """
    name = renderer_name(config, model)
    return FamilyRenderer(name, tokenizer, image_processor, vocab_size, placeholder_tokens)


class FamilyRenderer:
    """`Renderer` on the `renderers` package. The event loop and other threads may use it at the same time."""

    def __init__(
        self, name: str, tokenizer: Any, image_processor: Any, vocab_size: int, placeholder_tokens: PlaceholderTokens
    ) -> None:
        import renderers

        config: Any = renderers.config_from_name(name)
        if hasattr(config, "image_cache_max"):
            # The package would keep hundreds of processed images alive; the ImageStore already holds them.
            config = config.model_copy(update={"image_cache_max": 1})
        memo_tokenizer = MemoTokenizer(tokenizer)
        self._package: Any = renderers.create_renderer(memo_tokenizer, config)
        self._multimodal = renderers.is_multimodal(self._package)
        self._images = ImageStore(ProcessImage(image_processor, placeholder_tokens))
        if self._multimodal:
            stand_in = StandInProcessor(image_processor, self._images)
            self._package = type(self._package)(memo_tokenizer, config, processor=stand_in)
        self._name = name
        self._tokenizer = memo_tokenizer
        self._lock = threading.Lock()
        self._renders: ByteLRU[Hashable, _Skeleton] = ByteLRU(MEMO_BYTES)
        self._bridges: ByteLRU[Hashable, _Skeleton | None] = ByteLRU(MEMO_BYTES)

        # The package's first stop token closes a turn in the family's grammar. The others end a document: ban them.
        stop_ids: list[int] = self._package.get_stop_token_ids()
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        special.update(tokenizer.all_special_ids)
        unknown = set(range(vocab_size)).difference(tokenizer.get_vocab().values())
        banned = (special | unknown) - {stop_ids[0]}
        self._banned = tuple(sorted(banned))
        self._stop = tuple(id for id in stop_ids if id not in banned)
        self._image_tokens = frozenset(self._package.mm_token_type_id_map if self._multimodal else ())

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return self._stop

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        return self._banned

    @property
    def image_token_ids(self) -> frozenset[int]:
        return self._image_tokens

    async def first_turn(self, messages: Sequence[Message]) -> Prompt:
        return self._render(messages, await self._images.items_async(images_of(messages)))

    async def next_turn(
        self,
        previous: Prompt,
        completion_ids: IntArray,
        history: Sequence[Message],
        new_messages: Sequence[Message],
    ) -> tuple[Prompt, bool]:
        new_items = await self._images.items_async(images_of(new_messages))
        bridged = self._bridge(previous, completion_ids, new_messages, new_items)
        if bridged is not None:
            return bridged, True
        messages = [*history, *new_messages]
        return self._render(messages, await self._images.items_async(images_of(messages))), False

    def images(self, parts: Sequence[Image]) -> tuple[ImageItem, ...]:
        return self._images.items(parts)

    def decode(self, completion_ids: IntArray) -> str:
        # Not the package's parse_response: it strips white space and removes reasoning and tool calls, but a task must
        # be able to score everything that the policy wrote.
        return self._tokenizer.text(tuple(completion_ids.tolist()))

    def render_conversation(self, messages: Sequence[Message], given: int = 0) -> tuple[Prompt, BoolArray]:
        items = self._images.items(images_of(messages))
        with self._lock:
            rendered = self._package.render(to_package(messages, items))
        if len(rendered.sampled_mask) != len(rendered.token_ids):
            raise ConfigError(
                f"orchestrator.renderer.name={self._name} does not report which tokens a policy samples, so supervised "
                "steps would have no loss tokens: set trainer.warmup.steps=0, or choose another renderer"
            )
        token_ids, placeholders = self._skeleton(rendered, items)
        message_of = np.array(rendered.message_indices)
        sampled = np.array(rendered.sampled_mask, np.bool_) & (message_of >= given)
        self._check_sampled(token_ids, sampled, message_of)
        return _prompt(token_ids, placeholders, items), sampled

    def _check_sampled(self, token_ids: IntArray, sampled: BoolArray, message_of: IntArray) -> None:
        """Refuse an answer with a token that is never sampled, whose logprob is −inf, or with an early end of turn."""
        banned = sampled & np.isin(token_ids, self._banned)
        goes_on = np.append((message_of[1:] == message_of[:-1]) & sampled[1:], False)
        wrong = np.flatnonzero(banned | (sampled & goes_on & np.isin(token_ids, self._stop)))
        if len(wrong):
            token = self._tokenizer.decode([int(token_ids[wrong[0]])])
            raise UserFault(
                f"an assistant message contains the special token {safe_repr(token)}, which a policy cannot sample "
                "inside an answer, so it cannot be learned: remove it from the text"
            )

    def _render(self, messages: Sequence[Message], items: tuple[ImageItem, ...]) -> Prompt:
        def render() -> _Skeleton:
            with self._lock:
                rendered = self._package.render(to_package(messages, items), add_generation_prompt=True)
            return self._skeleton(rendered, items)

        token_ids, placeholders = self._renders.get_or_make(content_key(messages, items), render, _num_bytes)
        return _prompt(token_ids, placeholders, items)

    def _bridge(
        self,
        previous: Prompt,
        completion_ids: IntArray,
        new_messages: Sequence[Message],
        new_items: tuple[ImageItem, ...],
    ) -> Prompt | None:
        """The prompt that extends `previous` and the completion; None where the family's grammar does not allow one.

        The memo holds only what comes after the completion: two prompts with equal token ids may show different images.
        """
        sampled = np.concatenate([previous.token_ids, completion_ids])

        def bridge() -> _Skeleton | None:
            extra = {"previous_multi_modal_data": images_to_package(previous)} if self._multimodal else {}
            with self._lock:
                rendered = self._package.bridge_to_next_turn(
                    previous.token_ids.tolist(), completion_ids.tolist(), to_package(new_messages, new_items), **extra
                )
            if rendered is None or rendered.token_ids[: len(sampled)] != sampled.tolist():
                return None  # the family's grammar cuts or rewrites the sampled tokens
            images = previous.images + new_items
            token_ids, placeholders = self._skeleton(rendered, images, begin=len(sampled))
            if not extends(Prompt(token_ids, placeholders, images), previous, completion_ids):
                raise ContractError("a bridge moved the placeholders of the turns before it")
            return token_ids[len(sampled) :], placeholders[len(previous.placeholders) :]

        digest = hashlib.blake2b(sampled.tobytes(), digest_size=16).digest()
        key = (digest, len(completion_ids), content_key(new_messages, new_items))
        added = self._bridges.get_or_make(key, bridge, _num_bytes)
        if added is None:
            return None
        new_ids, new_placeholders = added
        token_ids = np.concatenate([sampled, new_ids])
        return _prompt(token_ids, previous.placeholders + new_placeholders, previous.images + new_items)

    def _skeleton(self, rendered: Any, items: tuple[ImageItem, ...], begin: int = 0) -> _Skeleton:
        """Token ids and placeholders of a render.

        Raises `ContractError` unless the images that came back are those that went in, in the same order, and, from
        token `begin` on (where the package wrote), image tokens stand in placeholders only.
        """
        data = rendered.multi_modal_data
        ranges = data.mm_placeholders.get("image", []) if data else []
        outputs = data.mm_items.get("image", []) if data else []
        if not len(ranges) == len(outputs) == len(items):
            raise ContractError(
                f"{len(items)} images went into the renderer and {len(ranges)} came out: check whether the family's "
                "chat format allows images in messages of that role"
            )
        for item, output in zip(items, outputs, strict=True):
            if any(output[name] is not item.mm_kwargs[name] for name in output):
                raise ContractError(f"the renderer put other pixels where image {item.hash} belongs")
        image_tokens = sum(id in self._image_tokens for id in rendered.token_ids[begin:])
        expected = sum(r.length for r in ranges if r.offset >= begin)
        if image_tokens != expected:
            raise ContractError(
                f"{image_tokens} image tokens but {expected} placeholder positions: a message's text must not spell "
                "the image token"
            )
        token_ids = np.array(rendered.token_ids, np.int64)
        token_ids.setflags(write=False)
        placeholders = (Placeholder(r.offset, r.length, item.hash) for r, item in zip(ranges, items, strict=True))
        return token_ids, tuple(placeholders)


_Skeleton: TypeAlias = tuple[IntArray, tuple[Placeholder, ...]]
"""A render, or the part that a bridge added, without its images: token ids (int64, read-only) and placeholders."""


def _num_bytes(skeleton: _Skeleton | None) -> int:
    """An estimate: the token ids, and 1 KiB for the key and the placeholders."""
    return 1024 + (skeleton[0].nbytes if skeleton is not None else 0)


def _prompt(token_ids: IntArray, placeholders: tuple[Placeholder, ...], images: tuple[ImageItem, ...]) -> Prompt:
    """A prompt whose contract is asserted."""
    check_placeholders(len(token_ids), placeholders, images)
    return Prompt(token_ids, placeholders, images)
