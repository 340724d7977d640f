"""Pairs of a recorded run: which rollouts are compared, byte for byte as they were sampled, and what is refused."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from support.families.clips import MESSAGES, video_renderer, vlm_of
from support.helpers import TINY
from support.packages import needs_videos
from vlmrl.config.dpo import DPOConfig
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.errors import ConfigError
from vlmrl.models.checkpoints.load import load_image_processor, load_tokenizer
from vlmrl.models.families import family_of
from vlmrl.orchestrator.preferences import PairBatch
from vlmrl.orchestrator.samples import make_samples
from vlmrl.orchestrator.stream import Indices
from vlmrl.record.rollouts import RolloutRecorder
from vlmrl.record.run_dir import RunDir
from vlmrl.rendering.renderer import Renderer, make_renderer
from vlmrl.runs.recorded_pairs import RecordedPairs, is_held_out
from vlmrl.types import Completion, DropReason, Image, Message, Rollout, StopReason, Turn

Change = Callable[[list[list[Rollout]]], None]


@pytest.fixture(scope="module")
def renderer(tiny_folder: Path) -> Renderer:
    tokenizer, processor = load_tokenizer(tiny_folder), load_image_processor(tiny_folder)
    return make_renderer(RendererConfig(), TINY, tokenizer, processor, 320, family_of(TINY.vlm).placeholder_tokens)


def square(shade: int) -> Image:
    return Image(np.full((32, 32, 3), shade, np.uint8))


def rollout(renderer: Renderer, step: int, group: int, index: int, reward: float) -> Rollout:
    """Two turns, each with a picture. What is sampled is no text that would be tokenized to the same tokens."""
    random = np.random.default_rng((step, group, index))

    def completion() -> Completion:
        ids = np.array([*random.integers(65, 91, 3), renderer.stop_token_ids[0]])
        return Completion(ids, -random.exponential(size=4).astype(np.float32), np.full(4, step - 1), "stop")

    async def turns() -> list[Turn]:
        asked, then = (Message.of("user", text, square(20 * group + step)) for text in ("a", "and this?"))
        first, sampled = await renderer.first_turn([asked]), completion()
        text = renderer.decode(sampled.token_ids)
        history = [asked, Message.of("assistant", text)]
        second, is_bridged = await renderer.next_turn(first, sampled.token_ids, history, [then])
        assert is_bridged
        return [
            Turn(first, sampled, text, [asked], 0, 0.0),
            Turn(second, completion(), "", [then], 0, 0.0),
        ]

    return Rollout(
        rollout_id=f"train/{step:06d}/{group:02d}/{index:02d}",
        problem_id=f"problem {group}",
        index=index,
        turns=asyncio.run(turns()),
        reward=reward,
        metrics={},
        stop_reason=StopReason.TERMINATED,
    )


REWARDS = ((0.0, 1.0, 0.5), (0.5, 0.5, 0.5), (1.0, 0.0, 1.0), (0.25, 0.75, 0.5))
"""Of the rollouts of each group; the second has no pair."""


def recorded(folder: Path, renderer: Renderer, change: Change = lambda groups: None) -> Path:
    """A run that recorded two steps of these groups."""
    run_dir = RunDir(folder)
    run_dir.create()
    recorder = RolloutRecorder(run_dir)
    for step in (1, 2):
        groups = [
            [rollout(renderer, step, group, index, reward) for index, reward in enumerate(rewards)]
            for group, rewards in enumerate(REWARDS)
        ]
        change(groups)
        recorder.write(step, {"train": [each for group in groups for each in group]})
    recorder.close()
    return folder


def pairs_of(folder: Path, renderer: Renderer, *, held_out: float = 0.0, batch_size: int = 8) -> RecordedPairs:
    config = SimpleNamespace(
        dpo=DPOConfig(from_run=str(folder), eval_fraction=held_out, batch_size=batch_size),
        seed=0,
        orchestrator=SimpleNamespace(eval=SimpleNamespace(problems=2)),
    )
    run: Any = SimpleNamespace(config=config, renderer=renderer, position=SimpleNamespace(rl=Indices()))
    return RecordedPairs.of(run)


def batch_of(pairs: RecordedPairs, step: int = 1) -> PairBatch:
    return asyncio.run(pairs.batch(step))


@pytest.fixture(scope="module")
def run_folder(renderer: Renderer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.mktemp("recorded") / "run", renderer)


def test_the_best_is_compared_with_the_worst(run_folder: Path, renderer: Renderer) -> None:
    pairs = pairs_of(run_folder, renderer)
    found = {(pair.pair_id, pair.chosen["rollout_id"][-2:], pair.rejected["rollout_id"][-2:]) for pair in pairs.train}
    groups = {("00", "01", "00"), ("02", "00", "01"), ("03", "01", "00")}
    assert found == {(f"train/{step:06d}/{g}", best, worst) for step in (1, 2) for g, best, worst in groups}
    assert pairs.without == Counter(ties=2)
    assert pairs.table()["pairs"] == "6, and 0 held out"


def test_samples_are_those_that_the_run_learned_from(run_folder: Path, renderer: Renderer) -> None:
    """Token ids, masks, placeholders and the processor's tensors of both turns, bit for bit."""
    made = batch_of(pairs_of(run_folder, renderer, batch_size=6))
    assert len({pair.pair_id for pair in made.pairs}) == 6
    for pair in made.pairs:
        step, group = int(pair.pair_id[6:12]), int(pair.pair_id[-2:])
        best, worst = np.argmax(REWARDS[group]), np.argmin(REWARDS[group])
        for samples, index in ((pair.chosen, best), (pair.rejected, worst)):
            (wanted,) = make_samples(rollout(renderer, step, group, int(index), 0.0))
            (found,) = samples
            for name in ("token_ids", "loss_mask", "mm_token_type_ids", "inference_logprobs", "versions"):
                np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)
            assert found.placeholders == wanted.placeholders
            assert found.loss_mask.sum() == 8, "the sampled tokens of both turns"
            for one, other in zip(found.mm_items, wanted.mm_items, strict=True):
                assert all(np.array_equal(one.mm_kwargs[key], other.mm_kwargs[key]) for key in other.mm_kwargs)


def test_each_pass_has_every_pair_in_another_order(run_folder: Path, renderer: Renderer) -> None:
    pairs = pairs_of(run_folder, renderer, batch_size=3)
    steps = [[rollout.rollout_id for rollout in batch_of(pairs, step).rollouts] for step in range(1, 5)]
    assert set(steps[0] + steps[1]) == set(steps[2] + steps[3]) == {pair.pair_id for pair in pairs.train}
    assert steps[0] + steps[1] != steps[2] + steps[3]
    again = pairs_of(run_folder, renderer, batch_size=3)
    again.run.position.rl = Indices(pairs.run.position.rl.cursor(made=1))
    assert [each.rollout_id for each in batch_of(again, 2).rollouts] == steps[1], "a resumed run goes on there"


def test_problems_are_held_out_as_a_whole(run_folder: Path, renderer: Renderer) -> None:
    pairs = pairs_of(run_folder, renderer, held_out=0.5)
    held_out = {f"problem {group}" for group in (0, 2, 3) if is_held_out(f"problem {group}", 0.5)}
    assert 0 < len(held_out) < 3
    assert {pair.problem_id for pair in pairs.eval} == held_out
    assert {pair.problem_id for pair in pairs.train}.isdisjoint(held_out)
    assert len(asyncio.run(pairs.held_out())) == 2, "as many as orchestrator.eval.problems"


def test_equal_rewards_are_parted_by_those_of_the_turns(renderer: Renderer, tmp_path: Path) -> None:
    def partial(groups: list[list[Rollout]]) -> None:
        groups[1][2].turns[0].reward, groups[1][0].turns[1].reward = 0.5, 0.25

    pairs = pairs_of(recorded(tmp_path / "run", renderer, partial), renderer)
    (pair,) = (pair for pair in pairs.train if pair.pair_id == "train/000001/01")
    assert (pair.chosen["rollout_id"][-2:], pair.rejected["rollout_id"][-2:]) == ("02", "01")


def test_rollouts_that_were_not_trained_on_do_not_count(renderer: Renderer, tmp_path: Path) -> None:
    def change(groups: list[list[Rollout]]) -> None:
        groups[0][1].dropped = DropReason.TRUNCATED
        groups[2][0].dropped = groups[2][2].dropped = DropReason.FAULT
        groups[3][1].turns = groups[3][0].turns

    pairs = pairs_of(recorded(tmp_path / "run", renderer, change), renderer)
    assert {pair.chosen["rollout_id"][-5:] for pair in pairs.train} == {"00/02"}
    assert pairs.without == Counter(ties=2, few=2, answers=2)


def test_a_run_without_a_pair_is_refused(renderer: Renderer, tmp_path: Path) -> None:
    def equal(groups: list[list[Rollout]]) -> None:
        for each in (each for group in groups for each in group):
            each.reward = 0.0

    folder = recorded(tmp_path / "run", renderer, equal)
    with pytest.raises(ConfigError, match=r"no pair to train on \(8 because all rewards are equal; 0 pairs held out"):
        pairs_of(folder, renderer)


def test_pixels_that_are_not_what_was_recorded_are_refused(renderer: Renderer, tmp_path: Path) -> None:
    folder = recorded(tmp_path / "run", renderer)
    for path in sorted((folder / "images").glob("*.png")):
        with PILImage.open(path) as picture:
            pixels = np.array(picture)
        pixels[0, 0, 0] += 1
        PILImage.fromarray(pixels).save(path)
    with pytest.raises(ConfigError, match=r"the file \w+.png holds other pixels than was recorded"):
        batch_of(pairs_of(folder, renderer))


def test_a_prompt_that_is_rendered_otherwise_is_refused(
    run_folder: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = pairs_of(run_folder, renderer)
    first_turn = renderer.first_turn

    async def other(messages: Any, tools: Any = None) -> Any:
        prompt = await first_turn(messages, tools)
        return replace(prompt, token_ids=prompt.token_ids[1:])

    monkeypatch.setattr(renderer, "first_turn", other)
    with pytest.raises(ConfigError, match="its first prompt is rendered to other tokens than was recorded"):
        batch_of(pairs)


def test_clips_are_learned_from_as_they_were_shown(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Two videos and a picture, made again from their frames; a frame with other pixels is refused by its file."""
    needs_videos()
    own = video_renderer(family_folder("qwen3_vl"), vlm_of("qwen3_vl"))
    prompt = asyncio.run(own.first_turn(MESSAGES))
    played = []
    for index, reward in enumerate((0.0, 1.0)):
        sampled = Completion(
            np.array([65 + index, own.stop_token_ids[0]]), np.zeros(2, np.float32), np.zeros(2, np.int64), "stop"
        )
        turn = Turn(prompt, sampled, own.decode(sampled.token_ids), MESSAGES, 0, 0.0)
        rollout_id = f"train/000001/00/{index:02d}"
        played.append(Rollout(rollout_id, "clips", index, [turn], reward, {}, StopReason.TERMINATED))
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    recorder = RolloutRecorder(run_dir)
    recorder.write(1, {"train": played})
    recorder.close()

    (pair,) = batch_of(pairs_of(run_dir.path, own, batch_size=1)).pairs
    for (found,), wanted in ((pair.chosen, played[1]), (pair.rejected, played[0])):
        (sample,) = make_samples(wanted)
        np.testing.assert_array_equal(found.token_ids, sample.token_ids)
        np.testing.assert_array_equal(found.mm_token_type_ids, sample.mm_token_type_ids)
        assert found.placeholders == sample.placeholders
        for one, other in zip(found.mm_items, sample.mm_items, strict=True):
            assert one.mm_kwargs.keys() == other.mm_kwargs.keys()
            assert all(np.array_equal(one.mm_kwargs[key], other.mm_kwargs[key]) for key in other.mm_kwargs)

    first, second, *_ = prompt.videos[0].frame_hashes
    run_dir.image(first).write_bytes(run_dir.image(second).read_bytes())
    again = video_renderer(family_folder("qwen3_vl"), vlm_of("qwen3_vl"))
    with pytest.raises(ConfigError, match=rf"images/{first}.png, frame 0 of the video \w+ is other than was recorded"):
        batch_of(pairs_of(run_dir.path, again, batch_size=1))
