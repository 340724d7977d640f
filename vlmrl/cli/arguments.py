r"""Arguments of the command line: the abbreviations that Hydra does not know, spelled out.

    task=file.py:MyTask            task=/here/file.py:MyTask
    reward=[math,~/r.py:fn]        reward=[math,/home/me/r.py:fn]
    algorithm=my_losses:mine       algorithm.loss=my_losses:mine
    task.args.level=3              ++task.args.level=3
    task.args.path=/x/y=z          ++task.args.path='/x/y=z'
    model.name=~/models/a(1)       model.name='/home/me/models/a(1)'
    task.path=a.csv,b.csv          task.path=[a.csv,b.csv]
    task.template={{ q }}, ${a}    task.template='{{ q }}, \\${a}'
    runs=outputs/a                 runs=['outputs/a']
    hydra/launcher=slurm           hydra.mode=MULTIRUN hydra/launcher=slurm

words.py has read `mode=`, `resume=` and the like before; conf_files.py makes an option of each import path;
hydra_errors.py explains what Hydra refuses.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from vlmrl.cli.conf_files import ENTRIES, OF_IMPORTS, OF_SEVERAL, distinct
from vlmrl.cli.words import QUOTED, folders_in, parsed, parses
from vlmrl.config.conf_folder import CONF
from vlmrl.config.field_docs import FieldDoc
from vlmrl.config.import_paths import absolute, is_import_path
from vlmrl.config.keys import is_free_form, values_at
from vlmrl.config.parse import escaped
from vlmrl.errors import ConfigError

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

EXAMPLES = {
    "reward": ", e.g. reward=[exact] reward.terms.exact.weight=0.5",
    "tool": ", e.g. tool=[zoom] tool.zoom.size=448",
}
"""Group → how keys of its options are set by themselves."""

MULTIRUN = ("--multirun", "-m")


def rewrite(arguments: list[str]) -> list[str]:
    """Spell out the abbreviations in the module's docstring. Raises ConfigError.

    A launcher is for multiruns, so choosing one makes the command a multirun, even of a single job:

    >>> rewrite(["hydra/launcher=slurm", "seed=1"])
    ['hydra.mode=MULTIRUN', 'hydra/launcher=slurm', 'seed=1']

    Flags come first, because argparse takes no key=value on both sides of one:

    >>> rewrite(["task=my_tasks.counting:Counting", "task.args.level=3", "--multirun", "seed=0,1"])
    ['--multirun', 'task=my_tasks.counting:Counting', '++task.args.level=3', 'seed=0,1']
    """
    arguments = sorted(arguments, key=lambda argument: bool(re.match(r"~|[^-].*=", argument)))
    is_multirun = any(argument in MULTIRUN for argument in arguments)
    texts = [text for argument in arguments for text in _rewritten(argument, is_multirun=is_multirun)]
    for group, place in ENTRIES.items():
        chosen = (text.partition("=")[2] for text in texts if text.startswith(f"{group}="))
        if is_multirun and any(len(split(choices)) > 1 for choices in chosen):
            texts = [_in_each_job(text, place) for text in texts]
    return texts


def _in_each_job(text: str, place: str) -> str:
    """Where a sweep chooses the entries of `place`, Hydra composes a config without any first, in which their keys do
    not exist. As the only value of a sweep, a key is set in each job alone.

    >>> [_in_each_job(f"reward.terms.exact.{text}", "reward.terms") for text in ("weight=0.5", "weight=1,2")]
    ['reward.terms.exact.weight=choice(0.5)', 'reward.terms.exact.weight=1,2']
    """
    key, _, value = text.partition("=")
    if not key.lstrip("+").startswith(f"{place}.") or parsed(text) is ...:
        return text
    return f"{key}=choice({value})"


def rewrite_params(params: dict[str, str]) -> dict[str, str]:
    """Spell out the abbreviations in `hydra.sweeper.params`, where a sweep's file lists values.

    >>> rewrite_params({"task": "a.b:C,/d.py:E", "task.args.level": "1,2", "seed": "0,1"})
    {'task': 'a.b:C,/d.py:E', '++task.args.level': '1,2', 'seed': '0,1'}
    """
    texts = [text for key, value in params.items() for text in _rewritten(f"{key}={value}", is_multirun=True)]
    return dict(text.split("=", 1) for text in texts)


def _rewritten(argument: str, *, is_multirun: bool) -> list[str]:
    key, equals, value = argument.partition("=")
    bare = key.lstrip("+")
    group = bare.partition("@")[0]
    if key == "hydra/launcher":
        return ["hydra.mode=MULTIRUN", argument]
    if not equals or key.startswith("~"):
        return [argument]
    if bare == "algorithm" and ":" in value:
        choices = split(value)
        if not all(map(is_import_path, choices)):
            raise ConfigError(
                f"{argument} mixes import paths with names of options, which cannot be swept together: "
                "sweep over them in two commands"
            )
        return [f"algorithm.loss={','.join(map(_import_path, choices))}"]
    if group in (*OF_IMPORTS, *OF_SEVERAL):
        return [f"{key}={','.join(_choice(group, key, choice) for choice in split(value))}"]
    if is_free_form(bare):
        if NO_PLAIN_TEXT.match(value) is None:
            value = as_text(bare, value, is_multirun=is_multirun)
        return [f"{'++' if key == bare else ''}{key}={value}"]
    if bare in HYDRA_TEXT:
        return [f"{key}={as_text(key, value, is_multirun=is_multirun)}"]
    if key == "runs" and not is_multirun:
        return [f"runs=[{','.join(map(quoted, folders_in(value)))}]"]
    fields = [] if bare in NOT_PARSED or bare == "runs" else values_at(bare)
    return [f"{key}={_text(key, value, fields, is_multirun=is_multirun)}"] if fields else [argument]


def _text(key: str, value: str, fields: Sequence[FieldDoc], *, is_multirun: bool) -> str:
    """The value of a key, whose schema is one of `fields`, as Hydra has to read it."""
    settings = [field.setting for field in fields if field.setting is not None]
    if any(setting.form.raw for setting in settings):
        return raw_text(key, value)
    if any(setting.imports for setting in settings) and all(map(is_import_path, split(value))):
        return ",".join(map(_import_path, split(value)))
    if any(field.type_text.startswith("str or list of str") for field in fields):
        if value.startswith("[") and not parses(f"{key}={value}") and value.endswith("]"):
            return f"[{','.join(as_text(key, part, is_multirun=False) for part in split(value[1:-1]))}]"
        parts = split(value)
        if len(parts) > 1 and not is_multirun and not os.path.exists(os.path.expanduser(value)):
            return f"[{','.join(as_text(key, part, is_multirun=False) for part in parts)}]"
        if value.startswith("["):
            return value
    is_text = any(
        field.type_text in ("str", "str or null", "str or list of str") or field.type_text.endswith("or an import path")
        for field in fields
    )
    if is_text and isinstance(parsed(f"{key}={value}"), bool | int | float):  # a revision such as 1e10
        return quoted(value)
    return as_text(key, value, is_multirun=is_multirun) if is_text else value


def _choice(group: str, key: str, text: str) -> str:
    """One choice of a group, an option or a list of options. Raises ConfigError for a list with two equal options."""
    if text.startswith("{"):
        raise ConfigError(
            f"{key}={text} is no list of options of {group}: write {key}=[<option>,<option>], and set the keys of each "
            "by themselves" + EXAMPLES.get(group, "")
        )
    if not (text.startswith("[") and text.endswith("]")):
        return _option(text)
    options = [_option(part) for part in split(text[1:-1])]
    named = distinct(group, f"{key}={text}", [unquoted(option) for option in options])
    pairs = zip(options, named, strict=True)
    return f"[{','.join(given if unquoted(given) == name else _quoted_where_needed(name) for given, name in pairs)}]"


def _option(text: str) -> str:
    return _import_path(text) if is_import_path(unquoted(text)) else text


def _import_path(text: str) -> str:
    return _quoted_where_needed(absolute(unquoted(text)))


def _quoted_where_needed(text: str) -> str:
    return text if parsed(f"key={text}") == text else quoted(text)


def split(value: str) -> list[str]:
    """The parts of a value between its commas, except commas inside brackets or quotes.

    >>> split("a,[b,c],'d,e'"), split("data/{a,b}.csv"), split("")
    (['a', '[b,c]', "'d,e'"], ['data/{a,b}.csv'], [''])
    """
    parts, depth, quote = [""], 0, ""
    for letter in value:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not parts[-1].strip():
            quote = letter
        depth += 0 if quote else (letter in "([{") - (letter in ")]}")
        if letter == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def unquoted(text: str) -> str:
    """A text without the quotes around it."""
    value = parsed(f"key={text}") if QUOTED.fullmatch(text) else text
    return value if isinstance(value, str) else text


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


def raw_text(key: str, value: str) -> str:
    r"""A template, a pattern or a prompt in quotes, in which neither Hydra nor OmegaConf reads anything. A value that
    stands in quotes already is the text between them, and several of those are values to sweep over.

    >>> raw_text("task.template", "{{ q }}, ${a}"), raw_text("task.template", "'a','b'"), raw_text("k", r"\boxed\{1\}")
    ("'{{ q }}, \\${a}'", "'a','b'", "'\\boxed\\{1\\}'")
    >>> raw_text("task.system_prompt", "null")
    'null'
    """
    if value == "null":
        return value
    parts = split(value)
    if all(QUOTED.fullmatch(part) and parses(f"{key}={part}") for part in parts):
        return ",".join(quoted(escaped(unquoted(part))) for part in parts)
    return quoted(escaped(value))


def quoted(value: str) -> str:
    """A text in single quotes, by Hydra's rules: a backslash escapes only a quote or the backslashes before one.

    >>> quoted("it's"), quoted("C:\\\\")
    ("'it\\\\'s'", "'C:\\\\\\\\'")
    """
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value) + "'"


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
