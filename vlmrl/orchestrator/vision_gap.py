"""The blind control: would the policy have said the same without its images?

    a step's samples ─▶ SAMPLES of them ─┬─ as they are ──────────────┐
                                         ├─ every image mid-grey ─────┼─▶ trainer.logprobs ─▶ nats per token
                                         └─ images of other problems ─┘

    vision_gap/blank     mean logprob of the loss tokens with the real images, minus that with grey ones
    vision_gap/shuffled  the same against images of other problems of the step

The tokens were sampled with the real images in view, so each gap estimates KL(with ‖ without) per token: 0 for a policy
that does not look, more the more it says because of what it sees. `blank` tells whether it looks at all; `shuffled`
whether what is *in* the image matters, and it shows pictures of the kind that the policy was trained on.

Token ids, placeholders and positions are those of the sample; the pixels alone differ. A blank image is a picture of
the same height and width in mid-grey, RGB (128, 128, 128), made by the renderer like any other: what the model would
be given if the camera's cap were on. Zeros in the processor's normalized space would be another colour for every
family. An image of another problem is one that the processor laid out alike (same grid): where several fit, it is drawn
among those with other pixels; where none fits, the sample is left out of `shuffled`.

It is measured before the step, on the weights that learn. Left out on purpose: masking a share of the patches, and a
loss term that rewards looking (a control that is trained on is none).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from vlmrl.rendering.renderer import Renderer
from vlmrl.types import Image, ImageItem, Placeholder, Trainer, TrainingSample

SAMPLES = 8
"""Completions that are scored again, drawn evenly from the step's; each is three short forward passes."""

GREY = 128
"""Of 0 to 255: what a blank image shows in each channel."""

Layout: TypeAlias = tuple[object, ...]
"""What two images must share to stand in for each other (`layout`)."""


@dataclass(eq=False)
class VisionGap:
    """Measures the gap every `every` steps, the first one included; `every=0` is never."""

    every: int
    renderer: Renderer
    trainer: Trainer

    def __call__(self, step: int, samples: Sequence[TrainingSample]) -> dict[str, float]:
        """The figures of `step` (1-based) from the samples that it is about to learn from, and `time/vision_gap` in
        seconds; nothing where it is not due or no sample shows an image. `vision_gap/shuffled` is left out where no
        sample could be shown another problem's images."""
        if self.every == 0 or (step - 1) % self.every:
            return {}
        started = time.perf_counter()
        seeing = [sample for sample in samples if sample.images and sample.loss_mask.any()]
        if not seeing:
            return {}
        real = evenly(seeing, SAMPLES)
        blank = [self._blanked(sample) for sample in real]
        shuffled = list(shuffle_images(real, seeing))
        scored = self.trainer.logprobs([*real, *blank, *(sample for _, sample in shuffled)])
        mean = [float(logprobs.mean()) for logprobs in scored]
        tokens = [len(logprobs) for logprobs in scored[: len(real)]]

        def gap(pairs: Sequence[tuple[int, int]]) -> float:
            """(index of a real one, index of its counterpart) → the gap over all their tokens."""
            return float(np.average([mean[a] - mean[b] for a, b in pairs], weights=[tokens[a] for a, _ in pairs]))

        figures = {"vision_gap/blank": gap([(i, len(real) + i) for i in range(len(real))])}
        if shuffled:
            figures["vision_gap/shuffled"] = gap([(i, 2 * len(real) + j) for j, (i, _) in enumerate(shuffled)])
        return {**figures, "time/vision_gap": time.perf_counter() - started}

    def _blanked(self, sample: TrainingSample) -> TrainingSample:
        pictures = [Image(np.full(image.pixels.shape, GREY, np.uint8)) for image in sample.images]
        return with_images(sample, self.renderer.images(pictures))


def evenly(samples: Sequence[TrainingSample], count: int) -> list[TrainingSample]:
    """`count` of them at even distances (all where there are fewer): a batch stands group by group."""
    places = np.linspace(0, len(samples), min(count, len(samples)), endpoint=False)
    return [samples[int(place)] for place in places]


def with_images(sample: TrainingSample, images: Sequence[ImageItem]) -> TrainingSample:
    """The same tokens with other images in their places. Raises `ContractError` where one takes more or fewer."""
    placeholders = tuple(
        Placeholder(place.offset, place.length, image.hash)
        for place, image in zip(sample.placeholders, images, strict=True)
    )
    return replace(sample, placeholders=placeholders, images=tuple(images))


def layout(image: ImageItem) -> Layout:
    """Equal for images whose processed arrays are of one shape and stand for the same grid. Whole numbers among them
    (`image_grid_thw`) say how the patches lie, so they count by value; the rest is pixels."""
    return tuple(
        (name, array.shape, array.tobytes() if np.issubdtype(array.dtype, np.integer) else None)
        for name, array in sorted(image.mm_kwargs.items())
    )


def shuffle_images(
    chosen: Sequence[TrainingSample], batch: Sequence[TrainingSample]
) -> Iterator[tuple[int, TrainingSample]]:
    """(index in `chosen`, the sample with images of other groups of `batch`) for each that has a stand-in for every
    image. Which one it gets is a function of its name, so that a step that is done again is the same."""
    shown: dict[Layout, dict[str, tuple[ImageItem, set[str]]]] = {}
    for sample in batch:
        for image in sample.images:
            shown.setdefault(layout(image), {}).setdefault(image.hash, (image, set()))[1].add(group_of(sample))
    for index, sample in enumerate(chosen):
        draw = random.Random(sample.rollout_id)
        images = []
        for image in sample.images:
            others = [
                other for other, groups in shown[layout(image)].values() if groups - {group_of(sample)}
            ]  # in the order of the batch
            # The same pixels only where every other problem shows them too: then there is nothing in them to be seen.
            others = [other for other in others if other.hash != image.hash] or others
            if others:
                images.append(draw.choice(others))
        if len(images) == len(sample.images):
            yield index, with_images(sample, images)


def group_of(sample: TrainingSample) -> str:
    """`train/000012/03` of `train/000012/03/07`: siblings show the same problem."""
    return sample.rollout_id.rpartition("/")[0]
