"""The keys that can be set, their metadata, and what to say about a key that cannot be set. All from the schemas."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence

from vlmrl.config.field_docs import alternatives_of, fields_of
from vlmrl.config.fields import Resume, Setting, setting_of
from vlmrl.config.run import SCHEMAS, RunConfig, schemas_of
from vlmrl.errors import ConfigError


def unknown_key(key: str) -> str:
    """The error text for a key that no schema has.

    >>> unknown_key("trainer.lr")
    'there is no such key; did you mean trainer.learning_rate or trainer.warmup.learning_rate?'
    >>> unknown_key("group_size")
    'there is no such key; did you mean orchestrator.group_size?'
    >>> unknown_key("modle")
    'there is no such key; did you mean mode or model?'

    For a key that only other options of a mixed group have, the text names them:

    >>> unknown_key("inference.replicas")
    'there is no such key in the chosen option of inference; inference=vllm has it'
    """
    group, _, name = key.partition(".")
    owners = [
        kind
        for kind, schema in SCHEMAS.get(group, {}).items()
        if name.partition(".")[0] in {field.name for field in dataclasses.fields(schema)}
    ]
    if owners and (key in known_keys() or is_free_form(key)):
        return f"there is no such key in the chosen option of {group}; {group}={'|'.join(owners)} has it"
    return "there is no such key" + did_you_mean(key, [*known_keys(), *known_groups()])


def did_you_mean(word: str, candidates: Sequence[str]) -> str:
    """`; did you mean a or b?`, or "" where no candidate is close.

    Dotted names are compared by their last part, or by its initials (`lr`); the rest decides between equals.
    """
    last_part = word.rpartition(".")[2]
    scores = {}
    for candidate in candidates:
        name = candidate.rpartition(".")[2]
        initials = "".join(part[:1] for part in name.split("_"))
        likeness = 1.0 if last_part == initials else difflib.SequenceMatcher(None, last_part, name).ratio()
        if sorted(last_part) == sorted(name):  # swapped letters
            likeness = max(likeness, 0.95)
        if likeness >= 0.7:
            scores[candidate] = likeness + difflib.SequenceMatcher(None, word, candidate).ratio() / 2
    best = [candidate for candidate in scores if scores[candidate] > max(scores.values()) - 0.1]
    return f"; did you mean {' or '.join(best[:3])}?" if best else ""


def known_keys() -> list[str]:
    """Every dotted key that can be set, of all schemas; groups themselves are not in it.

    >>> [key for key in known_keys() if key.endswith("image_size")]
    ['task.image_size']
    """
    return sorted({key for key, _ in all_settings()})


def known_groups() -> list[str]:
    """The groups of the root.

    >>> known_groups()[:3]
    ['model', 'task', 'orchestrator']
    """
    return [field.name for field in fields_of(RunConfig) if field.schema is not None]


def settings_at(key: str) -> list[Setting]:
    """The metadata of a dotted key: of a value, of a free-form dictionary for a key in it, or of all values in a group.

    A key that several schemas of a mixed group share has one entry per schema.
    """
    return list(_settings_at(RunConfig, key.split(".")))


def all_settings(schema: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, Setting]]:
    """Dotted key and metadata of every value of a schema and of the schemas in it. `*` stands for any name."""
    for name, setting, nested, wildcard in _fields(schema):
        if setting is not None:
            yield prefix + name, setting
        for each in nested:
            yield from all_settings(each, f"{prefix}{name}.{wildcard}")


def resume_policy(key: str) -> Resume:
    """What a resumed run may do with a key: the strictest policy of the values that it names.

    >>> resume_policy("seed").name, resume_policy("trainer.learning_rate").name, resume_policy("monitor.live").name
    ('refused', 'noted', 'free')
    >>> resume_policy("task.args.level").name, resume_policy("model").name
    ('noted', 'refused')

    Raises `ConfigError` where no schema has the key.
    """
    policies = {setting.on_resume for setting in settings_at(key)}
    if not policies:
        raise ConfigError(f"{key}: {unknown_key(key)}")
    return next(policy for policy in Resume if policy in policies)  # Resume lists the strictest first


def is_free_form(key: str) -> bool:
    """Whether a key is a dictionary whose keys no schema knows, or lies in one.

    >>> is_free_form("task.args.level"), is_free_form("inference.extra_args"), is_free_form("task")
    (True, True, False)
    """
    names = key.split(".")
    return any(
        setting.free_form and all(name in ("*", own) for name, own in zip(pattern, names[: len(pattern)], strict=True))
        for known, setting in all_settings(RunConfig)
        if len(pattern := known.split(".")) <= len(names)
    )


def _settings_at(schema: type, names: Sequence[str]) -> Iterator[Setting]:
    first, *rest = names
    for name, setting, nested, wildcard in _fields(schema):
        if name != first:
            continue
        if setting is not None and (not rest or wildcard):
            yield setting
        below = rest[1:] if wildcard else rest
        for each in nested:
            yield from _settings_at(each, below) if below else (found for _, found in all_settings(each))


def _fields(schema: type) -> Iterator[tuple[str, Setting | None, list[type], str]]:
    """Name, metadata, schemas of what it holds, and `*.` where it is a dictionary, of each field."""
    types = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        alternatives = alternatives_of(types[field.name])
        wildcard = ""
        if typing.get_origin(types[field.name]) is dict:
            alternatives, wildcard = typing.get_args(types[field.name])[1:], "*."
        bases = [each for each in alternatives if isinstance(each, type) and dataclasses.is_dataclass(each)]
        nested = [each for base in bases for each in (base, *schemas_of(base).values())]
        yield field.name, setting_of(field), nested, wildcard
