"""Tool calls of an answer: whatever they do, the policy gets a reply, and each is counted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest

from support import own_tools
from vlmrl.config.tool import ImportedTool, ToolConfig, ZoomTool
from vlmrl.orchestrator.toolbox import Toolbox
from vlmrl.rendering.images import decode
from vlmrl.tools.loading import load_tools
from vlmrl.types import Answer, BrokenCall, Image, ImageItem, Message, Placeholder, Prompt, Text, ToolCall, ToolUse

BOX = [0, 0, 500, 500]


def prompt(images: int = 1) -> Prompt:
    items = tuple(ImageItem(f"{n}", np.full((8, 8, 3), 10 * n, np.uint8), {}, 1) for n in range(1, images + 1))
    places = tuple(Placeholder(n, 1, item.hash) for n, item in enumerate(items))
    return Prompt(np.zeros(images, np.int64), places, items)


def toolbox(timeout_s: float = 30.0) -> Toolbox:
    config: dict[str, ToolConfig] = {"zoom": ZoomTool()}
    for name in ("count", "flip", "darker", "wait", "hang", "fail"):
        config[name] = ImportedTool(target=f"support.own_tools:{name}", timeout_s=timeout_s)
    return Toolbox(load_tools(config))


def replies(answer: Answer, box: Toolbox | None = None, images: int = 1) -> tuple[list[Message], ToolUse]:
    use = ToolUse()
    return list(asyncio.run((box or toolbox()).reply(answer, prompt(images), use))), use


def said(message: Message) -> str:
    return "".join(part.text if isinstance(part, Text) else "<image>" for part in message.content)


def called(name: str, id: str = "", **arguments: Any) -> Answer:
    return Answer("", calls=(ToolCall(name, arguments, id),))


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    own_tools.RELEASED.clear()
    yield
    own_tools.RELEASED.set()


def test_a_result_names_its_call_and_numbers_its_image() -> None:
    (message,), use = replies(called("zoom", "call_1", image=2, box=BOX), images=2)
    assert (message.role, message.name, message.tool_call_id) == ("tool", "zoom", "call_1")
    assert said(message) == "Image 3: <image>"
    image = message.content[1]
    assert isinstance(image, Image)
    assert decode(image.source).tolist() == np.full((8, 8, 3), 20).tolist()
    assert (use.calls, use.broken, use.errors, use.by_name) == (1, 0, 0, {"zoom": 1})
    assert use.seconds > 0


def test_several_calls_in_the_order_of_the_answer() -> None:
    calls = (
        ToolCall("count", {"image": 1, "what": "x"}),
        ToolCall("zoom", {"image": 1, "box": BOX}),
        ToolCall("darker", {"image": 1}),
        ToolCall("wait", {"seconds": 0.0}),
    )
    messages, use = replies(Answer("", calls=calls, broken=(BrokenCall("x", "is not valid JSON"),)))
    assert [said(message) for message in messages] == [
        "8",
        "Image 2: <image>",
        "half as brightImage 3: <image>",
        "waited 0 s",
        "This tool call is not valid JSON.",
    ]
    assert (use.calls, use.broken, use.errors) == (5, 1, 0)
    assert use.by_name == {"count": 1, "zoom": 1, "darker": 1, "wait": 1}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            called("look", image=1),
            "There is no tool of that name. The tools are: zoom, count, flip, darker, wait, hang, fail.",
        ),
        (called("zoom", image=1), "The argument box is missing: the tool takes image, box."),
        (called("flip", image=9), "image=9 is no number of an image: there are images 1 to 1."),
    ],
)
def test_a_call_that_cannot_be_run_is_broken(answer: Answer, words: str) -> None:
    (message,), use = replies(answer)
    assert said(message) == words
    assert (use.calls, use.broken, use.errors) == (1, 1, 0)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("wrong", "fail() raised ValueError: it is wrong"),
        ("exit", "fail() raised SystemExit: 3"),
        ("odd", "fail() returned a set: return a text, a number, an image, or a list of these"),
        ("image", ""),
    ],
)
def test_an_exception_is_a_reply_without_a_place(how: str, words: str) -> None:
    (message,), use = replies(called("fail", how=how))
    assert words in said(message)
    assert "own_tools.py" not in said(message)
    assert (use.calls, use.broken, use.errors) == (1, 0, 1)


def test_nothing_to_say_is_said() -> None:
    (message,), use = replies(called("fail", how="nothing"))
    assert (said(message), use.errors) == ("done", 0)


@pytest.mark.parametrize(("name", "arguments"), [("hang", {}), ("wait", {"seconds": 3600})])
def test_a_call_that_takes_too_long_is_a_reply(name: str, arguments: dict[str, Any]) -> None:
    (message,), use = replies(called(name, **arguments), toolbox(timeout_s=0.05))
    assert said(message) == f"{name} took longer than 0.05 s, so there is no result."
    assert (use.calls, use.errors, use.timeouts) == (1, 1, 1)


def test_only_the_first_calls_of_an_answer_are_run() -> None:
    many = Answer("", calls=tuple(ToolCall("zoom", {"image": 1, "box": BOX}) for _ in range(11)))
    messages, use = replies(many)
    assert [said(message) for message in messages][7:] == [
        "Image 9: <image>",
        *["Only the first 8 calls of an answer are run."] * 3,
    ]
    assert (use.calls, use.broken) == (11, 3)


def test_calls_do_not_run_in_the_thread_of_the_event_loop() -> None:
    seen: list[threading.Thread] = []

    class Noting:
        spec = load_tools({"zoom": ZoomTool()})[0].spec
        timeout_s = 30.0
        example: ClassVar[dict[str, Any]] = {}

        def call(self, arguments: Any, images: Any) -> str:
            seen.append(threading.current_thread())
            return "x"

    replies(called("zoom"), Toolbox((Noting(),)))
    assert seen[0] is not threading.current_thread()
