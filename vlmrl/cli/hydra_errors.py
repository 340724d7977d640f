"""Errors of Hydra and OmegaConf in one or two lines that name the key and say what to do."""

from __future__ import annotations

import re

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from vlmrl.cli.arguments import CONF, groups
from vlmrl.config.field_docs import fields_of
from vlmrl.config.keys import did_you_mean, unknown_key
from vlmrl.config.parse import summary
from vlmrl.config.run import RunConfig
from vlmrl.preflight.installed import LAUNCHERS, pip_line


def in_words(error: Exception, arguments: list[str]) -> str:
    """The message for an error that `arguments` caused. Raises the error itself where it is a bug."""
    cause = error.__cause__
    where = f"{str(error).splitlines()[0]} " if str(error).startswith("In ") else ""  # "In '<file>': …"
    for plugin, extra in LAUNCHERS.items():
        if isinstance(error, MissingConfigException) and plugin in (error.missing_cfg_file or str(error)):
            group, _, option = plugin.rpartition("/")
            return f"{group}={option} needs a package that is not installed: {pip_line(extra)}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={option}: {group} has only {', '.join(error.options)}{did_you_mean(option, error.options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override} does not parse as key=value: {' '.join(str(error).splitlines()[:-1])}"
    if "Got NoneType" in str(error) and (absent := _null_group(arguments)):
        return _about_null(absent)
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        named = re.search(r"Could not override '(.+?)'", str(error))
        key = named[1] if named else cause.full_key or str(cause.key)
        if "/" in key:
            return f"{key}: there is no such group{did_you_mean(key, groups())}"
        return f"{where}{key}: {unknown_key(key)}"
    if isinstance(cause, OmegaConfBaseException):
        return f"{where}{summary(cause)}"
    if isinstance(error, AssertionError):
        return _about_an_absent_group(error, arguments)
    if isinstance(error, OmegaConfBaseException):
        return summary(error)
    lines = [line for line in str(error).splitlines() if not line.startswith(("    reference_type", "    object_type"))]
    return "\n".join([*lines, f"(in: {' '.join(arguments)})"])


def _null_group(arguments: list[str]) -> str | None:
    """The group of the first argument `group=null`."""
    pairs = (argument.lstrip("+").partition("=") for argument in arguments)
    return next((key for key, _, value in pairs if value in ("null", "None") and key in groups()), None)


def _about_null(group: str) -> str:
    options = ", ".join(path.stem for path in sorted((CONF / group).glob("*.yaml")))
    needed = [field.name for field in fields_of(RunConfig) if field.schema is not None and field.default == "???"]
    if group in needed:
        return f"{group}=null chooses no option, and a run needs one: choose {group}=<one of {options}>"
    return (
        f"{group}=null is not how Hydra leaves a group out: write ~{group} or {group}=[], "
        f"or choose {group}=<one of {options}>"
    )


def _about_an_absent_group(error: AssertionError, arguments: list[str]) -> str:
    """Hydra asserts where a key is set in a group that is null. Any other assertion is raised again."""
    nested = ["model.tiny", *(group.replace("/", ".") for group in groups() if "/" in group)]
    absent = [key for key in arguments if key.lstrip("+").startswith(tuple(f"{group}." for group in nested))]
    if not absent:
        raise error
    group = absent[0].lstrip("+").partition("=")[0].rpartition(".")[0]
    option = group.replace(".", "/")
    remedy = f"choose an option with {option}=… as well" if option in groups() else "choose another option of its group"
    return f"{absent[0]}: {group} is null under these choices, so it has no keys: {remedy}"
