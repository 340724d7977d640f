"""mode=dpo has pairs, and its settings reach the loss."""

from __future__ import annotations

from vlmrl.config.clip_direction import ClipDirectionConfig
from vlmrl.config.dpo import PreferenceLoss
from vlmrl.config.gymnasium import GymnasiumConfig
from vlmrl.config.program import ProgramConfig
from vlmrl.config.run import Mode, RunConfig
from vlmrl.config.small_print import SmallPrintConfig
from vlmrl.config.task import ColorCodewordConfig, tasks_of
from vlmrl.config.verifiers import VerifiersConfig
from vlmrl.errors import ConfigError
from vlmrl.preflight.site import Site

WITHOUT_PAIRS = (
    ClipDirectionConfig,
    ColorCodewordConfig,
    GymnasiumConfig,
    SmallPrintConfig,
    ProgramConfig,
    VerifiersConfig,
)
"""Tasks that know no worse answers."""


def pairs_are_known(config: RunConfig) -> None:
    """The task has pairs, or a recorded run is named."""
    if config.mode is not Mode.dpo or config.dpo.from_run is not None:
        return
    for key, own in tasks_of(config.task).items():
        if isinstance(own, WITHOUT_PAIRS):
            raise ConfigError(
                f"dpo.from_run=null takes the pairs from the task, and {key}.kind={own.kind} has none, so there is "
                "nothing to learn from: set dpo.from_run=<folder of a run that recorded its rollouts>, or choose "
                "task=dataset with the columns chosen and rejected"
            )


def pair_settings_have_effect(config: RunConfig) -> None:
    """A recorded run is read with mode=dpo only, and IPO has no labels to smooth."""
    dpo = config.dpo
    if config.mode is not Mode.dpo:
        if dpo.from_run is not None:
            raise ConfigError(
                f"dpo.from_run={dpo.from_run} has no effect with mode={config.mode.name}, so no pair would be learned "
                "from: set mode=dpo, or drop dpo.from_run"
            )
        return
    if dpo.loss is PreferenceLoss.ipo and dpo.label_smoothing:
        raise ConfigError(
            f"dpo.label_smoothing={dpo.label_smoothing} has no effect with dpo.loss=ipo, whose target is a distance: "
            "set dpo.label_smoothing=0, or dpo.loss=sigmoid"
        )


def recorded_pairs_are_there(config: RunConfig, site: Site) -> None:
    """The run of `dpo.from_run` has recorded rollouts."""
    if config.mode is not Mode.dpo or config.dpo.from_run is None:
        return
    from vlmrl.record.run_dir import RunDir

    if not RunDir(config.dpo.from_run).rollouts_steps("step"):
        raise ConfigError(
            f"dpo.from_run={config.dpo.from_run} holds no recorded training rollouts (rollouts/step_*.parquet, which "
            "mode=rl writes where monitor.record_rollouts=true), so there are no pairs: set dpo.from_run to another run"
        )
