"""The blind control: the samples, the images that replace theirs, and the metrics, with a scripted trainer and with the
real renderer and policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import helpers
from support.helpers import BANNED, MERGE, TINY, Sampled, image
from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.orchestrator import RendererConfig
from vlmrl.config.trainer import TrainerConfig
from vlmrl.models.checkpoints.load import load_image_processor, load_tokenizer
from vlmrl.models.families import family_of
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy
from vlmrl.orchestrator.vision_gap import GREY, SAMPLES, VisionGap, evenly, group_of, layout, shuffle_images
from vlmrl.rendering.renderer import Renderer, make_renderer
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import FloatArray, Image, Message, MMItem, TrainingSample, Video, VideoItem, mm_token_type_ids

GREY_ITEM = replace(image(1, 1, 99), hash="grey")


def named(group: int, index: int, *parts: helpers.Part) -> TrainingSample:
    return helpers.sample(f"train/000001/{group:02d}/{index:02d}", [1, 2], *parts)


@dataclass(eq=False)
class Neighbours:
    """Renderer and trainer in which each image adds a fixed number of nats to every token of its sample."""

    worth: dict[str, float]
    asked: list[list[TrainingSample]] = field(default_factory=list)
    pictures: list[Image | Video] = field(default_factory=list)

    def items(self, parts: Sequence[Image | Video]) -> tuple[MMItem, ...]:
        self.pictures += parts
        return (GREY_ITEM,) * len(parts)

    def logprobs(self, samples: Sequence[TrainingSample]) -> list[FloatArray]:
        self.asked.append(list(samples))
        return [
            np.full(int(s.loss_mask.sum()), sum(self.worth.get(i.hash, 0.0) for i in s.mm_items), np.float32)
            for s in samples
        ]


def gap_of(neighbours: Any, every: int = 1) -> VisionGap:
    return VisionGap(every, neighbours, neighbours)


RED, BLUE = image(1, 1, 1), image(1, 1, 2)


def test_gaps_are_nats_per_token() -> None:
    """Red adds 1 nat, blue 3. Samples of 2 and 4 tokens: real 1 and 3, blank 0 and 0, shuffled 3 and 1."""
    samples = [named(0, 0, RED, Sampled([5, 6])), named(1, 0, BLUE, Sampled([5, 6, 7, 8]))]
    found = gap_of(Neighbours({RED.hash: 1.0, BLUE.hash: 3.0}))(1, samples)
    assert found.pop("time/vision_gap") > 0
    assert found == pytest.approx(
        {"vision_gap/blank": (2 * 1 + 4 * 3) / 6, "vision_gap/shuffled": (2 * (1 - 3) + 4 * (3 - 1)) / 6}
    )


def test_only_the_pixels_differ() -> None:
    neighbours = Neighbours({})
    samples = [named(0, 0, RED, Sampled([5])), named(1, 0, BLUE, Sampled([5]))]
    gap_of(neighbours)(1, samples)
    ((*real, a, b, c, d),) = neighbours.asked
    assert real == samples
    for sample, other in zip([*samples, *samples], [a, b, c, d], strict=True):
        for name in ("token_ids", "mm_token_type_ids", "loss_mask"):
            np.testing.assert_array_equal(getattr(sample, name), getattr(other, name))
        assert [(p.offset, p.length) for p in other.placeholders] == [(p.offset, p.length) for p in sample.placeholders]
    assert [sample.images for sample in (a, b, c, d)] == [(GREY_ITEM,), (GREY_ITEM,), (BLUE,), (RED,)]
    assert all((picture.source == GREY).all() for picture in neighbours.pictures)


@pytest.mark.parametrize(("every", "due"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 4, 7]), (10, [1]), (0, [])])
def test_the_control_is_due_every_n_steps(every: int, due: list[int]) -> None:
    gap = gap_of(Neighbours({}), every)
    samples = [named(0, 0, RED, Sampled([5]))]
    assert [step for step in range(1, 8) if gap(step, samples)] == due


def test_without_images_or_samples_there_is_nothing_to_control() -> None:
    gap = gap_of(Neighbours({}))
    assert gap(1, []) == {}
    assert gap(1, [named(0, 0, Sampled([5]))]) == {}


def test_samples_are_drawn_evenly() -> None:
    samples = [named(g, i, RED, Sampled([5])) for g in range(4) for i in range(16)]
    assert len(evenly(samples, SAMPLES)) == SAMPLES
    assert {group_of(sample) for sample in evenly(samples, 4)} == {f"train/000001/{g:02d}" for g in range(4)}
    assert evenly(samples[:2], SAMPLES) == samples[:2]


# ── images of other problems ────────────────────────────────────────────────────────────────────────────────


def stand_ins(batch: list[TrainingSample], index: int = 0) -> list[str] | None:
    """The images that replace those of the sample."""
    found = dict(shuffle_images([batch[index]], batch))
    return [each.hash for each in found[0].mm_items] if found else None


def test_replacements_have_the_same_grid() -> None:
    """2 × 1 and 1 × 2 have equally many tokens but different grids."""
    wide, high, other = image(1, 2, 1), image(2, 1, 2), image(1, 2, 3)
    assert layout(wide) == layout(other) != layout(high)
    batch = [named(0, 0, wide, Sampled([5])), named(1, 0, high, Sampled([5]))]
    assert stand_ins(batch) is None
    assert stand_ins([*batch, named(2, 0, other, Sampled([5]))]) == [other.hash]


def test_replacements_come_from_other_groups() -> None:
    batch = [named(0, 0, RED, Sampled([5])), named(0, 1, BLUE, Sampled([5]))]
    assert stand_ins(batch) is None
    assert gap_of(Neighbours({}))(1, batch).keys() == {"vision_gap/blank", "time/vision_gap"}


def test_replacements_have_other_pixels_where_there_are_any() -> None:
    batch = [named(0, 0, RED, RED, Sampled([5])), *(named(g, 0, RED, BLUE, Sampled([5])) for g in (1, 2))]
    assert stand_ins(batch) == [BLUE.hash] * 2
    assert stand_ins([named(g, 0, RED, Sampled([5])) for g in (0, 1)]) == [RED.hash]


def test_a_repeated_step_draws_the_same_images() -> None:
    batch = [named(g, 0, *(image(1, 1, 10 * g + i) for i in range(4)), Sampled([5])) for g in range(5)]
    assert stand_ins(batch) == stand_ins(batch)
    assert len({tuple(stand_ins(batch, i) or ()) for i in range(5)}) == 5


# ── videos ──────────────────────────────────────────────────────────────────────────────────────────────────


def clip(*levels: int) -> VideoItem:
    """A video of one pixel a frame, which has these levels; frame i is shown after i seconds."""
    frames = np.array(levels, np.uint8).reshape(-1, 1, 1, 1).repeat(3, axis=3)
    times = np.arange(len(levels), dtype=np.float64)
    return VideoItem(str(levels), frames, times, 1.0, (), {"pixel_values_videos": np.zeros((1, 1))}, 1)


@dataclass(eq=False)
class Watchers(Neighbours):
    """As `Neighbours`; a video adds the level of its last frame, in nats."""

    def items(self, parts: Sequence[Image | Video]) -> tuple[MMItem, ...]:
        self.pictures += parts
        return tuple(
            clip(*part.source[:, 0, 0, 0].tolist()) if isinstance(part, Video) else GREY_ITEM for part in parts
        )

    def logprobs(self, samples: Sequence[TrainingSample]) -> list[FloatArray]:
        self.asked.append(list(samples))
        last = [sum(float(i.frames[-1, 0, 0, 0]) for i in s.mm_items if isinstance(i, VideoItem)) for s in samples]
        return [np.full(int(s.loss_mask.sum()), nats, np.float32) for s, nats in zip(samples, last, strict=True)]


def test_gaps_of_videos_say_whether_time_matters() -> None:
    """Two frames have one other order. Last frames 7 and 2, so other order takes 7 - 1 and 2 - 4, as the first frame
    alone does; the other video of the step takes 7 - 2 and 2 - 7. Samples of one and of three tokens."""
    world = Watchers({})
    found = gap_of(world)(1, [named(0, 0, clip(1, 7), Sampled([5])), named(1, 0, clip(4, 2), Sampled([5, 6, 7]))])
    assert found.pop("time/vision_gap") > 0
    assert found == pytest.approx(
        {
            "vision_gap/blank": (7 - GREY + 3 * (2 - GREY)) / 4,
            "vision_gap/shuffled": (5 - 3 * 5) / 4,
            "vision_gap/order": (6 - 3 * 2) / 4,
            "vision_gap/first_frame": (6 - 3 * 2) / 4,
        }
    )


def test_frames_change_their_order_and_nothing_else() -> None:
    world = Watchers({})
    both = named(0, 0, RED, clip(1, 2, 3, 4, 5), clip(6, 7, 8), Sampled([5]))
    again = [gap_of(world)(1, [both]) for _ in range(2)]
    assert (
        again[0].keys()
        == again[1].keys()
        == {f"vision_gap/{n}" for n in ("blank", "order", "first_frame")} | {"time/vision_gap"}
    )
    for _, _, order, first in world.asked:
        assert order.images == first.images == (RED,)
        videos = [item for item in order.mm_items if isinstance(item, VideoItem)]
        levels = [item.frames[:, 0, 0, 0].tolist() for item in videos]
        assert [sorted(each) for each in levels] == [[1, 2, 3, 4, 5], [6, 7, 8]]
        assert levels != [[1, 2, 3, 4, 5], [6, 7, 8]]
        assert [item.times.tolist() for item in videos] == [[0, 1, 2, 3, 4], [0, 1, 2]]
        assert [item.hash for item in first.mm_items] == [RED.hash, "(1, 1, 1, 1, 1)", "(6, 6, 6)"]
        np.testing.assert_array_equal(order.token_ids, both.token_ids)
    one, other = ([item.hash for item in asked[2].mm_items] for asked in world.asked)
    assert one == other, "a repeated step draws the same order"


# ── through the real renderer and policy ────────────────────────────────────────────────────────────────────


def test_a_blank_image_is_grey_in_the_processors_own_space(tiny_folder: Path, tiny_model: Callable[[], Any]) -> None:
    """The gap also equals the one computed from logprobs one by one."""
    model = tiny_model()
    renderer: Renderer = make_renderer(
        RendererConfig(),
        TINY,
        load_tokenizer(tiny_folder),
        load_image_processor(tiny_folder),
        model.get_input_embeddings().num_embeddings,
        family_of(TINY.vlm).placeholder_tokens,
    )
    policy = Policy(model, position_function("mrope", MERGE), BANNED)
    trainer = LocalTrainer(
        policy, TrainerConfig(learning_rate=1.5e-3), AlgorithmConfig(), temperature=1.0, max_new_tokens=4
    )
    samples = []
    for group in range(3):
        pixels = np.random.default_rng(group).integers(0, 256, (32, 64, 3), np.uint8)
        messages = (Message.of("user", "a", Image(pixels)), Message.of("assistant", "abc"))
        prompt, sampled = renderer.render_conversation(messages)
        length = len(prompt.token_ids)
        samples.append(
            TrainingSample(
                rollout_id=f"train/000001/{group:02d}/00",
                token_ids=prompt.token_ids,
                mm_token_type_ids=mm_token_type_ids(length, prompt.placeholders),
                loss_mask=sampled,
                advantages=np.zeros(length, np.float32),
                inference_logprobs=np.zeros(length, np.float32),
                versions=np.where(sampled, 0, -1),
                placeholders=prompt.placeholders,
                mm_items=prompt.mm_items,
            )
        )
    gap = VisionGap(1, renderer, trainer)
    found = gap(1, samples)
    (grey,) = renderer.items([Image(np.full((32, 64, 3), GREY, np.uint8))])
    assert abs(grey.mm_kwargs["pixel_values"]).max() < 0.01, "mid-grey is the middle of what the processor makes"
    assert layout(grey) == layout(samples[0].mm_items[0])
    blank = [gap._blanked(sample) for sample in samples]
    assert {each.mm_items for each in blank} == {(grey,)}
    (real, other) = (np.concatenate([trainer.logprobs([s])[0] for s in batch]) for batch in (samples, blank))
    assert found["vision_gap/blank"] == pytest.approx(float((real - other).mean()), abs=1e-5)
    shuffled = [each for _, each in shuffle_images(samples, samples)]
    other = np.concatenate([trainer.logprobs([s])[0] for s in shuffled])
    assert found["vision_gap/shuffled"] == pytest.approx(float((real - other).mean()), abs=1e-5)
    assert abs(found["vision_gap/blank"]) > 1e-4, "the model does react to pixels"
