"""Checks of images and videos on their way: per sample, placeholder tokens equal features, and each keeps its hash."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch

from vlmrl.errors import ModelError
from vlmrl.models.policy import Policy
from vlmrl.rendering.images import image_hash
from vlmrl.rendering.video_store import video_hash
from vlmrl.runs.doctor.evidence import Evidence
from vlmrl.runs.doctor.pixels import NO_IMAGE
from vlmrl.runs.verdicts import Verdict, failed, judged, not_visible
from vlmrl.types import TOKEN_TYPES, ImageItem, MMItem, Modality, Prompt, TrainingSample, Video, VideoItem

SAME_TIME_S = 1e-6
"""Seconds that two times may differ by, which are quotients."""


def placeholders(
    name: str, policy: Policy, feature_ids: Mapping[Modality, int], samples: Sequence[TrainingSample]
) -> Verdict:
    """In every sample the image tokens, the features of the placeholders, the tokens marked as image and the vision
    features all count the same, also the grids where there are any, and the marks stand at the image tokens. The same
    of video tokens.

    `feature_ids`: the tokens that get the features of images and of videos.
    """
    if not feature_ids:
        return not_visible(name, "the model is text-only")
    items = {item.hash: item for sample in samples for item in sample.mm_items}
    if not items:
        return not_visible(name, NO_IMAGE)
    try:
        features = {hash: _count_features(policy, item) for hash, item in items.items()}
    except ModelError as error:  # it makes another number of features than the renderer has counted
        return failed(name, str(error))
    shown = {kind: [item for item in items.values() if item.modality == kind] for kind in feature_ids}
    totals: dict[Modality, Counter[str]] = {kind: Counter() for kind in feature_ids if shown[kind]}
    for sample in samples:
        for kind, id in feature_ids.items():
            has_grids = all(f"{kind}_grid_thw" in item.mm_kwargs for item in shown[kind])
            counts = _counts(sample, kind, id, features) | (_by_grids(sample, kind, policy) if has_grids else {})
            if len(set(counts.values())) > 1:
                return failed(name, f"{sample.rollout_id}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
            if (at := _first_stray(sample, kind, id)) is not None:
                return failed(
                    name,
                    f"{sample.rollout_id}: token {at} is {'an' if kind == 'image' else 'a'} {kind} token by its id or "
                    "by the placeholders, but not by both",
                )
            if kind in totals:
                totals[kind].update(counts)
    parts = (" = ".join(f"{number} {what}" for what, number in counts.items()) for counts in totals.values())
    finding = f"{len(samples)} samples: " + "; ".join(parts)
    numbers = {f"{kind}_tokens": counts[f"{kind} tokens"] for kind, counts in totals.items()}
    return judged(name, True, finding, "", samples=len(samples), **{"image_tokens": 0, **numbers})


def _counts(sample: TrainingSample, kind: Modality, id: int, features: Mapping[str, int]) -> dict[str, int]:
    """How many tokens of a kind a sample has, in several ways."""
    return {
        f"{kind} tokens": int((sample.token_ids == id).sum()),
        "in placeholders": sum(place.num_features for place in sample.placeholders if place.modality == kind),
        "marked": int((sample.mm_token_type_ids == TOKEN_TYPES[kind]).sum()),
        "features": sum(features[item.hash] for item in sample.mm_items if item.modality == kind),
    }


def _by_grids(sample: TrainingSample, kind: Modality, policy: Policy) -> dict[str, int]:
    merge = getattr(policy.config.vision_config, "spatial_merge_size", 1)
    grids = [item.mm_kwargs[f"{kind}_grid_thw"] for item in sample.mm_items if item.modality == kind]
    return {"by grids": sum(int(grid.prod()) // merge**2 for grid in grids)}


def _first_stray(sample: TrainingSample, kind: Modality, id: int) -> int | None:
    """The first token that is of a kind by its id or by its mark, and not by both; None where there is none."""
    stray = np.flatnonzero((sample.token_ids == id) != (sample.mm_token_type_ids == TOKEN_TYPES[kind]))
    return int(stray[0]) if len(stray) else None


def _count_features(policy: Policy, item: MMItem) -> int:
    """The vision features that the policy computes for one image or video, one per placeholder token."""
    with torch.no_grad():
        encoded = policy.encode_items([item])
    return 0 if encoded is None else int(encoded.levels[0].shape[0])


def image_hashes(name: str, evidence: Evidence, shown_twice: Prompt | None) -> Verdict:
    """Every image and video keeps its hash from the task to the engine's request and the trainer's sample, and a video
    shows the frames of the task, in their order and at their times.

    In the prompt `shown_twice` one image or video stands at two places, and must have two placeholders.
    """
    if shown_twice is None:
        return not_visible(name, NO_IMAGE)
    requests = {_identity(prompt) for prompt in evidence.requests}
    wrong = _changed_by_renderer(evidence) or _changed_on_the_way(evidence, requests) or _not_twice(shown_twice)
    if wrong is not None:
        return failed(name, wrong)
    images = sum(len(turn.hashes) for turn in evidence.rendered)
    videos = sum(len(turn.videos) for turn in evidence.rendered)
    shown = " and ".join(f"{number} {kind}s" for number, kind in ((images, "image"), (videos, "video")) if number)
    finding = (
        f"{shown} keep their hash from the task through {len(requests)} distinct requests to "
        f"{len(evidence.samples)} samples; {'an image' if images else 'a video'} shown twice has two placeholders"
    )
    numbers = {"videos": videos} if videos else {}
    return judged(
        name, True, finding, "", images=images, **numbers, requests=len(requests), samples=len(evidence.samples)
    )


def _changed_by_renderer(evidence: Evidence) -> str | None:
    """Where a prompt does not hold the images and videos that the task showed; None where all do."""
    for turn in evidence.rendered:
        new, prompt = turn.hashes, turn.prompt
        shown = [placeholder.hash for placeholder in prompt.placeholders if placeholder.modality == "image"]
        in_prompt = shown[len(shown) - len(new) :]
        if tuple(in_prompt) != new:
            return f"the task shows {list(new)}, the prompt {in_prompt}"
        if [_content_hash(item) for item in prompt.mm_items] != [p.hash for p in prompt.placeholders]:
            return "a placeholder has the hash of another image or video than the pixels that belong to it"
        if len(prompt.videos) < len(turn.videos):
            return f"the task shows {len(turn.videos)} videos, the prompt {len(prompt.videos)}"
        for part, item in zip(turn.videos, prompt.videos[len(prompt.videos) - len(turn.videos) :], strict=True):
            if (wrong := shown_otherwise(part, item)) is not None:
                return wrong
    return None


def _content_hash(item: MMItem) -> str:
    """The hash of what an item shows, computed again."""
    if isinstance(item, ImageItem):
        return image_hash(item.pixels)
    return video_hash(tuple(map(image_hash, item.frames)), item.times, item.rate)


def shown_otherwise(part: Video, item: VideoItem) -> str | None:
    """How the frames of a prompt differ from those of the task; None where each is the task's, at its time.

    `part.source` is uint8 [T, H, W, 3]. Without `times` and `fps`, frames are shown at equal distances. Which frames
    are shown of a video with `fps` is the processor's choice, but each stands at its own time, and they are as many as
    `rate` says.

    >>> frames = np.arange(4, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    >>> item = VideoItem("ab", frames[::2], np.array([0.0, 1.0]), 1.0, (), {}, 2)
    >>> shown_otherwise(Video(frames, fps=2.0), item), shown_otherwise(Video(frames[[0, 2, 1, 3]], fps=2.0), item)
    (None, 'frame 1 of a video, shown at 1 s, is not the frame of the task at that time')
    """
    total = len(part.source)
    if part.times is not None:
        times = np.asarray(part.times, np.float64)
    elif part.fps is not None:
        times = np.arange(total) / part.fps
    else:
        times = np.arange(total) / item.rate
    sampled = part.times is None and part.fps is not None
    expected = round(item.rate * total / part.fps) if sampled and part.fps is not None else total
    if len(item.times) != expected:
        return f"the task shows {expected} frames of a video, the prompt {len(item.times)}"
    for number, (time, frame) in enumerate(zip(item.times, item.frames, strict=True)):
        at = int(np.abs(times - time).argmin()) if sampled else number
        if abs(times[at] - time) > SAME_TIME_S or not np.array_equal(part.source[at], frame):
            return f"frame {number} of a video, shown at {time:g} s, is not the frame of the task at that time"
    return None


def _changed_on_the_way(evidence: Evidence, requests: set[tuple[bytes, Any, tuple[str, ...]]]) -> str | None:
    """Where the engine or the trainer got another prompt than the renderer made; None where neither did."""
    for rollout in evidence.rollouts():
        if any(_identity(turn.prompt) not in requests for turn in rollout.turns):
            return f"{rollout.rollout_id}: a prompt did not reach the engine as it was rendered"
    shown_by = {
        rollout.rollout_id: [
            tuple(list(turns)[-1].prompt.placeholders) for _, turns in groupby(rollout.turns, lambda turn: turn.branch)
        ]
        for rollout in evidence.rollouts()
    }
    for sample in evidence.samples:
        if sample.placeholders not in shown_by[sample.rollout_id]:
            return f"{sample.rollout_id}: its training sample shows other images than its prompts"
    return None


def _not_twice(prompt: Prompt) -> str | None:
    """What the placeholders are where no image or video has two; None where one does."""
    for i, first in enumerate(prompt.placeholders):
        if any(first.hash == other.hash and first.offset != other.offset for other in prompt.placeholders[i + 1 :]):
            return None
    return f"an image shown twice became the placeholders {[(p.offset, p.hash) for p in prompt.placeholders]}"


def _identity(prompt: Prompt) -> tuple[bytes, Any, tuple[str, ...]]:
    return prompt.token_ids.tobytes(), prompt.placeholders, tuple(item.hash for item in prompt.mm_items)
