"""Write conf/REFERENCE.md from the schemas and the files of conf/:

    python -m vlmrl.cli.reference > conf/REFERENCE.md

tests/unit/test_docs.py fails while the file in the repository differs from this output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from vlmrl.cli.explain import leaves, text_of
from vlmrl.config.conf_folder import CONF
from vlmrl.config.field_docs import FieldDoc, fields_of, summary_of, unit_of
from vlmrl.config.keys import sections
from vlmrl.config.run import PLACED

HEAD = """\
# Every key

`python -m vlmrl.cli.reference > conf/REFERENCE.md` writes this file from the schemas (`vlmrl/config/`) and the files \
of this folder; do not edit it. `python -m vlmrl explain <key>` prints the same on the command line, and where a value \
comes from.

`group=option` chooses an option of a group, `key=value` sets a key. The tables show the defaults of the schemas; an \
option's own values follow its name.
"""


def reference(conf: Path = CONF) -> str:
    """The text of the whole file."""
    return "\n".join([HEAD, *_section("", dict(sections()), conf), *_experiments(conf)]) + "\n"


def _section(key: str, places: Mapping[str, tuple[type, ...]], conf: Path) -> Iterator[str]:
    """The section of a group: summary, options and keys, followed by the sections of the groups in it.

    `places` are the groups with a section; a schema that stands in several places has one.
    """
    schema, *kinds = places[key]
    group = PLACED.get(key, key.replace(".", "/"))
    yield f"## `{key if key in PLACED else group}`\n" if key else "## The run\n"
    yield f"{summary_of(schema)}\n"
    if (conf / group).is_dir() and key and key not in PLACED.values():
        yield from _options(conf / group)
        for folder in sorted(path for path in (conf / group).iterdir() if path.is_dir()):
            if f"{key}.{folder.name}" not in places:  # its options set keys of this group
                yield f"### `{group}/{folder.name}`\n"
                yield from _options(folder)
    prefix = f"{key}." if key else ""
    shared = [field for field in fields_of(schema) if field.schema is None]
    yield from _table(prefix, shared)
    for own in kinds:
        known = {(field.name, field.type_text) for field in shared if field.default == "???" or field.name == "kind"}
        fields = [field for field in fields_of(own) if field not in shared and (field.name, "str") not in known]
        yield f"With `{group}={_kind(own)}`: {summary_of(own)}\n"
        if values := [field for field in fields if field.schema is None]:
            yield from _table(prefix, values)
    owners = {schema: _kind(schema) for schema in kinds}
    for each in (schema, *kinds):
        for field in fields_of(each):
            below = f"{prefix}{field.name}{'.*' if field.by_name else ''}"
            if field.schema is None or (each in owners and field in fields_of(schema)):
                continue
            if field.schema in places.get(below, ()):
                yield from _section(below, places, conf)
            else:
                first = next(place for place, found in places.items() if field.schema in found)
                yield f"`{below}`: {field.doc} Its keys are those of `{first}`.\n"


def _kind(schema: type) -> str:
    return next(str(field.default) for field in fields_of(schema) if field.name == "kind")


def _options(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.yaml")):
        sets = ", ".join(f"`{key}={value}`" for key, value in leaves(_tree(path), ""))
        yield (
            f"- `{path.stem}`" + (f": {_comment(path)}" if _comment(path) else "") + (f" Sets {sets}." if sets else "")
        )
    yield ""


def _experiments(conf: Path) -> Iterator[str]:
    yield "## `experiment`\n"
    yield "Several choices under one name, applied after those of the groups. No experiment is chosen by default.\n"
    yield from _options(conf / "experiment")


def _tree(path: Path) -> DictConfig:
    tree = OmegaConf.load(path)
    assert isinstance(tree, DictConfig)
    return tree


def _comment(path: Path) -> str:
    """The comment at the top of a file, without Hydra's `@package` line."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def _table(prefix: str, fields: list[FieldDoc]) -> Iterator[str]:
    yield "| key | value | default | |"
    yield "|---|---|---|---|"
    for field in fields:
        limits = field.setting.range if field.setting is not None else None
        about = "; ".join(part for part in (field.type_text, unit_of(field), limits.text if limits else "") if part)
        default = "" if field.default == "???" else f"`{text_of(field.default)}`"
        meanings = "".join(f"<br>`{name}`: {meaning}" for name, meaning in field.choices.items() if meaning)
        cells = (f"`{prefix}{field.name}`", about, default, field.doc + meanings)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


if __name__ == "__main__":
    print(reference(), end="")
