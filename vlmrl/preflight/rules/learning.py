"""There is something to do and something to learn from."""

from __future__ import annotations

from vlmrl.config.algorithm import Advantage, FilterMode, Loss
from vlmrl.config.import_paths import is_import_path
from vlmrl.config.keys import did_you_mean
from vlmrl.config.run import Mode, RunConfig
from vlmrl.errors import ConfigError


def algorithm_is_known(config: RunConfig) -> None:
    """Loss and advantage are built in, or import paths."""
    for key, name, known in (
        ("algorithm.loss", config.algorithm.loss, [*Loss]),
        ("algorithm.advantage", config.algorithm.advantage, [*Advantage]),
    ):
        if name not in known and not is_import_path(name):
            raise ConfigError(
                f"{key}={name} is neither one of {', '.join(known)} nor an import path, so nothing is computed: set "
                f"{key}={known[0]}, or my_package.my_module:my_function{did_you_mean(name, known)}"
            )


def groups_have_siblings(config: RunConfig) -> None:
    """An advantage is a comparison with the siblings, under each of the choices that exist."""
    if config.orchestrator.group_size < 2:
        raise ConfigError(
            f"algorithm.advantage={config.algorithm.advantage} requires orchestrator.group_size of at least 2, "
            "else a rollout has no sibling to be compared with and every advantage is 0: "
            "set orchestrator.group_size=2 or more"
        )


def mode_has_work(config: RunConfig) -> None:
    """Each mode has something to do."""
    if config.mode is Mode.report:
        raise ConfigError(
            "mode=report requires to stand on the command line with run=, else there is no run to show: "
            "python -m vlmrl mode=report run=outputs/latest"
        )
    if config.mode is Mode.sft and config.trainer.warmup.steps == 0:
        raise ConfigError(
            "mode=sft requires trainer.warmup.steps above 0, else there is nothing to do: set trainer.warmup.steps=100"
        )
    if config.mode is Mode.export and config.resume is None:
        raise ConfigError(
            "mode=export requires resume=<run folder>, else there is no checkpoint to write: set resume=outputs/latest"
        )
    if config.export.folder is not None and config.mode is not Mode.export:
        raise ConfigError(
            f"export.folder={config.export.folder} requires mode=export, else nothing is written there: set mode=export"
        )
    if config.mode is Mode.replay and (config.run is None or config.step is None):
        raise ConfigError(
            "mode=replay requires run and step on the command line, else there is no batch to replay: "
            "python -m vlmrl mode=replay run=outputs/latest step=1"
        )
    if config.mode is Mode.compare and not config.runs:
        raise ConfigError(
            "mode=compare requires runs, else there is nothing to compare: set runs=[outputs/multirun/<name>], or "
            "several folders of runs"
        )
    evaluation = config.orchestrator.eval
    if config.mode is Mode.eval and evaluation.problems == 0:
        raise ConfigError(
            "mode=eval requires orchestrator.eval.problems above 0, else there is nothing to do: "
            "set orchestrator.eval.problems=128"
        )
    if config.mode is Mode.rl and evaluation.every > 0 and evaluation.problems == 0:
        raise ConfigError(
            f"orchestrator.eval.every={evaluation.every} requires orchestrator.eval.problems above 0, else an "
            "evaluation has no problem: set orchestrator.eval.problems=128, or orchestrator.eval.every=0 for none"
        )


def optimizer_fits(config: RunConfig) -> None:
    """AdamW has its two betas, and the learning rate reaches its height within the run."""
    trainer = config.trainer
    if len(trainer.betas) != 2:
        raise ConfigError(
            f"trainer.betas={trainer.betas} requires two numbers, else AdamW lacks one: set trainer.betas=[0.9,0.95]"
        )
    if trainer.lr_warmup_steps > trainer.max_steps:
        raise ConfigError(
            f"trainer.lr_warmup_steps={trainer.lr_warmup_steps} requires trainer.max_steps at least as large, else "
            f"the run ends after {trainer.max_steps} steps, before it reaches trainer.learning_rate: lower it"
        )


def batches_are_learned_from(config: RunConfig) -> None:
    """Staleness is shorter than the run."""
    staleness, steps = config.orchestrator.max_staleness, config.trainer.max_steps
    if config.mode is Mode.rl and staleness >= steps:
        raise ConfigError(
            f"orchestrator.max_staleness={staleness} requires a larger trainer.max_steps than {steps}, else the whole "
            "run is sampled before anything is learned: lower orchestrator.max_staleness"
        )


def filters_can_find(config: RunConfig) -> None:
    """A row that is to be found fits in a completion."""
    filters, longest = config.algorithm.filters, config.orchestrator.max_new_tokens
    if filters.repetition is not FilterMode.none and filters.repetition_window > longest:
        raise ConfigError(
            f"algorithm.filters.repetition={filters.repetition.value} requires algorithm.filters.repetition_window="
            f"{filters.repetition_window} to fit in a completion, else it finds nothing: set it to at most "
            f"orchestrator.max_new_tokens={longest}"
        )
