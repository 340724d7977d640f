"""The check that the policy computes what the model's own forward computes, sequence by sequence."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmrl.models.features import to_device
from vlmrl.models.policy import Policy
from vlmrl.models.trial import own_attention
from vlmrl.models.vision_encoder import alike
from vlmrl.runs.doctor.logprobs import Bound, LogprobDifference, logprobs
from vlmrl.runs.doctor.reference import Reference
from vlmrl.runs.verdicts import Verdict, not_visible
from vlmrl.types import FloatArray, ImageItem, MMItem, TrainingSample, VideoItem

LONGEST = 2048
"""Tokens of the longest sequence that is compared: transformers' own attention takes memory with its square."""

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""The names under which a model's forward takes 1 for image tokens, 2 for video tokens and 0 for others."""


def own_forward(
    name: str,
    policy: Policy,
    reference: Reference,
    samples: Sequence[TrainingSample],
    trainer: Sequence[FloatArray],
    bound: Bound,
) -> Verdict:
    """The trainer's logprobs, computed in one prefix tree, are those of transformers' forward of each sequence alone,
    with its own attention, positions and masks.

    `trainer` has per sample float32 [loss tokens] at temperature 1. Samples of more than `LONGEST` tokens are left out,
    and those whose images of several sizes the processor makes other tokens of when it pads them together. Videos of
    several sizes are never padded.
    """
    inputs = {
        i: arrays
        for i, sample in enumerate(samples)
        if len(sample.token_ids) <= LONGEST and (arrays := _arrays(reference, sample.mm_items)) is not None
    }
    if not inputs:
        return not_visible(name, f"no sample has {LONGEST} tokens or fewer, and images or videos that the model takes")
    with own_attention(policy), torch.no_grad():
        theirs = np.concatenate([_logprobs(policy, samples[i], arrays) for i, arrays in inputs.items()])
    found = LogprobDifference.between(np.concatenate([trainer[i] for i in inputs]), theirs)
    return logprobs(name, found, bound, f"{len(inputs)} of {len(samples)} sequences one by one, ")


def _arrays(reference: Reference, items: Sequence[MMItem]) -> dict[str, np.ndarray] | None:
    """The arrays of all images and videos of a sample, by the names of the model's forward; None where there are none
    together.

    Arrays of one form stand side by side. Those of several forms are padded by the processor, which sees all images.
    """
    images = [item for item in items if isinstance(item, ImageItem)]
    videos = [item for item in items if isinstance(item, VideoItem)]
    together = reference.process_together(images) if len(alike(images)) > 1 else _side_by_side(images)
    return None if together is None else together | _side_by_side(videos)


def _side_by_side(items: Sequence[MMItem]) -> dict[str, np.ndarray]:
    names = items[0].mm_kwargs if items else ()
    return {name: np.concatenate([item.mm_kwargs[name] for item in items]) for name in names}


def _logprobs(policy: Policy, sample: TrainingSample, arrays: Mapping[str, np.ndarray]) -> FloatArray:
    """float32 [loss tokens] of one sample, at temperature 1, by the model's own forward."""
    device = policy.device
    token_ids = to_device(sample.token_ids[None], device)
    inputs: dict[str, Any] = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
    takes = inspect.signature(policy.model.forward).parameters
    types = to_device(sample.mm_token_type_ids[None], device)
    inputs |= {kind: types for kind in TOKEN_TYPES if kind in takes}
    inputs |= {kwarg: to_device(array, device) for kwarg, array in arrays.items() if kwarg in takes}
    logits: Tensor = policy.model(**inputs, use_cache=False).logits[0].float()
    at = np.flatnonzero(sample.loss_mask)
    rows = logits[to_device(at - 1, device)].masked_fill(policy.banned, float("-inf"))
    chosen = to_device(sample.token_ids[at], device)
    found: FloatArray = rows.log_softmax(-1).gather(1, chosen[:, None])[:, 0].cpu().numpy()
    return found
