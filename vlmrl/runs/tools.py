"""The tools of a run, and the texts that they add to a tokenizer that is made here."""

from __future__ import annotations

import json
import re

import numpy as np

from vlmrl.config.run import RunConfig
from vlmrl.models.families import family_of
from vlmrl.orchestrator.toolbox import Toolbox
from vlmrl.rendering.renderer import FamilyRenderer, Renderer
from vlmrl.rendering.tool_calls import message_fields, tool_entries
from vlmrl.tasks.base import Task
from vlmrl.tasks.loading import tokenizer_texts
from vlmrl.tools.base import Tool
from vlmrl.tools.loading import load_tools
from vlmrl.types import IntArray, Message, ToolCall


def make_toolbox(config: RunConfig) -> Toolbox | None:
    """The tools of a run; None without any. Raises `ConfigError`."""
    tools = load_tools(config.tool)
    return Toolbox(tools) if tools else None


def describe_tools(renderer: FamilyRenderer, config: RunConfig) -> None:
    """Let every prompt of the run describe its tools. Raises `ConfigError` for a chat format that cannot."""
    renderer.tools = tuple(tool.spec for tool in load_tools(config.tool))
    if renderer.tools:
        renderer.check_tools()


def texts_of_run(config: RunConfig, task: Task) -> tuple[str, ...]:
    """The texts that a tokenizer is trained on: those of the task, and what the chat template writes about the tools.
    () where the model comes with a tokenizer. Raises `ConfigError`."""
    texts = tokenizer_texts(config.model, task)
    recipe = family_of(config.model.vlm).recipe
    tools = load_tools(config.tool)
    if not texts or not tools or recipe is None:
        return texts
    from jinja2 import Environment

    calls = Message("assistant", (), tuple(_example(tool) for tool in tools))
    chat = [{"role": "assistant", "content": "", **message_fields(calls)}]
    template = Environment(extensions=["jinja2.ext.loopcontrols"])
    template.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    entries = tool_entries([tool.spec for tool in tools])
    written = template.from_string(recipe.chat_template).render(messages=chat, tools=entries)
    return (*texts, *filter(str.strip, re.split(r"<\|[^|>]*\|>|</?tool_[a-z]*>", written)), "Image 1: Image 2: ")


def _example(tool: Tool) -> ToolCall:
    return ToolCall(tool.spec.name, tool.example)


def example_completion(renderer: Renderer, toolbox: Toolbox) -> IntArray:
    """int64 [C]: the tokens of an answer that calls the first tool, without the end of its turn."""
    called = Message("assistant", (), (_example(toolbox.tools[0]),))
    prompt, sampled = renderer.render_conversation([Message.of("user", "?"), called], given=1, tools=toolbox.specs)
    return np.array(prompt.token_ids[sampled][:-1], np.int64)
