"""The command line: compose, check, run.

    arguments ─▶ rewrite task paths ─▶ resume=? ─ no ─▶ Hydra composes conf/ ─▶ start: parse, check, execute
                                         │                └─ sweep ─▶ each job: what is left of it ─▶ start
                                         └─ yes ─▶ the run's own config.yaml plus overrides ─▶ start
                       mode=replay run=? ──┘
    mode=report ─▶ the page of the runs that run= or runs= names; nothing is composed but the defaults to compare with

Exit codes: 0 done, 2 the configuration cannot run, 1 anything else. A message without a traceback is for the user;
a traceback is a bug. Imports no torch until a run starts: `--help`, `--cfg job` and refusals are quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import hydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

import vlmrl
from vlmrl.cli.arguments import CONF, rewrite
from vlmrl.cli.exit_codes import JobError, report
from vlmrl.cli.hydra_errors import in_words
from vlmrl.cli.hydra_job import CheckFirst, job
from vlmrl.cli.init import init
from vlmrl.cli.past_runs import REPORT, replayed, replays, resumed, resumes, write_page
from vlmrl.cli.recipe import with_recipe
from vlmrl.cli.schemas import register_schemas
from vlmrl.cli.start import lead_or_follow, start
from vlmrl.cli.sweep.compare import compare_and_show
from vlmrl.errors import ConfigError, VlmrlError
from vlmrl.ranks import slurm


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: the process's own arguments); returns the exit code.

    Of several ranks (`vlmrl.ranks.place`) the first does; the others follow it, whatever it is asked to do.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if "--version" in arguments:
            print(f"vlmrl {vlmrl.__version__}")
            return 0
        if REPORT in arguments:  # before ranks are counted: a run of several ranks starts it from one of them
            print(write_page(arguments))
            return 0
        if slurm.tasks_of_step() > 1:
            slurm.divide_tasks(slurm.serving_tasks_in(arguments))
        if slurm.server_index() is not None:
            return command_line(arguments)
        with slurm.holding_servers():
            return lead_or_follow(lambda: command_line(arguments))
    except VlmrlError as error:
        return report(error)


def command_line(arguments: list[str]) -> int:
    """The whole command line of one process."""
    try:
        if arguments[:1] == ["init"]:
            print(init(arguments[1:]))
            return 0
        arguments = rewrite(arguments)
        if "explain" in arguments:
            explain(with_recipe(arguments))
        elif replays(arguments):
            start(replayed(arguments))
        elif resumes(arguments):
            start(resumed(arguments))
        else:
            compose_and_start(with_recipe(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except JobError as failed:
        return int(failed.args[0])
    except SystemExit as stop:  # argparse, and a job that reported itself
        return int(stop.code or 0)
    except VlmrlError as error:
        return report(error)
    return 0


def explain(arguments: list[str]) -> None:
    """`python -m vlmrl explain …` (explain.py). Raises ConfigError where there is no such key, or nothing composes."""
    from vlmrl.cli.explain import explanation

    register_schemas()
    words = [argument for argument in arguments if argument != "explain"]
    try:
        print(explanation(words, CONF))
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, AssertionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(in_words(error, words)) from error


def compose_and_start(arguments: list[str]) -> None:
    """Hand the command line to Hydra. Raises ConfigError where it does not compose."""
    register_schemas()
    sys.argv = ["vlmrl", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # its errors reach us as they are instead of being printed
    try:
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    # A job reports its own errors: these are Hydra's.
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, AssertionError) as error:
        raise ConfigError(in_words(error, arguments)) from error
    except OSError as error:
        if error.filename is None:  # not about a folder
            raise
        key = "hydra.sweep.dir" if {"--multirun", "-m"} & set(arguments) else "hydra.run.dir"
        raise ConfigError(
            f"{key}: {error.filename} cannot be made ({error.strerror}), so the run could leave nothing: "
            f"set {key} to a folder that you may write to"
        ) from error
    finally:
        if CheckFirst.sweep_dir is not None and CheckFirst.sweep_dir.is_dir():  # however it ended
            compare_and_show([CheckFirst.sweep_dir], CheckFirst.sweep_dir)
