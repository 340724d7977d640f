"""Decoding: sample the completions of a batch, token by token, after its prompts are prefilled.

Requests with the same prompt that have sampled the same tokens so far form one branch, which is one row of the forward
pass. A branch splits where its requests sample different tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmrl.inference.embedded.cached_policy import CachedPolicy
from vlmrl.inference.embedded.completions import Sampled, finish
from vlmrl.inference.embedded.prefill import DistinctPrompt, Prefilled
from vlmrl.inference.embedded.requests import Request
from vlmrl.inference.embedded.sampling import SampledToken, sample_tokens, uniform_numbers
from vlmrl.inference.stop_strings import StopFinder, TextOf
from vlmrl.models.attention.layer_cache import PrefixStates
from vlmrl.models.attention.plan import (
    Blocks,
    LayerPlan,
    Path,
    SharedBlock,
    TreePlan,
    local_blocks,
    shared_blocks,
    shared_segments,
)
from vlmrl.models.attention.prefix_tree import Segment, depths
from vlmrl.models.attention.recurrent import plan_states
from vlmrl.types import Completion, IntArray


class _Sequence:
    """One request while its completion is sampled."""

    def __init__(self, request: Request, prompt: int, text_of: TextOf | None) -> None:
        self.request = request
        self.prompt = prompt
        """Index of its prompt."""
        self.stop_token_ids = frozenset(request.sampling.stop_token_ids)
        self.uniforms = uniform_numbers(request.sampling)
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.supports: list[NDArray[np.int32]] = []
        """One per token; none where they are not reported."""
        self.stop: str | None = None
        """The stop string that ended the completion."""
        self._finder: StopFinder | None = None
        if request.sampling.stop:
            assert text_of is not None, "a request with stop strings needs an engine that was given `text_of`"
            self._finder = StopFinder(request.sampling.stop, text_of)
        self.last_branch: _Branch | None = None
        """The branch that sampled the last token; None while the completion is not finished."""

    def add(self, sampled: SampledToken, branch: _Branch) -> None:
        """Append a token that `branch` sampled."""
        token = sampled.token
        self.token_ids.append(token)
        self.logprobs.append(sampled.logprob)
        if sampled.support is not None:
            self.supports.append(sampled.support)
        if token not in self.stop_token_ids and self._finder is not None:
            self.stop = self._finder.add(token)
        if self.is_stopped or len(self.token_ids) == self.request.sampling.max_new_tokens:
            self.last_branch = branch

    @property
    def is_stopped(self) -> bool:
        """Whether its last token is a stop token, or completes a stop string."""
        return self.stop is not None or self.token_ids[-1] in self.stop_token_ids

    @property
    def is_finished(self) -> bool:
        return self.last_branch is not None


@dataclass(eq=False)
class _Branch:
    """A distinct continuation of a distinct prompt."""

    prompt: int
    """Index of the prompt."""
    slots: list[int] = field(default_factory=list)
    """Slots of the continuation's tokens in the KV cache."""
    sequences: list[_Sequence] = field(default_factory=list)
    """The unfinished requests that have sampled exactly this continuation."""
    states: PrefixStates = field(default_factory=dict)
    """After the continuation; empty for a model whose layers carry no state."""


def decode(
    model: CachedPolicy,
    version: int,
    requests: Sequence[Request],
    prompts: Sequence[DistinctPrompt],
    request_prompt: Sequence[int],
    prefilled: Prefilled,
    text_of: TextOf | None = None,
) -> tuple[list[Completion], int]:
    """Sample one completion per request, in order → the completions, and the number of rows that were computed.

    `request_prompt` has the index of each request's prompt. `text_of` is needed for stop strings only. Leaves a
    `CachedTurn` in each request's session.
    """
    sequences = [_Sequence(request, prompt, text_of) for request, prompt in zip(requests, request_prompt, strict=True)]
    chain = _SharedChain(prompts, prefilled.segments, request_prompt)
    branches = [_Branch(prompt, states=states) for prompt, states in enumerate(prefilled.states)]
    for sequence in sequences:
        branches[sequence.prompt].sequences.append(sequence)
    hidden, rows = prefilled.hidden, 0
    for step in range(max(request.sampling.max_new_tokens for request in requests)):
        branches, branch_tokens = _split(branches, _sample(model, branches, hidden, step))
        if not branches:
            break
        hidden = _forward(model, branches, branch_tokens, prompts, chain, step)
        rows += len(branches)
    return [_finish(sequence, version, prompts, prefilled) for sequence in sequences], rows


def _sample(model: CachedPolicy, branches: Sequence[_Branch], hidden: Tensor, step: int) -> list[SampledToken]:
    """The next token of each unfinished request, in the order of `branches` and their sequences."""
    order = [sequence for branch in branches for sequence in branch.sequences]
    row = np.repeat(np.arange(len(branches)), [len(branch.sequences) for branch in branches])
    params = [sequence.request.sampling for sequence in order]
    return sample_tokens(model, hidden, row, params, [sequence.uniforms[step] for sequence in order])


def _split(branches: Sequence[_Branch], sampled: Sequence[SampledToken]) -> tuple[list[_Branch], list[int]]:
    """Append the sampled tokens to the requests → the branches of the unfinished ones, and the token of each branch."""
    children: list[_Branch] = []
    child_tokens: list[int] = []
    tokens = iter(sampled)
    for branch in branches:
        by_token: dict[int, _Branch] = {}
        for sequence in branch.sequences:
            each = next(tokens)
            sequence.add(each, branch)
            if not sequence.is_finished:
                child = _Branch(branch.prompt, branch.slots, states=branch.states)
                by_token.setdefault(each.token, child).sequences.append(sequence)
        for token, child in sorted(by_token.items()):
            children.append(child)
            child_tokens.append(token)
    return children, child_tokens


def _forward(
    model: CachedPolicy,
    branches: Sequence[_Branch],
    tokens: Sequence[int],
    prompts: Sequence[DistinctPrompt],
    chain: _SharedChain,
    step: int,
) -> Tensor:
    """Compute the newest token of each branch, in a slot of its own → float [branches, hidden]."""
    first_slot = model.kv_cache.allocate(len(branches))
    for i, branch in enumerate(branches):
        branch.slots = [*branch.slots, first_slot + i]
    plan = _plan(model, branches, prompts, chain, step)
    at = np.array([[prompts[b.prompt].next_text_position, prompts[b.prompt].next_position] for b in branches])
    positions = np.stack([at[:, 0], at[:, 1], at[:, 1], at[:, 1]]) + step
    types = np.zeros(len(branches), np.int64)
    hidden = model.forward(np.array(tokens), positions, types, [], plan, first_slot)
    if plan.states is not None:
        for i, branch in enumerate(branches):
            branch.states = plan.states.ends[i]
    return hidden


def _plan(
    model: CachedPolicy,
    branches: Sequence[_Branch],
    prompts: Sequence[DistinctPrompt],
    chain: _SharedChain,
    step: int,
) -> TreePlan:
    """The plan of a pass with the newest token of each branch. All of these are text, so no row sees a later one."""
    row_depths = np.array([len(prompts[b.prompt].keys) + step for b in branches])
    paths = [np.concatenate([chain.private_slots[b.prompt], np.array(b.slots, dtype=np.int64)]) for b in branches]
    planned: dict[int | None, Blocks] = {}
    by_window: dict[int | None, LayerPlan] = {}
    for rule in model.policy.rules.distinct:
        window = None if rule.window is None or row_depths.max() < rule.window else rule.window
        if window not in planned:
            kept = [path[-(window or len(path)) :] for path in paths]
            planned[window] = Blocks(
                shared=chain.blocks([b.prompt for b in branches], row_depths, window, model.device),
                local=local_blocks(
                    [Path(path, np.array([i]), len(path) - 1) for i, path in enumerate(kept)],
                    None,
                    model.device,
                ),
            )
        by_window[rule.window] = planned[window]
    states = None
    if model.policy.is_recurrent:
        rows = [np.array([i]) for i in range(len(branches))]
        starts = {i: branch.states for i, branch in enumerate(branches)}
        states = plan_states([Segment(-1, row, row) for row in rows], model.device, starts, range(len(branches)))
    return TreePlan(model.policy.rules, by_window, states=states)


def _finish(sequence: _Sequence, version: int, prompts: Sequence[DistinctPrompt], prefilled: Prefilled) -> Completion:
    """The completion of a finished request; its session keeps the turn."""
    assert sequence.last_branch is not None
    sampled = Sampled(
        token_ids=np.array(sequence.token_ids, dtype=np.int64),
        logprobs=np.array(sequence.logprobs, dtype=np.float32),
        supports=sequence.supports,
        stop=sequence.stop,
        is_stopped=sequence.is_stopped,
        slots=np.array(sequence.last_branch.slots, dtype=np.int64),
        states=sequence.last_branch.states,
    )
    prompt = sequence.prompt
    return finish(sequence.request, version, prompts[prompt], prefilled.slots[prompt], sampled)


class _SharedChain:
    """Splits each prompt for decoding: its leading segments are read in blocks that several rows share, the rest is
    read by each row for itself."""

    def __init__(
        self, prompts: Sequence[DistinctPrompt], segments: Sequence[Segment], request_prompt: Sequence[int]
    ) -> None:
        requests_below = [0] * len(segments)
        for number in request_prompt:
            segment = prompts[number].segment
            while segment >= 0:
                requests_below[segment] += 1
                segment = segments[segment].parent
        shared = shared_segments([s.parent for s in segments], [len(s.slots) for s in segments], requests_below)
        self._segments, self._depths = segments, depths(segments)
        self._members: dict[int, list[int]] = {i: [] for i in range(len(segments)) if shared[i]}
        """Shared segment → indices of the prompts below it, ascending and contiguous."""
        self.private_slots: list[IntArray] = []
        """Per prompt, int64: the slots that no shared block covers."""
        for index, prompt in enumerate(prompts):
            private: list[IntArray] = []
            segment = prompt.segment
            while segment >= 0:
                if shared[segment]:
                    self._members[segment].append(index)
                else:
                    private.append(segments[segment].slots)
                segment = segments[segment].parent
            self.private_slots.append(np.concatenate([np.empty(0, np.int64), *reversed(private)]))

    def blocks(
        self, row_prompts: Sequence[int], row_depths: IntArray, window: int | None, device: torch.device
    ) -> list[SharedBlock]:
        """The shared blocks for rows whose prompts are `row_prompts`, in ascending order, at depths `row_depths`."""
        blocks: list[SharedBlock] = []
        for segment, members in self._members.items():
            start, end = np.searchsorted(row_prompts, [members[0], members[-1] + 1])
            if start < end:
                slots, first_depth = self._segments[segment].slots, self._depths[segment]
                blocks += shared_blocks(int(start), slots, first_depth, row_depths[start:end], window, device)
        return blocks
