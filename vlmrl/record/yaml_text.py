"""Write YAML that gives every text back as it was.

PyYAML writes a text with U+0085 (next line) between single quotes, where its own reader takes the character for the end
of a line and folds it to a space. Between double quotes it is escaped.
"""

from __future__ import annotations

from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf._utils import get_omega_conf_dumper

FOLDED = "\x85"
"""The character that is not kept between single quotes."""


class _Dumper(get_omega_conf_dumper()):  # type: ignore[misc]
    """OmegaConf's, which quotes what looks like a number or a boolean."""


def _text(dumper: Any, text: str) -> yaml.ScalarNode:
    if FOLDED not in text:
        return get_omega_conf_dumper().str_representer(dumper, text)
    return yaml.ScalarNode("tag:yaml.org,2002:str", text, style='"')


_Dumper.add_representer(str, _text)


def yaml_of(tree: Any) -> str:
    """The YAML of a tree of plain values.

    >>> print(yaml_of({"a": "7", "b": "x\\x85y"}), end="")
    a: '7'
    b: "x\\Ny"
    """
    plain = OmegaConf.to_container(OmegaConf.create(tree), resolve=False, enum_to_str=True)
    text: str = yaml.dump(plain, default_flow_style=False, allow_unicode=True, sort_keys=False, Dumper=_Dumper)
    return text
