"""The doctor passes runs without a fault, and of a run with one fault exactly the lines that see it fail."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.broken_parts import (
    TamperingEngine,
    TamperingRenderer,
    apart,
    mixed_up,
    refuses,
    shifted,
    with_pixels,
)
from vlmrl import Message, Reply
from vlmrl.config.algorithm import Credit
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.config.run import RunConfig
from vlmrl.errors import EngineError
from vlmrl.inference.embedded.engine import EmbeddedEngine
from vlmrl.inference.vllm.client import VllmClient
from vlmrl.inference.vllm.server import vllm_version
from vlmrl.models.checkpoints.load import load_image_processor, load_tokenizer, resolve_checkpoint
from vlmrl.models.families import family_of
from vlmrl.models.families.positions import position_function
from vlmrl.models.features import VisionFeatures
from vlmrl.models.policy import Policy
from vlmrl.monitor.monitor import Monitor
from vlmrl.record.run_dir import RunDir
from vlmrl.rendering.renderer import make_renderer
from vlmrl.runs.build import Run, build_run
from vlmrl.runs.doctor.doctor import CHECKS, CONSEQUENCE, Doctor
from vlmrl.runs.doctor.weights import add_noise, weights_in
from vlmrl.runs.verdicts import State, Verdict, conclude
from vlmrl.types import Completion, ImageItem, Supports
from vlmrl.weight_sync.folder import FolderSync

AFTER_THE_SYNC = {"weights", "logprobs, version 1"}
ENGINE_APART = {"logprobs, version 0", "images, engine", "logprobs, version 1"}
"""The lines that fail where the engine computes something other than the trainer, at every policy version."""


def needs_vllm(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that starts a vLLM server."""
    for mark in (pytest.mark.vllm, pytest.mark.slow, pytest.mark.skipif(vllm_version() is None, reason="no vLLM")):
        test = mark(test)
    return test


@pytest.fixture(autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMRL_CACHE", str(tmp_path_factory.getbasetemp() / "doctor-cache"))


@pytest.fixture
def build(run_config: Callable[..., RunConfig], tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """`build("model.dtype=bfloat16")` builds the parts of a run as the command does."""
    threads = torch.get_num_threads()
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    config = run_config("mode=doctor", "monitor.wandb.mode=disabled")
    with Monitor(config.monitor, run_dir, total_steps=1, exact=True, credit=Credit.turn) as monitor:
        yield lambda *overrides: build_run(run_config("mode=doctor", *overrides), run_dir, monitor)
    torch.set_num_threads(threads)


@pytest.fixture
def run(build: Callable[..., Run]) -> Run:
    return build()


def examine(run: Run) -> dict[str, Verdict]:
    async def scenario() -> list[Verdict]:
        await run.engine.start()
        try:
            return await Doctor(run).examine()
        finally:
            await run.engine.stop()

    lines = asyncio.run(scenario())
    assert [line.name for line in lines] == list(CHECKS)
    return {line.name: line for line in lines}


def those(lines: dict[str, Verdict], state: State) -> set[str]:
    return {name for name, line in lines.items() if line.state is state}


def failed(run: Run) -> set[str]:
    return those(examine(run), State.FAILED)


# ── sound runs ──────────────────────────────────────────────────────────────────────────────────────────────


def test_every_line_is_checked_and_passes(run: Run) -> None:
    lines = examine(run)
    assert those(lines, State.OK) == set(CHECKS), lines
    assert 0 < lines["logprobs, version 0"].metrics["mismatch_kl"] <= 1e-11
    assert 0 < lines["logprobs, version 1"].metrics["mismatch_kl"] <= 1e-11
    assert lines["rollouts, version 0"].metrics == {"rollouts": 18, "turns": 36, "tokens": 360}
    assert lines["versions"].metrics["tokens"] > 360
    conclude(list(lines.values()), CONSEQUENCE)


def test_an_engine_with_weights_of_its_own(run: Run) -> None:
    apart(run)
    lines = examine(run)
    assert those(lines, State.NOT_VISIBLE) == {"positions, engine"}
    assert those(lines, State.FAILED) == set()


def test_half_precision(build: Callable[..., Run]) -> None:
    """The bound follows the rounding of bfloat16, and inverted images still change the logprobs by more."""
    lines = examine(build("model.dtype=bfloat16", "orchestrator.temperature=0.7"))
    assert those(lines, State.OK) == set(CHECKS), lines
    bound = lines["logprobs, version 0"].metrics["limit"]
    assert 1e-5 < bound < 1e-2
    assert lines["images, engine"].metrics["inverted_kl"] > 3 * bound


def test_one_turn_of_one_image(build: Callable[..., Run]) -> None:
    lines = examine(build("task.max_turns=1", "task.images_per_turn=1"))
    assert those(lines, State.NOT_VISIBLE) == {"token ids, later turns"}
    assert those(lines, State.FAILED) == set()


class Words:
    """An env without images, which is its own problem."""

    id = "words"

    def __init__(self) -> None:
        self._turn = 0

    def reset(self) -> tuple[Message, ...]:
        return (Message.of("user", "Say something."),)

    def step(self, completion: str) -> Reply:
        self._turn += 1
        return Reply(turn_reward=0.0, done=self._turn == 2, messages=(Message.of("user", "Something else."),))


@dataclass
class OnlyWords:
    built_with: tuple[str, ...]

    def problem(self, split: Any, index: int) -> Words:
        return Words()

    def num_rows(self, split: Any) -> None:
        return None

    def env(self, problem: Words) -> Words:
        return Words()

    def demonstration(self, problem: Words, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        raise NotImplementedError

    def texts(self) -> tuple[str, ...]:
        """The texts that the checkpoint's tokenizer was built from."""
        return self.built_with


def test_problems_without_images(run: Run) -> None:
    run.task = OnlyWords(run.task.texts())
    lines = examine(run)
    assert those(lines, State.FAILED) == set()
    assert those(lines, State.NOT_VISIBLE) == {
        "pixels",
        "placeholders",
        "image hashes",
        "images, trainer",
        "images, gradient",
        "images, engine",
    }


def test_noise_changes_every_weight_and_another_dtype_changes_none(run: Run) -> None:
    before = {name: tensor.clone() for name, tensor in run.trainer.weights().items()}
    with weights_in(run.policy, torch.bfloat16):
        assert {tensor.dtype for tensor in run.trainer.weights().values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.trainer.weights().items())
    add_noise(run.policy, 0.02, seed=0)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in run.trainer.weights().items())


# ── the sync ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_sync_that_does_nothing(run: Run) -> None:
    sync = apart(run)

    async def publish(version: int) -> None:
        sync.version = 0

    sync.publish = publish  # type: ignore[method-assign]
    assert failed(run) == AFTER_THE_SYNC | {"versions"}


def test_a_sync_that_only_reports_the_version(run: Run) -> None:
    apart(run).carry = lambda version, name, tensor: None
    assert failed(run) == AFTER_THE_SYNC


@pytest.mark.parametrize("part", ["visual.pos_embed", "lm_head.or.embed_tokens", "layers.1.self_attn.q_norm"])
def test_a_sync_that_leaves_out_a_weight(run: Run, part: str) -> None:
    names = part.split(".or.")
    apart(run).carry = lambda version, name, tensor: None if any(part in name for part in names) else tensor
    lines = examine(run)
    assert those(lines, State.FAILED) == AFTER_THE_SYNC
    assert lines["weights"].metrics["differing"] == 1
    assert names[-1] in lines["weights"].finding


def test_a_sync_that_rounds(run: Run) -> None:
    apart(run).carry = lambda version, name, tensor: tensor.to(torch.bfloat16)
    assert failed(run) == AFTER_THE_SYNC | ENGINE_APART


def test_a_sync_that_mistakes_one_weight_for_another(run: Run) -> None:
    ours = run.trainer.weights()
    pair = [f"model.language_model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
    other = {pair[0]: pair[1], pair[1]: pair[0]}
    apart(run).carry = lambda version, name, tensor: ours[other.get(name, name)]
    lines = examine(run)
    assert those(lines, State.FAILED) == AFTER_THE_SYNC | ENGINE_APART
    assert lines["weights"].metrics["differing"] == 2


def test_a_sync_that_raises(run: Run) -> None:
    sync = apart(run)

    async def publish(version: int) -> None:
        raise EngineError("the server serves another model")

    sync.publish = publish  # type: ignore[method-assign]
    lines = examine(run)
    assert those(lines, State.FAILED) == {"rollouts, version 0"}
    assert lines["rollouts, version 0"].finding == "EngineError: the server serves another model"
    assert those(lines, State.NOT_VISIBLE) == set(CHECKS[4:])


# ── the engine ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "change",
    [
        lambda pixels: (pixels - 0.5) / 0.5,
        lambda pixels: pixels / 255,
        np.zeros_like,
        lambda pixels: pixels[::-1].copy(),
    ],
    ids=["normalized twice", "scaled twice", "blind", "patches reversed"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_that_sees_other_pixels(build: Callable[..., Run], change: Any, dtype: str) -> None:
    run = build(f"model.dtype={dtype}")
    run.engine = TamperingEngine(run.engine, with_pixels(change))
    lines = examine(run)
    assert those(lines, State.FAILED) == ENGINE_APART


def test_an_engine_that_takes_one_image_for_another(run: Run) -> None:
    """It reuses the first images that it saw behind the same tokens, as a cache without hashes would."""
    kept: dict[bytes, tuple[ImageItem, ...]] = {}

    def first_seen(prompt: Any) -> Any:
        images = kept.setdefault(prompt.token_ids.tobytes(), prompt.images)
        pixels = tuple(
            dataclasses.replace(image, mm_kwargs=old.mm_kwargs)
            for image, old in zip(prompt.images, images, strict=True)
        )
        return dataclasses.replace(prompt, mm_items=pixels)

    run.engine = TamperingEngine(run.engine, first_seen)
    assert "images, engine" in failed(run)


def test_an_engine_with_other_positions(run: Run) -> None:
    theirs = Policy(run.policy.model, position_function("sequential"), run.renderer.banned_token_ids)
    run.engine = EmbeddedEngine(theirs, lambda: run.trainer.version, run.config.inference.max_model_len)
    assert failed(run) == ENGINE_APART | {"positions, engine"}


def test_an_engine_whose_logprobs_are_of_another_temperature(build: Callable[..., Run]) -> None:
    run = build("orchestrator.temperature=0.5")
    raw = TamperingEngine(
        run.engine, completion=lambda c: dataclasses.replace(c, logprobs=c.logprobs * np.float32(0.5))
    )
    run.engine = raw
    assert failed(run) == ENGINE_APART


TRUNCATED = ("orchestrator.top_k=5", "orchestrator.top_p=0.9", "orchestrator.min_p=0.05")


def test_a_truncated_distribution(build: Callable[..., Run]) -> None:
    lines = examine(build(*TRUNCATED))
    assert those(lines, State.OK) == set(CHECKS), lines
    assert re.match(
        r"\d+ over supports of [45]\.\d tokens on average, of \d+ tokens: ", lines["logprobs, version 0"].finding
    )


def test_an_engine_that_leaves_a_token_out_of_its_supports(build: Callable[..., Run]) -> None:
    def one_short(completion: Completion) -> Completion:
        if completion.supports is None:
            return completion
        supports = np.split(completion.supports.token_ids, completion.supports.offsets[1:-1])
        kept = [
            np.delete(each, int(np.flatnonzero(each != token)[0])) if len(each) > 1 else each
            for each, token in zip(supports, completion.token_ids, strict=True)
        ]
        return dataclasses.replace(completion, supports=Supports.of(kept))

    run = build(*TRUNCATED)
    run.engine = TamperingEngine(run.engine, completion=one_short)
    assert failed(run) == ENGINE_APART


def test_an_engine_that_names_another_version(run: Run) -> None:
    def later(completion: Completion) -> Completion:
        return dataclasses.replace(completion, versions=completion.versions + 1)

    run.engine = TamperingEngine(run.engine, completion=later)
    assert failed(run) == {"versions"}


def test_an_engine_that_refuses(run: Run) -> None:
    run.engine = TamperingEngine(run.engine, refuses)
    lines = examine(run)
    assert those(lines, State.FAILED) == {"rollouts, version 0"}
    assert "engine_error: out of order" in lines["rollouts, version 0"].finding
    assert those(lines, State.NOT_VISIBLE) == set(CHECKS[4:])


# ── the renderer ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_renderer_with_shifted_placeholders(run: Run) -> None:
    run.renderer = TamperingRenderer(run.renderer, prompt=shifted)
    lines = examine(run)
    assert those(lines, State.FAILED) == {"placeholders", "positions, trainer", "logprobs, transformers"}
    assert "is an image token by its id or by the placeholders, but not by both" in lines["placeholders"].finding


def test_a_renderer_that_mixes_up_images(run: Run) -> None:
    run.renderer = TamperingRenderer(run.renderer, prompt=mixed_up)
    assert failed(run) == {"image hashes"}


def test_a_renderer_with_other_tokens(run: Run) -> None:
    run.renderer = TamperingRenderer(
        run.renderer, messages=lambda messages: [m for m in messages if m.role != "system"]
    )
    lines = examine(run)
    assert those(lines, State.FAILED) == {"token ids, first turns", "token ids, later turns"}
    assert "from token 1 on the renderer has 'user" in lines["token ids, first turns"].finding


def test_a_renderer_with_other_pixels(run: Run) -> None:
    folder = resolve_checkpoint(run.config.model, run.task.texts())
    processor: Any = load_image_processor(folder)
    processor.image_mean = [0.48, 0.46, 0.41]
    tokenizer = load_tokenizer(folder)
    vocabulary = run.policy.model.get_input_embeddings().num_embeddings
    run.renderer = make_renderer(
        RendererConfig(),
        run.config.model,
        tokenizer,
        processor,
        vocabulary,
        family_of(run.config.model.vlm).placeholder_tokens,
    )
    lines = examine(run)
    assert those(lines, State.FAILED) == {"pixels"}
    assert "pixel_values: the renderer made float32" in lines["pixels"].finding


# ── the trainer ─────────────────────────────────────────────────────────────────────────────────────────────


def test_positions_of_another_model(run: Run) -> None:
    """Engine and trainer are wrong in the same way, so only the comparison with transformers finds it."""
    run.policy.positions = position_function("sequential")
    assert failed(run) == {"positions, trainer", "logprobs, transformers"}


def test_a_policy_that_is_blind(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer and engine both see nothing."""
    encode = Policy.encode_items

    def blind(self: Policy, images: Any) -> VisionFeatures | None:
        features = encode(self, images)
        assert features is not None or not images
        return features and dataclasses.replace(features, levels=[0 * level for level in features.levels])

    monkeypatch.setattr(Policy, "encode_items", blind)
    lines = examine(run)
    assert those(lines, State.FAILED) == {"images, trainer", "images, gradient", "logprobs, transformers"}
    assert those(lines, State.NOT_VISIBLE) == {"images, engine"}


def test_a_trainer_with_other_weights_than_the_policy(run: Run) -> None:
    """As if the optimizer held tensors that the model no longer has."""
    model = copy.deepcopy(run.policy.model)
    run.trainer._learner.policy = Policy(model, run.policy.positions, run.renderer.banned_token_ids)
    assert {"update"} <= failed(run)


# ── real servers ──────────────────────────────────────────────────────────────────────────────────────────────


@needs_vllm
def test_half_precision_of_other_kernels(build: Callable[..., Run]) -> None:
    """The bound is measured from the trainer's rounding alone, and vLLM's kernels keep it."""
    run = build("inference=vllm", "model.dtype=bfloat16")
    try:
        lines = examine(run)
    finally:
        run.weight_sync.close()
    assert those(lines, State.NOT_VISIBLE) == {"positions, engine"}
    assert those(lines, State.FAILED) == set(), lines
    found = lines["logprobs, version 0"].metrics
    assert 1e-7 < found["mismatch_kl"] < found["limit"] / 3


@needs_vllm
def test_a_sync_that_transfers_nothing(build: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    async def transfer(self: FolderSync, client: VllmClient) -> None:
        """Transfer nothing; the rest of an update happens: caches are dropped, the version is sent."""

    monkeypatch.setattr(FolderSync, "_transfer", transfer)
    run = build("inference=vllm")
    try:
        lines = examine(run)
    finally:
        run.weight_sync.close()
    assert those(lines, State.FAILED) == {"weights", "logprobs, version 1"}
    found = lines["weights"].metrics
    assert found["differing"] == found["compared"] > 40
    assert "of vLLM server 0" in lines["weights"].finding
