"""Arguments of the command line and Hydra's errors about them, in the words of this project.

    rewrite    what may be abbreviated, spelt out: import paths, keys that are not ours
    groups     the groups that there are
    in_words   an error of Hydra's or OmegaConf's, in one or two lines that name the key

Beside cli.py, because what continues or replays a run (past_runs.py) needs them too.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from vlmrl.config.keys import did_you_mean, unknown_key
from vlmrl.config.parse import summary
from vlmrl.errors import ConfigError

PACKAGE = Path(__file__).parents[1]
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())
"""conf/: inside the package where a wheel was installed, beside it in a checkout or an editable install."""


FREE = ("task.args", "algorithm.args", "inference.extra_args")
"""Dicts whose keys are not ours."""

IMPORTED = {"task": ("task=imported", "task.target="), "algorithm": ("algorithm.loss=",)}
"""Groups whose option may be an import path, and what it is short for; the path goes to the end."""

EXTRAS = {"hydra/launcher/joblib": "joblib", "hydra/launcher/submitit_slurm": "slurm", "hydra/sweeper/optuna": "optuna"}
"""What Hydra's plugins bring → the extra of ours that installs the plugin."""


def rewrite(arguments: list[str]) -> list[str]:
    """Spell out what the command line may abbreviate: import paths (`IMPORTED`), keys that are not ours (`FREE`), and
    that a launcher is for multiruns, be it of one job.

    >>> rewrite(["hydra/launcher=slurm", "seed=1"])
    ['hydra.mode=MULTIRUN', 'hydra/launcher=slurm', 'seed=1']

    Flags come first, because argparse takes no key=value on both sides of one.

    >>> rewrite(["task=my_tasks.counting:Counting", "task.args.level=3", "--multirun", "seed=0,1"])
    ['--multirun', 'task=imported', 'task.target=my_tasks.counting:Counting', '++task.args.level=3', 'seed=0,1']
    """
    rewritten = []
    arguments = sorted(arguments, key=lambda argument: bool(re.match(r"~|[^-].*=", argument)))
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "hydra/launcher":
            rewritten += ["hydra.mode=MULTIRUN", argument]
        elif key in IMPORTED and ":" in value:
            if not all(":" in choice for choice in value.split(",")):
                raise ConfigError(
                    f"{argument} requires import paths only or names only, else there is no one group to choose from: "
                    "sweep over them in two commands"
                )
            *before, last = IMPORTED[key]
            rewritten += [*before, f"{last}{value}"]
        elif "=" in argument and (key in FREE or key.startswith(tuple(f"{free}." for free in FREE))):
            rewritten.append(f"++{argument}")  # no schema knows these keys
        else:
            rewritten.append(argument)
    return rewritten


def in_words(error: Exception, arguments: list[str]) -> str:
    """Hydra's and OmegaConf's errors in one or two lines that name the key."""
    cause = error.__cause__
    where = f"{str(error).splitlines()[0]} " if str(error).startswith("In ") else ""  # "In '<file>': …"
    for plugin, extra in EXTRAS.items():
        if isinstance(error, MissingConfigException) and plugin in (error.missing_cfg_file or str(error)):
            group, _, option = plugin.rpartition("/")
            return f"{group}={option} requires a package that is not installed: pip install 'vlmrl[{extra}]'"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={option}: {group} has only {', '.join(error.options)}{did_you_mean(option, error.options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override} does not parse as key=value: {' '.join(str(error).splitlines()[:-1])}"
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        named = re.search(r"Could not override '(.+?)'", str(error))
        key = named[1] if named else cause.full_key or str(cause.key)
        if "/" in key:
            return f"{key}: there is no such group{did_you_mean(key, groups())}"
        return f"{where}{key}: {unknown_key(key)}"
    if isinstance(cause, OmegaConfBaseException):
        return f"{where}{summary(cause)}"
    if isinstance(error, AssertionError):
        absent = [key for key in arguments if key.startswith(("model.vlm.", "model.tiny.", "orchestrator.renderer."))]
        if not absent:
            raise error
        return f"{absent[0]}: {absent[0].rpartition('.')[0]} is none under these choices and has no keys"
    if isinstance(error, OmegaConfBaseException):
        return summary(error)
    lines = [line for line in str(error).splitlines() if not line.startswith(("    reference_type", "    object_type"))]
    return "\n".join([*lines, f"(in: {' '.join(arguments)})"])


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
