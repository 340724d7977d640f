"""A chat format from the checkpoint's chat template and processor.

Whatever the template or the tokenizer raises about messages is the fault of these messages (`UserFault`).

Bridges. What was sampled stays as it is, token for token. What the template writes after an answer is taken from a
short conversation of the same beginning, so a conversation of many turns costs linear time, and is tokenized from the
border on. Once per structure, an independent render of the whole conversation is compared: its text must be the text of
the tokens that were there, then what the bridge adds. Tokens may merge over the border in a whole render (the newlines
of Gemma), which is no difference in the text. Where the texts differ, the conversation forks: the template changes
earlier turns (thinking, white space, numbers of images), and a policy is to see what the template makes of them.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from vlmrl.caches.lru import ByteLRU
from vlmrl.errors import ConfigError, UserFault, fenced
from vlmrl.rendering.chat_format import Rendered
from vlmrl.rendering.control_tokens import ControlTokens
from vlmrl.rendering.memo_tokenizer import MemoTokenizer
from vlmrl.rendering.message_check import STRUCTURES_BYTES, MessageCheck, num_bytes, structure, words_of
from vlmrl.rendering.template.answers import find_answers
from vlmrl.rendering.template.call_grammar import CLOSE, OPEN, THINK, ReadCall, grammar_of, parse_answer
from vlmrl.rendering.template.chat_template import WORD, ChatTemplate
from vlmrl.rendering.template.encoder import Encoder
from vlmrl.rendering.template.surprises import Turns, find_surprises
from vlmrl.rendering.tool_calls import PROBE, PROBE_TOOL, texts_beside
from vlmrl.types import Answer, ContractError, IntArray, Message, MMItem, Modality, Prompt, Text, ToolSpec

ANSWERS_TOLD_APART = 3
"""From this many answers on, the structure of a conversation counts as the same."""


FEATURE_KEYS: Mapping[Modality, tuple[str, str]] = {
    "image": ("image_token", "an image's features"),
    "video": ("video.token", "a video's features"),
}
"""Kind → key under `model.vlm` of the token that gets its features, and what these are called in messages."""


class TemplateFormat:
    """Messages to tokens by a chat template. Several threads may use it at the same time."""

    name = "template"

    def __init__(
        self,
        tokenizer: Any,
        processor: Any,
        feature_tokens: Mapping[Modality, str],
        eos_ids: Sequence[int],
        options: Mapping[str, Any],
        parse_control_tokens: bool,
    ) -> None:
        """`processor` is None for a text-only model. `feature_tokens` are the tokens that get the features of images
        and videos, for the kinds that the model takes. `eos_ids` are those of generation_config.json. Raises
        `ConfigError`."""
        self._raw = tokenizer
        self._template = ChatTemplate(tokenizer, processor, options)
        vocabulary = tokenizer.get_vocab()
        for kind, token in feature_tokens.items():
            if token not in vocabulary:
                key, features = FEATURE_KEYS[kind]
                raise ConfigError(
                    f"model.vlm.{key}={token} is no token of the checkpoint's tokenizer, so no token would get "
                    f"{features}: set it to the token of {kind}_token_id in config.json"
                )
        feature_ids = {kind: vocabulary[token] for kind, token in feature_tokens.items()}
        self._encoder = Encoder(tokenizer, processor, feature_ids)
        lacks = {kind: self._template.lack_of(kind, written) for kind, written in self._encoder.written.items()}
        if lack := lacks.get("image"):
            raise ConfigError(lack)
        self.lacks_video = lacks.get("video")
        """What to say where a video is shown that the template does not write."""
        self._spelled = (*feature_tokens.items(), *self._encoder.written.items())
        # What a template writes for an image need not be a token (Ovis 2).
        self.image_tokens = frozenset(vocabulary[token] for _, token in self._spelled if token in vocabulary)
        self.turns = Turns.of(self._template)
        self.stop_ids = self._stop_ids(eos_ids)
        self.closing = self._closing_text()
        """What the template writes from the end of an answer to the token that closes the turn."""
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        special.update(tokenizer.all_special_ids)
        # Some templates write special tokens around an answer, which a policy has to sample as well (Aya Vision).
        self.special = special - set(self._encoder.encode(self.turns.sampled_prefix + self.closing))
        self._read_call = self._call_grammar()
        tags = OPEN + CLOSE if self._read_call is not None else ""
        self.call_tokens = self.special.intersection(self._encoder.encode(tags)) - {*self.stop_ids, *self.image_tokens}
        self.special -= self.call_tokens
        special -= self.call_tokens
        control = special | {*self.stop_ids, *self.image_tokens} | self._turn_openers()
        self._control = ControlTokens(tokenizer, control, self.image_tokens)
        if not parse_control_tokens:
            self._encoder.control = self._control
        self.tokenizer = MemoTokenizer(tokenizer, self._encoder.control, self.call_tokens)
        self.surprises = find_surprises(self._template, self.turns, self._encoder.written.get("image"))
        """What the template does beyond writing the messages down, as sentences for people."""
        self._lock = threading.RLock()
        self._messages = MessageCheck(self.name)
        self._continues: ByteLRU[Hashable, bool] = ByteLRU(STRUCTURES_BYTES)

    def _stop_ids(self, eos_ids: Sequence[int]) -> tuple[int, ...]:
        """First the token with which the template closes an answer, then those of the checkpoint. Raises `ConfigError`
        where there is none."""
        known = [*eos_ids, *([self._raw.eos_token_id] if self._raw.eos_token_id is not None else [])]
        tail = [id for id in self._encoder.encode(self.turns.last_tail) if self._encoder.is_added(id)]
        closing = next((id for id in tail if id in known), tail[0] if tail else None)
        if closing is None:  # some templates close a turn with the token that opens the next one (GLM)
            closing = next((id for id in self._encoder.encode(self.turns.tail)[:1] if id in known), None)
        if unknown := [id for id in eos_ids if self._raw.convert_ids_to_tokens(id) is None]:
            raise ConfigError(
                f"generation_config.json says eos_token_id={unknown[0]}, and the checkpoint's tokenizer has no such "
                "token, so no answer would end there: use the files that belong together"
            )
        found = dict.fromkeys([*([closing] if closing is not None else []), *known])
        if not found:
            raise ConfigError(
                "the checkpoint's chat template writes no special token after an answer, and neither its tokenizer nor "
                "generation_config.json names one, so no answer would end: set eos_token_id in generation_config.json"
            )
        return tuple(found)

    def _closing_text(self) -> str:
        """What the template writes from the end of an answer to the token that closes the turn."""
        stop = str(self._raw.convert_ids_to_tokens(self.stop_ids[0]))
        before, found, _ = self.turns.last_tail.partition(stop)
        return before + found if found else stop

    def _turn_openers(self) -> set[int]:
        """The added tokens that the template writes around messages, which not every tokenizer calls special."""
        ids = self._encoder.encode(self.turns.tail + self.turns.prompt + self.turns.head)
        return {id for id in ids if self._encoder.is_added(id) and str(self._raw.convert_ids_to_tokens(id)).strip()}

    def _call_grammar(self) -> ReadCall | None:
        """The grammar in which the template writes tool calls; None where it writes none, or in an unknown way."""
        try:
            return grammar_of(self._template.text(PROBE, generate=False, tools=(PROBE_TOOL,)))
        except Exception:  # noqa: BLE001 — a template may raise anything about tools
            return None

    # ── whole conversations ─────────────────────────────────────────────────────────────────────────────────

    def encode(self, text: str) -> list[int]:
        """The tokens of a text; control tokens and placeholders that it spells are text."""
        return self._control.as_text(text)

    def render(
        self,
        messages: Sequence[Message],
        items: tuple[MMItem, ...],
        generate: bool,
        tools: Sequence[ToolSpec] = (),
    ) -> Rendered:
        """A conversation; with `generate` it ends where the policy is to answer. Raises `UserFault` and
        `ContractError`."""
        self._check_spelling(messages, tools)
        marked, marked_tools, spelled = self._marked(self._as_written(messages) if generate else messages, tools)
        with self._asking():
            text = self._template.text(marked, generate=generate, tools=marked_tools)
            owners: list[int] = []
            if generate:
                ids = self._encoder.encode_whole(text, items)
            else:
                ids, owners = self._with_answers(marked, text, items, marked_tools)
            if spelled:
                others = self._control.tools_without(marked_tools)
                neutral = self._template.text(self._control.without(marked), generate=generate, tools=others)
                self._control.check_same(ids, self._encoder.encode_whole(neutral, items), self.name)
        made = _rendered(ids, self._encoder, items, 0, owners)
        self._messages.check(f"render {generate} {len(tools)}", messages, partial(self._text_of, generate, tools=tools))
        return made

    def parse(self, completion_ids: IntArray, tools: Sequence[ToolSpec], prompt: Prompt | None) -> Answer:
        """The parts of a completion; `prompt` is not needed, because the template begins every answer alike."""
        text = self.tokenizer.text(tuple(completion_ids.tolist()))
        if self._read_call is None:
            return Answer(text.strip())
        is_thinking = self.turns.prompt.rstrip().endswith(THINK)
        return parse_answer(text, self._read_call, tools, is_thinking=is_thinking)

    def _with_answers(
        self, messages: Sequence[Message], text: str, items: tuple[MMItem, ...], tools: Sequence[ToolSpec]
    ) -> tuple[list[int], list[int]]:
        """(token ids, the message of each that a policy would have sampled, −1 for the others)."""
        answers = find_answers(messages, text, partial(self._template.text, tools=tools), self.closing)
        is_open = bool(answers) and messages[-1].role == "assistant" and not answers[-1].is_closed
        if is_open:  # the template closes a turn with what opens the next one; a policy closes it itself
            text = text[: answers[-1].end]
        cuts, owners = [0], [-1]
        for answer in answers:
            cuts += [answer.begin, answer.end]
            owners += [answer.message, -1]
        parts: list[str] = []
        used = 0
        for begin, end in zip(cuts, [*cuts[1:], len(text)], strict=True):
            part = text[begin:end]
            shown = self._encoder.count(part)
            parts.append(self._encoder.expand(part, items[used : used + shown]))
            used += shown
        ids, message_of = [*self._encoder.begin(text)], [-1 for _ in self._encoder.begin(text)]
        for owner, tokens in zip(owners, self._encoder.encode_parts(parts), strict=True):
            ids += tokens
            message_of += [owner] * len(tokens)
        if is_open:
            ids.append(self.stop_ids[0])
            message_of.append(answers[-1].message)
        return ids, message_of

    def _text_of(self, generate: bool, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> str:
        with self._asking():
            return self._template.text(messages, generate=generate, tools=tools)

    # ── bridges ─────────────────────────────────────────────────────────────────────────────────────────────

    def bridge(
        self,
        previous: Prompt,
        completion_ids: IntArray,
        history: Sequence[Message],
        new_messages: Sequence[Message],
        new_items: tuple[MMItem, ...],
        tools: Sequence[ToolSpec] = (),
    ) -> Rendered | None:
        """What comes after `previous` and the completion; None where a render of the whole conversation is not its
        continuation. Raises `UserFault` and `ContractError`."""
        self._check_spelling(new_messages)
        marked, _, spelled = self._marked(new_messages, ())
        last = int(completion_ids[-1])
        with self._asking():
            added = self._added(history, marked, last, tools)
            if added is None:
                return None
            ids = self._encoder.encode_after(last, self._encoder.expand(added, new_items))
            if spelled:
                neutral = self._added(history, self._control.without(new_messages), last, tools)
                without = self._encoder.encode_after(last, self._encoder.expand(neutral or "", new_items))
                self._control.check_same(ids, without, self.name)
        known = np.concatenate([previous.token_ids, completion_ids])

        def continues() -> bool:
            with self._asking():
                earlier, marked_tools, _ = self._marked(self._as_written(history), tools)
                whole = self._template.text([*earlier, *marked], generate=True, tools=marked_tools)
                if any(message.tool_calls or message.reasoning for message in history):
                    # The template writes calls in its own way, which need not be the policy's: only what is around
                    # the answer can be compared.
                    before = self._template.text(earlier[:-1], generate=True, tools=marked_tools)
                    tail = added if last not in self.stop_ids else self.closing + added
                    return whole.startswith(before) and whole.endswith(tail)
                return self._is_continuation(whole, known, ids, (*previous.mm_items, *new_items))

        key = (len(tools), self._structure(known, completion_ids, history, new_messages))
        if not self._continues.get_or_make(key, continues, lambda _: num_bytes(new_messages)):
            return None
        short = [*_head(history), Message.of("assistant", WORD), *new_messages]
        self._messages.check(f"bridge {len(tools)}", short, partial(self._text_of, True, tools=tools))
        return _rendered(ids, self._encoder, new_items, len(known))

    def _added(
        self, history: Sequence[Message], new_messages: Sequence[Message], last: int, tools: Sequence[ToolSpec]
    ) -> str | None:
        """What the template writes between an answer that ended with token `last` and the next one. None where it does
        not close a turn with that token."""
        _, head = words_of(_head(history))
        text = self._template.text([*head, Message.of("assistant", WORD), *new_messages], generate=True, tools=tools)
        _, word, added = text.partition(WORD)
        if not word:
            return None
        if last != self.stop_ids[0]:
            return added if last not in self.stop_ids else None
        return added.removeprefix(self.closing) if added.startswith(self.closing) else None

    def _is_continuation(self, whole: str, known: IntArray, added: list[int], items: tuple[MMItem, ...]) -> bool:
        """Whether a whole conversation begins with the `known` tokens and goes on with the `added` ones."""
        if self._encoder.count(whole) != len(items):
            return False
        begin = self._encoder.begin(whole)
        expanded = self._encoder.expand(whole, items)
        decode = partial(self._raw.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        before = len(begin) if tuple(known[: len(begin)].tolist()) == begin else 0
        if decode([*known[before:].tolist(), *added]) == self._control.plain(expanded):
            return True
        return self._encoder.encode_whole(whole, items) == [*known.tolist(), *added]

    def _structure(
        self, known: IntArray, completion_ids: IntArray, history: Sequence[Message], new_messages: Sequence[Message]
    ) -> Hashable:
        """What decides whether a bridge holds: roles and kinds of parts at the beginning and at the end, how the answer
        ends, its white space, and the added tokens so far (a template may remove thinking)."""
        answers = [index for index, message in enumerate(history) if message.role == "assistant"]
        between = history[answers[-2] + 1 : answers[-1]] if len(answers) > 1 else ()
        text = "".join(part.text for part in history[-1].content if isinstance(part, Text)) if history else ""
        return (
            min(len(answers), ANSWERS_TOLD_APART),
            (structure(_head(history)), structure(between), structure(history[-1:]), structure(new_messages)),
            int(completion_ids[-1]) if int(completion_ids[-1]) in self.stop_ids else None,
            (not text, text != text.lstrip(), text != text.rstrip()),
            self._encoder.added_in(known),
        )

    def _as_written(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, whose answers are without what the template writes before each answer and a policy samples."""
        made = []
        for message in messages:
            first = message.content[0] if message.content else None
            if message.role == "assistant" and isinstance(first, Text) and self.turns.sampled_prefix:
                own = Text(first.text.removeprefix(self.turns.sampled_prefix))
                message = replace(message, content=(own, *message.content[1:]))
            made.append(message)
        return made

    # ── what is checked ─────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Ask the template or the tokenizer, one thread at a time. What they raise is the fault of the messages."""
        contract: ContractError | None = None
        with self._lock, fenced(f"the chat format {self.name} does not take these messages: it", UserFault):
            try:
                yield
            except ContractError as error:
                contract = error
        if contract is not None:
            raise contract

    def _marked(
        self, messages: Sequence[Message], tools: Sequence[ToolSpec]
    ) -> tuple[Sequence[Message], Sequence[ToolSpec], bool]:
        """Messages and tools with marks, and whether one of them spells a control token."""
        if self._encoder.control is None:
            return messages, tools, False
        with fenced("the texts of the messages cannot be read: they", UserFault):
            marked, in_messages = self._control.mark(messages)
            marked_tools, in_tools = self._control.mark_tools(tools)
            return marked, marked_tools, in_messages or in_tools

    def _check_spelling(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> None:
        """A text that spells a placeholder was most likely formatted for another tool."""
        texts = ["".join(part.text for part in each.content if isinstance(part, Text)) for each in messages]
        for text in (*texts, *texts_beside(messages, tools)):
            for kind, token in self._spelled:
                if token in text:
                    raise ContractError(f"a message's text must not spell the {kind} token ({token})")


def _head(history: Sequence[Message]) -> Sequence[Message]:
    """The messages before the first answer."""
    end = next((index for index, message in enumerate(history) if message.role == "assistant"), len(history))
    return history[:end]


def _rendered(
    ids: list[int],
    encoder: Encoder,
    items: Sequence[MMItem],
    offset: int,
    owners: Sequence[int] = (),
) -> Rendered:
    """`owners`: the message of each token that a policy would have sampled, −1 for the others."""
    token_ids = np.array(ids, np.int64)
    token_ids.setflags(write=False)
    sampled = tuple(owner >= 0 for owner in owners)
    return Rendered(token_ids, encoder.place(ids, items, offset), sampled, tuple(owners))
