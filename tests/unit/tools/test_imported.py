"""Functions of the user's own: what the prompt says of them, and what their parameters get."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from support import own_tools
from vlmrl.config.tool import ImportedTool
from vlmrl.errors import ConfigError
from vlmrl.tools.base import BadCallError
from vlmrl.tools.imported import Imported
from vlmrl.tools.loading import load_tools

GREY = np.full((4, 6, 3), 100, np.uint8)
GREY[:, 0] = 200


def tool(name: str, **settings: Any) -> Imported:
    return Imported.of(ImportedTool(target=f"support.own_tools:{name}", **settings), name, f"tool.{name}")


def test_type_hints_and_docstring_describe_it() -> None:
    spec = tool("count").spec
    assert (spec.name, spec.description) == ("count", "Count things in an image. Looks at every pixel.")
    assert spec.parameters == {
        "type": "object",
        "properties": {
            "image": {"type": "integer", "description": "Number of an image; the first image shown is 1."},
            "what": {"type": "string", "description": "What is counted, in one word."},
            "most": {"type": "integer", "description": "The largest number."},
        },
        "required": ["image", "what"],
    }
    assert tool("flip").spec.parameters["properties"]["axis"] == {"enum": ["x", "y"]}
    assert tool("fail").spec.parameters["properties"]["how"] == {"type": "string", "description": "What it does."}
    assert tool("wait", description="Do wait.").spec.description == "Do wait."


def test_an_image_parameter_gets_the_image_of_a_number() -> None:
    assert tool("count").call({"image": 2, "what": "ab"}, [GREY[:1], GREY]) == 8
    assert tool("count", args={"most": 3}).call({"image": 1, "what": "ab"}, [GREY]) == 3
    flipped = np.asarray(tool("flip").call({"image": 1}, [GREY]))
    assert flipped[0, :, 0].tolist() == [100, 100, 100, 100, 100, 200]


def test_a_tool_that_draws_on_its_image_draws_on_a_copy() -> None:
    words, half = tool("darker").call({"image": 1}, [GREY])
    assert (words, half[0, :2, 0].tolist()) == ("half as bright", [100, 50])
    assert GREY[0, :2, 0].tolist() == [200, 100]


def test_an_argument_that_the_policy_does_not_see() -> None:
    own = tool("count", args={"most": 3})
    assert set(own.spec.parameters["properties"]) == {"image", "what"}
    with pytest.raises(BadCallError, match=r"^most is no argument of this tool: it takes image, what\.$"):
        own.call({"image": 1, "what": "a", "most": 4}, [GREY])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image": 3}, "image=3 is no number of an image: there are images 1 to 1."),
        ({"image": 1, "axis": "z"}, 'axis="z" is wrong: it must be one of "x", "y".'),
        ({}, "The argument image is missing: the tool takes image, axis."),
    ],
)
def test_a_wrong_call_is_refused_in_words(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(BadCallError) as refused:
        tool("flip").call(arguments, [GREY])
    assert str(refused.value) == words


@pytest.mark.parametrize(
    ("name", "settings", "problem"),
    [
        ("missing", {}, "tool.missing.target=support.own_tools:missing names 'missing'"),
        ("without_words", {}, "has no docstring, so the policy would not know what it does"),
        ("without_hint", {}, "has the parameter x with no type hint"),
        ("of_a_set", {}, r"has the parameter x with the type set\[int\]"),
        (
            "count",
            {"args": {"more": 3}},
            "tool.count.args.more names no parameter of support.own_tools:count, .* image, what, most",
        ),
    ],
)
def test_a_function_that_cannot_be_described_is_refused(name: str, settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        tool(name, **settings)


def test_a_name_that_no_policy_can_call_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tool\.a b is no name that a policy can call"):
        load_tools({"a b": ImportedTool(target="support.own_tools:count")})


def test_every_example_can_be_called() -> None:
    for name in ("count", "flip", "darker", "fail"):
        own = tool(name)
        own.call(own.example, [GREY]) if name != "fail" else own.example
    assert own_tools.count.__doc__ is not None
