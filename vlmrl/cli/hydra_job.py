"""What Hydra calls: the job of each run, and the check before Hydra makes a folder or submits a job.

    hydra.main ─▶ CheckFirst (a callback: refuse every config before anything exists) ─▶ job, once per run ─▶ start

conf/config.yaml names `CheckFirst` as a callback and uses the resolvers that are registered here.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import ClassVar

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from vlmrl.cli.arguments import rewrite_params
from vlmrl.cli.exit_codes import JobError, report
from vlmrl.cli.own_folder import reserve, started
from vlmrl.cli.start import answer_without_a_run, checked, lead_or_follow, start
from vlmrl.cli.sweep.again import run_what_is_left
from vlmrl.cli.sweep.jobs import job_name
from vlmrl.config.run import Mode
from vlmrl.errors import ConfigError, Interrupted
from vlmrl.preflight.check import Stage, Submission, check
from vlmrl.preflight.rules.checkpoint import cache_is_usable
from vlmrl.preflight.site import this_site
from vlmrl.ranks import slurm
from vlmrl.record.run_dir import run_name

# conf/config.yaml uses these in hydra.sweep.subdir and hydra.run.dir.
OmegaConf.register_new_resolver("job_name", job_name, replace=True)
OmegaConf.register_new_resolver("run_name", run_name, replace=True)
OmegaConf.register_new_resolver("started", started, use_cache=True, replace=True)


def job(config: DictConfig) -> float | None:
    """Run one job; Hydra calls this once per run. Returns the objective for sweepers.

    A job of a sweep, and a job that Slurm restarted, continues what an earlier start left (sweep/again.py). A launcher
    may start several ranks of a job (submitit's tasks): rank 0 leads and the others follow.
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
            config.monitor.live = False  # jobs of joblib run at the same time and share a screen
        slurm.divide_tasks(config.inference.get("slurm_tasks", 0))
        if slurm.server_index() is not None:
            return start(config)
        with slurm.holding_servers():
            code = lead_or_follow(lead)
    except Exception as error:
        code = report(error)
        # After a JobError, Hydra runs the other jobs of a sweep, names this one and raises the error again. Ctrl-C ends
        # them all.
        sweep = HydraConfig.get().mode is RunMode.MULTIRUN and not isinstance(error, Interrupted)
        raise (JobError(code) if sweep else SystemExit(code)) from error
    if code != 0:  # of a rank other than 0
        raise JobError(code)
    return objective


def sweep_name(folder: str) -> str:
    """The sweep's name as a W&B group: its folder below `multirun`, or else the folder's own name.

    >>> sweep_name("outputs/multirun/2026-03-01/12-00-00"), sweep_name("/data/my_sweep")
    ('2026-03-01/12-00-00', 'my_sweep')
    """
    path = Path(folder)
    below = path.parts[path.parts.index("multirun") + 1 :] if "multirun" in path.parts else ()
    return "/".join(below or (path.name,))


class CheckFirst(Callback):
    """Refuses a config before Hydra makes a folder for it, and answers `dry_run=true` and `mode=check`."""

    def on_run_start(self, config: DictConfig, **kwargs: object) -> None:
        """Check a single run."""
        try:
            run_config, found = checked(place(without_hydra(config), "not made yet"))
            code = answer_without_a_run(run_config, found)
            if code is None:  # Hydra makes the run's folder next
                cache_is_usable(run_config, this_site())
        except Exception as error:  # Hydra would turn it into a warning and go on
            raise SystemExit(report(error)) from error
        if code is not None:
            raise SystemExit(code)
        reserve(config, "hydra.run.dir")

    sweep_dir: ClassVar[Path | None] = None
    """Folder of the sweep that was started; None for a single run."""

    def on_multirun_start(self, config: DictConfig, **kwargs: object) -> None:
        """Check all jobs of a sweep before the first one is started or submitted."""
        spell_out_params(config)
        codes: list[int] = []
        for overrides in sweep_jobs(config):
            job_config = GlobalHydra.instance().config_loader().load_sweep_config(config, overrides)
            try:
                run_config, found = checked(place(without_hydra(job_config), "not made yet"))
                submission = submission_of(config.hydra.launcher)
                check(run_config, Stage.submitted, submission)
                if run_config.dry_run or run_config.mode is Mode.check:
                    print(f"job {' '.join(overrides)}")
                if (code := answer_without_a_run(run_config, found)) is not None:
                    codes.append(code)
                elif submission.tasks_per_node is None:
                    cache_is_usable(run_config, this_site())
            except ConfigError as error:
                codes.append(report(ConfigError(f"in the job {' '.join(overrides)}: {error}")))
        if codes:
            raise SystemExit(next((code for code in codes if code != 0), 0))
        reserve(config, "hydra.sweep.dir")
        CheckFirst.sweep_dir = Path(config.hydra.sweep.dir)


def submission_of(launcher: DictConfig) -> Submission:
    """What `launcher` starts for each job."""
    if "tasks_per_node" not in launcher:
        return Submission()
    return Submission(nodes=launcher.nodes, tasks_per_node=launcher.tasks_per_node)


def without_hydra(config: DictConfig) -> DictConfig:
    """A copy without Hydra's own node, as a job gets it."""
    config = copy.deepcopy(config)
    with open_dict(config):
        del config["hydra"]
    return config


def spell_out_params(config: DictConfig) -> None:
    """Spell out abbreviations in `hydra.sweeper.params` in place; Hydra makes the sweeper from them afterwards."""
    params = config.hydra.sweeper.get("params")
    if params and all(isinstance(value, str) for value in params.values()):  # Optuna's may be dictionaries
        with open_dict(config):
            config.hydra.sweeper.params = rewrite_params(dict(params))


def sweep_jobs(config: DictConfig) -> list[list[str]]:
    """The overrides of each job of a sweep.

    A sweeper that chooses values as it goes (Optuna) gives one job: what all of its jobs have in common. The list is
    empty where the overrides do not parse, which Hydra reports itself.
    """
    parse_overrides = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides
    try:
        if config.hydra.sweeper._target_ != OmegaConf.structured(BasicSweeperConf)._target_:
            given = list(config.hydra.overrides.task)
            parsed = parse_overrides(given)
            return [[text for text, one in zip(given, parsed, strict=True) if not one.is_sweep_override()]]
        arguments = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
        (jobs,) = BasicSweeper.split_arguments(
            parse_overrides([*arguments, *config.hydra.overrides.task]), max_batch_size=None
        )
    except HydraException:
        return []
    return jobs


def place(config: DictConfig, output_dir: str) -> DictConfig:
    """Fill in the run's folder, in place. Raises ConfigError where the command line has set it."""
    if not OmegaConf.is_missing(config, "output_dir"):
        raise ConfigError(
            f"output_dir={config.output_dir} cannot be set, because Hydra would make another folder than the run "
            f"uses: set hydra.run.dir={config.output_dir}"
        )
    config.output_dir = output_dir
    return config
