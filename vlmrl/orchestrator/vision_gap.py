"""The blind control: measure how much the policy's answers depend on its images.

    a step's samples ─▶ SAMPLES of them ─┬─ unchanged ──────────────────────┐
                                         ├─ every image mid-grey ───────────┼─▶ trainer.logprobs ─▶ nats per token
                                         ├─ images of other problems ───────┤
                                         ├─ frames of videos in other order ┤
                                         └─ first frame of videos only ─────┘

    vision_gap/blank        mean logprob of the loss tokens with the real images, minus that with grey images
    vision_gap/shuffled     mean logprob with the real images, minus that with images of other problems of the step
    vision_gap/order        mean logprob with the real videos, minus that with their frames in another order
    vision_gap/first_frame  mean logprob with the real videos, minus that with the first frame in place of all

The tokens were sampled with the real images, so each gap estimates KL(with ‖ without images) per token. It is 0 for a
policy that ignores its images, and grows with their influence on the answer. `blank` shows whether the policy uses the
images at all. `shuffled` shows whether their content matters; it uses images like those that the policy was trained on.
A video counts as an image there. `order` and `first_frame` show whether time matters: they are 0 for a policy that
looks at the frames of a video one by one.

Only the pixels change; token ids, placeholders and positions stay those of the sample. A blank image has the same
height and width in mid-grey, RGB (128, 128, 128), and passes through the renderer like any other. (Zeros in the
processor's normalized space would be a different colour for every model family.) An image of another problem must have
the same processed layout (grid). If several fit, one with different pixels is drawn; if none fits, the sample is left
out of `shuffled`.

The gap is measured before the step, with the weights before their update. `algorithm.vision_advantage` weights
advantages by the same gap (vision_advantage.py). Left out on purpose: masking only some patches, and a loss term that
rewards looking, because a control that is optimized is no control any more.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from vlmrl.rendering.renderer import Renderer
from vlmrl.types import Image, ImageItem, IntArray, MMItem, Trainer, TrainingSample, Video, VideoItem

SAMPLES = 8
"""How many samples of the step are scored again, at even distances. Each costs three short forward passes."""

GREY = 128
"""Value of each channel of a blank image, 0 to 255."""

Layout: TypeAlias = tuple[object, ...]
"""The properties in which two images must agree to replace each other (`layout`)."""


@dataclass(eq=False)
class VisionGap:
    """Measures the gap every `every` steps, starting with the first; `every=0` disables it."""

    every: int
    renderer: Renderer
    trainer: Trainer

    def __call__(self, step: int, samples: Sequence[TrainingSample]) -> dict[str, float]:
        """Measure the gap on the samples of `step` (1-based), before they are trained on.

        Returns `vision_gap/…` in nats per token and `time/vision_gap` in seconds; empty where the control is not due
        or no sample has an image. `vision_gap/shuffled` is missing where no sample has replacements for its images,
        `vision_gap/order` and `vision_gap/first_frame` where none has a video.
        """
        if self.every == 0 or (step - 1) % self.every:
            return {}
        started = time.perf_counter()
        with_image = [sample for sample in samples if sample.mm_items and sample.loss_mask.any()]
        if not with_image:
            return {}
        real = evenly(with_image, SAMPLES)
        controls: dict[str, list[tuple[int, TrainingSample]]] = {
            "blank": [(index, self._blanked(sample)) for index, sample in enumerate(real)],
            "shuffled": list(shuffle_images(real, with_image)),
            "order": list(self._with_frames(real, _another_order)),
            "first_frame": list(self._with_frames(real, lambda video, draw: np.zeros(len(video.frames), np.int64))),
        }
        changed = [sample for pairs in controls.values() for _, sample in pairs]
        scored = self.trainer.logprobs([*real, *changed])
        of_changed = iter(scored[len(real) :])
        metrics = {}
        for name, pairs in controls.items():
            gaps = [float(scored[index].mean()) - float(next(of_changed).mean()) for index, _ in pairs]
            if gaps:
                tokens = [len(scored[index]) for index, _ in pairs]
                metrics[f"vision_gap/{name}"] = float(np.average(gaps, weights=tokens))
        return {**metrics, "time/vision_gap": time.perf_counter() - started}

    def _with_frames(
        self, samples: Sequence[TrainingSample], choose: Callable[[VideoItem, random.Random], IntArray]
    ) -> Iterator[tuple[int, TrainingSample]]:
        """Yield (index in `samples`, the sample with other frames at the same times) for each sample that shows a
        video. `choose` returns which frame is shown in the place of each. The draw depends only on the rollout id."""
        for index, sample in enumerate(samples):
            videos = [item for item in sample.mm_items if isinstance(item, VideoItem)]
            if not videos:
                continue
            draw = random.Random(sample.rollout_id)
            chosen = [(video, video.frames[choose(video, draw)]) for video in videos]
            made = iter(self.renderer.items([Video(each, of.rate, of.times.tolist()) for of, each in chosen]))
            items = [next(made) if isinstance(item, VideoItem) else item for item in sample.mm_items]
            yield index, with_items(sample, items)

    def _blanked(self, sample: TrainingSample) -> TrainingSample:
        return with_items(sample, self.renderer.items([_grey(item) for item in sample.mm_items]))


def _grey(item: MMItem) -> Image | Video:
    """What is shown in place of an item: grey pixels of its size, at its times."""
    if isinstance(item, ImageItem):
        return Image(np.full(item.pixels.shape, GREY, np.uint8))
    return Video(np.full(item.frames.shape, GREY, np.uint8), item.rate, item.times.tolist())


def _another_order(video: VideoItem, draw: random.Random) -> IntArray:
    """int64 [T]; the frames in another order than theirs."""
    places = list(range(len(video.frames)))
    while (order := draw.sample(places, len(places))) == places:
        pass
    return np.array(order, np.int64)


def evenly(samples: Sequence[TrainingSample], count: int) -> list[TrainingSample]:
    """`count` samples at even distances (all if there are fewer). A batch is ordered by group, so they come from
    different groups."""
    places = np.linspace(0, len(samples), min(count, len(samples)), endpoint=False)
    return [samples[int(place)] for place in places]


def with_items(sample: TrainingSample, items: Sequence[MMItem]) -> TrainingSample:
    """The same sample with other images and videos. Raises `ContractError` where one has another number of tokens."""
    placeholders = tuple(replace(place, hash=item.hash) for place, item in zip(sample.placeholders, items, strict=True))
    return replace(sample, placeholders=placeholders, mm_items=tuple(items))


def layout(item: MMItem) -> Layout:
    """A key that is equal for images (videos) with the same processed shapes, the same grid and the same tokens.
    Integer arrays (such as `image_grid_thw`) describe the grid, so their values count; float arrays hold pixels, so
    only their shapes do. The replacement counts, because 2 × 3 and 3 × 2 tiles may have the same shapes and other tile
    tags, and two videos of one size may have frames at other times."""
    arrays = (
        (name, array.shape, array.tobytes() if np.issubdtype(array.dtype, np.integer) else None)
        for name, array in sorted(item.mm_kwargs.items())
    )
    return ((item.replacement, (item.num_tokens,), None), *arrays)


def shuffle_images(
    chosen: Sequence[TrainingSample], batch: Sequence[TrainingSample]
) -> Iterator[tuple[int, TrainingSample]]:
    """Yield (index in `chosen`, the sample with images of other groups of `batch`) for each sample that has a
    replacement for every image. The draw depends only on the sample's rollout id, so a repeated step is identical."""
    others = OtherImages(batch)
    for index, sample in enumerate(chosen):
        draw = random.Random(sample.rollout_id)
        images = [draw.choice(found) for image in sample.mm_items if (found := others.of(image, group_of(sample)))]
        if len(images) == len(sample.mm_items):
            yield index, with_items(sample, images)


def swap_images(
    chosen: Sequence[TrainingSample], batch: Sequence[TrainingSample]
) -> Iterator[tuple[int, TrainingSample]]:
    """As `shuffle_images`, for the samples that have images; the same image has the same replacement in all samples of
    a group, so that siblings share their prefixes as before."""
    others = OtherImages(batch)
    drawn: dict[tuple[str, str], MMItem | None] = {}
    for index, sample in enumerate(chosen):
        group = group_of(sample)
        images = []
        for image in sample.mm_items:
            if (group, image.hash) not in drawn:
                found = others.of(image, group)
                drawn[group, image.hash] = random.Random(f"{group}/{image.hash}").choice(found) if found else None
            if (other := drawn[group, image.hash]) is not None:
                images.append(other)
        if images and len(images) == len(sample.mm_items):
            yield index, with_items(sample, images)


class OtherImages:
    """The images of a batch that can replace each other."""

    def __init__(self, batch: Sequence[TrainingSample]) -> None:
        self._shown: dict[Layout, dict[str, tuple[MMItem, set[str]]]] = {}
        """Layout → hash → the image, and the groups that show it."""
        for sample in batch:
            for image in sample.mm_items:
                same = self._shown.setdefault(layout(image), {})
                same.setdefault(image.hash, (image, set()))[1].add(group_of(sample))

    def of(self, image: MMItem, group: str) -> list[MMItem]:
        """What can replace an image of the batch in a sample of `group`, in the order of the batch."""
        others = [other for other, groups in self._shown[layout(image)].values() if groups - {group}]
        # Fall back to the same pixels only if every other problem shows them too: then they carry no information.
        return [other for other in others if other.hash != image.hash] or others


def group_of(sample: TrainingSample) -> str:
    """The group part of the rollout id: `train/000012/03` of `train/000012/03/07`. Siblings show the same problem."""
    return sample.rollout_id.rpartition("/")[0]
