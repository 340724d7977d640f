"""Checks of images on their way: per sample, placeholder tokens equal features, and every image keeps its hash."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch

from vlmrl.errors import ModelError
from vlmrl.models.policy import Policy
from vlmrl.rendering.images import image_hash
from vlmrl.runs.doctor.evidence import Evidence
from vlmrl.runs.doctor.pixels import NO_IMAGE
from vlmrl.runs.verdicts import Verdict, failed, judged, not_visible
from vlmrl.types import MMItem, Prompt, TrainingSample


def placeholders(name: str, policy: Policy, image_token_id: int | None, samples: Sequence[TrainingSample]) -> Verdict:
    """In every sample the image tokens, the features of the placeholders, the tokens marked as image and the vision
    features all count the same, also the grids where there are any, and the marks stand at the image tokens."""
    if image_token_id is None:
        return not_visible(name, "the model is text-only")
    images = {image.hash: image for sample in samples for image in sample.mm_items}
    if not images:
        return not_visible(name, NO_IMAGE)
    has_grids = all("image_grid_thw" in image.mm_kwargs for image in images.values())
    merge = getattr(policy.config.vision_config, "spatial_merge_size", 1)
    try:
        features = {hash: _count_features(policy, image) for hash, image in images.items()}
    except ModelError as error:  # it makes another number of features than the renderer has counted
        return failed(name, str(error))
    totals = np.zeros(4 + has_grids, np.int64)
    for sample in samples:
        is_image = sample.token_ids == image_token_id
        counts = {
            "image tokens": int(is_image.sum()),
            "in placeholders": sum(placeholder.num_features for placeholder in sample.placeholders),
            "marked": int((sample.mm_token_type_ids == 1).sum()),
            "features": sum(features[image.hash] for image in sample.mm_items),
        }
        if has_grids:
            grids = [image.mm_kwargs["image_grid_thw"] for image in sample.mm_items]
            counts["by grids"] = sum(int(grid.prod()) // merge**2 for grid in grids)
        if len(set(counts.values())) > 1:
            return failed(name, f"{sample.rollout_id}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
        if not np.array_equal(is_image, sample.mm_token_type_ids == 1):
            at = int(np.flatnonzero(is_image != (sample.mm_token_type_ids == 1))[0])
            return failed(
                name,
                f"{sample.rollout_id}: token {at} is an image token by its id or by the placeholders, but not by both",
            )
        totals += list(counts.values())
    finding = f"{len(samples)} samples: " + " = ".join(f"{n} {what}" for n, what in zip(totals, counts, strict=True))
    return judged(name, True, finding, samples=len(samples), image_tokens=int(totals[0]))


def _count_features(policy: Policy, image: MMItem) -> int:
    """The vision features that the policy computes for one image, one per placeholder token."""
    with torch.no_grad():
        encoded = policy.encode_items([image])
    return 0 if encoded is None else int(encoded.levels[0].shape[0])


def image_hashes(name: str, evidence: Evidence, shown_twice: Prompt | None) -> Verdict:
    """Every image keeps its hash from the task to the engine's request and the trainer's sample.

    In the prompt `shown_twice` one image stands at two places, and must have two placeholders.
    """
    if shown_twice is None:
        return not_visible(name, NO_IMAGE)
    requests = {_identity(prompt) for prompt in evidence.requests}
    wrong = _changed_by_renderer(evidence) or _changed_on_the_way(evidence, requests) or _not_twice(shown_twice)
    if wrong is not None:
        return failed(name, wrong)
    shown = sum(len(turn.hashes) for turn in evidence.rendered)
    finding = (
        f"{shown} images keep their hash from the task through {len(requests)} distinct requests to "
        f"{len(evidence.samples)} samples; an image shown twice has two placeholders"
    )
    return judged(name, True, finding, images=shown, requests=len(requests), samples=len(evidence.samples))


def _changed_by_renderer(evidence: Evidence) -> str | None:
    """Where a prompt does not hold the images that the task showed; None where all do."""
    for turn in evidence.rendered:
        new, prompt = turn.hashes, turn.prompt
        in_prompt = [placeholder.hash for placeholder in prompt.placeholders][len(prompt.placeholders) - len(new) :]
        if tuple(in_prompt) != new:
            return f"the task shows {list(new)}, the prompt {in_prompt}"
        if [image_hash(image.pixels) for image in prompt.images] != [p.hash for p in prompt.placeholders]:
            return "a placeholder has the hash of another image than the pixels that belong to it"
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
    """What the placeholders are where no image has two; None where one does."""
    for i, first in enumerate(prompt.placeholders):
        if any(first.hash == other.hash and first.offset != other.offset for other in prompt.placeholders[i + 1 :]):
            return None
    return f"an image shown twice became the placeholders {[(p.offset, p.hash) for p in prompt.placeholders]}"


def _identity(prompt: Prompt) -> tuple[bytes, Any, tuple[str, ...]]:
    return prompt.token_ids.tobytes(), prompt.placeholders, tuple(image.hash for image in prompt.images)
