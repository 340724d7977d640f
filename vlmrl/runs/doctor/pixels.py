"""Checks of pixels: the renderer's against the image processor's, and whether trainer and engine look at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmrl.runs.doctor.logprobs import Bound, LogprobDifference
from vlmrl.runs.doctor.reference import Reference
from vlmrl.runs.verdicts import Verdict, failed, judged, not_visible
from vlmrl.types import Rollout

NO_IMAGE = "no problem shows an image"


def pixels(name: str, reference: Reference, rollouts: Sequence[Rollout]) -> Verdict:
    """The renderer's pixels and sizes are the processor's, byte for byte."""
    if reference.image_processor is None:
        return not_visible(name, "the model is text-only")
    distinct = {image.hash: image for r in rollouts for turn in r.turns for image in turn.prompt.images}
    if not distinct:
        return not_visible(name, NO_IMAGE)
    names: set[str] = set()
    for image in distinct.values():
        for key, array in reference.process(image).items():
            names.add(key)
            ours = image.mm_kwargs.get(key)
            if ours is None or ours.dtype != array.dtype or ours.tobytes() != np.ascontiguousarray(array).tobytes():
                return failed(name, _difference(key, ours, array))
    finding = f"{', '.join(sorted(names))} of {len(distinct)} images are the image processor's, byte for byte"
    return judged(name, True, finding, images=len(distinct))


def _difference(key: str, ours: np.ndarray | None, theirs: np.ndarray) -> str:
    if ours is None:
        return f"{key}: the image processor makes {theirs.dtype} {list(theirs.shape)} of it, the renderer nothing"
    apart = float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("nan")
    return (
        f"{key}: the renderer made {ours.dtype} {list(ours.shape)}, the image processor {theirs.dtype} "
        f"{list(theirs.shape)}, max |delta| {apart:.3g}"
    )


@dataclass(frozen=True)
class InvertedPixels:
    """Logprobs of tokens that the engine sampled after images, and the same with the images inverted."""

    trainer_change: LogprobDifference
    """The trainer with the images that were shown, against the trainer with the inverted ones."""
    shown: LogprobDifference
    """The trainer with the images that were shown, against the engine."""
    inverted: LogprobDifference
    """The trainer with the inverted images, against the engine."""


def images_in_trainer(name: str, found: InvertedPixels | None, smallest: float) -> Verdict:
    """Inverted pixels behind the same tokens change the trainer's logprobs."""
    if found is None:
        return not_visible(name, NO_IMAGE)
    change = found.trainer_change
    finding = f"{change.tokens} tokens: inverted pixels change the trainer's logprobs by mismatch_kl {change.kl:.1e}"
    return judged(name, change.kl > smallest, finding, f"> {smallest:.1e}", mismatch_kl=change.kl, limit=smallest)


def images_in_engine(name: str, found: InvertedPixels | None, bound: Bound) -> Verdict:
    """The engine's logprobs follow from the pixels that it was shown, not from others behind the same tokens."""
    if found is None:
        return not_visible(name, NO_IMAGE)
    if found.trainer_change.kl <= bound.kl:
        return not_visible(
            name,
            f"inverted pixels change the trainer's own logprobs by mismatch_kl {found.trainer_change.kl:.1e}, which "
            f"rounding alone could explain ({bound.kl:.1e})",
        )
    shown, inverted = found.shown, found.inverted
    finding = (
        f"mismatch_kl {shown.kl:.1e}, |delta| max {shown.max:.1e} from the trainer with the pixels shown, "
        f"{inverted.kl:.1e} with the inverted ones"
    )
    return judged(
        name,
        bound.holds(shown) and shown.kl < inverted.kl,
        finding,
        f"{bound}, and less than with the inverted ones",
        shown_kl=shown.kl,
        shown_max=shown.max,
        inverted_kl=inverted.kl,
        limit=bound.kl,
        max_limit=bound.max,
    )
