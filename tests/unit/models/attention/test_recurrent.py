"""Layers that carry a state give over a prefix tree what transformers' own forward gives for each sequence alone."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from support.families.loading import load_processor
from support.families.prompts import prompt_and_batch
from support.recurrent_models import EAGER, HALF, MODELS, TEXT, InDoublePrecision, text_model
from vlmrl.errors import ModelError
from vlmrl.models.attention import recurrent
from vlmrl.models.attention.layer_cache import LayerCache, State
from vlmrl.models.attention.plan import plan_tree
from vlmrl.models.attention.prefix_tree import Segment, build_tree, sort_key
from vlmrl.models.attention.recurrent import plan_states
from vlmrl.models.blocks import checkpoint_blocks
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy
from vlmrl.types import IntArray, Prompt, mm_token_type_ids

CPU = torch.device("cpu")
TOLERANCE = 1e-8
"""Absolute for logprobs, relative for gradients, in float64. In float32 rounding alone moves the gradients of a gated
delta net's decay by 1e-4: their terms cancel."""

Sizes = tuple[int, Sequence[int]]
"""Length of a prefix, and of the branches after it."""

TREES: dict[str, Sizes] = {
    "prefixes shorter than a convolution": (2, (1, 1, 2, 3)),
    "one token": (1, (1, 5)),
    "a chunk less one": (63, (1, 2, 5)),
    "a chunk": (64, (1, 64, 5)),
    "a chunk and one": (65, (5, 70, 130)),
    "three chunks": (200, (3, 3, 3)),
}


def sequences_of(sizes: Sizes) -> list[IntArray]:
    """Sequences with a common prefix, each of whose branches forks again before its last token; and one other."""
    random = np.random.default_rng(0)
    prefix = random.integers(3, 60, sizes[0])
    found = [random.integers(3, 60, 7)]
    for branch, length in enumerate(sizes[1]):
        middle = random.integers(3, 60, length)
        middle[0] = 3 + branch
        found += [np.concatenate([prefix, middle, [token]]) for token in (61, 62)]
    return sorted(found, key=sort_key)


def by_tree(policy: Policy, sequences: Sequence[IntArray], *, share: bool = True) -> list[Tensor]:
    """Logprobs [L, vocabulary] of each sequence, of one pass over all of them."""
    tree = build_tree(sequences, share=share)
    ids, at = np.empty(tree.num_rows, np.int64), np.empty(tree.num_rows, np.int64)
    for sequence, rows in zip(sequences, tree.rows, strict=True):
        ids[rows], at[rows] = sequence, np.arange(len(sequence))
    segments = [Segment(p, np.arange(a, b), np.arange(a, b)) for p, a, b in tree.segments]
    hidden = policy.hidden_states(
        torch.from_numpy(ids),
        torch.from_numpy(np.stack([at] * 4)),
        torch.zeros(tree.num_rows, dtype=torch.int64),
        plan_tree(segments, CPU),
        None,
        torch.empty(0, dtype=torch.int64),
    )
    logprobs = policy.model.lm_head(hidden).log_softmax(-1)
    return [logprobs[torch.from_numpy(rows)] for rows in tree.rows]


def one_by_one(model: Any, sequences: Sequence[IntArray]) -> list[Tensor]:
    return [
        model(input_ids=torch.from_numpy(each)[None], use_cache=False).logits[0].log_softmax(-1) for each in sequences
    ]


def gradients(model: Any, logprobs: Sequence[Tensor], sequences: Sequence[IntArray]) -> dict[str, Tensor]:
    """Of a sum of logprobs with different weights, by parameter."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for number, (each, sequence) in enumerate(zip(logprobs, sequences, strict=True)):
        chosen = each[torch.arange(len(sequence) - 1), torch.from_numpy(sequence[1:])]
        total = total + (chosen * torch.linspace(-1, 1 + number, len(chosen), dtype=torch.float64)).sum()
    total.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(policy: Policy, model: Any, sequences: Sequence[IntArray], *, share: bool = True) -> None:
    """Assert that logprobs and gradients of a pass over all sequences are those of `model` for each."""
    with InDoublePrecision():
        mine, theirs = by_tree(policy, sequences, share=share), one_by_one(model, sequences)
        found, wanted = gradients(policy.model, mine, sequences), gradients(model, theirs, sequences)
    assert_same(mine, theirs, found, wanted)


def assert_same(
    mine: Sequence[Tensor], theirs: Sequence[Tensor], found: dict[str, Tensor], wanted: dict[str, Tensor]
) -> None:
    """Logprobs and gradients."""
    for ours, reference in zip(mine, theirs, strict=True):
        assert float((ours - reference).detach().abs().max()) <= TOLERANCE
    assert found.keys() == wanted.keys()
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        error = float((found[name] - gradient).norm())
        assert error <= TOLERANCE * max(float(gradient.norm()), 1e-3 * largest), f"gradient of {name}"


@pytest.mark.parametrize("sizes", TREES.values(), ids=TREES)
@pytest.mark.parametrize("name", MODELS)
def test_a_tree_gives_what_transformers_gives_one_by_one(name: str, sizes: Sizes) -> None:
    model = text_model(name)
    policy = Policy(copy.deepcopy(model), position_function("sequential"), [])
    assert policy.is_recurrent
    compare(policy, model, sequences_of(sizes))


@pytest.mark.parametrize("name", MODELS)
def test_sequences_side_by_side_do_not_see_each_other(name: str) -> None:
    model = text_model(name)
    policy = Policy(copy.deepcopy(model), position_function("sequential"), [])
    compare(policy, model, sequences_of((5, (1, 5, 70))), share=False)


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2"])
def test_layers_that_are_recomputed(name: str) -> None:
    """To the bit: in the backward pass they get the same plan again."""
    kept, recomputed = (Policy(text_model(name), position_function("sequential"), []) for _ in range(2))
    checkpoint_blocks(recomputed.model)
    sequences = sequences_of((5, (1, 5, 70)))
    found, wanted = (gradients(p.model, by_tree(p, sequences), sequences) for p in (recomputed, kept))
    assert all(bool((found[parameter] == gradient).all()) for parameter, gradient in wanted.items())


def test_a_policy_of_a_copied_model_and_a_second_policy_of_a_model() -> None:
    """A copy must not compute with the weights of the model that it was copied from."""
    model = text_model("qwen3_5_text")
    first = Policy(copy.deepcopy(model), position_function("sequential"), [])
    copied = copy.deepcopy(first.model)
    with torch.no_grad():
        for parameter in first.model.parameters():
            parameter.zero_()
    compare(Policy(copied, position_function("sequential"), []), model, sequences_of((5, (1, 5))))
    compare(Policy(copied, position_function("sequential"), []), model, sequences_of((5, (1, 5))))


def without_window(states: list[State]) -> list[State]:
    return [State({i: x * 0 for i, x in s.conv.items()}, s.recurrent) for s in states]


def without_state(states: list[State]) -> list[State]:
    return [State(s.conv, {i: x * 0 for i, x in s.recurrent.items()}) for s in states]


def without_gradient(states: list[State]) -> list[State]:
    return [State(s.conv, {i: x.detach() for i, x in s.recurrent.items()}) for s in states]


def of_another_branch(states: list[State]) -> list[State]:
    return states[::-1]


@pytest.mark.parametrize("broken", [without_window, without_state, without_gradient, of_another_branch])
def test_states_that_are_lost_are_seen(
    broken: Callable[[list[State]], list[State]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = text_model("qwen3_5_text")
    policy = Policy(copy.deepcopy(model), position_function("sequential"), [])
    after = LayerCache.after
    monkeypatch.setattr(LayerCache, "after", lambda cache: broken(after(cache)))
    with pytest.raises(AssertionError):
        compare(policy, model, sequences_of((5, (2, 2, 70))))


@pytest.mark.parametrize("broken", [without_window, without_state, without_gradient])
def test_a_layer_that_does_not_continue_from_its_state_is_refused(
    broken: Callable[[list[State]], list[State]], monkeypatch: pytest.MonkeyPatch
) -> None:
    after = LayerCache.after
    monkeypatch.setattr(LayerCache, "after", lambda cache: broken(after(cache)))
    with pytest.raises(ModelError, match=r"Qwen3_5GatedDeltaNet carries a state .* differs by"):
        Policy(text_model("qwen3_5_text"), position_function("sequential"), [])


@pytest.mark.parametrize(
    ("name", "more", "reason"),
    [
        ("mamba2", {"num_heads": 4, "state_size": 16, "n_groups": 1}, "inplace operation"),
        ("minimax", {"num_local_experts": 4, **HALF}, "does not hand its state to transformers' cache"),
    ],
)
def test_other_recurrent_layers_are_refused(name: str, more: dict[str, Any], reason: str) -> None:
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(name, **TEXT, **more)).double().eval()
    with pytest.raises(ModelError, match=reason):
        Policy(model, position_function("sequential"), [])


def test_pieces_of_equal_length_share_a_call() -> None:
    """Two prompts of 130 and 70 tokens, the first with three branches of 3 tokens."""
    lengths, parents = (130, 3, 3, 3, 70), (-1, 0, 0, 0, -1)
    ends = np.cumsum(lengths)
    rows = [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    plan = plan_states([Segment(p, r, r) for p, r in zip(parents, rows, strict=True)], CPU)
    calls = [[len(plan.pieces[i].rows) for i in group] for group in plan.groups]
    assert calls == [[64], [128], [2], [6], [3, 3, 3]]
    assert sorted(plan.order.tolist()) == list(range(209))
    assert plan.order[plan.inverse].tolist() == list(range(209))


FAMILIES = ["qwen3_5", "qwen3_5_moe"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_with_images_in_pieces(
    family_folder: Callable[[str], Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The family's own checkpoint and processor; the prompt is cut at every border of a piece."""
    monkeypatch.setattr(recurrent, "WHOLE_CHUNKS", 8)
    folder = family_folder(name)
    auto: Any = AutoModelForImageTextToText
    model, other = (auto.from_pretrained(folder, **EAGER).double().eval() for _ in range(2))
    prompt, batch = prompt_and_batch(name, load_processor(folder), model.config.image_token_id)
    policy = Policy(model, position_function("mrope", model.config.vision_config.spatial_merge_size), [])
    with InDoublePrecision():
        mine = [policy.model.lm_head(hidden_of(policy, prompt)).log_softmax(-1)]
        theirs = [other(**batch).logits[0].log_softmax(-1)]
        found, wanted = (gradients(m, each, [prompt.token_ids]) for m, each in ((model, mine), (other, theirs)))
    assert_same(mine, theirs, found, wanted)


def hidden_of(policy: Policy, prompt: Prompt) -> Tensor:
    length = len(prompt.token_ids)
    features = policy.encode_items(prompt.images)
    assert features is not None
    shown = [np.arange(features.first[i.hash], features.first[i.hash] + i.num_tokens) for i in prompt.images]
    return policy.hidden_states(
        torch.from_numpy(prompt.token_ids),
        torch.from_numpy(policy.positions(length, prompt.placeholders, prompt.mm_items)),
        torch.from_numpy(mm_token_type_ids(length, prompt.placeholders)),
        plan_tree([Segment(-1, np.arange(length), np.arange(length))], CPU),
        features,
        torch.from_numpy(np.concatenate(shown)),
    )


def test_kernels_of_a_package_compute_what_they_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-linear-attention refuses float32 and has no gradient for single tokens."""
    sequences = sequences_of(TREES["one token"])
    policy = Policy(text_model("qwen3_5_text").bfloat16(), position_function("sequential"), [])
    expected = by_tree(policy, sequences)
    code = sys.modules[Qwen3_5GatedDeltaNet.__module__]
    lengths: list[int] = []

    def kernel_for(reference: Any) -> Any:
        @functools.wraps(reference)
        def kernel(query: Tensor, *args: Any, **kwargs: Any) -> Any:
            assert query.dtype is torch.bfloat16
            assert query.shape[1] > 1
            lengths.append(query.shape[1])
            return reference(query, *args, **kwargs)

        return kernel

    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        function = getattr(code, name)
        monkeypatch.setattr(code, name, kernel_for(getattr(function, "_reference", function)))
    by_tree(Policy(text_model("qwen3_5_text").float(), position_function("sequential"), []), sequences)
    assert not lengths
    found = by_tree(Policy(text_model("qwen3_5_text").bfloat16(), position_function("sequential"), []), sequences)
    assert lengths
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_heads_that_forget_fast_lose_no_digits() -> None:
    """In a chunk whose decays sum to -480, float32 sums would give those near 1 an error of 1e-5. What is
    left, up to 1.1e-6 by processor, is the rounding of the values themselves."""
    policy = Policy(text_model("qwen3_5_text").float(), position_function("sequential"), [])
    assert policy.is_recurrent  # the functions of transformers' module are wrapped
    rule = sys.modules[Qwen3_5GatedDeltaNet.__module__].torch_chunk_gated_delta_rule
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 64, 2, 16, generator=generator)
    beta = torch.rand(1, 64, 2, generator=generator)
    decay = torch.where(torch.arange(64) < 40, -12.0, -0.01)[None, :, None].expand(1, 64, 2)
    found, _ = rule(query, key, value, g=decay, beta=beta)
    plain, _ = rule._reference(query, key, value, g=decay, beta=beta)
    with InDoublePrecision():
        exact, _ = rule._reference(*(x.double() for x in (query, key, value)), g=decay.double(), beta=beta.double())
    after = slice(41, None)
    errors = [float((x - exact)[:, after].norm() / exact[:, after].norm()) for x in (found, plain)]
    assert errors[0] < 2e-6 < 5e-6 < errors[1], errors
