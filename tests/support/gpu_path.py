"""What a policy computes on a GPU: flash attention by its definition for machines without one, and samples of a family
with what transformers' own eager attention gives for each of them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from support.families.loading import load_processor
from support.families.prompts import prompt_and_batch
from vlmrl.config.trainer import Packing
from vlmrl.models.policy import Policy
from vlmrl.trainer.forward import loss_logprobs
from vlmrl.trainer.packing import pack
from vlmrl.types import Prompt, TrainingSample, mm_token_type_ids

TAILS = ((5, 6, 7, 8), (5, 6, 9), (10,))
"""Answers of three siblings, of which two share their beginning."""

PER_TOKEN = ("attention_mask", "mm_token_type_ids", "token_type_ids")
"""Inputs of transformers' forward that have a value for each token."""


def flash_by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    starts_of_keys: Tensor,
    longest: int,
    longest_of_keys: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    **_: Any,
) -> Tensor:
    """In place of `torch.nn.attention.varlen.varlen_attn`: [T, H, D], [K, KV, D] × 2 → [T, H, D]. The last query of a
    sequence is aligned with its last key."""
    assert starts.dtype is starts_of_keys.dtype is torch.int32  # the kernel reads nothing else
    assert type(longest) is type(longest_of_keys) is int
    group = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (key, value))
    outputs = []
    for (start, end), (first, last) in zip(pairwise(starts.tolist()), pairwise(starts_of_keys.tolist()), strict=True):
        assert end - start <= longest
        assert last - first <= longest_of_keys
        key_at = torch.arange(last - first)
        back = key_at[len(key_at) - (end - start) :, None] - key_at
        before, after = (len(key_at) if size < 0 else size for size in window_size)
        scores = torch.einsum("qhd,khd->hqk", query[start:end], keys[first:last]) * scale
        scores = scores.masked_fill((back > before) | (-back > after), float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values[first:last]))
    return torch.cat(outputs)


def logprobs_of(
    policy: Policy, samples: Sequence[TrainingSample], packing: Packing, *, backward: bool = False
) -> list[Tensor]:
    """Logprobs of each sample's loss tokens as a trainer computes them; `backward` also leaves the
    gradients of their sum, weighted by the advantages."""
    kernel = policy.kernel(shared=packing is Packing.tree)
    found: list[Tensor] = [torch.empty(0)] * len(samples)
    with torch.set_grad_enabled(backward):
        for batch in pack(samples, packing, 4096, policy.positions, policy.device, kernel=kernel, rules=policy.rules):
            logprobs, _ = loss_logprobs(policy, batch, 1.0)
            if backward:
                (logprobs * batch.advantages).sum().backward()  # type: ignore[no-untyped-call]
            for i in set(batch.sample_index.tolist()):
                found[i] = logprobs.detach()[batch.sample_index == i].cpu()
    return found


@dataclass(frozen=True)
class FamilySamples:
    """Siblings of one prompt with the images of a family, and how transformers sees them."""

    samples: list[TrainingSample]
    batches: list[dict[str, Tensor]]
    """Inputs of transformers' forward, for each sample."""


def family_samples(name: str, folder: Path, image_token_id: int) -> FamilySamples:
    prompt, batch = prompt_and_batch(name, load_processor(folder), image_token_id)
    samples = [_sample(prompt, tail) for tail in TAILS]
    return FamilySamples(samples, [_with_tail(batch, tail) for tail in TAILS])


def load(folder: Path, device: str, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    auto: Any = AutoModelForImageTextToText
    return auto.from_pretrained(folder, dtype=dtype, attn_implementation=attention).to(device).eval()


def by_transformers(model: Any, made: FamilySamples) -> list[Tensor]:
    """Logprobs of each sample's loss tokens, on the CPU; leaves the gradients of their sum, weighted by the
    advantages."""
    found = []
    for sample, batch in zip(made.samples, made.batches, strict=True):
        given = {
            key: tensor.to(model.device, model.dtype if tensor.is_floating_point() else tensor.dtype)
            for key, tensor in batch.items()
        }
        log_probs = model(**given, use_cache=False).logits[0].float().log_softmax(-1)
        at = torch.from_numpy(np.flatnonzero(sample.loss_mask))
        logprobs = log_probs[at - 1, torch.from_numpy(sample.token_ids)[at]]
        weights = torch.from_numpy(sample.advantages)[at].to(model.device)
        (logprobs * weights).sum().backward()
        found.append(logprobs.detach().cpu())
    return found


def gradients_of(model: Any) -> dict[str, Tensor]:
    """Every gradient, in float32 on the CPU."""
    return {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}


def _sample(prompt: Prompt, tail: Sequence[int]) -> TrainingSample:
    token_ids = np.concatenate([prompt.token_ids, np.array(tail, np.int64)])
    length = len(token_ids)
    mask = np.arange(length) >= len(prompt.token_ids)
    advantages = np.random.default_rng(length).standard_normal(length)
    return TrainingSample(
        rollout_id=str(tail),
        token_ids=token_ids,
        mm_token_type_ids=mm_token_type_ids(length, prompt.placeholders),
        loss_mask=mask,
        advantages=np.where(mask, advantages, 0).astype(np.float32),
        inference_logprobs=np.where(mask, -1, 0).astype(np.float32),
        versions=np.where(mask, 0, -1),
        placeholders=prompt.placeholders,
        mm_items=prompt.mm_items,
    )


def _with_tail(batch: Any, tail: Sequence[int]) -> dict[str, Tensor]:
    added = torch.tensor([tail])
    longer = {key: torch.as_tensor(value) for key, value in batch.items()}
    longer["input_ids"] = torch.cat([longer["input_ids"], added], 1)
    for key in set(PER_TOKEN) & longer.keys():
        end = torch.full_like(added, int(key == "attention_mask"))
        longer[key] = torch.cat([longer[key], end.to(longer[key].dtype)], 1)
    return longer
