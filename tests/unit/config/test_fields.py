"""Metadata of fields: every value has a resume policy, and keys are found wherever they lie."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from vlmrl.config import keys
from vlmrl.config.field_docs import fields_of
from vlmrl.config.fields import PATTERN, PROSE, SMALLEST, Range, Resume, Setting, setting, setting_of
from vlmrl.config.keys import all_settings, is_free_form, known_keys, resume_policy, sections, settings_at
from vlmrl.config.model import LoraConfig
from vlmrl.config.orchestrator import STOP
from vlmrl.config.ranges import numbers_with_ranges
from vlmrl.config.run import SCHEMAS
from vlmrl.config.trainer import TrainerConfig
from vlmrl.errors import ConfigError

SCHEMA_FIELDS = [(schema, each) for _, found in sections() for schema in found for each in dataclasses.fields(schema)]


INFINITY_MEANS_OFF = {"max_grad_norm", "clip_high", "importance_cap"}
"""Numbers without a highest value: with infinity, nothing is cut."""


@pytest.mark.parametrize(("schema", "one"), SCHEMA_FIELDS, ids=[f"{s.__name__}.{f.name}" for s, f in SCHEMA_FIELDS])
def test_every_value_has_a_policy_and_every_number_a_range(schema: type, one: dataclasses.Field[Any]) -> None:
    doc = next(doc for doc in fields_of(schema) if doc.name == one.name)
    found = setting_of(one)
    assert (found is None) == (doc.schema is not None), "values are settings, groups are not"
    if found is not None and doc.is_number:
        assert found.range is not None
        assert found.range.consequence
        assert found.range.low > -math.inf
        assert (found.range.high < math.inf) == (one.name not in INFINITY_MEANS_OFF)
    elif found is not None:
        assert found.range is None


@pytest.mark.parametrize(("schema", "one"), SCHEMA_FIELDS, ids=[f"{s.__name__}.{f.name}" for s, f in SCHEMA_FIELDS])
def test_no_text_may_be_empty(schema: type, one: dataclasses.Field[Any]) -> None:
    found = setting_of(one)
    if found is not None and one.name != "output_dir":
        for text in ("", " ", "a\n", "\0", "\x7f"):
            allowed = {" ", "a\n"} if found.form is STOP else {"a\n"} if found.form in (PROSE, PATTERN) else set()
            assert text not in found.form or text in allowed


def test_every_schema_of_a_mixed_group_has_its_kind() -> None:
    for kinds in SCHEMAS.values():
        for kind, schema in kinds.items():
            assert schema().kind == kind


# ── resume ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("key", "policy"),
    [
        *(
            (key, Resume.refused)
            for key in ("seed", "task.target", "task.kind", "model.tiny.hidden_size", "model.name")
        ),
        *((key, Resume.refused) for key in ("model", "model.lora.rank", "model.size.text.hidden_size", "output_dir")),
        *((key, Resume.noted) for key in ("trainer.learning_rate", "orchestrator.group_size", "task.args.level.x")),
        *((key, Resume.noted) for key in ("orchestrator.temperature", "algorithm.args", "trainer.warmup", "algorithm")),
        *((key, Resume.free) for key in ("trainer.threads", "trainer.checkpoint_every", "model.device", "monitor")),
        *((key, Resume.free) for key in ("inference.replicas", "inference.urls", "weight_sync.root")),
    ],
)
def test_policies(key: str, policy: Resume) -> None:
    assert resume_policy(key) is policy


def test_an_unknown_key_has_no_policy() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.lr: there is no such key; did you mean trainer\.learning_rate"):
        resume_policy("trainer.lr")
    with pytest.raises(ConfigError, match=r"trainer\.max_steps\.more"):
        resume_policy("trainer.max_steps.more")


# ── nesting and wildcards ───────────────────────────────────────────────────────────────────────────────────


@dataclass
class Item:
    """One of several."""

    weight: float = setting(1.0, on_resume=Resume.noted, low=0, outside="it pushes away")
    """Weight."""
    args: dict[str, Any] = setting({}, on_resume=Resume.free, free_form=True)
    """Anything."""


@dataclass
class Mixture:
    """Groups by name."""

    items: dict[str, Item] = field(default_factory=dict)
    """Each by its name."""
    first: Item | None = None
    """Or none."""


def test_named_groups_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "RunConfig", Mixture)
    assert [key for key, _ in all_settings(Mixture)] == ["items.*.weight", "items.*.args"], "each schema once"
    assert resume_policy("first.weight") is Resume.noted
    assert is_free_form("first.args.level")
    assert resume_policy("items.any_name.weight") is Resume.noted
    assert resume_policy("items.any_name") is resume_policy("items") is Resume.noted
    assert is_free_form("items.any_name.args.level")
    assert not is_free_form("items.any_name.weight")
    assert settings_at("items.any_name.pace") == []


def test_numbers_of_named_groups_are_found() -> None:
    config = Mixture(items={"a": Item(weight=2.0), "b": Item(weight=-1.0)})
    found = [(key, number, number in allowed) for key, number, allowed in numbers_with_ranges(config)]
    assert found == [("items.a.weight", 2.0, True), ("items.b.weight", -1.0, False)]


def test_numbers_of_lists_and_absent_groups() -> None:
    assert [number for key, number, _ in numbers_with_ranges(TrainerConfig()) if key == "betas"] == [0.9, 0.95]
    assert {key for key, _, _ in numbers_with_ranges(LoraConfig())} == {"rank", "alpha"}


def test_free_form_keys() -> None:
    free = [key for key in known_keys() if is_free_form(key)]
    assert free == [
        "algorithm.args",
        "inference.extra_args",
        "model.vlm.image_settings",
        "orchestrator.renderer.options",
        "reward.terms.*.args",
        "reward.terms.*.extra_body",
        "task.args",
        "task.env_kwargs",
        "task.weights",
        "tool.*.args",
    ]


# ── one setting ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_default_is_not_shared() -> None:
    one, other = Item(), Item()
    one.args["level"] = 3
    assert other.args == {}


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (Range(1, math.inf, ""), (1, 10**9, math.inf), (0, -1, math.nan)),
        (Range(SMALLEST, 100, ""), (5e-324, 100), (0, -1.0, 101, math.inf, math.nan)),
        (Range(0, 1, ""), (0, 0.5, 1), (-0.1, 1.1, math.nan)),
    ],
)
def test_ranges(allowed: Range, inside: tuple[float, ...], outside: tuple[float, ...]) -> None:
    assert all(number in allowed for number in inside)
    assert not any(number in allowed for number in outside)


def test_a_setting_carries_what_it_was_given() -> None:
    weight, args = map(setting_of, dataclasses.fields(Item))
    assert weight == Setting(Resume.noted, Range(0, math.inf, "it pushes away"))
    assert args == Setting(Resume.free, free_form=True)
