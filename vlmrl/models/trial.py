"""A first sequence of tokens, with a branch, through the policy and through the model's own forward: they must agree.

    prompt ─┬─ a      the policy computes both branches in one pass over the tree
            └─ b      the model computes [prompt, a] and [prompt, b] by itself, with its own attention and positions

It is what keeps an architecture that nobody thought of from being computed wrong: attention that does not go through
transformers' interface (ALiBi, relative positions), or positions that start elsewhere.

Left out on purpose: images (the short certificate compares those), and what begins only beyond the length of the trial
(sparse attention, rotary frequencies that change: `checkpoints/architecture.py` refuses those).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmrl.errors import ModelError, VlmrlError, headline
from vlmrl.models.attention.plan import plan_tree
from vlmrl.models.attention.prefix_tree import Segment
from vlmrl.models.blocks import uncompiled_in_inference
from vlmrl.models.features import to_device
from vlmrl.models.policy import Policy
from vlmrl.types import IntArray

log = logging.getLogger(__name__)

PREFIX, BRANCHES = 24, (5, 3)
"""Tokens of the prefix and of the two branches."""

FLOAT32_KL, HALF_KL = 1e-5, 0.05
"""Largest mean KL divergence per token, in nats. float32 rounds to less than 1e-9. Architectures that the policy does
not compute were off by 1e-4 to 6 with random weights, mostly by more than 0.05; half precision can only see those."""


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


def try_policy(policy: Policy) -> None:
    """Raise `ModelError` where the policy does not compute what its model computes."""
    prefix, *branches = (_tokens(policy, count, seed) for seed, count in enumerate((PREFIX, *BRANCHES)))
    with torch.inference_mode(), uncompiled_in_inference(), code_of(policy.model):
        ours = _in_a_tree(policy, prefix, *branches)
        with own_attention(policy):
            theirs = torch.cat([_alone(policy, np.concatenate([prefix, branch])) for branch in branches])
        _check_numbers(policy, theirs)
        divergence = float((theirs.exp() * (theirs - ours)).nan_to_num(neginf=0.0).sum(-1).mean())
    if divergence <= (FLOAT32_KL if policy.dtype is torch.float32 else HALF_KL):
        return
    why = (
        "something in it depends on more than the tokens before and their positions"
        if policy.model._supports_attention_backend
        else "its layers do not call transformers' attention interface, as those with ALiBi do not"
    )
    raise ModelError(
        f"{type(policy.model).__name__} computes other probabilities than the policy does: KL {divergence:.2g} nats "
        f"for {PREFIX} tokens and two branches. Most likely {why}. A run would learn from another distribution than "
        "the model's: choose a model of another architecture"
    )


def _check_numbers(policy: Policy, logprobs: Tensor) -> None:
    """Raise `ModelError` where the model itself computes no probabilities. −inf is a token that is never sampled."""
    if bool(logprobs.isnan().any()):
        raise ModelError(
            f"{type(policy.model).__name__} computes probabilities that are no numbers (NaN), so no token could be "
            "sampled: its weights and the numbers of its config.json (such as rms_norm_eps) do not fit; download the "
            "checkpoint again"
        )


def _tokens(policy: Policy, count: int, seed: int) -> IntArray:
    """int64 [count]; tokens that may be sampled."""
    allowed = (~policy.banned).nonzero()[:, 0].cpu().numpy()
    chosen: IntArray = np.random.default_rng(seed).choice(allowed, count).astype(np.int64)
    return chosen


def _in_a_tree(policy: Policy, prefix: IntArray, first: IntArray, second: IntArray) -> Tensor:
    """Logprobs float32 [prefix and first, prefix and second; vocabulary], from one pass over both branches."""
    begin, middle = len(prefix), len(prefix) + len(first)
    runs = [np.arange(begin), np.arange(begin, middle), np.arange(middle, middle + len(second))]
    segments = [Segment(-1 if i == 0 else 0, run, run, np.arange(len(run))) for i, run in enumerate(runs)]
    positions = np.concatenate([np.arange(middle), np.arange(begin, begin + len(second))])
    ids = to_device(np.concatenate([prefix, first, second]), policy.device)
    hidden = policy.hidden_states(
        ids,
        to_device(np.tile(positions, (4, 1)), policy.device),
        torch.zeros_like(ids),
        plan_tree(segments, policy.device, policy.rules),
        None,
        ids.new_zeros(0),
    )
    logprobs = policy.log_probs(hidden, 1.0)
    return torch.cat([logprobs[:middle], logprobs[:begin], logprobs[middle:]])


def _alone(policy: Policy, token_ids: IntArray) -> Tensor:
    """Logprobs float32 [tokens, vocabulary], by the model's own forward."""
    ids = to_device(token_ids[None], policy.device)
    out = policy.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    logits: Tensor = out.logits[0].float()
    return logits.masked_fill(policy.banned, float("-inf")).log_softmax(-1)
