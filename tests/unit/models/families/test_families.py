"""What each family knows, the neutral family for unknown ones, and that no other module compares family names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import vlmrl.models.families
from vlmrl.config.model import Init, ModelConfig, TinyConfig, VLMConfig
from vlmrl.models.families import FAMILIES, family_of
from vlmrl.models.families.base import Family, ImageBounds

PACKAGE = Path(vlmrl.models.families.__file__).parents[2]


def vlm(family: str, positions: str = "mrope") -> VLMConfig:
    return VLMConfig(family, ["a-renderer"], positions, "<|image_pad|>")


@pytest.mark.parametrize(("name", "experts", "tiny"), [("qwen3_vl", False, True), ("qwen3_vl_moe", True, False)])
def test_qwen3_vl_dense_and_with_experts(name: str, experts: bool, tiny: bool) -> None:
    family = family_of(vlm(name))
    assert (family.name, family.token_pixels) == (name, 32)
    assert family.image_token == "<|image_pad|>"
    assert (family.has_experts, family.builds_tiny) == (experts, tiny)


@pytest.mark.parametrize("known", [None, vlm("polar_vl", "sequential")])
def test_of_other_models_nothing_special_is_known(known: VLMConfig | None) -> None:
    family = family_of(known)
    assert type(family) is Family
    assert family.name == ("" if known is None else "polar_vl")
    assert (family.has_experts, family.builds_tiny) == (False, False)
    assert family.token_pixels is None
    assert family.image_bounds(ModelConfig(name="x", vlm=known)) is None
    assert family.vision_parameters({"hidden_size": 64}) is None
    assert family.tiny_problem(TinyConfig(head_dim=6)) is None


def test_bounds_of_an_image_depend_on_where_the_checkpoint_comes_from() -> None:
    known = vlm("qwen3_vl")
    bounds = [
        family_of(known).image_bounds(ModelConfig(name="x", vlm=known, tiny=tiny, init=init))
        for tiny, init in ((None, Init.pretrained), (None, Init.random), (TinyConfig(), Init.pretrained))
    ]
    assert bounds == [ImageBounds(65536, 16777216), ImageBounds(1024, 16777216), ImageBounds(1024, 1048576)]


def test_positions_of_a_loaded_model() -> None:
    model_config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    text_only = family_of(None).position_function(SimpleNamespace())
    for positions in (text_only, family_of(vlm("polar_vl", "sequential")).position_function(model_config)):
        assert positions(2, (), ()).tolist() == [[0, 1]] * 4


def test_tokens_of_an_image_come_from_its_grid() -> None:
    processor = SimpleNamespace(merge_size=2)
    assert family_of(None).placeholder_tokens({"image_grid_thw": np.array([[1, 4, 6]])}, processor) == 6


def test_finding_a_family_imports_nothing_heavy() -> None:
    code = "import sys; from vlmrl.models.families import family_of; family_of(None); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers"} & set(ast.literal_eval(done.stdout))


# ── nothing else compares family names ──────────────────────────────────────────────────────────────────────


def compared_names(source: str) -> list[int]:
    """Lines that compare something with the name of a family or a part of one ("qwen", "_moe"), in whatever way: by an
    operator, `startswith`, `endswith`, a `match`, or a lookup in a dictionary that is keyed by names."""

    def names(*nodes: ast.AST) -> bool:
        texts = [n.value for node in nodes for n in ast.walk(node) if isinstance(n, ast.Constant)]
        return any(isinstance(text, str) and _is_part_of_a_name(text) for text in texts)

    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            found = names(node.left, *node.comparators)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            found = node.func.attr in ("startswith", "endswith", "removeprefix", "removesuffix") and names(*node.args)
        elif isinstance(node, ast.MatchValue):
            found = names(node.value)
        elif isinstance(node, ast.Dict):
            found = names(*(key for key in node.keys if isinstance(key, ast.Constant)))
        else:
            continue
        if found:
            lines.append(node.lineno if isinstance(node, ast.expr | ast.pattern) else 0)
    return lines


def _is_part_of_a_name(text: str) -> bool:
    return len(text) > 3 and any(text in name for name in FAMILIES)


@pytest.mark.parametrize(
    "planted",
    [
        'if vlm.family == "qwen3_vl": pass',
        'if "qwen3_vl_moe" != vlm.family: pass',
        'if vlm.family in ("other", "qwen3_vl"): pass',
        'if vlm.family.startswith("qwen3"): pass',
        'if vlm.family.endswith("_moe"): pass',
        'match vlm.family:\n    case "qwen3_vl": pass',
        'PIXELS = {"qwen3_vl": 32}[vlm.family]',
        'def f():\n    return "_moe" in vlm.family',
    ],
)
def test_a_comparison_is_found(planted: str) -> None:
    assert compared_names(planted)


def test_nothing_outside_the_families_compares_family_names() -> None:
    found = {
        str(path.relative_to(PACKAGE)): lines
        for path in PACKAGE.rglob("*.py")
        if PACKAGE / "models" / "families" not in path.parents
        for lines in [compared_names(path.read_text())]
        if lines
    }
    assert found == {}
