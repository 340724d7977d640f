"""Arguments of the command line: the abbreviations that Hydra does not know, spelled out.

    task=my_module:MyTask       task=imported task.target=my_module:MyTask
    task.args.level=3           ++task.args.level=3
    task.args.path=/x/y=z       ++task.args.path='/x/y=z'
    model.name=~/models/a(1)    model.name='/home/me/models/a(1)'
    runs=outputs/a              runs=['outputs/a']
    hydra/launcher=slurm        hydra.mode=MULTIRUN hydra/launcher=slurm

words.py has read `mode=`, `resume=` and the like before; hydra_errors.py explains what Hydra refuses.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from vlmrl.cli.words import folders_in, parses
from vlmrl.config.field_docs import fields_of
from vlmrl.config.keys import is_free_form
from vlmrl.config.run import SCHEMAS, RunConfig
from vlmrl.errors import ConfigError

PACKAGE = Path(__file__).parents[1]
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())
"""conf/: inside the package where a wheel was installed, next to it in a checkout or an editable install."""


IMPORTED = {"task": ("task=imported", "task.target="), "algorithm": ("algorithm.loss=",)}
"""Groups whose option may be an import path → the overrides that it stands for; the path goes to the end."""

NOT_PARSED = ("resume", "run")
"""Text keys that past_runs.py reads as they stand, without Hydra's grammar."""

NO_PLAIN_TEXT = re.compile(
    r"""\s*(?:
          [\['"] | \{(?!\{)
        | (choice|range|interval|glob|tag|shuffle|sort|extend_list|int|float|str|bool|json_str)\s*\(
    )""",
    re.VERBOSE,
)
"""The begin of a value that is meant as a list, a dictionary, a quoted text or a call of Hydra's grammar."""

HYDRA_TEXT = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.job.name")
"""Keys of Hydra's own whose value is text."""

MULTIRUN = ("--multirun", "-m")


def rewrite(arguments: list[str]) -> list[str]:
    """Spell out the abbreviations in the module's docstring. Raises ConfigError.

    A launcher is for multiruns, so choosing one makes the command a multirun, even of a single job:

    >>> rewrite(["hydra/launcher=slurm", "seed=1"])
    ['hydra.mode=MULTIRUN', 'hydra/launcher=slurm', 'seed=1']

    Flags come first, because argparse takes no key=value on both sides of one:

    >>> rewrite(["task=my_tasks.counting:Counting", "task.args.level=3", "--multirun", "seed=0,1"])
    ['--multirun', 'task=imported', 'task.target=my_tasks.counting:Counting', '++task.args.level=3', 'seed=0,1']
    """
    arguments = sorted(arguments, key=lambda argument: bool(re.match(r"~|[^-].*=", argument)))
    is_multirun = any(argument in MULTIRUN for argument in arguments)
    return [text for argument in arguments for text in _rewritten(argument, is_multirun=is_multirun)]


def rewrite_params(params: dict[str, str]) -> dict[str, str]:
    """Spell out the abbreviations in `hydra.sweeper.params`, where a sweep's file lists values.

    >>> rewrite_params({"task": "a.b:C,d:E", "task.args.level": "1,2", "seed": "0,1"})
    {'task': 'imported', 'task.target': 'a.b:C,d:E', '++task.args.level': '1,2', 'seed': '0,1'}
    """
    texts = [text for key, value in params.items() for text in _rewritten(f"{key}={value}", is_multirun=True)]
    return dict(text.split("=", 1) for text in texts)


def _rewritten(argument: str, *, is_multirun: bool) -> list[str]:
    key, equals, value = argument.partition("=")
    if key == "hydra/launcher":
        return ["hydra.mode=MULTIRUN", argument]
    if key in IMPORTED and ":" in value:
        if not all(":" in choice for choice in value.split(",")):
            raise ConfigError(
                f"{argument} mixes import paths with names of options, which cannot be swept together: "
                "sweep over them in two commands"
            )
        *before, last = IMPORTED[key]
        return [*before, f"{last}{value}"]
    bare = key.lstrip("+")
    if equals and is_free_form(bare):
        if NO_PLAIN_TEXT.match(value) is None:
            value = as_text(bare, value, is_multirun=is_multirun)
        return [f"{'++' if key == bare else ''}{key}={value}"]
    if equals and bare in text_keys():
        return [f"{key}={as_text(key, value, is_multirun=is_multirun)}"]
    if key == "runs" and equals and not is_multirun:
        return [f"runs=[{','.join(map(quoted, folders_in(value)))}]"]
    return [argument]


def with_quoted_words(arguments: list[str]) -> list[str]:
    """Quote the values of `NOT_PARSED` for Hydra, for a command that does not read them itself.

    >>> with_quoted_words(["run=a=b", "seed=1"])
    ["run='a=b'", 'seed=1']
    """
    pairs = [(argument, *argument.partition("=")) for argument in arguments]
    return [
        f"{key}={as_text(key, value, is_multirun=False)}" if key in NOT_PARSED else text
        for text, key, _, value in pairs
    ]


def as_text(key: str, value: str, *, is_multirun: bool) -> str:
    """The value of a key that holds text, in quotes where Hydra's grammar cannot parse it. `~/` at its start is the
    home folder, as in a shell. The values of a sweep are quoted one by one.

    >>> as_text("model.name", "日本(1).parquet", is_multirun=False), as_text("model.name", "a/b", is_multirun=False)
    ("'日本(1).parquet'", 'a/b')
    >>> as_text("model.name", "a,b=1", is_multirun=True), as_text("model.name", "a,b=1", is_multirun=False)
    ("a,'b=1'", "'a,b=1'")
    """
    if is_multirun and "," in value and not set(value) & set("[](){}'\""):  # a list of values to sweep over
        return ",".join(as_text(key, part, is_multirun=False) for part in value.split(","))
    if value.startswith("~/"):
        value = os.path.expanduser(value)
    return value if parses(f"{key}={value}") else quoted(value)


def quoted(value: str) -> str:
    """A text in single quotes, by Hydra's rules: a backslash escapes only a quote or the backslashes before one.

    >>> quoted("it's"), quoted("C:\\\\")
    ("'it\\\\'s'", "'C:\\\\\\\\'")
    """
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"


@functools.cache
def text_keys() -> frozenset[str]:
    """The keys whose value is text by their schema.

    >>> sorted(key for key in text_keys() if key.startswith("model."))[:3]
    ['model.device', 'model.name', 'model.size.name']
    """
    return frozenset({*_text_keys(RunConfig, ""), *HYDRA_TEXT} - {*NOT_PARSED})


def _text_keys(schema: type, prefix: str) -> Iterator[str]:
    for field in fields_of(schema):
        key = prefix + field.name
        if field.type_text in ("str", "str or null") or field.type_text.endswith("or an import path"):
            yield key
        for nested in {field.schema, *SCHEMAS.get(key, {}).values()}:
            if nested is not None:
                yield from _text_keys(nested, f"{key}.")


def groups() -> list[str]:
    """The config groups, as the command line names them.

    >>> [group for group in groups() if group.startswith(("orchestrator", "sweep"))]
    ['orchestrator', 'orchestrator/renderer', 'sweep']
    """
    # conf/sweep is a link to sweeps/ in a checkout, which Path.rglob does not follow.
    folders = [
        Path(folder).relative_to(CONF).as_posix() for folder, _, names in os.walk(CONF, followlinks=True) if names
    ]
    return sorted(set(folders) - {"."})
