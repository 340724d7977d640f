"""What `mode=replay`, `mode=export`, `resume=` and `against=` need of an earlier run is still there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmrl.config.run import READ_A_CHECKPOINT, Mode, RunConfig
from vlmrl.errors import ConfigError
from vlmrl.preflight.site import Site

if TYPE_CHECKING:
    from vlmrl.record.run_dir import RunDir


def batch_was_recorded(config: RunConfig, site: Site) -> None:
    """mode=replay: the batch of `step` and the weights that learned from it are on disk."""
    if config.mode is not Mode.replay:
        return
    from vlmrl.record.run_dir import RunDir

    assert config.run is not None, "mode_has_work runs at an earlier stage"
    assert config.step is not None, "mode_has_work runs at an earlier stage"
    refuse_batch(RunDir(config.run), config.step)


def refuse_batch(run_dir: RunDir, step: int) -> None:
    """Raise `ConfigError` where `run_dir` does not hold the batch of `step` or the weights that learned from it."""
    recorded = run_dir.rollouts_steps("step")
    kept = run_dir.checkpoint_steps()
    # No policy sampled what a player of mode=play answered, so its replay needs no weights.
    is_played = run_dir.config.exists() and run_dir.read_config(key="run").get("mode") == Mode.play.name
    possible = [each for each in recorded if each == 1 or each - 1 in kept or is_played]
    remedy = f"set step={' or '.join(map(str, possible[-8:]))}" if possible else "set run= to another run"
    from vlmrl.record.disk_bound import read_deleted

    deleted = read_deleted(run_dir)
    if step not in recorded and deleted is not None and deleted.covers("step", step):
        raise ConfigError(
            f"step={step} has no recorded batch any more: the run {deleted.says()}, so there is nothing to replay: "
            f"{remedy}"
        )
    if step not in recorded:
        raise ConfigError(
            f"step={step} has no recorded batch ({run_dir.rollouts_file('step', step)} is missing; mode=rl writes it "
            f"where monitor.record_rollouts=true), so there is nothing to replay: {remedy}"
        )
    if step not in possible:
        raise ConfigError(
            f"step={step} was learned from by policy version {step - 1}, whose checkpoint is gone "
            f"({run_dir.checkpoints} holds {', '.join(map(str, kept)) or 'none'}), so the batch cannot be replayed: "
            f"{remedy}. A run keeps more of them with trainer.checkpoint_every and trainer.keep_checkpoints"
        )


def record_can_go_on(config: RunConfig, site: Site) -> None:
    """`resume=`: the run recorded its rollouts as this version does. Other modes only read a checkpoint of it."""
    if config.resume is None or config.mode in READ_A_CHECKPOINT:
        return
    from vlmrl.record.run_dir import RunDir

    if RunDir(config.resume).is_of_older_version:
        raise ConfigError(
            f"resume={config.resume} is a run of an older version, whose rollouts are .jsonl files, so its folder "
            "would hold one run in two formats: continue it with the version that its config.yaml names under "
            f"environment, or start a new run from its model: python -m vlmrl mode=export resume={config.resume}, then "
            "model.name=<the exported folder>"
        )


def export_folder_is_free(config: RunConfig, site: Site) -> None:
    """mode=export: `export.folder` does not exist yet."""
    if config.mode is Mode.export and config.export.folder is not None and Path(config.export.folder).exists():
        raise ConfigError(
            f"export.folder={config.export.folder} exists already, and an export overwrites nothing: remove it, or set "
            "export.folder to another one"
        )


def older_certificate_is_there(config: RunConfig, site: Site) -> None:
    """mode=doctor: `against` names a certificate."""
    if config.against is not None:
        older_certificate(config.against)


def older_certificate(against: str) -> dict[str, Any]:
    """The certificate that `against` names: a doctor.json, or the folder of a run that has one. Raises
    `ConfigError`."""
    import orjson

    from vlmrl.record.files import read_small
    from vlmrl.record.run_dir import RunDir, is_certificate

    path = Path(against).expanduser()
    file = RunDir(path).doctor if path.is_dir() else path
    remedy = "set against=<folder of a run of mode=doctor>, or the path of its doctor.json"
    try:
        content = orjson.loads(read_small(file))
    except OSError as error:
        raise ConfigError(
            f"against={against}: {file} cannot be read ({error.strerror}), so there is nothing to compare with: "
            f"{remedy}"
        ) from error
    except orjson.JSONDecodeError as error:
        raise ConfigError(
            f"against={against}: {file} is no JSON ({error}), so there is nothing to compare with: {remedy}"
        ) from error
    if isinstance(content, list):
        raise ConfigError(
            f"against={against}: {file} is of an older vlmrl and names no versions, so what has changed would not be "
            "known: run mode=doctor with the older packages again, or drop against"
        )
    if not is_certificate(content):
        raise ConfigError(
            f"against={against}: {file} was not written by mode=doctor, so there is nothing to compare with: {remedy}"
        )
    found: dict[str, Any] = content
    return found
