"""Files of a checkpoint that do not serve end in an error that names the file and what to do, before a step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.families.learning import learning
from vlmrl.errors import VlmrlError
from vlmrl.runs.build import build_renderer

PROCESSOR, TEMPLATE, END = "preprocessor_config.json", "chat_template.jinja", "generation_config.json"

DAMAGES: list[tuple[str, str | dict[str, Any] | None, str]] = [
    (PROCESSOR, {"image_mean": [float("nan")] * 3}, "values of an image that are not finite"),
    (PROCESSOR, {"image_mean": "x"}, "mean must have 3 elements"),
    (
        PROCESSOR,
        {"size": {"nope": 1}},
        "does not load .*size must have one of.*: use the preprocessor_config.json that",
    ),
    (PROCESSOR, {"image_processor_type": "Nope"}, r"Unrecognized image processor in [^ ]*\): use the preprocessor_con"),
    (PROCESSOR, "{", r"preprocessor_config\.json is corrupt"),
    ("processor_config.json", {"processor_class": "NopeProcessor"}, "transformers has no processor NopeProcessor"),
    ("tokenizer.json", "{}", r"tokenizer of .* does not load .*: download tokenizer\.json"),
    ("tokenizer_config.json", "[]", "it holds no JSON object"),
    (TEMPLATE, None, "has no chat template"),
    (TEMPLATE, "{{ raise_exception('no') }}", "does not render a question and an answer"),
    (TEMPLATE, "{{ nope.x }}", "'nope' is undefined"),
    (TEMPLATE, "{% if %}", "is no Jinja template"),
    (TEMPLATE, "hello", "leaves out the text"),
    (
        TEMPLATE,
        "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}",
        "writes no <image> for an image of a question",
    ),
    (END, {"eos_token_id": 10**7}, "eos_token_id=10000000, and the checkpoint's tokenizer has no such token"),
    (END, "{", r"generation_config\.json is corrupt"),
]


@pytest.mark.parametrize(("file", "damage", "reason"), DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_file_is_named(
    file: str,
    damage: str | dict[str, Any] | None,
    reason: str,
    family_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    whole = learning(family_folder("llava_next"))
    path = Path(shutil.copytree(whole.folder, tmp_path / "checkpoint")) / file
    if damage is None:
        path.unlink()
    elif isinstance(damage, str):
        path.write_text(damage)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(VlmrlError, match=reason):
        build_renderer(whole.config, path.parent, whole.model)
