"""Renderers of a user's own, named by an import path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from renderers import RenderedTokens
from renderers.qwen3_vl import Qwen3VLRenderer


class Spaced:
    """A text format without a template: `user: … assistant: …`, each text after `gap`."""

    is_multimodal = False

    def __init__(self, tokenizer: Any, processor: Any, gap: str = " ") -> None:
        self._tokenizer = tokenizer
        self._gap = gap
        self._stop = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> Any:
        ids: list[int] = []
        owners: list[int] = []
        sampled: list[bool] = []
        for index, message in enumerate(messages):
            header = self._encode(f"{message['role']}:{self._gap}")
            body = [*self._encode(message["content"]), self._stop]
            ids += [*header, *body]
            owners += [index] * (len(header) + len(body))
            sampled += [False] * len(header) + [message["role"] == "assistant"] * len(body)
        if add_generation_prompt:
            prompt = self._encode(f"assistant:{self._gap}")
            ids, owners, sampled = ids + prompt, owners + [-1] * len(prompt), sampled + [False] * len(prompt)
        return RenderedTokens(token_ids=ids, message_indices=owners, sampled_mask=sampled)

    def bridge_to_next_turn(
        self, previous_prompt_ids: list[int], previous_completion_ids: list[int], new_messages: Any
    ) -> Any:
        added = self.render(new_messages, add_generation_prompt=True).token_ids
        known = [*previous_prompt_ids, *previous_completion_ids]
        return RenderedTokens(token_ids=[*known, *added], message_indices=[-1] * (len(known) + len(added)))

    def get_stop_token_ids(self) -> list[int]:
        return [self._stop]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids


class Quoting(Qwen3VLRenderer):  # type: ignore[misc]  # the package has no types
    """The package's renderer of Qwen3-VL, with a mark before each text."""

    def __init__(self, tokenizer: Any, processor: Any) -> None:
        super().__init__(tokenizer, processor=processor)

    def render(self, messages: Any, **kwargs: Any) -> Any:
        return super().render([_quoted(message) for message in messages], **kwargs)


def _quoted(message: Any) -> Any:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": "> " + content}
    return {**message, "content": [{**p, "text": "> " + p["text"]} if "text" in p else p for p in content]}


NOT_A_RENDERER = 3
