"""conf/, the dataclasses and what is said about them: held together for whatever is added."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlmrl
from vlmrl.cli.reference import reference
from vlmrl.config.conf_folder import CONF, PACKAGE
from vlmrl.config.field_docs import UNITS, FieldDoc, fields_of, unit_of
from vlmrl.config.keys import groups_at, known_keys, sections
from vlmrl.config.ranges import range_text
from vlmrl.config.run import PLACED, SCHEMAS, RunConfig


def documented() -> Iterator[tuple[str, FieldDoc]]:
    """Every field of every schema by its dotted key; a key that several schemas have, several times."""
    for key, found in sections():
        for schema in found:
            for field in fields_of(schema):
                yield f"{key}.{field.name}".lstrip("."), field


FIELDS = list(documented())
NUMBERS = [(key, field) for key, field in FIELDS if field.is_number]


def test_every_key_is_found() -> None:
    assert {key for key, field in FIELDS if field.schema is None} == set(known_keys())


@pytest.mark.parametrize(("key", "field"), FIELDS, ids=[key for key, _ in FIELDS])
def test_every_field_is_explained(key: str, field: FieldDoc) -> None:
    assert field.doc, f"{key} has no docstring: write a string below it that says what it means"
    assert field.schema is None or inspect.getdoc(field.schema), f"{field.schema} has no docstring"


@pytest.mark.parametrize(("key", "field"), NUMBERS, ids=[key for key, _ in NUMBERS])
def test_every_number_has_a_unit_and_a_range(key: str, field: FieldDoc) -> None:
    assert unit_of(field), f"{key}: its docstring has no unit. Name one of {', '.join(UNITS)} (field_docs.UNITS)"
    assert range_text(key), f"{key} has no row in vlmrl.config.ranges.RANGES"


def test_a_folder_of_conf_is_a_group_of_the_schema() -> None:
    folders = {path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")} - {"."}
    for folder in {folder for folder in folders if not folder.startswith("hydra")} - {"experiment", "monitor/logger"}:
        place = next((place for place, group in PLACED.items() if group == folder), folder.replace("/", "."))
        assert groups_at(place), folder


def test_a_group_of_the_root_has_a_folder_of_conf_and_an_owner() -> None:
    for field in fields_of(RunConfig):
        if field.schema is not None:
            assert list((CONF / field.name).glob("*.yaml")), f"conf/{field.name}/ has no option"
            for schema in (field.schema, *SCHEMAS.get(field.name, {}).values()):
                owner = Path(inspect.getfile(schema)).relative_to(PACKAGE).as_posix()
                owners = (
                    f"config/{field.name}.py",
                    *(
                        f"config/{name}.py"
                        for name in ("clip_direction", "dataset", "gymnasium", "program", "small_print", "verifiers")
                    ),
                )
                assert owner in owners, f"{schema} of {field.name}: {owner}"


def test_an_option_with_a_schema_of_its_own_has_a_file_of_its_own() -> None:
    for group, options in SCHEMAS.items():
        assert {path.stem for path in (CONF / group).glob("*.yaml")} == set(options)
        for option in options:
            text = (CONF / group / f"{option}.yaml").read_text()
            assert f"- /schema/{group}/{option}@_here_" in text, f"conf/{group}/{option}.yaml does not name its schema"


def test_the_reference_is_up_to_date() -> None:
    path = Path(vlmrl.__file__).parents[1] / "conf/REFERENCE.md"
    if not path.exists():
        pytest.skip("not a checkout")
    assert path.read_text() == reference(), "run: python -m vlmrl.cli.reference > conf/REFERENCE.md"


def test_a_field_without_a_docstring_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "undocumented.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass C:\n    a: int = 1\n    b: int = 2\n    'Tokens.'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import undocumented  # type: ignore[import-not-found]

    assert [(field.doc, unit_of(field)) for field in fields_of(undocumented.C)] == [("", ""), ("Tokens.", "tokens")]
