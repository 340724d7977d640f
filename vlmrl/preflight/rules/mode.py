"""The mode has what it works on."""

from __future__ import annotations

from pathlib import Path

from vlmrl.config.import_paths import is_import_path
from vlmrl.config.keys import did_you_mean
from vlmrl.config.play import Player
from vlmrl.config.run import READ_A_CHECKPOINT, Mode, RunConfig
from vlmrl.errors import ConfigError

REPLAY_HAS_NO_BATCH = (
    "mode=replay needs run=<run folder> and step=<1 or more> on the command line, because there is no batch to replay "
    "without them: python -m vlmrl mode=replay run=outputs/latest step=1"
)
"""The command line refuses `mode=replay` with this text, too, because it reads the run's config first."""


def past_run_is_named(config: RunConfig) -> None:
    """Modes that read past runs say which."""
    if config.mode in (Mode.report, Mode.faults):
        mode = f"mode={config.mode.name}"
        raise ConfigError(
            f"{mode} works on the command line only, next to run=, because it composes no config of a run: "
            f"python -m vlmrl {mode} run=outputs/latest"
        )
    if config.mode is Mode.export and config.resume is None:
        raise ConfigError("mode=export has no resume=, so there is no checkpoint to write: set resume=outputs/latest")
    if config.mode is Mode.replay and (config.run is None or config.step is None):
        raise ConfigError(REPLAY_HAS_NO_BATCH)
    if config.mode is Mode.compare and not config.runs:
        raise ConfigError(
            "mode=compare has no runs=, so there is nothing to compare: set runs=[outputs/multirun/<name>], or several "
            "folders of runs"
        )


def past_run_is_read(config: RunConfig) -> None:
    """`resume`, `run`, `step`, `rollout` and `runs` have an effect: the command line has read them, for their mode.

    A resumed run and a replay use the config.yaml of the run that they name, so these keys do nothing in a file of
    conf/, from which a new run is composed.
    """
    folder = Path(config.output_dir)
    of_a_file = None
    if config.resume is not None and Path(config.resume) != folder:
        of_a_file = f"resume={config.resume}", "trained from scratch", f"resume={config.resume}"
    elif config.mode is Mode.replay and config.run is not None and Path(config.run) not in folder.parents:
        words = f"mode=replay run={config.run} step={config.step}"
        of_a_file = words, "replayed with another config than the run's own", words
    if of_a_file is not None:
        given, consequence, words = of_a_file
        raise ConfigError(
            f"{given} stands in a file of conf/ or of --config-dir, from which a new run is composed, so it would be "
            f"{consequence}: remove it there, and write {words} on the command line, without --multirun"
        )
    for key, value, modes in (
        ("run", config.run, (Mode.replay,)),
        ("step", config.step, (Mode.replay, *READ_A_CHECKPOINT) if config.resume else (Mode.replay,)),
        ("rollout", config.rollout, (Mode.faults,)),
        ("row", config.row, (Mode.preview,)),
        ("full", "true" if config.full else None, (Mode.preview,)),
        ("runs", ",".join(config.runs) or None, (Mode.compare,)),
        ("against", config.against, (Mode.doctor,)),
    ):
        if value is not None and config.mode not in modes:
            raise ConfigError(
                f"{key}={value} has no effect with mode={config.mode.name}, so it would not be read: drop {key}, or "
                f"set mode={modes[0].name}"
            )


def export_folder_has_effect(config: RunConfig) -> None:
    """`export.folder` is set for an export only."""
    if config.export.folder is not None and config.mode is not Mode.export:
        raise ConfigError(
            f"export.folder={config.export.folder} has no effect with mode={config.mode.name}, so no checkpoint would "
            "be written there: set mode=export, or drop export.folder"
        )


def episodes_are_new(config: RunConfig) -> None:
    """A run of mode=play or mode=bench is not continued: neither saves anything."""
    if config.mode in (Mode.play, Mode.bench) and config.resume is not None:
        mode, over = f"mode={config.mode.name}", "episodes" if config.mode is Mode.play else "steps"
        raise ConfigError(
            f"resume={config.resume} names a run of {mode}, whose {over} are over, so nothing can be continued: "
            f"drop resume= and start a new run with {mode}"
        )


def player_is_known(config: RunConfig) -> None:
    """Somebody answers with mode=play."""
    policy = config.play.policy
    if policy not in [*Player] and not is_import_path(policy):
        raise ConfigError(
            f"play.policy={policy} is neither one of {', '.join(Player)} nor an import path, so nothing would answer: "
            f"set play.policy=person, or play.policy=my_module:my_policy{did_you_mean(policy, [*Player])}"
        )


def mode_has_work(config: RunConfig) -> None:
    """A supervised run has steps."""
    if config.mode is Mode.sft and config.trainer.warmup.steps == 0 and config.trainer.max_epochs is None:
        raise ConfigError(
            "mode=sft trains for trainer.warmup.steps=0 steps, so nothing would be learned: set "
            "trainer.warmup.steps=100"
        )
