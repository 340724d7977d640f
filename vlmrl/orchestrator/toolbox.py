"""Run the tool calls of an answer, and make the messages that reply to them.

    Answer ─▶ calls ─▶ thread of the run (or the event loop of the tasks, for `async`) ─▶ tool messages
              broken ───────────────────────────────────────────────────────────────────▶ a tool message that says why

Whatever a call does, the policy gets a reply and the rollout goes on: a tool that there is not, arguments that do not
fit, an exception, a call that takes too long. `ToolUse` counts each. A call sees the images of the prompt that it was
sampled for, so it works on what the policy has seen, whatever the env does meanwhile.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmrl.errors import UserFault, fenced
from vlmrl.orchestrator.task_threads import TaskThreads
from vlmrl.rendering.images import Pixels
from vlmrl.tasks.event_loop import InTaskLoop
from vlmrl.tools.base import BadCallError, Tool, ToolFault, parts_of
from vlmrl.types import Answer, Image, Message, Part, Prompt, Text, ToolCall, ToolSpec, ToolUse

log = logging.getLogger(__name__)

MOST_CALLS = 8
"""Calls of one answer that are run; each may show an image. The others get a reply that says so."""

_PLACE = re.compile(r" \([^()]*:\d+, in [^()]*\)$")
"""The place in the user's code at the end of a fault's text, which is not for the policy."""


@dataclass(frozen=True)
class _Refusal:
    """What replies to a call whose arguments do not fit."""

    text: str


@dataclass(eq=False)
class Toolbox:
    """The tools of a run."""

    tools: tuple[Tool, ...]
    threads: TaskThreads = field(default_factory=TaskThreads)

    @property
    def specs(self) -> tuple[ToolSpec, ...]:
        """What the prompts say about the tools."""
        return tuple(tool.spec for tool in self.tools)

    async def reply(self, answer: Answer, prompt: Prompt, use: ToolUse, text: str = "") -> tuple[Message, ...]:
        """A message for each call of an answer, first those that can be read. `use` counts them. The images of the
        replies are numbered after those of `prompt`, in the order of the messages. `text` is the answer as the policy
        wrote it, for those that show it."""
        started = time.monotonic()
        images = [image.pixels for image in prompt.images]
        run, left = answer.calls[:MOST_CALLS], answer.calls[MOST_CALLS:]
        results = list(await asyncio.gather(*(self._result(call, images, use) for call in run)))
        results += [self._broken(use, f"Only the first {MOST_CALLS} calls of an answer are run.") for _ in left]
        number = len(images)
        messages = []
        for call, parts in zip(answer.calls, results, strict=True):
            use.calls += 1
            if any(tool.spec.name == call.name for tool in self.tools):
                use.by_name[call.name] = use.by_name.get(call.name, 0) + 1
            numbered: list[Part] = []
            for part in parts:
                if isinstance(part, Image):
                    number += 1
                    numbered.append(Text(f"Image {number}: "))
                numbered.append(part)
            messages.append(Message("tool", tuple(numbered), tool_call_id=call.id, name=call.name))
        for broken in answer.broken:
            use.calls += 1
            messages.append(Message("tool", self._broken(use, f"This tool call {broken.reason}.")))
        use.seconds += time.monotonic() - started
        return tuple(messages)

    @staticmethod
    def _broken(use: ToolUse, text: str) -> tuple[Part, ...]:
        use.broken += 1
        return (Text(text),)

    async def _result(self, call: ToolCall, images: Sequence[Pixels], use: ToolUse) -> tuple[Part, ...]:
        """What replies to one call."""
        tool = next((tool for tool in self.tools if tool.spec.name == call.name), None)
        if tool is None:
            known = ", ".join(each.spec.name for each in self.tools)
            return self._broken(use, f"There is no tool of that name. The tools are: {known}.")
        try:
            found = await self._called(tool, call, images)
        except TimeoutError:
            use.errors += 1
            use.timeouts += 1
            return (Text(f"{call.name} took longer than {tool.timeout_s:g} s, so there is no result."),)
        except UserFault as fault:
            use.errors += 1
            log.warning("tool %s: %s\n%s", call.name, fault.text, fault.traceback or "")
            return (Text(_PLACE.sub("", fault.text)),)
        return self._broken(use, found.text) if isinstance(found, _Refusal) else found

    async def _called(self, tool: Tool, call: ToolCall, images: Sequence[Pixels]) -> tuple[Part, ...] | _Refusal:
        """The result of a call. Raises `UserFault`, and `TimeoutError`."""
        where = f"{call.name}()"

        def in_thread() -> Any:
            with fenced(where, ToolFault):
                try:
                    returned = tool.call(call.arguments, images)
                except BadCallError as error:
                    return _Refusal(str(error))
                return returned if inspect.isawaitable(returned) else parts_of(returned, call.name)

        begun = self.threads.begin(in_thread)
        until: float | None = None
        while not begun.future.done():
            left = tool.timeout_s if until is None else until - time.monotonic()
            await asyncio.wait({begun.future}, timeout=max(0.0, left))
            if begun.future.done() or begun.started is None:
                continue  # a call that waits for a thread has not begun to take time
            until = begun.started + tool.timeout_s
            if time.monotonic() >= until:
                self.threads.give_up(begun)
                raise TimeoutError
        returned = begun.future.result()
        if not inspect.isawaitable(returned):
            found: tuple[Part, ...] | _Refusal = returned
            return found
        assert begun.started is not None
        return await _awaited(where, call.name, returned, begun.started + tool.timeout_s)


async def _awaited(where: str, name: str, returned: Any, until: float) -> tuple[Part, ...] | _Refusal:
    """The result of an `async` tool, in the event loop of the tasks. Raises `UserFault`, and `TimeoutError`."""

    async def result() -> tuple[Part, ...] | _Refusal:
        with fenced(where, ToolFault):
            try:
                return parts_of(await returned, name)
            except BadCallError as error:
                return _Refusal(str(error))

    running = InTaskLoop(result())
    future = asyncio.wrap_future(running.future)
    await asyncio.wait({future}, timeout=max(0.0, until - time.monotonic()))
    if not future.done():
        running.cancel()
        future.add_done_callback(_retrieve)
        raise TimeoutError
    return future.result()


def _retrieve(future: asyncio.Future[Any]) -> None:
    """Take the error of a call that nothing waits for any more, so that it is not reported as lost."""
    if not future.cancelled():
        future.exception()
