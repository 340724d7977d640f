"""record/yaml_text: every text comes back from the YAML that is written."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from vlmrl.record.yaml_text import yaml_of


@pytest.mark.parametrize(
    "text", ["\x85", "a\x85b", "\x85 a", "a\u2028 b", " \u2029", "a\n\x85b", "7", "on", "a\nb", "日本"]
)
def test_a_text_comes_back(text: str) -> None:
    tree = {"a": text, f"k{text}": [text]}
    assert OmegaConf.create(yaml_of(tree)) == tree


def test_other_texts_are_written_as_before() -> None:
    tree = {"a": "日本", "b": "7", "c": ["on", 1.5, None], "d": "x\ny"}
    assert yaml_of(tree) == OmegaConf.to_yaml(OmegaConf.create(tree))
