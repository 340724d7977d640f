"""The checkpoint's chat template as text: messages in, one string out, with one placeholder per image and video."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import groupby
from typing import Any

from vlmrl.errors import ConfigError
from vlmrl.rendering.tool_calls import message_fields, tool_entries
from vlmrl.types import Message, Modality, Part, Text, ToolSpec

TODAY = datetime(2025, 1, 1)
"""What a template takes for today's date. A date that moves would make a resumed run, a replay and two machines differ;
`orchestrator.renderer.options` sets another one where the template has an option for it (`date_string`)."""

FROZEN_NOW = "frozen_strftime_now"
"""Takes the place of `strftime_now`, with which a template asks for the date."""

ARTICLES: Mapping[Modality, str] = {"image": "an image", "video": "a video"}

WORD = "w99999w"
"""A text that no template writes by itself, and no probe of messages."""


class ChatTemplate:
    """Renders conversations with the processor's chat template, or the tokenizer's where it has none."""

    def __init__(self, tokenizer: Any, processor: Any, options: Mapping[str, Any]) -> None:
        """`processor` is None for a text-only model. `options` are variables of the template. Raises `ConfigError`."""
        owners = [owner.chat_template for owner in (processor, tokenizer) if owner is not None and owner.chat_template]
        if not owners:
            raise ConfigError(
                "the checkpoint has no chat template, so orchestrator/renderer=template has nothing to make prompts "
                "with: add chat_template.jinja to its folder, or choose another renderer"
            )
        source = owners[0].get("default", "") if isinstance(owners[0], dict) else owners[0]
        self._source = re.sub(r"\bstrftime_now\b", FROZEN_NOW, source)
        self._tokenizer = tokenizer
        self._takes_images = processor is not None
        self.variables = _variables(self._source)
        if unknown := sorted(options.keys() - self.variables):
            raise ConfigError(
                f"orchestrator.renderer.options.{unknown[0]} is no variable of the checkpoint's chat template, so it "
                f"would change nothing: its variables are {', '.join(sorted(self.variables))}"
            )
        self._options = dict(options)
        self._in_parts: dict[tuple[str, bool, bool], bool] = {}

    def text(
        self, messages: Sequence[Message], *, generate: bool, today: datetime = TODAY, tools: Sequence[ToolSpec] = ()
    ) -> str:
        """The text of a conversation; with `generate` it ends where the policy is to answer. Raises whatever the
        template raises."""
        return self._render([self._content(message, tools) for message in messages], generate, today, tools)

    def lack_of(self, kind: Modality, placeholder: str) -> str | None:
        """What to say where the template writes no placeholder for an image (a video) of a question, else None. What
        the template raises is left to those that look at whole conversations."""
        chat = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": WORD}]}]
        try:
            text = self._render(chat, True, TODAY)
        except Exception:  # noqa: BLE001 — a template may raise anything
            return None
        if WORD not in text or placeholder in text:
            return None
        return (
            f"the checkpoint's chat template writes no {placeholder} for {ARTICLES[kind]} of a question, so the policy "
            "would not see it: use the chat_template.jinja that belongs to the checkpoint, or choose another renderer"
        )

    def _render(
        self, chat: list[dict[str, Any]], generate: bool, today: datetime, tools: Sequence[ToolSpec] = ()
    ) -> str:
        extra = dict(self._options)
        if tools:
            extra["tools"] = tool_entries(tools)
        if FROZEN_NOW in self.variables:
            extra[FROZEN_NOW] = today.strftime
        # By the tokenizer: a processor's own method does the same to text, but may ask for its video processor first.
        text: str = self._tokenizer.apply_chat_template(
            chat, chat_template=self._source, tokenize=False, add_generation_prompt=generate, **extra
        )
        return text

    def _content(self, message: Message, tools: Sequence[ToolSpec]) -> dict[str, Any]:
        """The message as templates take it. Texts in a row are one text."""
        runs = [list(run) for _, run in groupby(message.content, lambda part: isinstance(part, Text))]
        shows = any(not isinstance(part, Text) for part in message.content)
        fields = message_fields(message)
        # Templates ask `if message.content` before a tool call, and a list of one empty part counts as content.
        is_bare_call = not message.content and bool(message.tool_calls)
        if is_bare_call or (not shows and not self._takes_parts(message, tools)):
            return {"role": message.role, "content": "".join(map(_joined, runs)), **fields}
        parts: list[dict[str, str]] = []
        for run in runs:
            shown = [{"type": str(part.modality)} for part in run if not isinstance(part, Text)]
            parts += shown or [{"type": "text", "text": _joined(run)}]
        return {"role": message.role, "content": parts or [{"type": "text", "text": ""}], **fields}

    def _takes_parts(self, message: Message, tools: Sequence[ToolSpec]) -> bool:
        """Whether the template reads messages of this kind as a list of parts. Some read only one string, and some
        write the list itself, brackets included."""
        kind = (message.role, bool(message.tool_calls), bool(tools))
        if kind not in self._in_parts:
            forms = (True, False) if self._takes_images else (False, True)
            reads = (form for form in forms if self._reads(message.role, form, message_fields(message), tools))
            self._in_parts[kind] = next(reads, self._takes_images)
        return self._in_parts[kind]

    def _reads(self, role: str, parts: bool, fields: dict[str, Any], tools: Sequence[ToolSpec]) -> bool:
        before = {"assistant": ["user"], "tool": ["user", "assistant"]}.get(role, [])
        after = {"system": ["user"], "assistant": ["user"]}.get(role, [])

        def say(role: str, word: str) -> dict[str, Any]:
            return {"role": role, "content": [{"type": "text", "text": word}] if parts else word}

        this = {**say(role, WORD), **fields}
        chat = [*(say(each, "x") for each in before), this, *(say(each, "y") for each in after)]
        try:
            text = self._render(chat, True, TODAY, tools)
        except Exception:  # noqa: BLE001 — a template may raise anything about a form that it does not read
            return False
        return WORD in text and f"'text': '{WORD}'" not in text


def _joined(parts: Sequence[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Text))


def _variables(source: str) -> frozenset[str]:
    """The variables that a template reads and does not set itself."""
    from jinja2 import TemplateError, ext, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols])
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(source)))
    except TemplateError as error:
        raise ConfigError(
            f"the checkpoint's chat template is no Jinja template ({error}), so no prompt can be made: correct "
            "chat_template.jinja, or choose another renderer"
        ) from error
