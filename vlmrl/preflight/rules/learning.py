"""There is something to learn from, and the optimizer's numbers fit the run."""

from __future__ import annotations

from vlmrl.config.algorithm import Advantage, Compare, Credit, FilterMode, Loss, OverlongConfig, VisionAdvantageConfig
from vlmrl.config.import_paths import is_import_path
from vlmrl.config.keys import did_you_mean
from vlmrl.config.monitor import BlindGuard
from vlmrl.config.run import BY_REWARD, RunConfig
from vlmrl.errors import ConfigError


def algorithm_is_known(config: RunConfig) -> None:
    """Loss and advantage are built in or named by an import path."""
    for key, name, known in (
        ("algorithm.loss", config.algorithm.loss, [*Loss]),
        ("algorithm.advantage", config.algorithm.advantage, [*Advantage]),
    ):
        if name not in known and not is_import_path(name):
            raise ConfigError(
                f"{key}={name} is neither one of {', '.join(known)} nor an import path, so there is no such function: "
                f"set {key}={known[0]}, or {key}=my_package.my_module:my_function{did_you_mean(name, known)}"
            )


def groups_have_siblings(config: RunConfig) -> None:
    """Every way to compute an advantage from rewards compares a rollout with its siblings."""
    if config.orchestrator.group_size < 2 and config.algorithm.advantage not in (Advantage.none, Advantage.gae):
        raise ConfigError(
            f"orchestrator.group_size={config.orchestrator.group_size} leaves a rollout without a sibling, so "
            f"algorithm.advantage={config.algorithm.advantage} would be 0 everywhere: set orchestrator.group_size=2 or "
            "more"
        )


def batches_are_learned_from(config: RunConfig) -> None:
    """Staleness is shorter than the run."""
    staleness, steps = config.orchestrator.max_staleness, config.trainer.max_steps
    if config.mode in BY_REWARD and staleness >= steps:
        raise ConfigError(
            f"orchestrator.max_staleness={staleness} is not below trainer.max_steps={steps}, so the whole run would be "
            "sampled before anything is learned: lower orchestrator.max_staleness"
        )


def credit_settings_have_effect(config: RunConfig) -> None:
    """What only one kind of credit reads is left alone with the others."""
    algorithm, credit = config.algorithm, config.algorithm.credit
    if config.mode not in BY_REWARD:
        return
    if algorithm.discount != 1 and credit is not Credit["return"]:
        raise ConfigError(
            f"algorithm.discount={algorithm.discount} has no effect with algorithm.credit={credit.name}, which adds up "
            "no later rewards: set algorithm.credit=return, or algorithm.discount=1"
        )
    if algorithm.compare is Compare.state and credit is Credit.episode:
        raise ConfigError(
            "algorithm.compare=state has no effect with algorithm.credit=episode, which compares whole episodes: set "
            "algorithm.credit=return (or turn), or algorithm.compare=turn"
        )


def overlong_answers_exist(config: RunConfig) -> None:
    """The punishment of long answers reaches some answers and not all of them."""
    overlong, budget = config.algorithm.overlong, config.orchestrator.max_new_tokens
    if config.mode not in BY_REWARD:
        return
    if not overlong.is_on:
        for name in ("longest", "penalty"):
            value, default = getattr(overlong, name), getattr(OverlongConfig(), name)
            if value != default:
                raise ConfigError(
                    f"algorithm.overlong.{name}={value} has no effect with algorithm.overlong.tokens=0, which punishes "
                    "no length: set algorithm.overlong.tokens to the number of tokens over which the punishment grows, "
                    f"or drop algorithm.overlong.{name}"
                )
        return
    if overlong.longest is not None and overlong.longest > budget:
        raise ConfigError(
            f"algorithm.overlong.longest={overlong.longest} is longer than orchestrator.max_new_tokens={budget}, so no "
            f"answer would reach the whole penalty: set algorithm.overlong.longest={budget} or less"
        )
    longest = budget if overlong.longest is None else overlong.longest
    if overlong.tokens >= longest:
        name = "orchestrator.max_new_tokens" if overlong.longest is None else "algorithm.overlong.longest"
        raise ConfigError(
            f"algorithm.overlong.tokens={overlong.tokens} is not below {name}={longest}, so every answer would be "
            f"punished for its length: set algorithm.overlong.tokens={max(1, longest // 5)}"
        )


def looking_is_measured(config: RunConfig) -> None:
    """There are images to look at, and others in the same step to replace them."""
    looking, groups = config.algorithm.vision_advantage, config.orchestrator.groups_per_step
    if config.mode not in BY_REWARD:
        return
    if not looking.is_on:
        if looking.cap != VisionAdvantageConfig().cap:
            raise ConfigError(
                f"algorithm.vision_advantage.cap={looking.cap} has no effect with algorithm.vision_advantage.weight=0, "
                "which weights nothing: set algorithm.vision_advantage.weight=1, or drop "
                "algorithm.vision_advantage.cap"
            )
        return
    weight = f"algorithm.vision_advantage.weight={looking.weight}"
    if config.model.vlm is None:
        raise ConfigError(
            f"{weight} compares answers with and without their images, and model.vlm=null has none: set "
            "algorithm.vision_advantage.weight=0"
        )
    if groups < 2:
        raise ConfigError(
            f"{weight} takes the images of another problem of the step, and orchestrator.groups_per_step={groups} is "
            "the only one: set orchestrator.groups_per_step=2 or more"
        )
    if config.algorithm.advantage == Advantage.none:
        raise ConfigError(
            f"{weight} weights the advantages of rewards, and algorithm.advantage=none makes them all 0: set "
            "algorithm.vision_advantage.weight=0"
        )


def guard_has_controls(config: RunConfig) -> None:
    """A run that is to end when it learns blind measures whether it does."""
    monitor = config.monitor
    if config.mode not in BY_REWARD or monitor.blind_guard is not BlindGuard.stop:
        return
    if monitor.vision_gap_every == 0:
        raise ConfigError(
            "monitor.blind_guard=stop reads the blind control, and monitor.vision_gap_every=0 makes none, so the run "
            "would never be stopped: set monitor.vision_gap_every=10, or monitor.blind_guard=none"
        )
    if config.model.vlm is None:
        raise ConfigError(
            "monitor.blind_guard=stop reads the blind control, and with model.vlm=null there are no images, so the run "
            "would never be stopped: set monitor.blind_guard=none"
        )


def optimizer_steps_are_made(config: RunConfig) -> None:
    """A batch can be divided into its minibatches, and what concerns later optimizer steps has some."""
    algorithm, orchestrator = config.algorithm, config.orchestrator
    if config.mode not in BY_REWARD:
        return
    rollouts = orchestrator.groups_per_step * orchestrator.group_size
    if algorithm.minibatches > rollouts:
        raise ConfigError(
            f"algorithm.minibatches={algorithm.minibatches} is above the {rollouts} rollouts of a step "
            f"(orchestrator.groups_per_step={orchestrator.groups_per_step}, orchestrator.group_size="
            f"{orchestrator.group_size}), so a minibatch would be empty: set algorithm.minibatches={rollouts} or less"
        )
    if algorithm.target_kl is not None and algorithm.epochs == algorithm.minibatches == 1:
        raise ConfigError(
            f"algorithm.target_kl={algorithm.target_kl} has no effect with algorithm.epochs=1 and "
            "algorithm.minibatches=1, where a batch has one optimizer step: set algorithm.epochs=2, or "
            "algorithm.target_kl=null"
        )
    if algorithm.clip_dual is not None and algorithm.loss in (Loss.rloo, Loss.cispo):
        raise ConfigError(
            f"algorithm.clip_dual={algorithm.clip_dual} has no effect with algorithm.loss={algorithm.loss}, which does "
            f"not take the smaller of two objectives: set algorithm.loss={Loss.grpo.value}, or algorithm.clip_dual=null"
        )


def filters_can_find(config: RunConfig) -> None:
    """A repetition of the filter's length fits in a completion."""
    filters, longest = config.algorithm.filters, config.orchestrator.max_new_tokens
    if filters.repetition is not FilterMode.none and filters.repetition_window > longest:
        raise ConfigError(
            f"algorithm.filters.repetition_window={filters.repetition_window} is longer than "
            f"orchestrator.max_new_tokens={longest}, so algorithm.filters.repetition={filters.repetition.value} would "
            f"find nothing: set algorithm.filters.repetition_window={longest} or less"
        )


def optimizer_fits(config: RunConfig) -> None:
    """AdamW has two betas, and the learning rate reaches its maximum within the run."""
    trainer = config.trainer
    if len(trainer.betas) != 2:
        raise ConfigError(
            f"trainer.betas={list(trainer.betas)} does not have two numbers, so AdamW would lack one: set "
            "trainer.betas=[0.9,0.95]"
        )
    if trainer.max_epochs is None and trainer.lr_warmup_steps > trainer.max_steps:
        raise ConfigError(
            f"trainer.lr_warmup_steps={trainer.lr_warmup_steps} is longer than trainer.max_steps={trainer.max_steps}, "
            "so the run would end before it reaches trainer.learning_rate: lower trainer.lr_warmup_steps"
        )
