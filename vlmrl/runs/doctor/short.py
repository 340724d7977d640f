"""The short certificate of a family of which nothing is known: a few checks before its first run, kept and reused.

    a family without a file in conf/model/vlm
      ─▶ passed before, with these versions, files and settings: the run goes on
      ─▶ else two conversations in noise, without an engine ─▶ a line fails: the run ends, before anything has started
                                                            ─▶ none fails: the certificate is kept

The checks are the doctor's own: token ids, pixels, placeholders, positions, logprobs against transformers' own forward
and against the samples one by one, and whether the images matter. It takes seconds for a small model. A certificate is
kept in `$VLMRL_CACHE/certificates`; one that failed is not kept, so the next run tries again.

Left out on purpose: the engine, the weight sync and the gradient, which `mode=doctor` checks.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from vlmrl.config.run import LEARN, Mode, RunConfig
from vlmrl.models.checkpoints.built_folders import cache_folder
from vlmrl.models.policy import Policy
from vlmrl.monitor.monitor import Monitor
from vlmrl.orchestrator.samples import make_samples
from vlmrl.preflight.auto_model import known_families
from vlmrl.record.files import read_json
from vlmrl.record.run_dir import RunDir, is_certificate
from vlmrl.rendering.renderer import Renderer
from vlmrl.runs.doctor.certificate import SAMPLING, certificate
from vlmrl.runs.doctor.comparing import Comparing, inverted_samples
from vlmrl.runs.doctor.judging import verdict_of
from vlmrl.runs.doctor.logprobs import FLOAT32, ROUNDING_FACTOR, logprobs
from vlmrl.runs.doctor.noise_images import TwoTurns
from vlmrl.runs.doctor.own_forward import own_forward
from vlmrl.runs.doctor.pixels import images_in_trainer, pixels
from vlmrl.runs.doctor.placeholders import placeholders
from vlmrl.runs.doctor.playing import Playing
from vlmrl.runs.doctor.positions import trainer_positions
from vlmrl.runs.doctor.reference import reference_of
from vlmrl.runs.doctor.tokens import first_turns, later_turns
from vlmrl.runs.doctor.watching import ScriptedEngine
from vlmrl.runs.verdicts import Verdict, as_table, conclude
from vlmrl.types import Message, Rollout, TrainingSample

ANSWERS = ("A", "B B")
"""Each conversation is answered in these ways, so that samples share a prefix and part from each other."""

PROBLEMS = 2

ENGINE_SETTINGS = ("engine", "engine_dtype", "weight_sync", *SAMPLING)
"""Settings on which the short certificate does not depend."""


def ensure_certified(
    config: RunConfig, folder: Path, policy: Policy, renderer: Renderer, run_dir: RunDir, monitor: Monitor
) -> None:
    """Try a model of an unknown family, unless this checkpoint has passed before. Raises `ParityError` with the lines
    that failed.

    The verdicts are shown and written to the run's doctor.json; a certificate that passed is kept.
    """
    if not needs_certificate(config):
        return
    assert config.model.vlm is not None
    found = certificate(config, folder, policy, ())
    kept = _place(found)
    before = read_json(kept, is_certificate, monitor.warn)
    what = f"model.vlm.family={config.model.vlm.family} has no file in conf/model/vlm"
    if before is not None:
        monitor.table("short certificate", {"kept": f"{what}; this checkpoint passed before: {kept}"})
        run_dir.write_doctor(before)
        return
    monitor.status(f"{what}: a short certificate before its first run")
    verdicts = ShortCertificate(config, folder, policy, renderer).verdicts()
    found["checks"] = [verdict.as_json("bound") for verdict in verdicts]
    found["kept"] = str(kept)
    run_dir.write_doctor(found)
    monitor.table("short certificate", as_table(verdicts))
    conclude(
        verdicts,
        f"and {what}, so it would be trained by the general way, which does not compute what this model computes: "
        "choose another model, or write conf/model/vlm/<family>.yaml and, where it needs one, a module in "
        "models/families (docs/families.md); mode=doctor shows all lines",
    )
    _keep(kept, found, monitor)


def needs_certificate(config: RunConfig) -> bool:
    """Whether a run of this config first tries its model: one with images, of a family without a file of its own."""
    vlm = config.model.vlm
    return (
        config.mode in (*LEARN, Mode.eval, Mode.serve, Mode.bench)
        and vlm is not None
        and vlm.family not in known_families()
    )


class ShortCertificate:
    """Tries a model with two conversations of two turns, in noise of several sizes."""

    def __init__(self, config: RunConfig, folder: Path, policy: Policy, renderer: Renderer) -> None:
        self._policy = policy
        self._reference = reference_of(config, folder)
        self._playing = Playing(config, TwoTurns(), renderer, problems=PROBLEMS, is_whole=True)
        self._comparing = Comparing(config, policy)

    def verdicts(self) -> list[Verdict]:
        """One verdict per check."""
        rollouts = [rollout for answer in ANSWERS for rollout in self._rollouts(answer)]
        reference, policy, ids = self._reference, self._policy, self._reference.feature_ids
        verdicts = [
            verdict_of("token ids, first turns", first_turns, reference, rollouts),
            verdict_of("token ids, later turns", later_turns, reference, rollouts),
            verdict_of("pixels", pixels, reference, rollouts),
        ]
        samples = [sample for rollout in rollouts if rollout.turns for sample in make_samples(rollout)]
        if samples:
            verdicts += [
                verdict_of("placeholders", placeholders, policy, ids, samples),
                verdict_of("positions, trainer", trainer_positions, policy, ids, samples),
                verdict_of("logprobs, transformers", self._transformers, samples),
                verdict_of("logprobs, one by one", self._one_by_one, samples),
                verdict_of("images, trainer", self._images, [tuple(rollouts[0].turns[0].messages)]),
            ]
        return verdicts

    def _rollouts(self, answer: str) -> list[Rollout]:
        token_ids = self._reference.tokenizer.encode(answer, add_special_tokens=False)
        return asyncio.run(self._playing.scripted(np.array(token_ids, np.int64)))

    def _transformers(self, name: str, samples: Sequence[TrainingSample]) -> Verdict:
        trained = self._comparing.greedy_logprobs(samples)
        bound = self._comparing.bound((), samples)
        return own_forward(name, self._policy, self._reference, samples, trained, bound)

    def _one_by_one(self, name: str, samples: Sequence[TrainingSample]) -> Verdict:
        return logprobs(name, self._comparing.one_by_one(samples), self._comparing.bound((), samples))

    def _images(self, name: str, openings: Sequence[Sequence[Message]]) -> Verdict:
        prompts = asyncio.run(self._playing.inverted(openings))
        answer = self._reference.tokenizer.encode(ANSWERS[-1], add_special_tokens=False)
        engine = ScriptedEngine(np.array(answer, np.int64))
        samples = asyncio.run(self._playing.answered(engine, prompts))
        found = self._comparing.inverted(samples, inverted_samples(samples, prompts))
        smallest = max(FLOAT32.kl, self._comparing.bound(samples).kl / ROUNDING_FACTOR)
        return images_in_trainer(name, found, smallest)


# ── where it is kept ────────────────────────────────────────────────────────────────────────────────────────


def _place(found: dict[str, Any]) -> Path:
    """The file of a certificate for these versions, the checkpoint's files, and these settings."""
    settings = {name: value for name, value in found["settings"].items() if name not in ENGINE_SETTINGS}
    key = [found["versions"], found["checkpoint"]["files"], settings]
    text = orjson.dumps(key, option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS)
    family = found["settings"]["family"]
    return cache_folder() / "certificates" / f"{family}-{hashlib.sha256(text).hexdigest()[:16]}.json"


def _keep(path: Path, found: dict[str, Any], monitor: Monitor) -> None:
    """Write a certificate whole or not at all. Several runs may write the same one at once."""
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(orjson.dumps(found, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY))
        os.replace(temporary, path)
    except OSError as error:
        monitor.warn(
            f"the short certificate cannot be kept in {path.parent} ({error.strerror or error}), so the next run tries "
            "the model again: make room there, or set the environment variable VLMRL_CACHE to another folder"
        )
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
