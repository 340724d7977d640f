"""The one door for refusals of a configuration: `check(config, stage)` raises what cannot work.

    composed    on the command line, before anything exists: the configuration alone. No torch, below a second
    submitted   before a launcher submits a job: the nodes and tasks that it will start
    here        on the machine that runs it, before the run's folder exists: packages, GPUs, the checkpoint

Each refusal is a small function in `rules/`, which raises `ConfigError`. Its message names the key with its value, says
what would go wrong, and what to set instead. `RULES` says at which stages each one runs.

Left out on purpose: faults that are not about the configuration (a corrupt checkpoint, a rank that runs out of memory).
They stay where they happen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from vlmrl.config.run import RunConfig
from vlmrl.preflight.rules import (
    checkpoint,
    critic,
    engine,
    evaluation,
    imports,
    learning,
    machine,
    mode,
    model,
    numbers,
    packages,
    past_run,
    preference,
    program,
    ranks,
    reference,
    reward,
    secrecy,
    slurm,
    task,
    tool,
    transfer,
    video,
    video_family,
)
from vlmrl.preflight.site import Site, Submission, submitted_site, this_site

__all__ = ["RULES", "Rule", "Stage", "Submission", "check"]


class Stage(Enum):
    """When a configuration is checked; what is known grows from one stage to the next."""

    composed = "composed"
    submitted = "submitted"
    here = "here"


@dataclass(frozen=True)
class Rule:
    """One refusal and the stages at which it runs."""

    name: str
    stages: tuple[Stage, ...]
    refuse: Callable[[RunConfig, Site], None]
    """Raises `ConfigError` for a configuration that breaks the rule at that site."""


def _of_config(refuse: Callable[[RunConfig], None]) -> Rule:
    """A rule that needs the configuration alone, so it runs at the first stage."""
    return Rule(refuse.__name__, (Stage.composed,), lambda config, site: refuse(config))


def _of_site(refuse: Callable[[RunConfig, Site], None], *stages: Stage) -> Rule:
    return Rule(refuse.__name__, stages, refuse)


RULES: tuple[Rule, ...] = (
    _of_config(secrecy.no_secret_is_recorded),
    _of_config(numbers.texts_have_their_form),
    _of_config(model.renderer_is_there),
    _of_config(model.renderer_serves_family),
    _of_config(model.positions_are_known),
    _of_config(model.image_token_is_known),
    _of_config(model.size_is_numbers),
    _of_config(numbers.numbers_in_range),
    _of_config(model.frame_budgets_fit),
    _of_config(engine.kinds_are_chosen),
    _of_config(engine.servers_have_one_place),
    _of_config(engine.weights_reach_engine),
    _of_config(engine.kept_requests_stay_apart),
    _of_config(engine.embedded_is_on_policy),
    _of_config(engine.supports_are_reported),
    _of_config(engine.context_holds_samples),
    _of_config(learning.algorithm_is_known),
    _of_config(learning.groups_have_siblings),
    _of_config(learning.batches_are_learned_from),
    _of_config(reference.reference_is_there),
    _of_config(reference.distributions_are_reported),
    _of_config(reference.something_is_learned),
    _of_site(slurm.servers_have_tasks, Stage.submitted),
    _of_site(slurm.some_task_trains, Stage.submitted),
    _of_site(ranks.ranks_work_together, Stage.composed, Stage.submitted, Stage.here),
    _of_site(engine.requests_can_enter, Stage.composed, Stage.submitted, Stage.here),
    _of_site(slurm.weights_cross_nodes, Stage.submitted, Stage.here),
    _of_config(learning.filters_can_find),
    _of_config(learning.overlong_answers_exist),
    _of_config(learning.looking_is_measured),
    _of_config(learning.guard_has_controls),
    _of_config(engine.stop_strings_are_few),
    _of_config(mode.past_run_is_named),
    _of_config(mode.episodes_are_new),
    _of_config(mode.past_run_is_read),
    _of_config(mode.export_folder_has_effect),
    _of_config(mode.mode_has_work),
    _of_config(mode.player_is_known),
    _of_config(preference.pairs_are_known),
    _of_config(preference.pair_settings_have_effect),
    _of_config(evaluation.evaluation_has_work),
    _of_config(evaluation.sets_have_names),
    _of_config(evaluation.sets_are_played),
    _of_config(evaluation.best_is_measured),
    _of_config(learning.optimizer_fits),
    _of_config(learning.optimizer_steps_are_made),
    _of_config(critic.value_settings_have_effect),
    _of_config(critic.values_are_of_tokens),
    _of_config(learning.credit_settings_have_effect),
    _of_config(reward.names_can_be_keys),
    _of_config(reward.mixture_has_tasks),
    _of_config(reward.answers_are_scored),
    _of_config(reward.terms_have_effect),
    _of_config(program.programs_have_a_mode),
    _of_config(program.programs_bring_their_tools),
    _of_config(program.programs_are_commands),
    _of_config(program.workers_are_the_programs),
    _of_config(program.program_settings_have_effect),
    _of_config(program.programs_are_paid_by_episode),
    _of_config(program.programs_have_demonstrations),
    _of_config(task.workers_are_processes),
    _of_config(task.squares_fill_tokens),
    _of_config(task.answer_fits),
    _of_config(task.episode_has_room),
    _of_config(task.target_is_a_reward),
    _of_config(tool.calls_leave_a_turn),
    _of_config(tool.demonstrated_calls_exist),
    _of_config(model.random_has_size),
    _of_config(model.something_learns),
    _of_config(model.tiny_is_a_model),
    _of_config(video_family.family_has_videos),
    _of_config(video_family.video_sizes_are_possible),
    _of_config(imports.imports_resolve),
    _of_site(packages.packages_are_installed, Stage.here),
    _of_site(model.renderer_exists, Stage.here),
    _of_site(task.images_are_seen, Stage.here),
    _of_config(video.videos_are_shown),
    _of_site(tool.tools_have_images, Stage.here),
    _of_site(program.programs_are_here, Stage.here),
    _of_site(reference.reference_folder_is_there, Stage.here),
    _of_site(past_run.batch_was_recorded, Stage.here),
    _of_site(preference.recorded_pairs_are_there, Stage.here),
    _of_site(past_run.older_certificate_is_there, Stage.here),
    _of_site(past_run.export_folder_is_free, Stage.here),
    _of_site(past_run.record_can_go_on, Stage.here),
    _of_site(machine.gpus_hold_the_run, Stage.here),
    _of_site(transfer.gpus_can_transfer, Stage.here),
    _of_site(checkpoint.cache_is_usable, Stage.here),
    _of_site(checkpoint.frequencies_stay, Stage.here),
    _of_site(checkpoint.model_runs_here, Stage.here),
)
"""All rules, in the order in which they run: cheap ones first, and imports of the user's modules last."""


def check(config: RunConfig, stage: Stage, submission: Submission | None = None) -> None:
    """Refuse a configuration that cannot run, by the rules of one stage. Raises `ConfigError`.

    `submission` is what the launcher will start, for `Stage.submitted`.
    """
    if stage is Stage.submitted:
        assert submission is not None, "the stage is about what the launcher will start"
        site = submitted_site(config, submission)
    else:
        site = this_site()
    for rule in RULES:
        if stage in rule.stages:
            rule.refuse(config, site)
