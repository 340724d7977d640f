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
    control_tokens.py   text that spells a control token stays text
    chat_format.py      what follows is built on: tokens of a conversation, and what comes after an answer
    grammar.py          … by the package, each render and bridge checked: images, control tokens, messages
    template/           … by the checkpoint's own chat template and processor, for families that the package lacks
    interface.py        what the rest of the program calls
    renderer.py         memoized renders (sibling rollouts share prompts), the contract between tokens and pixels
                        asserted on every prompt, and the tokens that may not be sampled

    tool_calls.py       tools and calls between our records and the chat formats'
    tool_check.py       whether a chat format can be used with tools; template/call_grammar.py reads a template's calls
    videos.py           the frames of a video, however it is handed in; those of a file by video_files.py
    item_store.py       what the stores of images and videos (video_store.py) share
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from vlmrl.caches.lru import ByteLRU
from vlmrl.config.model import ModelConfig
from vlmrl.config.orchestrator import TEMPLATE, RendererConfig
from vlmrl.errors import ConfigError, UserFault, safe_repr
from vlmrl.rendering.chat_format import ChatFormat, Rendered
from vlmrl.rendering.grammar import Grammar
from vlmrl.rendering.image_store import ImageStore
from vlmrl.rendering.images import ImageError
from vlmrl.rendering.interface import Renderer
from vlmrl.rendering.item_store import ItemStores
from vlmrl.rendering.messages import content_key, shown_in
from vlmrl.rendering.processors import PlaceholderTokens, ProcessedSize, ProcessImage, untold_size
from vlmrl.rendering.template.image_text import ProcessWithText
from vlmrl.rendering.template.template_format import TemplateFormat
from vlmrl.rendering.template.video_text import ProcessVideoWithText
from vlmrl.rendering.tool_check import tool_problem
from vlmrl.rendering.video_store import VideoStore
from vlmrl.types import (
    Answer,
    BoolArray,
    ContractError,
    Image,
    ImageItem,
    IntArray,
    Message,
    MMItem,
    Modality,
    Placeholder,
    Prompt,
    ToolSpec,
    Video,
    check_placeholders,
)

__all__ = ["FamilyRenderer", "ImageError", "Renderer", "make_renderer", "renderer_name"]

MEMO_BYTES = 64 << 20
"""Renders, and as many bytes of bridges, that are kept for the sibling rollouts of a few steps. Tokens only."""


def renderer_name(config: RendererConfig, model: ModelConfig) -> str:
    """The renderer's name; `auto` is the first of `model.vlm.renderers`.

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
    processed_size: ProcessedSize = untold_size,
    *,
    processor: Any = None,
    load_video_processor: Callable[[], Any] | None = None,
    eos_ids: Sequence[int] = (),
) -> FamilyRenderer:
    """The renderer of a model.

    `vocab_size` is the size of the model's embedding, which may exceed the tokenizer's. `image_processor` is None for a
    text-only model. `placeholder_tokens` and `processed_size` are the family's (`family_of(model.vlm)`); without the
    second, the sizes of processed images are not known. `preflight` has refused names that the package does not have.

    The renderer `template` takes the whole `processor` (None for a text-only model), which gets its video processor
    from `load_video_processor` when the first video is shown, and `eos_ids` of generation_config.json. Raises
    `ConfigError` for a template or a processor that it cannot use.
    """
    name = renderer_name(config, model)
    process = ProcessImage(image_processor, placeholder_tokens, processed_size)
    vocabulary = tokenizer.get_vocab().values()
    if name != TEMPLATE:
        images = ImageStore(process, process.processed_size)
        grammar = Grammar(name, tokenizer, image_processor, images, config.parse_control_tokens, config.options)
        videos = VideoStore(None, refusal=f"the renderer {name} makes no videos: set orchestrator/renderer=template")
        return FamilyRenderer(grammar, images, videos, vocabulary, vocab_size)
    vlm = model.vlm
    tokens: dict[Modality, str] = {} if vlm is None else {"image": vlm.image_token}
    if vlm is not None and vlm.video is not None:
        tokens["video"] = vlm.video.token
    chat_format = TemplateFormat(tokenizer, processor, tokens, eos_ids, config.options, config.parse_control_tokens)
    if processor is None or vlm is None:
        videos = VideoStore(None, refusal="a text-only model was shown a video")
        return FamilyRenderer(chat_format, ImageStore(process), videos, vocabulary, vocab_size)
    with_text = ProcessWithText(processor, tokenizer.convert_tokens_to_ids(vlm.image_token), vlm.image_settings)
    chat_format.surprises += tuple(filter(None, [with_text.surprise()]))
    refusal = f"vlmrl makes no videos for model.vlm.family={vlm.family}: show frames as images, or choose another model"
    process_video = None
    if chat_format.lacks_video is not None:
        refusal = chat_format.lacks_video
    elif vlm.video is not None and load_video_processor is not None:
        video_id = tokenizer.convert_tokens_to_ids(vlm.video.token)
        process_video = ProcessVideoWithText(processor, load_video_processor, vlm.video, video_id)
    videos = VideoStore(process_video, process.processed_size, refusal)
    return FamilyRenderer(chat_format, ImageStore(with_text, process.processed_size), videos, vocabulary, vocab_size)


class FamilyRenderer:
    """`Renderer` on a chat format. The event loop and other threads may use it at the same time."""

    def __init__(
        self,
        chat_format: ChatFormat,
        images: ImageStore,
        videos: VideoStore,
        vocabulary: Iterable[int],
        vocab_size: int,
    ) -> None:
        """`vocabulary` are the ids that the tokenizer knows, `vocab_size` is the number of rows of the embedding."""
        self._images = images
        self._stores = ItemStores(images, videos)
        self.chat_format = chat_format
        self._tokenizer = chat_format.tokenizer
        self._renders: ByteLRU[Hashable, Rendered] = ByteLRU(MEMO_BYTES)
        self._bridges: ByteLRU[Hashable, Rendered | None] = ByteLRU(MEMO_BYTES)
        self._digests: WeakKeyDictionary[Prompt, bytes] = WeakKeyDictionary()
        """Prompts that a bridge made → digest of their tokens."""
        self.tools: tuple[ToolSpec, ...] = ()
        """The tools of the run, which prompts describe unless others are given."""
        self._tool_problem: str | None = None
        """Why tools cannot be used; empty where they can, None before it is known."""

        _check_vocabulary(chat_format, vocabulary, vocab_size)
        # The first stop token closes a turn in the family's chat format. The others end a document: ban them.
        stop_ids = chat_format.stop_ids
        self.surprises = chat_format.surprises
        """What the chat format does beyond writing the messages down, as sentences for people."""
        unknown = set(range(vocab_size)).difference(vocabulary)
        banned = (chat_format.special | unknown) - {stop_ids[0]}
        self._banned = tuple(sorted(banned))
        self._stop = tuple(id for id in stop_ids if id not in banned)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return self._stop

    @property
    def banned_token_ids(self) -> tuple[int, ...]:
        return self._banned

    @property
    def image_token_ids(self) -> frozenset[int]:
        return self.chat_format.image_tokens

    def try_image(self, encodes: Callable[[Sequence[ImageItem]], bool]) -> None:
        """Process one image, to see whether all can be served (`ImageStore.try_image`)."""
        self._images.try_image(encodes)

    async def first_turn(self, messages: Sequence[Message], tools: Sequence[ToolSpec] | None = None) -> Prompt:
        return self._render(messages, await self._stores.items_async(shown_in(messages)), self._given(tools))

    async def next_turn(
        self,
        previous: Prompt,
        completion_ids: IntArray,
        history: Sequence[Message],
        new_messages: Sequence[Message],
        tools: Sequence[ToolSpec] | None = None,
    ) -> tuple[Prompt, bool]:
        tools = self._given(tools)
        new_items = await self._stores.items_async(shown_in(new_messages))
        bridged = self._bridge(previous, completion_ids, history, new_messages, new_items, tools)
        if bridged is not None:
            return bridged, True
        messages = [*history, *new_messages]
        return self._render(messages, await self._stores.items_async(shown_in(messages)), tools), False

    def items(self, parts: Sequence[Image | Video]) -> tuple[MMItem, ...]:
        return self._stores.items(parts)

    def encode(self, answer: str) -> IntArray:
        """int64 [C ≥ 1]: the completion of a policy that answers with this text, with the end of its turn."""
        return np.array([*self.chat_format.encode(answer), self.chat_format.stop_ids[0]], np.int64)

    def decode(self, completion_ids: IntArray) -> str:
        # Not the text of `parse`: it strips white space and removes reasoning and tool calls, but a task must be able
        # to score everything that the policy wrote.
        return self._tokenizer.text(tuple(completion_ids.tolist()))

    def parse(self, completion_ids: IntArray, tools: Sequence[ToolSpec] = (), prompt: Prompt | None = None) -> Answer:
        return self.chat_format.parse(completion_ids, tools, prompt)

    def check_tools(self) -> None:
        if self._tool_problem is None:
            self._tool_problem = tool_problem(self.chat_format)
        if self._tool_problem:
            raise ConfigError(
                f"the chat format {self.chat_format.name} of this checkpoint cannot be used with tools: "
                f"{self._tool_problem}. Set tool=[], or choose another model or renderer (orchestrator.renderer.name)"
            )

    def render_conversation(
        self, messages: Sequence[Message], given: int = 0, tools: Sequence[ToolSpec] | None = None
    ) -> tuple[Prompt, BoolArray]:
        tools = self._given(tools)
        self._check_given(tools)
        items = self._stores.items(shown_in(messages))
        rendered = self.chat_format.render(messages, items, generate=False, tools=tools)
        if not rendered.sampled_mask:
            raise ConfigError(
                f"orchestrator.renderer.name={self.chat_format.name} does not report which tokens a policy samples, so "
                "supervised steps would have no loss tokens: set trainer.warmup.steps=0, or choose another renderer"
            )
        message_of = np.array(rendered.message_of)
        sampled = np.array(rendered.sampled_mask, np.bool_) & (message_of >= given)
        self._check_sampled(rendered.token_ids, sampled, message_of)
        return _prompt(rendered.token_ids, rendered.placeholders, items), sampled

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

    def _given(self, tools: Sequence[ToolSpec] | None) -> Sequence[ToolSpec]:
        return self.tools if tools is None else tools

    def _check_given(self, tools: Sequence[ToolSpec]) -> None:
        """Raise `UserFault` where there are tools and the chat format cannot be used with them."""
        if tools:
            try:
                self.check_tools()
            except ConfigError as error:
                raise UserFault(str(error)) from error

    def _render(self, messages: Sequence[Message], items: tuple[MMItem, ...], tools: Sequence[ToolSpec]) -> Prompt:
        def render() -> Rendered:
            self._check_given(tools)
            return self.chat_format.render(messages, items, generate=True, tools=tools)

        rendered = self._renders.get_or_make(content_key(messages, items, tools), render, _num_bytes)
        return _prompt(rendered.token_ids, rendered.placeholders, items)

    def _bridge(
        self,
        previous: Prompt,
        completion_ids: IntArray,
        history: Sequence[Message],
        new_messages: Sequence[Message],
        new_items: tuple[MMItem, ...],
        tools: Sequence[ToolSpec],
    ) -> Prompt | None:
        """The prompt that extends `previous` and the completion; None where the family's grammar does not allow one.

        The memo holds only what comes after the completion: two prompts with equal token ids may show different images.
        """

        def bridge() -> Rendered | None:
            return self.chat_format.bridge(previous, completion_ids, history, new_messages, new_items, tools)

        digest = _digest(self._digests.get(previous) or _digest(b"", previous.token_ids), completion_ids)
        key = (digest, len(completion_ids), content_key(new_messages, new_items, tools))
        added = self._bridges.get_or_make(key, bridge, _num_bytes)
        if added is None:
            return None
        token_ids = np.concatenate([previous.token_ids, completion_ids, added.token_ids])
        # What was there before is checked already, and the new placeholders stand behind it.
        check_placeholders(len(token_ids), added.placeholders, new_items)
        if any(placeholder.offset < len(token_ids) - len(added.token_ids) for placeholder in added.placeholders):
            raise ContractError("a bridge moved the placeholders of the turns before it")
        prompt = Prompt(token_ids, previous.placeholders + added.placeholders, previous.mm_items + new_items)
        self._digests[prompt] = _digest(digest, added.token_ids)
        return prompt


def _check_vocabulary(chat_format: ChatFormat, vocabulary: Iterable[int], vocab_size: int) -> None:
    """Raise `ConfigError` where a text can become tokens that have no row in the model's embedding. Special tokens
    that the chat format does not write may have none (Gemma 3 without its vision tower)."""
    needed = {*chat_format.stop_ids[:1], *chat_format.image_tokens}
    rowless = [id for id in vocabulary if id >= vocab_size and (id in needed or id not in chat_format.special)]
    if rowless:
        raise ConfigError(
            f"the tokenizer has the token {safe_repr(chat_format.tokenizer.decode([min(rowless)]))} with the id "
            f"{min(rowless)}, and the model's embedding has {vocab_size} rows, so a text with it could not be "
            "embedded: use the tokenizer and the config.json that belong to the checkpoint"
        )


def _digest(before: bytes, token_ids: IntArray) -> bytes:
    """A digest of tokens that follow others, so that a long conversation is not hashed again at every turn."""
    return hashlib.blake2b(before + token_ids.tobytes(), digest_size=16).digest()


def _num_bytes(rendered: Rendered | None) -> int:
    """An estimate: the token ids, and 1 KiB for the key and the placeholders."""
    return 1024 + (rendered.token_ids.nbytes + len(rendered.sampled_mask) if rendered is not None else 0)


def _prompt(token_ids: IntArray, placeholders: tuple[Placeholder, ...], items: tuple[MMItem, ...]) -> Prompt:
    """A prompt whose contract is asserted."""
    check_placeholders(len(token_ids), placeholders, items)
    return Prompt(token_ids, placeholders, items)
