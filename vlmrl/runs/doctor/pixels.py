"""Checks of pixels: the renderer's against the image processor's, and whether trainer and engine look at them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmrl.models.families.positions import SECONDS
from vlmrl.runs.doctor.logprobs import Bound, LogprobDifference
from vlmrl.runs.doctor.reference import Reference
from vlmrl.runs.verdicts import Verdict, failed, judged, not_visible
from vlmrl.types import Modality, Rollout

NO_IMAGE = "no problem shows an image or a video"


def pixels(name: str, reference: Reference, rollouts: Sequence[Rollout]) -> Verdict:
    """The renderer's pixels and sizes are the processor's, byte for byte, of images and of videos."""
    if reference.image_processor is None:
        return not_visible(name, "the model is text-only")
    distinct = {item.hash: item for r in rollouts for turn in r.turns for item in turn.prompt.mm_items}
    if not distinct:
        return not_visible(name, NO_IMAGE)
    names: set[str] = set()
    for item in distinct.values():
        for key, array in reference.process(item).items():
            names.add(key)
            ours = item.mm_kwargs.get(key)
            if ours is None or not _is_same(key, ours, np.ascontiguousarray(array)):
                return failed(name, _difference(item.modality, key, ours, array))
    counts = Counter(item.modality for item in distinct.values())
    shown = " and ".join(f"{number} {kind}s" for kind, number in sorted(counts.items()))
    processors = " and ".join(f"the {kind} processor's" for kind in sorted(counts))
    finding = f"{', '.join(sorted(names))} of {shown} are {processors}, byte for byte"
    numbers = {f"{kind}s": number for kind, number in counts.items()}
    return judged(name, True, finding, "", **{"images": 0, **numbers})


def _is_same(key: str, ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether two arrays are equal, byte for byte. The seconds between frames are a quotient, which the processor
    returns with the precision of the tensors that it is asked for."""
    if key == SECONDS and ours.shape == theirs.shape:
        return bool(np.allclose(ours, theirs, rtol=np.finfo(np.float32).eps, atol=0))
    return ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()


def _difference(kind: Modality, key: str, ours: np.ndarray | None, theirs: np.ndarray) -> str:
    if ours is None:
        return f"{key}: the {kind} processor makes {theirs.dtype} {list(theirs.shape)} of it, the renderer nothing"
    apart = float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("nan")
    return (
        f"{key}: the renderer made {ours.dtype} {list(ours.shape)}, the {kind} processor {theirs.dtype} "
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
