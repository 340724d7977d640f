"""What the doctor looks at, collected once, and the lines of its table, one function each."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from torch import Tensor

from vlmrl.config.algorithm import Credit
from vlmrl.config.parse import parse
from vlmrl.models.digests import compare
from vlmrl.monitor.monitor import Monitor
from vlmrl.preflight.auto_model import fill_model
from vlmrl.record.run_dir import RunDir
from vlmrl.runs.build import Run, build_run
from vlmrl.runs.doctor.comparing import Comparing, inverted_samples
from vlmrl.runs.doctor.evidence import Evidence
from vlmrl.runs.doctor.logprobs import FLOAT32, logprobs
from vlmrl.runs.doctor.own_forward import own_forward
from vlmrl.runs.doctor.pixels import images_in_engine, images_in_trainer, pixels
from vlmrl.runs.doctor.placeholders import image_hashes, placeholders
from vlmrl.runs.doctor.playing import Playing
from vlmrl.runs.doctor.positions import engine_positions, trainer_positions
from vlmrl.runs.doctor.reference import Reference, reference_of
from vlmrl.runs.doctor.weights import weights
from vlmrl.runs.verdicts import State, Verdict
from vlmrl.types import Prompt, Rollout, TrainingSample


@dataclass
class Parts:
    """A family's run, and what the doctor has collected of it."""

    run: Run
    reference: Reference
    playing: Playing
    comparing: Comparing
    scripted: list[Rollout]
    evidence: Evidence
    shown_twice: Prompt
    inverted: list[Prompt]
    """Prompts with images, each followed by the one with inverted pixels."""

    def answered(self, engine: Any) -> tuple[list[TrainingSample], list[TrainingSample]]:
        """Samples of `inverted` that `engine` answered, and the same with inverted pixels."""
        samples = asyncio.run(self.playing.answered(engine, self.inverted))
        return samples, inverted_samples(samples, self.inverted)


def config_of(folder: Path, *task: str) -> DictConfig:
    """The config of `mode=doctor` for a checkpoint; `task` are the overrides that choose the task."""
    from hydra import compose, initialize_config_dir

    from vlmrl.cli.recipe import with_recipe
    from vlmrl.cli.schemas import register_schemas
    from vlmrl.config.conf_folder import CONF

    register_schemas()
    overrides = [
        "mode=doctor",
        "model=auto",
        f"model.name={folder}",
        *(task or ("task=color_codeword",)),
        "trainer=scratch",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", with_recipe([*overrides, "monitor.wandb.mode=disabled"]))
    config.output_dir = "outputs/test"
    return config


def collected(composed: DictConfig, folder: Path) -> Parts:
    config, _ = fill_model(parse(composed))
    run_dir = RunDir(folder / "run")
    run_dir.create()
    with Monitor(config.monitor, run_dir, total_steps=1, exact=True, credit=Credit.turn) as monitor:
        run = build_run(config, run_dir, monitor)
    reference = reference_of(config, Path(config.model.name))
    playing = Playing(config, run.task, run.renderer, problems=2)

    async def scenario() -> tuple[list[Rollout], Evidence, Prompt | None, list[Prompt]]:
        answer = np.array(reference.tokenizer.encode("A", add_special_tokens=False), np.int64)
        scripted = await playing.scripted(answer)
        evidence = await playing.sampled(run.engine, 0, run.policy)
        return scripted, evidence, await playing.shown_twice(evidence), await playing.inverted(evidence.openings())

    scripted, evidence, shown_twice, inverted = asyncio.run(scenario())
    assert shown_twice is not None, [rollout.error for rollout in scripted]
    comparing = Comparing(config, run.policy, run.trainer)
    return Parts(run, reference, playing, comparing, scripted, evidence, shown_twice, inverted)


# ── the lines ───────────────────────────────────────────────────────────────────────────────────────────────


def pixel_line(parts: Parts, scripted: list[Rollout]) -> Verdict:
    return pixels("pixels", parts.reference, scripted)


def hash_line(parts: Parts, evidence: Evidence) -> Verdict:
    return image_hashes("image hashes", evidence, parts.shown_twice)


def placeholder_line(parts: Parts, samples: list[TrainingSample]) -> Verdict:
    return placeholders("placeholders", parts.run.policy, parts.reference.feature_ids, samples)


def position_line(parts: Parts) -> Verdict:
    samples = parts.evidence.samples
    return trainer_positions("positions, trainer", parts.run.policy, parts.reference.feature_ids, samples)


def engine_position_line(parts: Parts, evidence: Evidence) -> Verdict:
    return engine_positions("positions, engine", parts.run.policy, evidence)


def weight_line(parts: Parts, theirs: dict[str, Tensor]) -> Verdict:
    return weights("weights", compare(parts.run.trainer.weights(), theirs))


def engine_lines(parts: Parts, engine: Any) -> list[Verdict]:
    """The lines of logprobs and of the blind check, for first turns that `engine` answered."""
    samples, swapped = parts.answered(engine)
    found = parts.comparing.inverted(samples, swapped)
    return [
        logprobs("logprobs, version 0", found.shown, FLOAT32),
        images_in_engine("images, engine", found, FLOAT32),
        images_in_trainer("images, trainer", found, FLOAT32.kl),
    ]


def transformers_line(parts: Parts) -> Verdict:
    samples = parts.evidence.samples
    trained = parts.comparing.greedy_logprobs(samples)
    return own_forward("logprobs, transformers", parts.run.policy, parts.reference, samples, trained, FLOAT32)


def assert_fails(verdict: Verdict) -> None:
    assert verdict.state is State.FAILED, f"{verdict.name}: {verdict.line}"
