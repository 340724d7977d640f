"""What a chat template does beyond writing messages down is found by comparing: each surprise has a template that shows
it, and the plain template has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from support.tiny_renderer import PLACEHOLDER_TOKENS, VOCAB_SIZE, first, following
from vlmrl.config.model import ModelConfig
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.errors import ConfigError, UserFault
from vlmrl.rendering.renderer import FamilyRenderer, make_renderer
from vlmrl.rendering.template.chat_template import ChatTemplate
from vlmrl.rendering.template.surprises import Turns, find_surprises
from vlmrl.rendering.template.template_format import TemplateFormat
from vlmrl.types import ContractError, Message

SAY = (
    "{%- macro say(c) -%}{%- if c is string -%}{{ c }}{%- else -%}{%- for p in c -%}"
    "{{ '<|image_pad|>' if p.type == 'image' else p.text }}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
PLAIN = SAY + (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}{{ say(m.content) }}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}"
)


def changed(old: str, new: str) -> str:
    assert old in PLAIN
    return PLAIN.replace(old, new)


LOOP = "{%- for m in messages -%}"
HEADER = "{{ '<|im_start|>' + m.role + '\\n' }}"
BODY = "{{ say(m.content) }}"
ASK = "<|im_start|>assistant\n{% endif -%}"

SURPRISES = {
    "writes today's date": "Today is {{ strftime_now('%d %b %Y') }}.\n" + PLAIN,
    "refuses a system message": changed(
        LOOP, "{%- if messages[0].role == 'system' -%}{{ raise_exception('no') }}{%- endif -%}" + LOOP
    ),
    "drops a system message": changed(LOOP, "{%- for m in messages if m.role != 'system' -%}"),
    "moves the system message": changed(
        LOOP + HEADER,
        "{%- for m in messages if m.role != 'system' -%}"
        + HEADER
        + "{%- if loop.last and messages[0].role == 'system' -%}{{ say(messages[0].content) }}\n{%- endif -%}",
    ),
    "adds a system message of its own where there is none: 'Be kind.'": changed(
        LOOP,
        "{%- if messages[0].role != 'system' -%}<|im_start|>system\nBe kind.<|im_end|>\n{% endif -%}" + LOOP,
    ),
    "refuses two messages of one role": changed(
        LOOP,
        LOOP + "{%- if loop.previtem and loop.previtem.role == m.role -%}{{ raise_exception('no') }}{%- endif -%}",
    ),
    "drops one of two messages": changed(
        LOOP,
        "{%- for m in messages -%}{%- if loop.nextitem and loop.nextitem.role == m.role -%}{% continue %}{%- endif -%}",
    ),
    "removes thinking": changed(
        BODY,
        "{{ say(m.content) if m.role == 'user' or loop.last else say(m.content).split('</think>')[-1] }}",
    ),
    "removes white space": changed(BODY, "{{ say(m.content) | trim }}"),
    "begins an answer that is to be sampled with '<think>\\n'": changed(
        ASK, "<|im_start|>assistant\n<think>\n{% endif -%}"
    ),
    "before an answer, which a policy must sample": changed(
        BODY, "{{ '[OK] ' if m.role == 'assistant' }}{{ say(m.content) }}"
    ),
    "and earlier ones with": changed(ASK, "<|im_start|>model\n{% endif -%}"),
    "moves images away": changed(
        BODY,
        "{%- if m.content is not string -%}{%- for p in m.content if p.type == 'image' -%}<|image_pad|>{%- endfor -%}"
        "{%- for p in m.content if p.type != 'image' -%}{{ p.text }}{%- endfor -%}"
        "{%- else -%}{{ m.content }}{%- endif -%}",
    ),
    "writes no placeholder for an image": changed(
        BODY, "{%- for p in m.content if p is not string and p.type != 'image' -%}{{ p.text }}{%- endfor -%}"
    ),
}
SURPRISES["merges two messages of one role"] = changed(
    HEADER, "{%- if not loop.previtem or loop.previtem.role != m.role -%}" + HEADER + "{% endif -%}"
).replace(
    "<|im_end|>\n{% endfor",
    "{%- if not loop.nextitem or loop.nextitem.role != m.role -%}<|im_end|>\n{% endif -%}{% endfor",
)


def surprises_of(tokenizer: Any, source: str) -> tuple[str, ...]:
    template = ChatTemplate(tokenizer, SimpleNamespace(chat_template=source), {})
    return find_surprises(template, Turns.of(template), "<|image_pad|>")


def test_a_plain_template_has_none(tokenizer: Any) -> None:
    assert surprises_of(tokenizer, PLAIN) == ()


@pytest.mark.parametrize("sentence", SURPRISES)
def test_a_surprise_is_found(tokenizer: Any, sentence: str) -> None:
    found = surprises_of(tokenizer, SURPRISES[sentence])
    assert any(sentence in each for each in found), found
    assert len(found) == 1, found


@pytest.fixture
def renderer_of(tokenizer: Any) -> Iterator[Callable[..., FamilyRenderer]]:
    """A text-only renderer with another chat template."""

    def make(source: str, **options: Any) -> FamilyRenderer:
        tokenizer.chat_template = source
        config, model = RendererConfig(name="template", options=options), ModelConfig(name="x")
        return make_renderer(config, model, tokenizer, None, VOCAB_SIZE, PLACEHOLDER_TOKENS)

    kept = tokenizer.chat_template
    yield make
    tokenizer.chat_template = kept


def test_lost_content_is_refused(renderer_of: Callable[..., FamilyRenderer]) -> None:
    asked = [Message.of("system", "rules"), Message.of("user", "q")]
    with pytest.raises(ContractError, match=r"message 1 of 2 \(system\) is left out"):
        first(renderer_of(SURPRISES["drops a system message"]), asked)
    with pytest.raises(UserFault, match="does not take these messages: it raised TemplateError: no"):
        first(renderer_of(SURPRISES["refuses a system message"]), asked)
    assert first(renderer_of(PLAIN), asked)


@pytest.mark.parametrize(
    ("sentence", "answer", "bridged"),
    [
        (None, "<think>a</think>b", True),
        ("removes thinking", "<think>a</think>b", False),
        ("removes thinking", "b", True),
        (None, "b \n", True),
        ("removes white space", "b \n", False),
        ("removes white space", "b", True),
        ("begins an answer that is to be sampled with '<think>\\n'", "b", False),
        ("and earlier ones with", "b", False),
        ("before an answer, which a policy must sample", "[OK] b", True),
        ("before an answer, which a policy must sample", "b", False),
        ("moves the system message", "b", False),
        ("adds a system message of its own where there is none: 'Be kind.'", "b", True),
    ],
)
def test_a_template_that_changes_earlier_turns_forks(
    renderer_of: Callable[..., FamilyRenderer], tokenizer: Any, sentence: str | None, answer: str, bridged: bool
) -> None:
    renderer = renderer_of(PLAIN if sentence is None else SURPRISES[sentence])
    begin = [Message.of("system", "rules")] if sentence == "moves the system message" else []
    asked = [*begin, Message.of("user", "q")]
    prompt = first(renderer, asked)
    ids = np.array([*tokenizer.encode(answer), *renderer.stop_token_ids[:1]])
    history = [*asked, Message.of("assistant", answer)]
    for new in ([Message.of("user", "r")], [Message.of("user", "s")]):  # the second by what is remembered
        longer, made = following(renderer, prompt, ids, history, new)
        assert made is bridged
        assert isinstance(renderer.chat_format, TemplateFormat)
        assert tokenizer.decode(longer.token_ids).endswith(renderer.chat_format.turns.prompt)


def test_options(renderer_of: Callable[..., FamilyRenderer], tokenizer: Any) -> None:
    source = changed(ASK, "<|im_start|>assistant\n{{ '/quick' if not slow }}{% endif -%}")
    asked = [Message.of("user", "q")]
    assert tokenizer.decode(first(renderer_of(source), asked).token_ids).endswith("/quick")
    assert tokenizer.decode(first(renderer_of(source, slow=True), asked).token_ids).endswith("assistant\n")
    with pytest.raises(ConfigError, match=r"renderer\.options\.fast is no variable of the checkpoint's chat template"):
        renderer_of(source, fast=True)


@pytest.mark.parametrize(
    ("source", "refusal"),
    [
        ("{% for", "is no Jinja template"),
        ("{{ raise_exception('never') }}", "does not render a question and an answer"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "leaves out the text"),
        ("", "has no chat template"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(
    renderer_of: Callable[..., FamilyRenderer], source: str, refusal: str
) -> None:
    with pytest.raises(ConfigError, match=refusal):
        renderer_of(source)
