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

import contextlib
import copy
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vlmrl.cli.arguments import CONF, in_words, rewrite
from vlmrl.cli.past_runs import REPORT, replayed, replays, resumed, resumes, write_page
from vlmrl.cli.sweep.again import run_what_is_left
from vlmrl.cli.sweep.compare import compare_and_show
from vlmrl.cli.sweep.jobs import job_name
from vlmrl.config.import_paths import is_import_path
from vlmrl.config.inference import VllmConfig
from vlmrl.config.parse import parse
from vlmrl.config.run import Mode, RunConfig, register_schemas
from vlmrl.errors import ConfigError, Interrupted, VlmrlError
from vlmrl.preflight.rules.engine import weights_cross_nodes
from vlmrl.preflight.rules.ranks import ranks_work_together
from vlmrl.ranks import slurm
from vlmrl.ranks.place import find_place
from vlmrl.record.run_dir import RunDir, run_name

# For conf/config.yaml: hydra.sweep.subdir, hydra.run.dir.
OmegaConf.register_new_resolver("job_name", job_name, replace=True)
OmegaConf.register_new_resolver("run_name", run_name, replace=True)
OmegaConf.register_new_resolver("started", slurm.started, use_cache=True, replace=True)


class JobError(Exception):
    """Takes a job's exit code through Hydra's sweep; what went wrong is printed already."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: the process's own arguments); returns the exit code.

    Of several ranks (`vlmrl.ranks.place`) the first does; the others follow it, whatever it is asked to do.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if REPORT in arguments:  # before ranks are counted: a run of several ranks starts it from one of them
            print(write_page(arguments))
            return 0
        if slurm.tasks_of_step() > 1:
            slurm.part(slurm.said_in(arguments))
        if slurm.server_index() is not None:
            return command_line(arguments)
        with slurm.holding_servers():
            return of_all_ranks(lambda: command_line(arguments))
    except VlmrlError as error:
        return report(error)


def of_all_ranks(lead: Callable[[], int]) -> int:
    """Rank 0 leads, the others follow → exit code."""
    if find_place().size == 1:
        return lead()
    from vlmrl.ranks.rank_group import init_from_environment
    from vlmrl.runs.run import follow_leader

    with init_from_environment() as group:
        assert group is not None
        return lead() if group.rank == 0 else follow_leader(group)


def command_line(arguments: list[str]) -> int:
    """The whole command line of one process."""
    try:
        arguments = rewrite(arguments)
        if "explain" in arguments:
            explain(arguments)
        elif replays(arguments):
            start(replayed(arguments))
        elif resumes(arguments):
            start(resumed(arguments))
        else:
            compose_and_start(arguments)
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


def report(error: Exception) -> int:
    """Print what ended the run to stderr, a traceback only where it is a bug; returns the exit code."""
    if not isinstance(error, VlmrlError):
        traceback.print_exception(error)
        return 1
    print(f"{'interrupted' if isinstance(error, Interrupted) else 'error'}: {error}", file=sys.stderr)
    return error.exit_code


def start(config: DictConfig) -> float | None:
    """Check a composed config and run it; returns the objective, for sweepers."""
    run_config = parse(config)
    if run_config.dry_run:
        show_plan(run_config)
        return None
    if run_config.mode is Mode.compare:
        compare_runs(run_config)
        return None
    if isinstance(run_config.inference, VllmConfig):
        slurm.part(run_config.inference.slurm_tasks)
        if (index := slurm.server_index()) is not None:
            from vlmrl.runs.serve_slurm import serve

            serve(run_config, index)
            return None
        weights_cross_nodes(run_config, slurm.nodes())
    check_imports(run_config)
    check_here(run_config)
    from vlmrl.runs.run import execute

    return execute(run_config)


def check_imports(config: RunConfig) -> None:
    """Import what the user wrote and the config names by its import path. Raises ConfigError where it is not there, or
    is no such thing; what the user's module raises is left as it is."""
    from vlmrl.tasks.loading import find_task

    find_task(config.task)
    if is_import_path(config.algorithm.loss):
        from vlmrl.trainer.loss import loss_function

        loss_function(config.algorithm.loss)
    if is_import_path(config.algorithm.advantage):
        from vlmrl.orchestrator.advantages import estimator_named

        estimator_named(config.algorithm.advantage)


def check_here(config: RunConfig) -> None:
    """Raises ConfigError where the GPUs of this machine cannot hold the run."""
    from vlmrl.preflight.estimate.sizes import find_sizes
    from vlmrl.preflight.machine import find_machine
    from vlmrl.preflight.places import check_machine

    if config.model.device != "cpu":
        check_machine(config, find_machine(), find_sizes(config.model), find_place().size)


def show_plan(config: RunConfig) -> None:
    """dry_run=true. Raises ConfigError."""
    from vlmrl.preflight.estimate.plan import dry_run

    print(dry_run(config))


def compare_runs(config: RunConfig) -> None:
    """mode=compare. What one multirun comes to goes into its own folder; the run's folder is left for anything else."""
    into = Path(config.output_dir)
    if len(config.runs) == 1 and not RunDir(config.runs[0]).config.exists():
        with contextlib.suppress(OSError):
            into.rmdir()  # Hydra made it
        into = Path(config.runs[0])
    compare_and_show(config.runs, into)


# ── through Hydra ───────────────────────────────────────────────────────────────────────────────────────────


def job(config: DictConfig) -> float | None:
    """What Hydra calls, once per run; in a sweep by way of what is left of the job.

    A launcher may start several ranks of it (submitit's tasks): the others follow the first.
    """
    objective, code = None, 0

    def lead() -> int:
        nonlocal objective
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            config.monitor.wandb.group = config.monitor.wandb.group or sweep_name(HydraConfig.get().sweep.dir)
        if HydraConfig.get().mode is RunMode.MULTIRUN or slurm.is_restarted():
            objective = run_what_is_left(config, HydraConfig.get().overrides.task, start)
        else:
            objective = start(config)
        return 0

    try:
        place(config, HydraConfig.get().runtime.output_dir)
        if "n_jobs" in HydraConfig.get().launcher:
            config.monitor.live = False  # joblib's jobs share a screen
        slurm.part(config.inference.get("slurm_tasks", 0))
        if slurm.server_index() is not None:
            return start(config)
        with slurm.holding_servers():
            code = of_all_ranks(lead)
    except Exception as error:
        code = report(error)
        # In a sweep Hydra runs the other jobs, names this one, and raises the error again. Ctrl-C means all of them.
        sweep = HydraConfig.get().mode is RunMode.MULTIRUN and not isinstance(error, Interrupted)
        raise (JobError(code) if sweep else SystemExit(code)) from error
    if code != 0:  # of a rank that is not the first
        raise JobError(code)
    return objective


def sweep_name(folder: str) -> str:
    """What a sweep is called elsewhere: its folder below `multirun`, else the folder's own name.

    >>> sweep_name("outputs/multirun/2026-03-01/12-00-00"), sweep_name("/data/my_sweep")
    ('2026-03-01/12-00-00', 'my_sweep')
    """
    path = Path(folder)
    below = path.parts[path.parts.index("multirun") + 1 :] if "multirun" in path.parts else ()
    return "/".join(below or (path.name,))


class CheckFirst(Callback):
    """Refuses a config before Hydra makes a folder for it (conf/config.yaml names this class)."""

    def on_run_start(self, config: DictConfig, **kwargs: object) -> None:
        """A single run."""
        try:
            run_config = parse(place(without_hydra(config), "not made yet"))
            if run_config.mode is not Mode.compare:
                check_imports(run_config)
            if run_config.dry_run:
                show_plan(run_config)
                raise SystemExit(0)
        except Exception as error:  # Hydra would print a warning of a callback, and go on
            raise SystemExit(report(error)) from error

    sweep_dir: ClassVar[Path | None] = None
    """Of the sweep that was started; None before, and for a single run."""

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        """All jobs of a sweep, before the first one is started or submitted."""
        codes, dry_run = [], False
        for overrides in sweep_jobs(config):
            job_config = GlobalHydra.instance().config_loader().load_sweep_config(config, overrides)
            try:
                run_config = parse(place(without_hydra(job_config), "not made yet"))
                check_launcher(config.hydra.launcher, run_config)
                check_imports(run_config)
                if run_config.dry_run:
                    dry_run = True
                    print(f"job {' '.join(overrides)}")
                    show_plan(run_config)
            except ConfigError as error:
                codes.append(report(ConfigError(f"in the job {' '.join(overrides)}: {error}")))
        if codes or dry_run:
            raise SystemExit(codes[0] if codes else 0)
        CheckFirst.sweep_dir = Path(config.hydra.sweep.dir)


def check_launcher(launcher: DictConfig, config: RunConfig) -> None:
    """Whether the tasks that `launcher` starts are those that a run needs. Raises ConfigError."""
    serving = config.inference.slurm_tasks if isinstance(config.inference, VllmConfig) else 0
    if "tasks_per_node" not in launcher:
        if serving:
            raise ConfigError(
                f"inference.slurm_tasks={serving} requires tasks of its own for each job of a sweep, else the servers "
                "of the first never end: set hydra/launcher=slurm"
            )
        return
    tasks = launcher.nodes * launcher.tasks_per_node
    if serving >= tasks:
        raise ConfigError(
            f"inference.slurm_tasks={serving} requires more tasks than hydra.launcher.nodes={launcher.nodes} × "
            f"hydra.launcher.tasks_per_node={launcher.tasks_per_node}, else none trains: set "
            f"hydra.launcher.tasks_per_node={-(-(serving + 1) // launcher.nodes)}"
        )
    ranks_work_together(config, tasks - serving)
    weights_cross_nodes(config, launcher.nodes)


def without_hydra(config: DictConfig) -> DictConfig:
    """A copy, as a job gets it."""
    config = copy.deepcopy(config)
    with open_dict(config):
        del config["hydra"]
    return config


def sweep_jobs(config: DictConfig) -> list[list[str]]:
    """The overrides of each job of a sweep; none where its sweeper makes them up on the way, or they do not parse:
    then Hydra says so itself."""
    if config.hydra.sweeper._target_ != OmegaConf.structured(BasicSweeperConf)._target_:
        return []
    arguments = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    try:
        overrides = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(
            [*arguments, *config.hydra.overrides.task]
        )
        (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    except HydraException:
        return []
    return jobs


def place(config: DictConfig, output_dir: str) -> DictConfig:
    """Fill in where the run goes."""
    if not OmegaConf.is_missing(config, "output_dir"):
        raise ConfigError(
            f"output_dir={config.output_dir} requires to be left alone, else Hydra makes another folder than the "
            f"run uses: set hydra.run.dir={config.output_dir}"
        )
    config.output_dir = output_dir
    return config


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
