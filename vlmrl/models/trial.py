"""A first sequence of tokens, with a branch, through the policy and through the model's own forward: they must agree.

    prefix ─┬─ a      the policy computes both branches in one pass over the tree
            └─ b      the model computes [prefix, a] and [prefix, b] by itself, with its own attention and positions

It takes three short passes and costs milliseconds for a small model. It is what keeps an architecture that nobody
thought of from being computed wrong: attention that does not go through transformers' interface (ALiBi, relative
positions), positions that start elsewhere, a decoder that is only a part of the model.

Left out on purpose: images (the doctor and its short certificate compare those), and what begins only beyond the length
of the trial (sparse attention, rotary frequencies that change: `checkpoints/architecture.py` refuses those).
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
from vlmrl.models.policy import Policy

log = logging.getLogger(__name__)

PREFIX, BRANCHES = 24, (5, 3)
"""Tokens of the prefix and of the two branches."""

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


def try_policy(policy: Policy) -> None:
    """Raise `ModelError` where the policy does not compute what its model computes."""
    prefix, first, second = (_tokens(policy, n, seed) for seed, n in enumerate((PREFIX, *BRANCHES)))
    with torch.no_grad(), code_of(policy.model):
        ours = _in_a_tree(policy, prefix, first, second)
        with own_attention(policy):
            theirs = torch.cat([_alone(policy, torch.cat([prefix, branch])) for branch in (first, second)])
        divergence = float((theirs.exp() * (theirs - ours)).nan_to_num(neginf=0.0).sum(-1).mean())
    if divergence <= (FLOAT32_KL if policy.dtype is torch.float32 else HALF_KL):
        return
    name = type(policy.model).__name__
    why = (
        "its layers do not call transformers' attention interface, as those with ALiBi or relative positions do not"
        if not policy.model._supports_attention_backend
        else "something in it depends on more than the tokens before and their positions"
    )
    raise ModelError(
        f"{name} computes other probabilities than the policy does of the same {PREFIX + max(BRANCHES)} tokens "
        f"(KL {divergence:.2g}): {why}. A run would learn from another distribution than the model's: choose a model "
        "of another architecture"
    )


def _tokens(policy: Policy, count: int, seed: int) -> Tensor:
    """int64 [count]; tokens that may be sampled."""
    allowed = (~policy.banned).nonzero()[:, 0].cpu().numpy()
    chosen = np.random.default_rng(seed).choice(allowed, count)
    return torch.from_numpy(chosen.astype(np.int64)).to(policy.device)


def _in_a_tree(policy: Policy, prefix: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Logprobs float32 [prefix and first, prefix and second; vocabulary], from one pass over both branches."""
    a, b, end = len(prefix), len(prefix) + len(first), len(prefix) + len(first) + len(second)
    runs = [np.arange(a), np.arange(a, b), np.arange(b, end)]
    segments = [Segment(-1 if i == 0 else 0, run, run, np.arange(len(run))) for i, run in enumerate(runs)]
    path = np.concatenate([np.arange(b), np.arange(a, a + len(second))])
    ids = torch.cat([prefix, first, second])
    hidden = policy.hidden_states(
        ids,
        torch.from_numpy(np.tile(path, (4, 1))).to(policy.device),
        torch.zeros_like(ids),
        plan_tree(segments, policy.device, policy.rules),
        None,
        ids.new_zeros(0),
    )
    logprobs = policy.log_probs(hidden, 1.0)
    return torch.cat([logprobs[:b], logprobs[:a], logprobs[b:]])


def _alone(policy: Policy, ids: Tensor) -> Tensor:
    """Logprobs float32 [tokens, vocabulary], by the model's own forward."""
    out = policy.model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), use_cache=False)
    logits: Tensor = out.logits[0].float()
    return logits.masked_fill(policy.banned, float("-inf")).log_softmax(-1)
