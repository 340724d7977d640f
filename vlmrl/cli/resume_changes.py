"""What a resumed run may change: the values before and after the overrides, judged by their effect.

    config.yaml ─▶ leaves_of ─┐
                              ├─▶ changes ─▶ each by `Resume` of its field: refused, noted or free
    overrides ───▶ leaves_of ─┘

It does not matter how a value was set (`key=`, `++key=`, `~key`, `group=option`), only whether it differs afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from omegaconf import MISSING, DictConfig, OmegaConf

from vlmrl.cli.explain import text_of
from vlmrl.config.fields import Resume
from vlmrl.config.keys import resume_policy
from vlmrl.errors import ConfigError


def notes_on_changes(recorded: Mapping[str, object], now: Mapping[str, object], folder: str) -> list[str]:
    """A sentence for each changed value that the schema wants reported. Raises ConfigError if one must not change."""
    notes = []
    for key, (old, new) in changes(recorded, now).items():
        policy = resume_policy(key)
        if (term := _TERM.fullmatch(key)) is not None and (key in recorded) != (key in now):
            raise _other_terms(term[1], recorded, now, folder)
        if policy is Resume.refused:
            raise ConfigError(
                f"{key}={new} cannot continue resume={folder}, which ran with {key}={old}: the checkpoint would not "
                f"fit, or the steps would not belong to one run. Remove what sets {key} from the command, or start a "
                "new run without resume="
            )
        if policy is Resume.noted:
            notes.append(f"{key} changes from {old} to {new}, so the curves may bend from here on")
    return notes


_TERM = re.compile(r"((?:.+\.)?reward\.terms)\.([^.]+)\.kind")


def _other_terms(terms: str, recorded: Mapping[str, object], now: Mapping[str, object], folder: str) -> ConfigError:
    """The refusal of reward terms that the run did not have, or has no longer. `terms` is their key."""
    before, after = (
        [match[2] for match in map(_TERM.fullmatch, values) if match is not None and match[1] == terms]
        for values in (recorded, now)
    )
    remedy = f"keep its terms and change their weights ({terms}.{before[0]}.weight=0 leaves one out)" if before else ""
    return ConfigError(
        f"{terms} has {', '.join(after) or 'no term'} and resume={folder} ran with {', '.join(before) or 'none'}, so "
        f"the rewards of one run would have two meanings: {remedy}{', or ' if remedy else ''}start a new run from its "
        f"model (python -m vlmrl mode=export resume={folder}, then model.name=<the exported folder>)"
    )


def changes(recorded: Mapping[str, object], now: Mapping[str, object]) -> dict[str, tuple[str, str]]:
    """Key → the value before and after, as texts, for each value that differs. A key that is absent reads `null`.

    Values differ where their types do: `3` and `'3'` are not the same setting of a task.

    >>> changes({"seed": 0, "task.args.level": 3, "eps": 1e-8}, {"seed": 0, "task.args.level": "3", "eps": 1e-08})
    {'task.args.level': ('3', "'3'")}
    >>> changes({"task.args": {}}, {"task.args.level": 3})
    {'task.args.level': ('null', '3')}
    """
    groups = {key[:end] for key in (*recorded, *now) for end, letter in enumerate(key) if letter == "."}
    found = {}
    # The kind of a mixed group comes first: where it differs, so do the keys of the group.
    for key in sorted({*recorded, *now} - groups, key=lambda key: (not key.endswith(".kind"), key)):
        old, new = (values.get(key, MISSING) for values in (recorded, now))
        if not _equal(old, new):
            texts = [text_of(None if value == MISSING else value) for value in (old, new)]
            if texts[0] == texts[1]:
                texts = ["absent" if value == MISSING else repr(value) for value in (old, new)]
            found[key] = (texts[0], texts[1])
    return found


def _equal(old: object, new: object) -> bool:
    match old, new:
        case (dict(), dict()):
            return old.keys() == new.keys() and all(_equal(old[key], new[key]) for key in old)
        case (list() | tuple(), list() | tuple()):
            return len(old) == len(new) and all(map(_equal, old, new))
    return type(old) is type(new) and (old == new or (old != old and new != new))  # NaN is the same setting as NaN


def leaves_of(config: DictConfig) -> dict[str, object]:
    """Dotted key → value. A dictionary without keys counts as a value; values that are not set are left out."""

    def walk(node: object, key: str) -> Iterator[tuple[str, object]]:
        if isinstance(node, dict) and node:
            for name, child in node.items():
                yield from walk(child, f"{key}.{name}" if key else str(name))
        elif node != MISSING:
            yield key, node

    return dict(walk(OmegaConf.to_container(config, resolve=True, enum_to_str=True), ""))
