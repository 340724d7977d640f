"""Run directories for tests, with a real config, written by the real recorder and metrics log."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir

from support.configs import checked
from vlmrl.cli.recipe import with_recipe
from vlmrl.cli.schemas import register_schemas
from vlmrl.config.conf_folder import CONF
from vlmrl.config.run import RunConfig
from vlmrl.record.metrics import MetricsLog
from vlmrl.record.rollouts import RolloutRecorder
from vlmrl.record.run_dir import RunDir
from vlmrl.record.step_keys import REQUIRED_KEYS
from vlmrl.types import (
    Completion,
    DropReason,
    Image,
    ImageItem,
    Message,
    Placeholder,
    Prompt,
    Rollout,
    StopReason,
    TokenMetrics,
    Turn,
)

IMAGE_TOKEN = 999


def config_of(*overrides: str) -> RunConfig:
    """The config of a command line, checked."""
    register_schemas()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", with_recipe(list(overrides)))
    config.output_dir = "made later"
    return checked(config)


class Alphabet:
    """A tokenizer whose token 97 is "a"; `names` gives other spellings."""

    def __init__(self, names: dict[int, str]) -> None:
        self.names = names

    def decode(self, ids: list[int], **_: object) -> str:
        return self.names.get(ids[0], chr(ids[0]))


def noise(seed: int, height: int, width: int) -> ImageItem:
    """An image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return ImageItem(hashlib.sha256(pixels.tobytes()).hexdigest()[:32], pixels, {}, 3)


def one_turn(
    text: str,
    image: ImageItem | None,
    *,
    step: int,
    reward: float,
    advantage: float,
    question: str = "What is it? ",
    before: Turn | None = None,
    ids: list[int] | None = None,
) -> Turn:
    """A turn with the completion `text`, one token per letter, and metrics drawn from a seed made of its letters."""
    prompt_ids = [*before.prompt.token_ids, *before.completion.token_ids] if before else []
    placeholders = list(before.prompt.placeholders) if before else []
    images = list(before.prompt.images) if before else []
    prompt_ids += [ord(letter) for letter in question]
    if image is not None:
        placeholders.append(Placeholder(len(prompt_ids), image.num_tokens, image.hash))
        images.append(image)
        prompt_ids += [IMAGE_TOKEN] * image.num_tokens
    completion_ids = np.array(ids or [ord(letter) for letter in text], np.int64)
    random = np.random.default_rng(completion_ids.sum() + step)
    logprobs = -random.exponential(size=len(completion_ids)).astype(np.float32)
    parts = [question] if image is None else [question, Image(image.pixels)]
    return Turn(
        Prompt(np.array(prompt_ids, np.int64), tuple(placeholders), tuple(images)),
        Completion(completion_ids, logprobs, np.full(len(completion_ids), step - 1), "stop"),
        text,
        [Message.of("user", *parts)],
        branch=0,
        reward=reward,
        advantage=advantage,
        learned=TokenMetrics(
            logprobs + random.normal(0, 0.01, len(completion_ids)).astype(np.float32),
            random.exponential(size=len(completion_ids)).astype(np.float32),
        ),
    )


def one_rollout(
    label: str,
    step: int,
    group: int,
    index: int,
    turns: list[Turn],
    *,
    problem: str = "",
    stop: StopReason = StopReason.TERMINATED,
    dropped: DropReason | None = None,
    error: str | None = None,
) -> Rollout:
    if dropped is not None or label != "train":
        for turn in turns:
            turn.learned = None
    return Rollout(
        rollout_id=f"{label}/{step:06d}/{group:02d}/{index:02d}",
        problem_id=problem or f"problem {group}",
        index=index,
        turns=turns,
        reward=turns[-1].reward if turns else 0.0,
        metrics={"exact_match": turns[-1].reward if turns else 0.0},
        stop_reason=stop,
        error=error,
        dropped=dropped,
        seconds=0.5,
    )


def ordinary_rollout(label: str, step: int, group: int, index: int, images: list[ImageItem]) -> Rollout:
    """Two turns, the second with another image, and a reward that differs between siblings."""
    reward = ((step + group + index) % 5) / 4
    answer = "abcdefgh"[index % 8] * 2 + chr(97 + step % 26)
    first = one_turn(answer, images[group % len(images)], step=step, reward=0.0, advantage=(0.5 - reward) / 2)
    second = one_turn(
        answer[::-1] + "z",
        images[(group + 1) % len(images)],
        step=step,
        reward=reward,
        advantage=reward - 0.5,
        before=first,
    )
    return one_rollout(label, step, group, index, [first, second])


def record(
    path: Path,
    config: RunConfig,
    steps: Iterable[tuple[int, list[Rollout]]],
    evaluations: Iterable[tuple[int, list[Rollout], list[Rollout]]] = (),
    *,
    names: dict[int, str] | None = None,
    summary: dict[str, Any] | None = None,
    metrics: Callable[[int], dict[str, float]] = lambda step: {},
) -> RunDir:
    """A run directory with these rollouts; `metrics` returns the metrics of a step that are not 1 / step."""
    run_dir = RunDir(path)
    run_dir.create()
    config.output_dir = str(run_dir.path)
    run_dir.write_config(config)
    recorder = RolloutRecorder(run_dir)
    recorder.spell_with(Alphabet({IMAGE_TOKEN: "<|image_pad|>", **(names or {})}))
    log = MetricsLog(run_dir.metrics)
    evaluated = {step: (sampled, greedy) for step, sampled, greedy in evaluations}
    for step, rollouts in steps:
        recorder.write(step, {"train": rollouts})
        figures = {
            **dict.fromkeys(REQUIRED_KEYS[1:], 1.0 / step),
            "rollouts/total": float(len(rollouts)),
            **metrics(step),
        }
        for rollout in rollouts:
            if rollout.dropped is not None:
                key = f"rollouts/dropped/{rollout.dropped}"
                figures[key] = figures.get(key, 0.0) + 1.0
        if step in evaluated:
            sampled, greedy = evaluated[step]
            recorder.write(step, {"eval_sampled": sampled, "eval_greedy": greedy})
            figures |= {"eval/reward": 0.5, "eval/reward_greedy": 0.75}
        log.write({"step": step, **figures})
    recorder.close()
    log.close()
    if summary is not None:
        run_dir.write_summary(summary)
    return run_dir
