"""The table that `dry_run=true` prints: what the run would take.

All rows are computed from the config, except that one problem of the task is played with empty answers to count the
turns, images and characters of an episode. Rows that are estimates say so; episode.py and memory.py have the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from vlmrl.config.dataset import DatasetConfig
from vlmrl.config.eval_set import EvalSet
from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Dtype, VideoConfig
from vlmrl.config.run import Mode, RunConfig
from vlmrl.config.task import MixtureConfig, TaskConfig, most_turns, tasks_of
from vlmrl.config.trainer import Packing
from vlmrl.errors import ConfigError, UserFault
from vlmrl.models.families import family_of
from vlmrl.preflight.estimate.episode import SAMPLES, EpisodeEstimate, play
from vlmrl.preflight.estimate.memory import (
    StepTokens,
    TrainerMemory,
    engine_parts,
    pixel_bytes,
    server_memory,
    trainer_memory,
)
from vlmrl.preflight.estimate.sizes import CHARACTERS_PER_TOKEN, TINY_CHARACTERS_PER_TOKEN, Sizes, find_sizes
from vlmrl.preflight.installed import missing
from vlmrl.preflight.machine import Machine, find_machine
from vlmrl.preflight.places import GIB, gpus_needed, processes, uses_gpus
from vlmrl.preflight.rules.checkpoint import refuse_family
from vlmrl.preflight.rules.machine import refuse_machine
from vlmrl.preflight.rules.task import images_are_seen
from vlmrl.preflight.rules.video import rows_are_shown
from vlmrl.preflight.settle import COMPILES_NOTHING
from vlmrl.preflight.site import this_site
from vlmrl.ranks.place import find_place
from vlmrl.tasks.base import Split, Task
from vlmrl.tasks.loading import data_table_of, load_task
from vlmrl.tasks.mixture import MixtureTask, keys_at

MOST_CUT = 4096
"""Samples of a step up to which its micro-batches are cut as by the trainer, in a tenth of a second."""


def dry_run(config: RunConfig) -> str:
    """The plan of a config that passed `Stage.composed`.

    Raises `ConfigError` where this machine has GPUs and they cannot hold the run, where the checkpoint is here and is
    of another family or text-only, and where none of the task's first problems can be played.
    """
    machine, sizes, ranks = find_machine(), find_sizes(config.model), find_place().size
    refuse_family(config.model)
    images_are_seen(config, this_site())
    task = load_task(config.task, seed=config.seed)
    rows_are_shown(config, task)
    video = None if config.model.vlm is None else config.model.vlm.video
    episode, wrong = _longest_of_tasks(config.task, task, video)
    sets = {name: each for name, each in config.orchestrator.eval.sets.items() if each.own_task is not None}
    of_sets = {
        name: _play_set(f"orchestrator.eval.sets.{name}.task", each, config.seed, video) for name, each in sets.items()
    }
    if machine.gpus and config.model.device != "cpu":
        refuse_machine(config, machine, sizes, ranks)
    rows = [
        *_model(config, sizes),
        *(("data", f"{what}: {found}") for what, found in data_table_of(task).items()),
        *(
            ("data", f"set {name}, {what}: {text}")
            for name, (data, _) in of_sets.items()
            for what, text in data.items()
        ),
        *_arithmetic(config, ranks),
        *_tokens(config, sizes, episode, ranks),
        *_memory(config, machine, sizes, episode, ranks),
        *_processes(config, machine, sizes, ranks),
        *(("note", text) for text in wrong),
        *(("note", f"set {name}: {text}") for name, (_, texts) in of_sets.items() for text in texts),
        *(("note", note) for note in notes(config, sizes, episode)),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def planned_memory(config: RunConfig, task: Task, ranks: int) -> TrainerMemory | None:
    """What `dry_run` estimates for the trainer; None where the model's sizes are not known. Raises `ConfigError` where
    no problem of the task can be played."""
    sizes = find_sizes(config.model)
    video = None if config.model.vlm is None else config.model.vlm.video
    episode, _ = _longest_of_tasks(config.task, task, video)
    on_gpu = _samples_on_gpu(config, find_machine(), sizes)
    return trainer_memory(config, sizes, tokens_of_micro_batch(config, sizes, episode), ranks, on_gpu=on_gpu)


def _play(
    key: str, config: TaskConfig, task: Task, video: VideoConfig | None, split: Split = "train"
) -> tuple[EpisodeEstimate, list[str]]:
    """`play`; raises `ConfigError` where none of the first problems of the task at `key` can be played."""
    with keys_at(key):
        try:
            return play(task, config.max_turns, split, video)
        except UserFault as fault:
            given = f"task.path={config.path}" if isinstance(config, DatasetConfig) else f"task.target={config.target}"
            raise ConfigError(
                f"{given}: none of its first {SAMPLES} problems can be played ({fault.text}), so a run would have "
                "nothing but faults: correct it, and check it with mode=check"
            ) from None


def _play_set(key: str, own: EvalSet, seed: int, video: VideoConfig | None) -> tuple[dict[str, str], list[str]]:
    """What the task of an evaluation set has read, and what is wrong with its first problems. Raises `ConfigError`."""
    config = own.own_task
    assert config is not None, "only sets with a task of their own are played"
    with keys_at(key):
        task = load_task(config, seed=seed)
    tasks = task.tasks if isinstance(task, MixtureTask) else {}
    configs = tasks_of(config, key)
    notes = [
        note
        for each, one in configs.items()
        for note in _play(each, one, tasks.get(each.rpartition(".")[2], task), video, own.split.value)[1]
    ]
    return data_table_of(task), notes


def _longest_of_tasks(config: TaskConfig, task: Task, video: VideoConfig | None) -> tuple[EpisodeEstimate, list[str]]:
    """The first episode of the task; of a mixture, that with the most pixels and text among those of its tasks."""
    if not isinstance(config, MixtureConfig) or not isinstance(task, MixtureTask):
        return _play("task", config, task, video)
    played = [_play(f"task.tasks.{name}", config.tasks[name], own, video) for name, own in task.tasks.items()]
    pixels = [found.pixels for found, _ in played]
    episode = max(zip(pixels, played, strict=True), key=lambda pair: (pair[0], pair[1][0].characters))[1][0]
    return episode, [note for _, notes_of_task in played for note in notes_of_task]


def _model(config: RunConfig, sizes: Sizes) -> Iterator[tuple[str, str]]:
    count = "parameters unknown" if sizes.parameters is None else f"{sizes.parameters:,} parameters"
    yield "model", f"{config.model.name}: {count} (by {sizes.source}), {config.model.dtype.value}"
    yield (
        "task",
        f"{config.task.target}, up to {most_turns(config.task)} turns"
        + (f", {config.task.num_examples} training problems" if config.task.num_examples is not None else ""),
    )
    algorithm = f"{config.algorithm.loss}, {config.algorithm.advantage}, credit by {config.algorithm.credit.value}"
    if config.mode is Mode.dpo:
        algorithm = f"dpo, {config.dpo.loss.value} loss, beta {config.dpo.beta:g}, reference={config.reference.kind}"
    yield "algorithm", algorithm


def _arithmetic(config: RunConfig, ranks: int) -> Iterator[tuple[str, str]]:
    o, t = config.orchestrator, config.trainer
    rollouts = o.groups_per_step * o.group_size
    supervised = f"{t.warmup.steps} supervised × {t.warmup.batch_size} conversations"
    if config.mode is Mode.sft:
        yield "optimizer steps", supervised
        return
    if config.mode is Mode.dpo:
        before = f"{supervised}, then " if t.warmup.steps else ""
        yield "optimizer steps", f"{before}{t.max_steps} × {config.dpo.batch_size} pairs"
        return
    yield (
        "rollouts per step",
        f"{o.groups_per_step} groups × {o.group_size} = {rollouts}"
        + (f", {math.ceil(rollouts / ranks)} for each of {ranks} ranks" if ranks > 1 else ""),
    )
    if config.mode is Mode.bench:
        yield "optimizer steps", config.bench.in_words(o.max_staleness)
        return
    yield "optimizer steps", (f"{supervised}, then " if t.warmup.steps else "") + f"{t.max_steps} × {rollouts} rollouts"
    yield (
        "policy",
        f"{'on-policy' if o.max_staleness == 0 else f'up to {o.max_staleness} steps stale'}, so "
        + (f"{o.max_staleness + 1} batch{'es' * (o.max_staleness > 0)} of {rollouts} rollouts in flight or waiting"),
    )
    if o.eval.every:
        yield "evaluation", f"{o.eval.problems} held-out problems, sampled and greedy, every {o.eval.every} steps"


def _tokens(config: RunConfig, sizes: Sizes, episode: EpisodeEstimate, ranks: int) -> Iterator[tuple[str, str]]:
    o, t = config.orchestrator, config.trainer
    longest = longest_episode(config, sizes, episode)
    videos = f"{len(episode.videos)} videos, " if episode.videos else ""
    shown = f"{len(episode.images)} images, {videos}{episode.characters} characters"
    shown += f", {episode.turns} × {o.max_new_tokens} new"
    yield "tokens per episode", f"up to about {longest} of {t.seq_len} (estimate: {shown})"
    rows, loss_tokens = step_tokens(config, sizes, episode)
    passes = math.ceil(rows / ranks / t.micro_batch_tokens)
    batches = f"{passes} micro-batch{'es' * (passes > 1)} of {t.micro_batch_tokens:,}" + " a rank" * (ranks > 1)
    packed = f"{rows:,} packed ({t.packing.value}), {loss_tokens:,} trained on"
    yield "tokens per step", f"up to about {packed}: {batches} (estimate)"


def longest_episode(config: RunConfig, sizes: Sizes, episode: EpisodeEstimate) -> int:
    """Tokens of the longest episode that the budgets allow; episode.py explains the estimate."""
    per_token = TINY_CHARACTERS_PER_TOKEN if config.model.tiny is not None else CHARACTERS_PER_TOKEN
    family = family_of(config.model.vlm)
    return episode.tokens(
        config.orchestrator.max_new_tokens, family, sizes.image_bounds, per_token, family.video_bounds(config.model)
    )


def step_tokens(config: RunConfig, sizes: Sizes, episode: EpisodeEstimate) -> tuple[int, int]:
    """Packed rows and loss tokens of a step in which every answer is as long as it may be. A tree holds the first
    prompt of a group once; everything after the first answer exists once per rollout."""
    o = config.orchestrator
    rollouts, length = o.groups_per_step * o.group_size, longest_episode(config, sizes, episode)
    prompt = (length - episode.turns * o.max_new_tokens) // episode.turns
    shared = prompt if config.trainer.packing is Packing.tree else 0
    further = episode.conversations - 1  # each has one answer that no other has
    rows = o.groups_per_step * shared + rollouts * (length - shared + further * length)
    return rows, rollouts * (episode.turns + further) * o.max_new_tokens


def tokens_of_micro_batch(config: RunConfig, sizes: Sizes, episode: EpisodeEstimate) -> StepTokens:
    """What decides over the memory of a step."""
    o = config.orchestrator
    rows, loss_tokens = step_tokens(config, sizes, episode)
    largest = largest_micro_batch(config, sizes, episode)
    budget = 0 if config.trainer.packing is Packing.none else config.trainer.micro_batch_tokens
    length, rollouts = longest_episode(config, sizes, episode), o.groups_per_step * o.group_size
    prompt = (length - episode.turns * o.max_new_tokens) // episode.turns
    prompts = o.groups_per_step * prompt
    return StepTokens(
        rows=largest,
        loss_tokens=math.ceil(loss_tokens * largest / rows),
        prompts=prompts,
        rollouts=prompts + rollouts * (length - prompt + (episode.conversations - 1) * length),
        sampled_at_a_time=rollouts,
        full_rows=min(rows, budget),
    )


def largest_micro_batch(config: RunConfig, sizes: Sizes, episode: EpisodeEstimate) -> int:
    """Rows of the largest micro-batch of such a step, cut as the trainer cuts it. Less than
    `trainer.micro_batch_tokens`, where whole groups do not fill it; full for a step of more than `MOST_CUT` samples."""
    from vlmrl.trainer.cutting import cut  # needs NumPy

    o = config.orchestrator
    length = longest_episode(config, sizes, episode)
    if config.trainer.packing is Packing.none:
        return length
    if o.groups_per_step * o.group_size * episode.conversations > MOST_CUT:
        return min(step_tokens(config, sizes, episode)[0], config.trainer.micro_batch_tokens)
    prompt = (length - episode.turns * o.max_new_tokens) // episode.turns
    sibling = prompt if config.trainer.packing is Packing.tree else 0
    shared = [0, *[sibling] * (o.group_size - 1)] * o.groups_per_step
    shared += [0] * (o.groups_per_step * o.group_size * (episode.conversations - 1))
    bounds = cut([length] * len(shared), shared, config.trainer.micro_batch_tokens)
    return max(length + (end - start - 1) * length - sum(shared[start + 1 : end]) for start, end in bounds)


def _memory(
    config: RunConfig, machine: Machine, sizes: Sizes, episode: EpisodeEstimate, ranks: int
) -> Iterator[tuple[str, str]]:
    step = tokens_of_micro_batch(config, sizes, episode)
    trainer = trainer_memory(config, sizes, step, ranks, on_gpu=_samples_on_gpu(config, machine, sizes))
    if trainer is not None:
        longest, full = trainer.activations, trainer.full_activations
        if longest is None or full is None:
            active = "unknown"
        elif longest == full:
            active = size(full)
        else:
            active = f"{size(longest)} (longest answers) to {size(full)} (full micro-batches)"
        yield (
            "trainer's memory",
            f"about {size(trainer.fixed)} a rank + {active} of activations (estimate)"
            + (f"; {size(trainer.in_transit)} of it are weights in transit" if trainer.in_transit else ""),
        )
        if trainer.engine and trainer.peak is not None and trainer.full_peak is not None:
            peak = span(trainer.peak, trainer.full_peak)
            yield "", f"or + {size(trainer.engine)} of the engine while it samples: a peak of {peak}"
            yield from _engine_parts(config, machine, sizes, step, trainer.fixed, ranks)
        if trainer.on_host:
            yield "", f"and {size(trainer.on_host)} of the host's, where AdamW runs (trainer.cpu_offload)"
    if isinstance(config.inference, VllmConfig):
        server = server_memory(config.inference, sizes)
        if server is not None:
            cache = (
                ""
                if server.cache_per_token is None
                else (
                    f", {size(server.cache_per_token * config.inference.max_model_len)} of cache for each sequence of "
                    f"{config.inference.max_model_len} tokens"
                )
            )
            yield (
                "server's memory",
                (
                    f"{size(server.weights)} of weights a GPU{cache} (estimate); takes "
                    f"{config.inference.gpu_memory_utilization:.0%} of each of its GPUs"
                ),
            )
    yield "pixels on the host", f"up to about {size(pixel_bytes(config, episode))} (estimate)"


def _samples_on_gpu(config: RunConfig, machine: Machine, sizes: Sizes) -> bool:
    """Whether the embedded engine samples on a GPU: of this machine, or of the one that the run is meant for."""
    return config.model.device != "cpu" and (bool(machine.gpus) or uses_gpus(config, sizes))


def _engine_parts(
    config: RunConfig, machine: Machine, sizes: Sizes, step: StepTokens, fixed: int, ranks: int
) -> Iterator[tuple[str, str]]:
    """How the embedded engine samples a step on a GPU that is smaller than the peak. `fixed`: bytes of the trainer."""
    if sizes.text is None or not machine.gpus or config.model.device == "cpu":
        return
    count = engine_parts(config, sizes, step, machine.gpus[0].memory - fixed, ranks)
    if count != 1:
        how = f"in {count} parts, one after the other" if count else "not at all: take a smaller model or more GPUs"
        yield "", f"GPU {machine.gpus[0].index} has room for less, so a step's rollouts are sampled {how}"


def _processes(config: RunConfig, machine: Machine, sizes: Sizes, ranks: int) -> Iterator[tuple[str, str]]:
    gpus = [gpu.index for gpu in machine.gpus] if config.model.device != "cpu" else []
    for process in processes(config, ranks, gpus):
        if process.devices:
            where = f"GPU {','.join(process.devices)}"
        elif uses_gpus(config, sizes):
            where = "a GPU of the machine that runs it"
        else:
            where = "CPU"
        yield "starts", f"{process.name} on {where}"
    if isinstance(config.inference, VllmConfig) and config.inference.urls:
        yield "uses", ", ".join(config.inference.urls)
    if isinstance(config.inference, VllmConfig) and config.inference.slurm_tasks:
        yield "uses", f"a vLLM server on each of the Slurm job's last {config.inference.slurm_tasks} tasks"
    yield "weights go", f"by weight_sync={config.weight_sync.kind}"
    found = ", ".join(f"{gpu.name} ({gpu.memory / GIB:.0f} GiB)" for gpu in machine.gpus) or "no GPU"
    yield "this machine", f"{machine.cores} cores, {machine.memory / GIB:.0f} GiB, {found}"
    if uses_gpus(config, sizes) and not machine.gpus:
        needed = gpus_needed(config, ranks)
        yield "", f"the run needs {needed} GPU{'s' * (needed > 1)}: it cannot start here"
    for need in missing(config):
        yield "missing here", need.message()


def notes(config: RunConfig, sizes: Sizes, episode: EpisodeEstimate) -> Iterator[str]:
    """Sentences about settings that are allowed but may be unintended."""
    longest, t = longest_episode(config, sizes, episode), config.trainer
    if config.model.vlm is None and episode.images:
        yield (
            f"an episode shows {len(episode.images)} images and model.name={config.model.name} is a text-only model, "
            "so such a rollout fails (stop_reason=image_error): choose a task of texts, or a model with images"
        )
    if longest > t.seq_len:
        yield (
            f"an episode may grow to about {longest} tokens and trainer.seq_len={t.seq_len} cuts it before its last "
            f"turn (stop_reason=context_full): set trainer.seq_len={longest} or more, or fewer "
            "orchestrator.max_new_tokens"
        )
    if t.micro_batch_tokens < longest:
        yield (
            f"trainer.micro_batch_tokens={t.micro_batch_tokens} is less than an episode of about {longest} tokens, so "
            "a micro-batch is one sample, however long: raise it where memory allows"
        )
    if isinstance(config.inference, VllmConfig) and config.inference.dtype is not config.model.dtype:
        pair = f"model.dtype={config.model.dtype.value} and inference.dtype={config.inference.dtype.value}"
        wide = config.inference.dtype is Dtype.float16 and config.model.dtype is Dtype.bfloat16
        if not wide:  # three bits more for the sampler are meant
            yield (
                f"{pair} round differently, which mismatch_kl will show: set inference.dtype=${{model.dtype}}, unless "
                "you intend the difference"
            )
    if t.compile is None and not uses_gpus(config, sizes):
        yield COMPILES_NOTHING
    examples = config.task.num_examples
    if examples is not None and examples < config.orchestrator.groups_per_step:
        yield (
            f"task.num_examples={examples} is less than orchestrator.groups_per_step="
            f"{config.orchestrator.groups_per_step}, so a step holds the same problem twice"
        )


def span(low: float, high: float) -> str:
    """Both sizes, or the one that they are.

    >>> span(60 * 2**30, 79 * 2**30), span(1024, 1024)
    ('60 GiB to 79 GiB', '1.0 KiB')
    """
    return size(low) if low == high else f"{size(low)} to {size(high)}"


def size(count: float) -> str:
    """Bytes for people.

    >>> size(428480 * 16), size(7.1e10)
    ('6.5 MiB', '66 GiB')
    """
    for unit, name in ((GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.{0 if count >= 10 * unit else 1}f} {name}"
    return f"{count:.0f} B"
