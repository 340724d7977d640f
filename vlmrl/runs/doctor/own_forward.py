"""The check that the policy computes what the model's own forward computes, sequence by sequence."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmrl.models.features import to_device
from vlmrl.models.image_encoder import alike
from vlmrl.models.policy import Policy
from vlmrl.runs.doctor.logprobs import LogprobDifference
from vlmrl.runs.verdicts import Verdict, judged, not_visible
from vlmrl.types import FloatArray, TrainingSample

LONGEST = 2048
"""Tokens of the longest sequence that is compared: transformers' own attention takes memory with its square."""

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""The names under which a model's forward takes 1 for image tokens and 0 for others."""


def own_forward(
    name: str, policy: Policy, samples: Sequence[TrainingSample], trainer: Sequence[FloatArray], bound: float
) -> Verdict:
    """The trainer's logprobs, computed in one prefix tree, are those of transformers' forward of each sequence alone,
    with its own attention, positions and masks: mismatch_kl is at most `bound`.

    `trainer` has per sample float32 [loss tokens] at temperature 1. Samples whose images differ in size and samples of
    more than `LONGEST` tokens are left out: transformers would pad the ones and take too long for the others.
    """
    chosen = [i for i, s in enumerate(samples) if len(s.token_ids) <= LONGEST and len(alike(s.images)) <= 1]
    if not chosen:
        return not_visible(name, f"no sample has images of one size and {LONGEST} tokens or fewer")
    with _attention_of_its_own(policy), torch.no_grad():
        theirs = np.concatenate([_logprobs(policy, samples[i]) for i in chosen])
    found = LogprobDifference.between(np.concatenate([trainer[i] for i in chosen]), theirs)
    finding = (
        f"{len(chosen)} of {len(samples)} sequences one by one, {found.tokens} tokens: mismatch_kl {found.kl:.1e}, "
        f"|delta| mean {found.mean:.1e} max {found.max:.1e}"
    )
    return judged(
        name,
        found.kl <= bound,
        finding,
        f"mismatch_kl <= {bound:.1e}",
        mismatch_kl=found.kl,
        mean_delta=found.mean,
        max_delta=found.max,
        limit=bound,
        tokens=found.tokens,
    )


@contextmanager
def _attention_of_its_own(policy: Policy) -> Iterator[None]:
    """Let the language model compute with transformers' plain attention inside the block."""
    text = policy.config.get_text_config()
    ours = text._attn_implementation
    text._attn_implementation = "eager"
    try:
        yield
    finally:
        text._attn_implementation = ours


def _logprobs(policy: Policy, sample: TrainingSample) -> FloatArray:
    """float32 [loss tokens] of one sample, at temperature 1, by the model's own forward."""
    device = policy.device
    token_ids = to_device(sample.token_ids[None], device)
    inputs: dict[str, Any] = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
    takes = inspect.signature(policy.model.forward).parameters
    types = to_device(sample.mm_token_type_ids[None], device)
    inputs |= {kind: types for kind in TOKEN_TYPES if kind in takes}
    for kwarg in sample.images[0].mm_kwargs if sample.images else ():
        if kwarg in takes:
            together = np.concatenate([image.mm_kwargs[kwarg] for image in sample.images])
            inputs[kwarg] = to_device(together, device)
    logits: Tensor = policy.model(**inputs, use_cache=False).logits[0].float()
    at = np.flatnonzero(sample.loss_mask)
    rows = logits[to_device(at - 1, device)].masked_fill(policy.banned, float("-inf"))
    chosen = to_device(sample.token_ids[at], device)
    found: FloatArray = rows.log_softmax(-1).gather(1, chosen[:, None])[:, 0].cpu().numpy()
    return found
