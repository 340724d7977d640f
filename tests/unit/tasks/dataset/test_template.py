"""A template that cannot work is refused before the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.row_files import task_of
from vlmrl.errors import ConfigError

ROW = {"question": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ questoin }}", r"task\.template uses questoin \(line 1, character 4\), .* did you mean question\?"),
        ("Well.\n{% if hard %}{{ question }}{% endif %}", r"uses hard \(line 2, character 7\), which is no column"),
        ("{{ question }", r"cannot be read as a Jinja template \(unexpected '}', line 1: "),
        ("a\n{% if question %}", r"Jinja template \(.*line 2"),
        ("{{ question | shout }}", r"No filter named 'shout'"),
        ("prompts/absent.jinja", r"task\.template=prompts/absent\.jinja is no file here"),
    ],
)
def test_refused(template: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        task_of(tmp_path, ROW, template=template)
