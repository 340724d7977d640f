"""Tasks that a program outside of the run plays: the program can be started, and what is set has an effect on it."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Iterator

from vlmrl.config.algorithm import Credit
from vlmrl.config.dataset import DatasetConfig
from vlmrl.config.program import ProgramConfig, ProgramResult
from vlmrl.config.run import BY_REWARD, LEARN, Mode, RunConfig
from vlmrl.config.task import Workers, tasks_of
from vlmrl.config.verifiers import VerifiersConfig
from vlmrl.errors import ConfigError
from vlmrl.preflight.rules.reward import all_tasks
from vlmrl.preflight.site import Site

WITHOUT_PROGRAMS = (Mode.check, Mode.play, Mode.preview)
"""Modes that call a task's envs themselves."""


def played_outside_of(config: RunConfig) -> Iterator[tuple[str, ProgramConfig | VerifiersConfig]]:
    """Key and config of every task that is played outside of the run, those of mixtures and of evaluation sets too."""
    for key, whole in all_tasks(config).items():
        for own_key, own in tasks_of(whole, key).items():
            if isinstance(own, ProgramConfig | VerifiersConfig):
                yield own_key, own


def programs_of(config: RunConfig) -> Iterator[tuple[str, ProgramConfig]]:
    """Those of task=program."""
    return ((key, own) for key, own in played_outside_of(config) if isinstance(own, ProgramConfig))


def programs_have_a_mode(config: RunConfig) -> None:
    """Modes that call envs have none to call."""
    if config.mode not in WITHOUT_PROGRAMS:
        return
    for key, own in played_outside_of(config):
        raise ConfigError(
            f"mode={config.mode.name} calls the env of a task, and the episodes of {key}.kind={own.kind} are played by "
            "a program, so there is nothing to call: set mode=eval orchestrator.eval.problems=2 to see the program "
            "play"
        )


def programs_bring_their_tools(config: RunConfig) -> None:
    """The run's tools are offered to policies that answer an env."""
    for key, own in played_outside_of(config):
        if config.tool:
            raise ConfigError(
                f"tool=[{','.join(config.tool)}] has no effect on {key}.kind={own.kind}, because a program says in its "
                "requests which tools there are and runs them: set tool=[], and write the tools into the program"
            )


def programs_are_commands(config: RunConfig) -> None:
    """A command can be split into words."""
    for key, own in programs_of(config):
        try:
            words = shlex.split(own.command)
        except ValueError as error:
            raise ConfigError(
                f"{key}.command={own.command} cannot be split into words ({error}), so no program can be started: "
                "write the closing quote"
            ) from None
        if not words:
            raise ConfigError(f"{key}.command={own.command} has no word, so no program can be started: name a program")


def programs_are_here(config: RunConfig, site: Site) -> None:
    """The program is on this machine."""
    if config.mode not in (*BY_REWARD, Mode.eval, Mode.doctor) or site.serves:
        return
    for key, own in programs_of(config):
        program = shlex.split(own.command)[0]
        if shutil.which(program) is None:
            raise ConfigError(
                f"{key}.command={own.command} starts {program}, which is not found here, so no episode could be "
                "played: correct it, give its whole path, or add its folder to PATH"
            )


def workers_are_the_programs(config: RunConfig) -> None:
    """Settings of envs have no effect where there are none."""
    for key, own in played_outside_of(config):
        set_for_envs = f"workers={own.workers.name}" if own.workers is not Workers.thread else ""
        if own.num_workers is not None:
            set_for_envs = f"num_workers={own.num_workers}"
        if set_for_envs:
            ours = "processes" if isinstance(own, ProgramConfig) else "episodes"
            raise ConfigError(
                f"{key}.{set_for_envs} has no effect on task={own.kind}, whose program runs in processes of its own: "
                f"leave it out, and set {key}.{ours}"
            )


def program_settings_have_effect(config: RunConfig) -> None:
    """Settings of rows are not set for a program without rows."""
    for key, own in programs_of(config):
        if own.reuse and own.result is ProgramResult.file:
            raise ConfigError(
                f"{key}.result=file does not work with {key}.reuse=true, because the process goes on after a problem "
                f"and nothing says that the file is complete: set {key}.result=last_line, and print the result"
            )
        if own.path is not None:
            continue
        for field in dataclasses.fields(DatasetConfig):
            if field.name in OF_ROWS and getattr(own, field.name) != getattr(ProgramConfig(), field.name):
                raise ConfigError(
                    f"{key}.{field.name} says which rows are used and how, and {key}.path names none, so it would have "
                    f"no effect: set {key}.path, or leave it out"
                )


OF_ROWS = {field.name for field in dataclasses.fields(DatasetConfig)} & {
    *("name", "split", "revision", "rows", "eval_path", "eval_split", "eval_fraction", "columns", "image_root"),
    *("video_root", "ignore_video_settings", "fetch", "system_prompt", "template", "shuffle_images"),
}
"""Settings of a data set."""


def programs_are_paid_by_episode(config: RunConfig) -> None:
    """A program's reward is that of the episode."""
    if config.mode not in BY_REWARD or config.algorithm.credit is Credit.episode:
        return
    for key, own in played_outside_of(config):
        raise ConfigError(
            f"algorithm.credit={config.algorithm.credit.name} trains each turn on a reward of its own, and a program "
            f"({key}.kind={own.kind}) pays whole episodes, so nothing would be learned: set algorithm.credit=episode"
        )


def programs_have_demonstrations(config: RunConfig) -> None:
    """Supervised steps have conversations to learn from."""
    if config.trainer.warmup.steps == 0 or config.mode not in LEARN:
        return
    for key, own in tasks_of(config.task).items():
        if isinstance(own, VerifiersConfig) or (isinstance(own, ProgramConfig) and own.path is None):
            without = f" without {key}.path" if isinstance(own, ProgramConfig) else ""
            raise ConfigError(
                f"trainer.warmup.steps={config.trainer.warmup.steps} needs demonstrations, and {key}.kind={own.kind}"
                f"{without} has none, because the problems are made outside of the run: set trainer.warmup.steps=0"
            )
