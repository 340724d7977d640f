"""The keys that can be set, their metadata, and what to say about a key that cannot be set. All from the schemas."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from vlmrl.config.field_docs import FieldDoc, fields_of
from vlmrl.config.fields import Resume, Setting
from vlmrl.config.run import RunConfig, group_of, schemas_of
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
    names = key.split(".")
    for end in range(len(names) - 1, 0, -1):
        above = ".".join(names[:end])
        for base in groups_at(above):
            kinds = schemas_of(base)
            owners = [kind for kind in kinds if any(_values(kinds[kind], names[end:]))]
            if owners:
                group = group_of(base)
                choice = group if group == above else f"+{group}@{above}"
                return f"there is no such key in the chosen option of {above}; {choice}={'|'.join(owners)} has it"
    siblings = [f"{above}.{field.name}" for above in (key.rpartition(".")[0],) for field in _fields_below(above)]
    return "there is no such key" + did_you_mean(key, [*known_keys(), *known_groups(), *siblings])


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
    return f"; did you mean {' or '.join(best[:3]).replace('*', '<name>')}?" if best else ""


def known_keys() -> list[str]:
    """The dotted keys that can be set, of all schemas; groups themselves are not in it.

    A schema that stands in several places counts at the first: the keys of a mixture's tasks (`task.tasks.*`) are those
    of `task`.

    >>> [key for key in known_keys() if key.endswith("image_size")]
    ['task.image_size']
    """
    return sorted({key for key, _ in all_settings()})


def known_groups() -> list[str]:
    """The groups of the root.

    >>> known_groups()[:3]
    ['model', 'task', 'reward']
    """
    return [field.name for field in fields_of(RunConfig) if field.schema is not None]


def settings_at(key: str) -> list[Setting]:
    """The metadata of a dotted key: of a value, of a free-form dictionary for a key in it, or of all values in a group.

    A key that several schemas of a mixed group share has one entry per schema.
    """
    values = [field.setting for field in values_at(key) if field.setting is not None]
    return values or [setting for schema in groups_at(key) for _, setting in all_settings(schema)]


def values_at(key: str) -> list[FieldDoc]:
    """The fields that a dotted key names: of every schema that may stand there. Empty for a group.

    >>> {field.name for field in values_at("task.args.level")}, values_at("task")
    ({'args'}, [])
    """
    return list(_values(RunConfig, key.split(".")))


def groups_at(key: str) -> list[type]:
    """The schemas that may stand at a dotted key: the base first, then those of the options of a mixed group.

    >>> [schema.__name__ for schema in groups_at("inference")], groups_at("seed")
    (['InferenceConfig', 'EmbeddedConfig', 'VllmConfig'], [])
    """
    return list(dict.fromkeys(_groups(RunConfig, key.split("."))))


def sections(schema: type = RunConfig) -> Iterator[tuple[str, tuple[type, ...]]]:
    """Dotted key and schemas of every group, the root first. `*` stands for any name.

    A schema that stands in several places comes once, at the place that is closest to the root. So the schemas of a
    mixture's tasks do not come again, and a task that holds tasks has an end.
    """
    waiting: list[tuple[str, tuple[type, ...]]] = [("", (schema,))]
    seen = {schema}
    while waiting:
        key, found = waiting.pop(0)
        yield key, found
        for each in found:
            for field in fields_of(each):
                if field.schema is not None and field.schema not in seen:
                    below = (field.schema, *schemas_of(field.schema).values())
                    seen |= {*below}
                    waiting.append((f"{key}.{field.name}{'.*' if field.by_name else ''}".lstrip("."), below))


def all_settings(schema: type = RunConfig) -> Iterator[tuple[str, Setting]]:
    """Dotted key and metadata of every value of a schema and of the schemas in it (`sections`)."""
    for key, found in sections(schema):
        for each in found:
            for field in fields_of(each):
                if field.setting is not None:
                    yield f"{key}.{field.name}".lstrip("."), field.setting


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
    return any(field.setting is not None and field.setting.free_form for field in values_at(key))


def _values(schema: type, names: Sequence[str]) -> Iterator[FieldDoc]:
    """The values that `names` lead to from a schema."""
    first, *rest = names
    for field in fields_of(schema):
        if field.name != first:
            continue
        if field.schema is None and (not rest or field.type_text == "dict"):
            yield field
        elif field.schema is not None:
            below = rest[1:] if field.by_name else rest
            if below:
                for each in (field.schema, *schemas_of(field.schema).values()):
                    yield from _values(each, below)


def _groups(schema: type, names: Sequence[str]) -> Iterator[type]:
    """The schemas that `names` lead to from a schema. All of a dictionary is the schemas of its entries."""
    first, *rest = names
    for field in fields_of(schema):
        if field.name == first and field.schema is not None:
            below = rest[1:] if field.by_name else rest
            for each in (field.schema, *schemas_of(field.schema).values()):
                if below:
                    yield from _groups(each, below)
                else:
                    yield each


def _fields_below(key: str) -> Iterator[FieldDoc]:
    for schema in groups_at(key) if key else ():
        yield from fields_of(schema)
