"""The command line: compose, check, run.

    init my_task             write a task to start from
    explain …                what keys mean
    mode=report …            write the page of finished runs
    mode=faults …            list what went wrong in a run, or play one row again
    resume=… | mode=replay   the run's own config.yaml plus overrides ─────┐
    anything else            Hydra composes conf/ ─▶ hydra_job: each job ──┴─▶ start: check, execute

exit_codes.py lists the exit codes. Torch is imported only when a run starts, so `--help`, `--cfg job` and refusals are
quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import hydra

import vlmrl
from vlmrl.cli.arguments import rewrite, with_quoted_words
from vlmrl.cli.compose_once import compose_once
from vlmrl.cli.exit_codes import JobError, report
from vlmrl.cli.hydra_errors import composing
from vlmrl.cli.hydra_job import CheckFirst, job
from vlmrl.cli.init import init
from vlmrl.cli.past_runs import FAULTS, REPORT, replayed, replays, resumed, resumes, show_faults, write_page
from vlmrl.cli.recipe import with_recipe
from vlmrl.cli.schemas import register_schemas
from vlmrl.cli.start import lead_or_follow, start
from vlmrl.cli.sweep.compare import compare_and_show
from vlmrl.cli.words import plain_words
from vlmrl.config.conf_folder import CONF
from vlmrl.errors import ConfigError, VlmrlError
from vlmrl.monitor.screen import unbreakable_output
from vlmrl.ranks import slurm


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command (default: the arguments of this process); returns the exit code."""
    with unbreakable_output():
        return answer(sys.argv[1:] if arguments is None else arguments)


def answer(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code.

    In a rank group (`vlmrl.ranks.place`) rank 0 runs the command and the other ranks follow it.
    """
    try:
        find_modules_here()
        words = plain_words(arguments)
        if "--version" in words:
            print(f"vlmrl {vlmrl.__version__}")
            return 0
        if sys.flags.optimize > 1:
            raise ConfigError(
                f"PYTHONOPTIMIZE={sys.flags.optimize} (python -OO) removes the docstrings, which transformers reads "
                "when it imports a model, so no model would load: unset it, or set PYTHONOPTIMIZE=1."
            )
        if REPORT in words:  # before the ranks are counted: rank 0 of a run starts this as a process of its own
            print(write_page(words))
            return 0
        if slurm.tasks_of_step() > 1:
            slurm.divide_tasks(slurm.serving_tasks_in(words))
        if slurm.server_index() is not None:
            return command_line(words)
        with slurm.holding_servers():
            return lead_or_follow(lambda: command_line(words))
    except VlmrlError as error:
        return report(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1


def find_modules_here() -> None:
    """Let tasks of the user's own be imported from the current folder, with `vlmrl` as with `python -m vlmrl`.

    Python puts the folder first in the search path for `python -m`; under PYTHONSAFEPATH it comes last, so that nothing
    in it hides another module. Raises ConfigError where the folder is gone.
    """
    try:
        here = os.getcwd()
    except OSError as error:
        raise ConfigError(
            f"the current folder cannot be found ({error.strerror}), so a run has no place for its files: change to "
            "another folder"
        ) from error
    if not {"", here} & set(sys.path):
        sys.path.insert(len(sys.path) if sys.flags.safe_path else 0, here)


def command_line(arguments: list[str]) -> int:
    """Run the command in one process; returns the exit code."""
    try:
        if arguments[:1] == ["init"]:
            print(init(arguments[1:]))
            return 0
        arguments = rewrite(arguments)
        if "explain" in arguments:
            explain(with_recipe(arguments))
        elif FAULTS in arguments and not {"-h", "--help"} & set(arguments):
            return show_faults(arguments)
        elif replays(arguments):
            start(replayed(arguments))
        elif resumes(arguments):
            start(*resumed(arguments))
        else:
            compose_and_start(with_recipe(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except JobError as failed:
        return int(failed.args[0])
    except SystemExit as stop:  # from argparse, or from a job that has printed its error
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except VlmrlError as error:
        return report(error)
    return 0


def explain(arguments: list[str]) -> None:
    """Print what `python -m vlmrl explain …` answers. Raises ConfigError for an unknown key or bad overrides."""
    from vlmrl.cli.explain import explanation

    register_schemas()
    words = [argument for argument in arguments if argument != "explain"]
    with composing(words):
        print(explanation(words, CONF))


def compose_and_start(arguments: list[str]) -> None:
    """Hand the command line to Hydra. Raises ConfigError where it does not compose."""
    register_schemas()
    compose_once()
    arguments = with_quoted_words(arguments)
    sys.argv = ["vlmrl", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    try:
        with composing(arguments):  # a job prints its own errors, so these are Hydra's
            hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    except OSError as error:
        if error.filename is None:  # not about a folder
            raise
        key = "hydra.sweep.dir" if {"--multirun", "-m"} & set(arguments) else "hydra.run.dir"
        raise ConfigError(
            f"{key}: the folder {error.filename} cannot be made ({error.strerror}), so the run has no place for its "
            f"files: set {key} to a folder that you may write to"
        ) from error
    finally:
        if CheckFirst.sweep_dir is not None and CheckFirst.sweep_dir.is_dir():  # also after a failure
            compare_and_show([CheckFirst.sweep_dir], CheckFirst.sweep_dir)
