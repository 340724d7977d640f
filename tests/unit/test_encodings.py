"""Texts and the output of programs have an explicit encoding: the locale may mean ASCII (LC_ALL=C, PYTHONUTF8=0)."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from support.command_line import REPOSITORY

TEXT_METHODS = ("read_text", "write_text")
PROGRAMS = ("run", "Popen", "check_output")


def without_encoding(source: str) -> Iterator[int]:
    """The lines of calls that read or write text in the locale's encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        keywords = {each.arg: each.value for each in node.keywords}
        if "encoding" in keywords or None in keywords:
            continue
        if name in PROGRAMS and {"text", "universal_newlines"} & keywords.keys():
            yield node.lineno
        if name in TEXT_METHODS or (name in ("open", "fdopen", "NamedTemporaryFile") and is_text(node, name)):
            yield node.lineno


def is_text(call: ast.Call, name: str) -> bool:
    """Whether the call opens a text file: its mode has no `b`. `os.open` and `PIL.Image.open` have no such mode, and an
    `Endpoint` opens sessions."""
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    if (owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")) == "endpoint":
        return False
    if isinstance(owner, ast.Name) and name == "open" and owner.id in ("os", "webbrowser", "PILImage", "Image"):
        return False
    if isinstance(owner, ast.Attribute) and owner.attr == "Image":
        return False
    is_path_method = owner is not None and name == "open"
    mode = next((each.value for each in call.keywords if each.arg == "mode"), None)
    if mode is None:
        place = 0 if is_path_method else 1
        mode = call.args[place] if len(call.args) > place else None
    if mode is None:
        return name != "NamedTemporaryFile"
    return not (isinstance(mode, ast.Constant) and "b" in str(mode.value))


@pytest.mark.parametrize(
    "line", ["p.read_text()", "p.open()", "open(p, 'w')", "subprocess.run(c, text=True)", "os.fdopen(f)"]
)
def test_a_call_without_encoding_is_found(line: str) -> None:
    assert list(without_encoding(line)) == [1]


@pytest.mark.parametrize(
    "line",
    [
        "p.read_text(encoding='utf-8')",
        "p.open('rb')",
        "open(p, mode='ab')",
        "os.open(p, 0)",
        "PIL.Image.open(p)",
        "self.endpoint.open(s)",
    ],
)
def test_other_calls_are_not(line: str) -> None:
    assert list(without_encoding(line)) == []


def test_every_text_has_an_encoding() -> None:
    found = [
        f"{path.relative_to(REPOSITORY)}:{line}"
        for path in sorted((REPOSITORY / "vlmrl").rglob("*.py"))
        for line in without_encoding(path.read_text(encoding="utf-8"))
    ]
    assert found == []
