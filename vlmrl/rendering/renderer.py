"""The renderer: it alone turns messages into token ids and images into pixels and placeholders.

    first turn   messages ────────────────────────────▶ Prompt          rendered
    later turns  Prompt + completion + new messages ──▶ longer Prompt   bridged: extends what was sampled by tokens
                 … where that is impossible ──────────▶ another Prompt  rendered anew: a new branch

The token grammar of a model family is the `renderers` package's; this file adds what a trainer needs around it: images
processed once and off the event loop (images.py), memoized renders (siblings of a group share prompts), the contract
between tokens and pixels asserted on every prompt, and which tokens may not be sampled.

The package is handed stand-ins: a stand-in is a tiny picture whose pixels spell an image's hash, and the image
processor given to the package answers it with what was processed before. So a render never decodes, hashes or
processes pixels, whatever the family, and nothing in the package is patched.

Left out on purpose: tool specifications and tool calls as structure (they are text here), video.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Protocol, TypeAlias

import numpy as np
from PIL import Image as PILImage

from vlmrl.caches.lru import ByteLRU
from vlmrl.config.model import ModelConfig
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.errors import ConfigError
from vlmrl.rendering.images import ImageError, ImageStore, Pixels
from vlmrl.types import (
    BoolArray,
    ContractError,
    Image,
    ImageItem,
    IntArray,
    Message,
    Placeholder,
    Prompt,
    Text,
    check_placeholders,
)

__all__ = ["FamilyRenderer", "ImageError", "Renderer", "make_renderer", "renderer_name"]

MEMO_BYTES = 64 << 20
"""Renders, and as much again of bridges, that are kept for the siblings of a few steps. Tokens only, no pixels."""

MEMO_PIECES = 4096
"""Pieces of text whose tokens are kept."""


class Renderer(Protocol):
    """Messages to tokens and pixels, and completions back to text."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Sampling one of these ends a completion."""
        ...

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        """Never sampled: every special token but the end of turn, and ids that the tokenizer does not know."""
        ...

    @property
    def image_token_ids(self) -> frozenset[int]:
        """Placeholder tokens; one that is sampled makes a sample unusable."""
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

        True: bridged, i.e. the prompt begins with the previous one and `completion_ids` (int64 [C]). False: the whole
        conversation was rendered anew and a new branch begins. Raises `ImageError` and `ContractError`.
        """
        ...

    def images(self, parts: Sequence[Image]) -> tuple[ImageItem, ...]:
        """The images as prompts hold them, one per part. Blocks while new ones are processed. Raises `ImageError`."""
        ...

    def decode(self, completion_ids: IntArray) -> str:
        """A completion's text without special tokens."""
        ...

    def render_conversation(self, messages: Sequence[Message]) -> tuple[Prompt, BoolArray]:
        """A whole conversation with assistant turns, and bool [P]: True on tokens that a policy would have sampled.

        Blocks while new images are processed. Raises `ImageError` and `ContractError`.
        """
        ...


def renderer_name(config: RendererConfig, model: ModelConfig) -> str:
    """The name in the `renderers` package, with `auto` made the family's own.

    Raises `ConfigError` where the model has none, or where the renderer cannot serve the family.
    """
    served = list(model.vlm.renderers) if model.vlm else []
    if config.name == "auto":
        if not served:
            raise ConfigError(
                f"orchestrator.renderer.name=auto does not name a renderer for model.name={model.name}, so nobody "
                "could make its tokens: name one of the `renderers` package, e.g. orchestrator.renderer.name=qwen3"
            )
        return served[0]
    if model.vlm and config.name not in served:
        raise ConfigError(
            f"orchestrator.renderer.name={config.name} does not serve model.vlm.family={model.vlm.family}, so tokens "
            f"and pixels would not be the model's: choose auto or one of {', '.join(served)}"
        )
    return config.name


def make_renderer(
    config: RendererConfig, model: ModelConfig, tokenizer: Any, image_processor: Any, vocab_size: int
) -> Renderer:
    """The renderer of a model. `vocab_size` is that of its embedding, which may exceed the tokenizer's;
    `image_processor` is None for a text-only model. Raises `ConfigError` for a name that the package does not have.
    """
    return FamilyRenderer(renderer_name(config, model), tokenizer, image_processor, vocab_size)


class FamilyRenderer:
    """`Renderer` on the `renderers` package. May be used from the event loop and from threads at once."""

    def __init__(self, name: str, tokenizer: Any, image_processor: Any, vocab_size: int) -> None:
        import renderers

        try:
            config: Any = renderers.config_from_name(name)
        except ValueError as error:
            raise ConfigError(
                f"orchestrator.renderer.name={name} is not a name of the `renderers` package, so nobody could make "
                f"tokens: {error}"
            ) from error
        if hasattr(config, "image_cache_max"):
            # The package would keep hundreds of processed images alive; ours are in the ImageStore.
            config = config.model_copy(update={"image_cache_max": 1})
        memo_tokenizer = _MemoTokenizer(tokenizer)
        self._package: Any = renderers.create_renderer(memo_tokenizer, config)
        self._multimodal = renderers.is_multimodal(self._package)
        self._images = ImageStore(_Process(image_processor))
        if self._multimodal:
            stand_in = _StandInProcessor(image_processor, self._images)
            self._package = type(self._package)(memo_tokenizer, config, processor=stand_in)
        self._name = name
        self._tokenizer = memo_tokenizer
        self._lock = threading.Lock()
        self._renders: ByteLRU[Hashable, _Skeleton] = ByteLRU(MEMO_BYTES)
        self._bridges: ByteLRU[Hashable, _Skeleton | None] = ByteLRU(MEMO_BYTES)

        # The package's first stop token closes a turn in its grammar; the others end a document and are banned.
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
        return self._render(messages, await self._images.items_async(_images_of(messages)))

    async def next_turn(
        self,
        previous: Prompt,
        completion_ids: IntArray,
        history: Sequence[Message],
        new_messages: Sequence[Message],
    ) -> tuple[Prompt, bool]:
        new_items = await self._images.items_async(_images_of(new_messages))
        bridged = self._bridge(previous, completion_ids, new_messages, new_items)
        if bridged is not None:
            return bridged, True
        messages = [*history, *new_messages]
        return self._render(messages, await self._images.items_async(_images_of(messages))), False

    def images(self, parts: Sequence[Image]) -> tuple[ImageItem, ...]:
        return self._images.items(parts)

    def decode(self, completion_ids: IntArray) -> str:
        # Not the package's parse_response: it strips white space and takes reasoning and tool calls away, and a task
        # must be able to score what the policy wrote.
        return self._tokenizer.text(tuple(completion_ids.tolist()))

    def render_conversation(self, messages: Sequence[Message]) -> tuple[Prompt, BoolArray]:
        items = self._images.items(_images_of(messages))
        with self._lock:
            rendered = self._package.render(_to_package(messages, items))
        if len(rendered.sampled_mask) != len(rendered.token_ids):
            raise ConfigError(
                f"orchestrator.renderer.name={self._name} does not say which tokens a policy samples, so supervised "
                "steps would learn from nothing: set trainer.warmup.steps=0, or choose another renderer"
            )
        token_ids, placeholders = self._skeleton(rendered, items)
        return _prompt(token_ids, placeholders, items), np.array(rendered.sampled_mask, np.bool_)

    def _render(self, messages: Sequence[Message], items: tuple[ImageItem, ...]) -> Prompt:
        def render() -> _Skeleton:
            with self._lock:
                rendered = self._package.render(_to_package(messages, items), add_generation_prompt=True)
            return self._skeleton(rendered, items)

        token_ids, placeholders = self._renders.get_or_make(_content_key(messages, items), render, _num_bytes)
        return _prompt(token_ids, placeholders, items)

    def _bridge(
        self,
        previous: Prompt,
        completion_ids: IntArray,
        new_messages: Sequence[Message],
        new_items: tuple[ImageItem, ...],
    ) -> Prompt | None:
        """The prompt that extends `previous` and the completion, or None where the family's grammar allows none.

        Remembered is what comes after them: what is before is theirs, and the previous images may be others although
        the token ids are the same.
        """
        sampled = np.concatenate([previous.token_ids, completion_ids])

        def bridge() -> _Skeleton | None:
            extra = {"previous_multi_modal_data": _to_package_images(previous)} if self._multimodal else {}
            with self._lock:
                rendered = self._package.bridge_to_next_turn(
                    previous.token_ids.tolist(), completion_ids.tolist(), _to_package(new_messages, new_items), **extra
                )
            if rendered is None or rendered.token_ids[: len(sampled)] != sampled.tolist():
                return None  # the family's grammar cuts or rewrites what was sampled
            token_ids, placeholders = self._skeleton(rendered, previous.images + new_items, begin=len(sampled))
            if placeholders[: len(previous.placeholders)] != previous.placeholders:
                raise ContractError("a bridge moved the placeholders of the turns before it")
            return token_ids[len(sampled) :], placeholders[len(previous.placeholders) :]

        digest = hashlib.blake2b(sampled.tobytes(), digest_size=16).digest()
        key = (digest, len(completion_ids), _content_key(new_messages, new_items))
        added = self._bridges.get_or_make(key, bridge, _num_bytes)
        if added is None:
            return None
        new_ids, new_placeholders = added
        token_ids = np.concatenate([sampled, new_ids])
        return _prompt(token_ids, previous.placeholders + new_placeholders, previous.images + new_items)

    def _skeleton(self, rendered: Any, items: tuple[ImageItem, ...], begin: int = 0) -> _Skeleton:
        """Token ids and placeholders of a render. Asserted: the images that came back are those that went in, in order,
        and from token `begin` on (where the package wrote) image tokens stand in placeholders only."""
        data = rendered.multi_modal_data
        ranges = data.mm_placeholders.get("image", []) if data else []
        outputs = data.mm_items.get("image", []) if data else []
        if not len(ranges) == len(outputs) == len(items):
            raise ContractError(
                f"{len(items)} images went into the renderer and {len(ranges)} came out: does the family's chat format "
                "allow images in messages of that role?"
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


# ── between our records and the package's ───────────────────────────────────────────────────────────────────

_Skeleton: TypeAlias = tuple[IntArray, tuple[Placeholder, ...]]
"""A render, or what a bridge added, without the images: token ids, int64, read-only; placeholders."""


def _num_bytes(skeleton: _Skeleton | None) -> int:
    """An estimate, with 1 KiB for what an entry takes beside its tokens (its key, its placeholders)."""
    return 1024 + (skeleton[0].nbytes if skeleton is not None else 0)


def _images_of(messages: Iterable[Message]) -> list[Image]:
    return [part for message in messages for part in message.content if isinstance(part, Image)]


def _content_key(messages: Iterable[Message], items: Iterable[ImageItem]) -> Hashable:
    """Equal for equal roles, texts and pixels. A text is itself, an image the 1-tuple of its hash."""
    hashes = iter([(item.hash,) for item in items])
    return tuple(
        (message.role, tuple(part.text if isinstance(part, Text) else next(hashes) for part in message.content))
        for message in messages
    )


def _to_package(messages: Iterable[Message], items: Iterable[ImageItem]) -> list[dict[str, Any]]:
    """The package's messages, images as stand-ins. Text alone is one string, which every family takes."""
    remaining = iter(items)
    converted: list[dict[str, Any]] = []
    for message in messages:
        content: list[dict[str, Any]] | str = [
            {"type": "text", "text": part.text}
            if isinstance(part, Text)
            else {"type": "image", "image": _stand_in(next(remaining).hash)}
            for part in message.content
        ]
        if all(isinstance(part, Text) for part in message.content):
            content = "".join(part["text"] for part in content if isinstance(part, dict))
        converted.append({"role": message.role, "content": content})
    return converted


def _to_package_images(prompt: Prompt) -> Any:
    from renderers import MultiModalData, PlaceholderRange

    if not prompt.images:
        return None
    return MultiModalData(
        mm_hashes={"image": [image.hash for image in prompt.images]},
        mm_placeholders={"image": [PlaceholderRange(p.offset, p.length) for p in prompt.placeholders]},
        mm_items={"image": [dict(image.mm_kwargs) for image in prompt.images]},
    )


def _prompt(token_ids: IntArray, placeholders: tuple[Placeholder, ...], images: tuple[ImageItem, ...]) -> Prompt:
    check_placeholders(len(token_ids), placeholders, images)
    return Prompt(token_ids, placeholders, images)


# ── what the package is given ───────────────────────────────────────────────────────────────────────────────


@lru_cache(maxsize=4096)
def _stand_in(digest: str) -> PILImage.Image:
    """A picture of 11 × 1 pixels that spells a hash, 32 ASCII bytes and one of padding."""
    return PILImage.frombytes("RGB", (11, 1), digest.encode() + b"\0")


class _Process:
    """Runs the real image processor, for the `ImageStore`: pixels → (mm_kwargs, placeholder tokens)."""

    def __init__(self, image_processor: Any) -> None:
        self._image_processor = image_processor

    def __call__(self, pixels: Pixels) -> tuple[dict[str, np.ndarray], int]:
        if self._image_processor is None:
            raise ImageError("a text-only model was shown an image")
        try:
            # The layout is said, because it cannot be told from an image that is 3 pixels high.
            output = self._image_processor(images=[pixels], return_tensors="np", input_data_format="channels_last")
        except (ValueError, TypeError, ArithmeticError) as error:
            raise ImageError(
                f"an image of {pixels.shape[1]} × {pixels.shape[0]} cannot be processed: {error}"
            ) from error
        mm_kwargs = {name: np.ascontiguousarray(array) for name, array in output.items()}
        return mm_kwargs, int(mm_kwargs["image_grid_thw"].prod()) // self._image_processor.merge_size**2


class _StandInProcessor:
    """What the package takes for the model's processor: answers a stand-in with what its image was processed to."""

    def __init__(self, image_processor: Any, images: ImageStore) -> None:
        self.merge_size = image_processor.merge_size
        self._images = images

    @property
    def image_processor(self) -> _StandInProcessor:
        return self

    def __call__(self, images: Sequence[PILImage.Image], return_tensors: str) -> dict[str, np.ndarray]:
        (stand_in,) = images
        return self._images.known(stand_in.tobytes()[:32].decode()).mm_kwargs


class _MemoTokenizer:
    """The tokenizer as the package needs it, remembering pieces of text: prompts repeat them without end.

    It has no `__call__` on purpose. The package would use it to attribute characters to tokens, which nobody here
    reads and which costs more than all the rest of a render.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.name_or_path: str = tokenizer.name_or_path
        self.unk_token_id: int | None = tokenizer.unk_token_id
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self.convert_tokens_to_ids = lru_cache(maxsize=1024)(tokenizer.convert_tokens_to_ids)

        @lru_cache(maxsize=MEMO_PIECES)
        def encode(text: str, add_special_tokens: bool) -> tuple[int, ...]:
            return tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))

        @lru_cache(maxsize=MEMO_PIECES)
        def decode(token_ids: tuple[int, ...], skip_special_tokens: bool) -> str:
            text: str = tokenizer.decode(
                list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
            return text

        self._encode, self._decode = encode, decode

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(self._encode(text, add_special_tokens))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self._decode(tuple(token_ids), skip_special_tokens)

    def text(self, token_ids: tuple[int, ...]) -> str:
        return self._decode(token_ids, True)
