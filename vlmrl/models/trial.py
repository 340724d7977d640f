"""A first sequence of tokens, with a branch, through the policy and through the model's own forward: they must agree.

    prompt ─┬─ a      the policy computes both branches in one pass over the tree
            └─ b      the model computes [prompt, a] and [prompt, b] by itself, with its own attention and positions

The prompt is random tokens; of a family that no file of conf/model/vlm names, also one with an image. It is what keeps
an architecture that nobody thought of from being computed wrong: attention that does not go through transformers'
interface (ALiBi, relative positions), positions that start elsewhere, image features that go to other places than image
tokens (Ovis 2).

Left out on purpose: images of different sizes (the doctor compares those), and what begins only beyond the length of
the trial (sparse attention, rotary frequencies that change: `checkpoints/architecture.py` refuses those).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmrl.errors import ModelError, VlmrlError, headline
from vlmrl.models.attention.plan import plan_tree
from vlmrl.models.attention.prefix_tree import Segment, image_ends
from vlmrl.models.blocks import uncompiled_in_inference
from vlmrl.models.features import to_device
from vlmrl.models.policy import Policy
from vlmrl.types import IntArray, Prompt, mm_token_type_ids

log = logging.getLogger(__name__)

PREFIX, BRANCHES = 24, (5, 3)
"""Tokens of the prefix and of the two branches."""

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""The names under which a model's forward takes 1 for image tokens and 0 for others."""

FLOAT32_KL, HALF_KL = 1e-5, 0.05
"""Largest mean KL divergence per token, in nats. Rounding gives 1e-10 in float32 and 1e-3 in bfloat16 (routers of
experts included); forgetting ALiBi, or a position, gives more than 0.1."""


@contextmanager
def code_of(model: Any) -> Iterator[None]:
    """Whatever the code of a model's family raises inside becomes a `ModelError` that names the model's class. The
    traceback is in the log."""
    try:
        yield
    except VlmrlError:
        raise
    except Exception as error:  # code of any family
        log.exception("%s", type(model).__name__)
        raise ModelError(
            f"{type(model).__name__} does not compute in the way that the policy needs ({headline(error)}): its layers "
            f"must take inputs_embeds and hand their keyword arguments on to transformers' attention interface. Choose "
            "a model of another architecture"
        ) from error


@contextmanager
def own_attention(policy: Policy) -> Iterator[None]:
    """Let the language model compute with transformers' plain attention inside the block."""
    text = policy.config.get_text_config()
    ours = text._attn_implementation
    text._attn_implementation = "eager"
    try:
        yield
    finally:
        text._attn_implementation = ours


def try_policy(policy: Policy, shown: Prompt | None = None) -> None:
    """Raise `ModelError` where the policy does not compute what its model computes, of random tokens and of the prompt
    `shown`, which has images."""
    plain = Prompt(_tokens(policy, PREFIX, 0), (), ())
    with torch.inference_mode(), uncompiled_in_inference(), code_of(policy.model):
        reasons = [_unlike(policy, prompt) for prompt in (plain, shown) if prompt is not None]
    policy.take_image_counters()  # the image of the trial belongs to no step
    for reason in filter(None, reasons[:1]):
        refuse(policy, reason, _why(policy.model))
    for reason in filter(None, reasons[1:]):
        refuse(
            policy,
            f"{reason} with an image, and the same without one",
            "its images change more than the features in place of their tokens",
        )


def refuse(policy: Policy, difference: str, why: str) -> None:
    """Raise `ModelError` for a policy that computes something else than its model."""
    raise ModelError(
        f"{type(policy.model).__name__} computes other probabilities than the policy does: {difference}. Most likely "
        f"{why}. A run would learn from another distribution than the model's: choose a model of another architecture"
    )


def _why(model: Any) -> str:
    if not model._supports_attention_backend:
        return "its layers do not call transformers' attention interface, as those with ALiBi do not"
    return "something in it depends on more than the tokens before and their positions"


def _unlike(policy: Policy, prompt: Prompt) -> str | None:
    """How far apart the two are for `prompt` with both branches; None where that is rounding."""
    branches = [_tokens(policy, count, seed) for seed, count in enumerate(BRANCHES, start=1)]
    ours = _in_a_tree(policy, prompt, *branches)
    with own_attention(policy):
        theirs = torch.cat([_alone(policy, prompt, branch) for branch in branches])
    divergence = float((theirs.exp() * (theirs - ours)).nan_to_num(neginf=0.0).sum(-1).mean())
    if divergence <= (FLOAT32_KL if policy.dtype is torch.float32 else HALF_KL):
        return None
    return f"KL {divergence:.2g} nats for {len(prompt.token_ids)} tokens and two branches"


def _tokens(policy: Policy, count: int, seed: int) -> IntArray:
    """int64 [count]; tokens that may be sampled."""
    allowed = (~policy.banned).nonzero()[:, 0].cpu().numpy()
    chosen: IntArray = np.random.default_rng(seed).choice(allowed, count).astype(np.int64)
    return chosen


def _in_a_tree(policy: Policy, prompt: Prompt, first: IntArray, second: IntArray) -> Tensor:
    """Logprobs float32 [prompt and first, prompt and second; vocabulary], from one pass over both branches."""
    begin, middle = len(prompt.token_ids), len(prompt.token_ids) + len(first)
    end = middle + len(second)
    types = mm_token_type_ids(end, prompt.placeholders)
    runs = [np.arange(begin), np.arange(begin, middle), np.arange(middle, end)]
    segments = [Segment(-1 if i == 0 else 0, run, run, image_ends(types[run])) for i, run in enumerate(runs)]
    positions = policy.positions(middle, prompt.placeholders, prompt.images)
    positions = np.concatenate([positions, positions[:, begin : begin + len(second)]], axis=1)
    features = policy.encode_images(prompt.images)
    rows = [features.first[i.hash] + np.arange(i.num_tokens) for i in prompt.images] if features is not None else []
    hidden = policy.hidden_states(
        to_device(np.concatenate([prompt.token_ids, first, second]), policy.device),
        to_device(positions, policy.device),
        to_device(types, policy.device),
        plan_tree(segments, policy.device, policy.rules),
        features,
        to_device(np.concatenate([np.zeros(0, np.int64), *rows]), policy.device),
    )
    logprobs = policy.log_probs(hidden, 1.0)
    return torch.cat([logprobs[:middle], logprobs[:begin], logprobs[middle:]])


def _alone(policy: Policy, prompt: Prompt, branch: IntArray) -> Tensor:
    """Logprobs float32 [tokens, vocabulary], by the model's own forward."""
    ids = to_device(np.concatenate([prompt.token_ids, branch])[None], policy.device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.images:
        takes = inspect.signature(policy.model.forward).parameters.keys()
        types = to_device(mm_token_type_ids(ids.shape[1], prompt.placeholders)[None], policy.device)
        inputs |= {kind: types for kind in TOKEN_TYPES if kind in takes}
        for name in takes & prompt.images[0].mm_kwargs.keys():
            together = np.concatenate([image.mm_kwargs[name] for image in prompt.images])
            inputs[name] = to_device(together, policy.device)
    logits: Tensor = policy.model(**inputs, use_cache=False).logits[0].float()
    return logits.masked_fill(policy.banned, float("-inf")).log_softmax(-1)
