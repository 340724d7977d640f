"""The keys that can be set, and what to say about one that cannot. All from the schemas."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence

from vlmrl.config.field_docs import fields_of
from vlmrl.config.run import SCHEMAS, RunConfig


def unknown_key(key: str) -> str:
    """What to say about a key that no schema has.

    >>> unknown_key("trainer.lr")
    'there is no such key; did you mean trainer.learning_rate or trainer.warmup.learning_rate?'
    >>> unknown_key("group_size")
    'there is no such key; did you mean orchestrator.group_size?'
    >>> unknown_key("modle")
    'there is no such key; did you mean mode or model?'
    """
    return "there is no such key" + did_you_mean(key, [*known_keys(), *known_groups()])


def did_you_mean(word: str, candidates: Sequence[str]) -> str:
    """`; did you mean a or b?`, or nothing where no candidate is close.

    Dotted names are close by their last part, initials included (`lr`); the rest decides between equals.
    """
    last_part = word.rpartition(".")[2]
    scores = {}
    for candidate in candidates:
        name = candidate.rpartition(".")[2]
        initials = "".join(part[:1] for part in name.split("_"))
        likeness = 1.0 if last_part == initials else difflib.SequenceMatcher(None, last_part, name).ratio()
        if sorted(last_part) == sorted(name):  # letters that changed places
            likeness = max(likeness, 0.95)
        if likeness >= 0.7:
            scores[candidate] = likeness + difflib.SequenceMatcher(None, word, candidate).ratio() / 2
    best = [candidate for candidate in scores if scores[candidate] > max(scores.values()) - 0.1]
    return f"; did you mean {' or '.join(best[:3])}?" if best else ""


def known_keys() -> list[str]:
    """Every key that can be set, dotted; of all the schemas, without the groups themselves.

    >>> [key for key in known_keys() if key.endswith("image_size")]
    ['task.image_size']
    """
    return sorted(set(_keys_of(RunConfig, "")))


def known_groups() -> list[str]:
    """The groups of the root.

    >>> known_groups()[:3]
    ['model', 'task', 'orchestrator']
    """
    return [field.name for field in fields_of(RunConfig) if field.schema is not None]


def _keys_of(schema: type, prefix: str) -> Iterator[str]:
    types = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key = prefix + field.name
        choices = [types[field.name], *typing.get_args(types[field.name]), *SCHEMAS.get(key, {}).values()]
        nested = [choice for choice in choices if isinstance(choice, type) and dataclasses.is_dataclass(choice)]
        if not nested:
            yield key
        for choice in nested:
            yield from _keys_of(choice, f"{key}.")
