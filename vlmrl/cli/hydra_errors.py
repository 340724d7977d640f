"""Errors of Hydra and OmegaConf in one or two lines that name the key and say what to do."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
from collections.abc import Iterator

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from vlmrl.cli.arguments import groups
from vlmrl.cli.conf_files import OF_SEVERAL
from vlmrl.cli.words import parsed
from vlmrl.config.conf_folder import CONF
from vlmrl.config.field_docs import fields_of
from vlmrl.config.keys import did_you_mean, is_free_form, unknown_key
from vlmrl.config.parse import summary
from vlmrl.config.run import RunConfig
from vlmrl.config.secrets import redacted_words
from vlmrl.errors import ConfigError, VlmrlError, describe
from vlmrl.preflight.installed import LAUNCHERS, pip_line

PARSERS = ("hydra", "omegaconf", "antlr4", "yaml")
"""Packages that read a command line and the files of conf/. What they raise is about what they were given."""


LAUNCHERS_CODE = ("submitit", "joblib", "hydra_plugins")
"""Packages that start the jobs of a sweep."""


@contextlib.contextmanager
def composing(arguments: list[str]) -> Iterator[None]:
    """Turn what Hydra, OmegaConf and their parsers raise in the block into a ConfigError, and what a launcher raises
    into a VlmrlError. A bug of vlmrl passes, and so does a folder that cannot be made."""
    try:
        yield
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(in_words(error, arguments)) from error
    except Exception as error:
        package = _package_that_raised(error)
        if package in LAUNCHERS_CODE:
            raise VlmrlError(
                f"the launcher cannot start the jobs ({' '.join(describe(error).split())}), so none runs: start it "
                "where the queue answers, or leave hydra/launcher= out to run them here, one after the other"
            ) from error
        is_of_a_folder = isinstance(error, OSError) and not str(error.filename).endswith(".yaml")
        if package not in PARSERS or is_of_a_folder:
            raise
        raise ConfigError(in_words(error, arguments)) from error


def _package_that_raised(error: Exception) -> str:
    """The package of the innermost frame outside the standard library: Hydra does not wrap each exception that its own
    code raises."""
    step, package = error.__traceback__, ""
    while step is not None:
        name = str(step.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        package = package if name in sys.stdlib_module_names else name
        step = step.tb_next
    return package


def in_words(error: Exception, arguments: list[str]) -> str:
    """The message for an error that `arguments` caused."""
    cause = error.__cause__
    where = f"{str(error).splitlines()[0]} " if str(error).startswith("In ") else ""  # "In '<file>': …"
    for plugin, extra in LAUNCHERS.items():
        if isinstance(error, MissingConfigException) and plugin in (error.missing_cfg_file or str(error)):
            group, _, option = plugin.rpartition("/")
            return f"{group}={option} needs a package that is not installed: {pip_line(extra)}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={option}: {group} has only {', '.join(error.options)}{did_you_mean(option, error.options)}"
    if about := _about_a_list_of_options(str(error), arguments):
        return about
    if isinstance(error, OverrideParseException):
        return _about_quotes(error)
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
    if isinstance(error, AssertionError) and (about := _about_an_absent_group(arguments)):
        return about
    if isinstance(error, OmegaConfBaseException):
        return summary(error)
    given = f"(in: {' '.join(redacted_words(arguments))})"
    if about := _about_odd_group(arguments):
        return about
    if not isinstance(error, HydraException | YAMLError | ValueError):
        return (
            f"these choices do not compose ({' '.join(describe(error).split())}), so there is no configuration to run: "
            f"write group=option for a group and key=value for a key {given}"
        )
    lines = [line for line in str(error).splitlines() if not line.startswith(("    reference_type", "    object_type"))]
    return "\n".join([*lines, given])


def _about_quotes(error: OverrideParseException) -> str:
    """Which part does not parse, and the same argument with quotes for Hydra inside quotes for the shell."""
    key, equals, value = str(error.override).partition("=")
    if is_free_form(key.lstrip("+")):
        key = key.lstrip("+")  # rewrite has added it
    (given,) = redacted_words([f"{key}{equals}{value}"])
    reason = " ".join(str(error).splitlines()[:-1])
    if not equals:
        return f"{given} does not parse as key=value: {reason}: write {key}=<value>, or remove it"
    if value.lstrip()[:1] in ("[", "{"):
        example = shlex.quote(f'{key}=["a=b","c,d"]')
        remedy = f"put each text in it into quotes, or all of it if it is one text, inside the shell's: {example}"
    else:
        (quoted,) = redacted_words([key + '="' + re.sub(r'(\\*)("|$)', _escaped, value) + '"'])
        remedy = f"put the value into quotes, inside the shell's: {shlex.quote(quoted)}"
    return f"{given} does not parse as key=value: {reason}: {remedy}"


def _escaped(found: re.Match[str]) -> str:
    return found[1] * 2 + ('\\"' if found[2] else "")


def _about_odd_group(arguments: list[str]) -> str | None:
    """The first argument `group=value` whose value is neither the name of an option nor a list of names."""
    for argument in arguments:
        key, equals, _ = argument.lstrip("+").partition("=")
        if equals and key in groups():
            value = parsed(argument)
            names = value if isinstance(value, list) else [value]
            if value is not ... and not all(isinstance(name, str) for name in names):
                return f"{argument} names no option of {key}: choose {key}=<one of {_options(key)}>"
    return None


def _options(group: str) -> str:
    return ", ".join(path.stem for path in sorted((CONF / group).glob("*.yaml")))


def _null_group(arguments: list[str]) -> str | None:
    """The group of the first argument `group=null`."""
    pairs = (argument.lstrip("+").partition("=") for argument in arguments)
    absent = (key for key, _, value in pairs if value in ("null", "None") and key.partition("@")[0] in groups())
    return next(absent, None)


def _about_a_list_of_options(text: str, arguments: list[str]) -> str | None:
    """Several options of a group where one is unknown, or where it is not clear whether all or each is meant."""
    if (found := re.search(r"Could not load '(.+)/([^/']+)'", text)) and found[1] in groups():
        group, option = found[1], found[2]
        given = next((argument for argument in arguments if argument.lstrip("+").startswith(f"{group}=")), group)
        known = [path.stem for path in (CONF / group).glob("*.yaml")]
        return f"{given}: {group} has no option {option}, only {_options(group)}{did_you_mean(option, known)}"
    if found := re.search(r"Ambiguous value for argument '(([^='+~]+)=([^']*))'", text):
        given, group, options = found[1], found[2], found[3]
        if group in OF_SEVERAL:
            return (
                f"{given} may mean one run with all of these or a run with each: write {group}=[{options}] for one "
                "run, or add --multirun for a run with each"
            )
    return None


def _about_null(group: str) -> str:
    if "@" in group:
        return f"{group}=null chooses no option, so there is nothing to add: remove it, or name an option"
    options = _options(group)
    needed = [field.name for field in fields_of(RunConfig) if field.schema is not None and field.default == "???"]
    if group in needed:
        return f"{group}=null chooses no option, and a run needs one: choose {group}=<one of {options}>"
    return (
        f"{group}=null is not how Hydra leaves a group out: write ~{group} or {group}=[], "
        f"or choose {group}=<one of {options}>"
    )


def _about_an_absent_group(arguments: list[str]) -> str | None:
    """Hydra asserts where a key is set in a group that is null."""
    nested = ["model.tiny", *(group.replace("/", ".") for group in groups() if "/" in group)]
    absent = [key for key in arguments if key.lstrip("+").startswith(tuple(f"{group}." for group in nested))]
    if not absent:
        return None
    group = absent[0].lstrip("+").partition("=")[0].rpartition(".")[0]
    option = group.replace(".", "/")
    remedy = f"choose an option with {option}=… as well" if option in groups() else "choose another option of its group"
    return f"{absent[0]}: {group} is null under these choices, so it has no keys: {remedy}"
