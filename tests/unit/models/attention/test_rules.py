"""Windows, soft caps and attention among an image's tokens: against dense attention in float64, on random trees."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from support import attention_kinds as kinds
from support.attention_trees import (
    CPU,
    DIM,
    HEADS,
    KV_HEADS,
    MODULE,
    THRESHOLDS,
    Tree,
    assert_close,
    attend,
    dense,
    noise,
    plan_of,
    trees,
)
from support.helpers import blocks_of, seen
from vlmrl.errors import ModelError
from vlmrl.models.attention import fused as fused_attention
from vlmrl.models.attention import plan as plan_module
from vlmrl.models.attention import plan as tree_plan
from vlmrl.models.attention.fused import Kernel, Sequences
from vlmrl.models.attention.plan import KVPool, make_plan, plan_tree
from vlmrl.models.attention.prefix_tree import ImageKeys, Segment, image_ends
from vlmrl.models.attention.rules import CAUSAL, MASK_NAME, AttentionRule, AttentionRules, attention_rules
from vlmrl.models.attention.tree import tree_attention_forward
from vlmrl.types import Placeholder

RULES = st.builds(AttentionRule, st.sampled_from([None, 1, 2, 3, 5, 8, 20]), st.booleans())


@pytest.fixture(autouse=True)
def no_pass_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention for the few rows of these tests, too."""
    monkeypatch.setattr(plan_module, "SHORT_PASS_ROWS", 0)


@st.composite
def image_trees(draw: st.DrawFn, pool: bool = False) -> tuple[list[Segment], NDArray[np.int64], int]:
    """Segments with images at any places in them, the token types per slot, and the first slot of the rows."""
    tree: Tree = draw(trees(pool))
    segments, first_slot = tree.segments()
    types = np.zeros(sum(tree.lengths), np.int64)
    for i, segment in enumerate(segments):
        length = len(segment.slots)
        own = np.array(draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)), np.int64)
        if segment.parent >= 0:
            own[0] = 0  # no branch begins inside an image
        types[segment.slots] = own
        segments[i] = replace(segment, image_ends=image_ends(own))
    return segments, types, first_slot


def visible_pairs(segments: list[Segment], types: NDArray[np.int64], rule: AttentionRule) -> NDArray[np.int64]:
    """int64 [rows, slots]; 1 where the row sees the slot: branch by branch, token by token, from the definition."""
    mask = np.zeros((sum(len(s.rows) for s in segments), sum(len(s.slots) for s in segments)), np.int64)
    for segment in segments:
        chain = [segment]
        while chain[0].parent >= 0:
            chain.insert(0, segments[chain[0].parent])
        branch = [int(slot) for part in chain for slot in part.slots]
        image = [0]
        """The number of text tokens so far: two image tokens are of one run where it is equal."""
        for slot in branch:
            image.append(image[-1] + (types[slot] == 0))
        for i, row in enumerate(segment.rows):
            q = len(branch) - len(segment.slots) + i
            for k, slot in enumerate(branch):
                same_run = types[branch[q]] == types[slot] == 1 and image[q] == image[k]
                causal = k <= q or (rule.image_runs and same_run)
                mask[row, slot] = causal and (rule.window is None or k > q - rule.window)
    return mask


@settings(max_examples=300)
@given(
    image_trees(pool=True),
    st.lists(RULES, min_size=1, max_size=3, unique_by=lambda rule: rule.window),
    st.sampled_from(THRESHOLDS),
    st.integers(1, 9),
)
def test_blocks_cover_each_visible_pair_once(
    drawn: tuple[list[Segment], NDArray[np.int64], int], rules: list[AttentionRule], threshold: int, piece: int
) -> None:
    segments, types, _ = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_plan, "MIN_WINDOWED_ROWS", piece)
        plan = plan_of(segments, threshold, AttentionRules(tuple(rules)))
    for rule in rules:
        mask = visible_pairs(segments, types, rule)
        np.testing.assert_array_equal(seen(plan, len(mask), mask.shape[1], rule.window), mask)


@settings(max_examples=100)
@given(
    image_trees(),
    RULES,
    st.sampled_from(THRESHOLDS),
    st.integers(0, 2**32),
    st.sampled_from([None, 0.7, 3.0]),
)
def test_output_and_gradients_are_those_of_dense_attention(
    drawn: tuple[list[Segment], NDArray[np.int64], int],
    rule: AttentionRule,
    threshold: int,
    seed: int,
    softcap: float | None,
) -> None:
    segments, types, _ = drawn
    mask = torch.from_numpy(visible_pairs(segments, types, rule))
    length = len(mask)
    inputs = [noise(seed + i, heads, length, DIM) * 2 for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))]
    grad = noise(seed + 3, HEADS, length, DIM)
    found = [x.clone().requires_grad_() for x in inputs]
    plan = plan_of(segments, threshold, AttentionRules((rule,)))
    out = attend(plan, *found, sliding_window=rule.window, softcap=softcap)
    out.backward(grad)  # type: ignore[no-untyped-call]
    wanted = [x.double().requires_grad_() for x in inputs]
    reference = dense(mask, *wanted, softcap=softcap)
    reference.backward(grad.double())  # type: ignore[no-untyped-call]
    assert_close(out, reference, 1e-5)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert_close(mine.grad, theirs.grad, 3e-6, terms=float(grad.norm()))


@settings(max_examples=60)
@given(image_trees(pool=True), RULES, st.sampled_from(THRESHOLDS), st.integers(0, 2**32))
def test_rows_see_the_keys_in_the_pool(
    drawn: tuple[list[Segment], NDArray[np.int64], int], rule: AttentionRule, threshold: int, seed: int
) -> None:
    segments, types, first_slot = drawn
    mask = visible_pairs(segments, types, rule)
    rows, slots = mask.shape
    q, k, v = (noise(seed + i, heads, n, DIM) for i, (heads, n) in enumerate([(HEADS, rows), *[(KV_HEADS, slots)] * 2]))
    pool = KVPool(slots)
    pool.write(0, 0, k[:, :first_slot], v[:, :first_slot])
    plan = replace(plan_of(segments, threshold, AttentionRules((rule,))), pool=pool, first_slot=first_slot)
    with torch.no_grad():
        out = attend(plan, q, k[:, first_slot:], v[:, first_slot:], sliding_window=rule.window)
    assert_close(out, dense(torch.from_numpy(mask), q.double(), k.double(), v.double()))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=40)
@given(image_trees(), RULES, st.integers(0, 2**32), st.sampled_from([None, 0.7]))
def test_flex_attention_is_dense_attention(
    drawn: tuple[list[Segment], NDArray[np.int64], int], rule: AttentionRule, seed: int, softcap: float | None
) -> None:
    segments, types, _ = drawn
    mask = torch.from_numpy(visible_pairs(segments, types, rule))
    q, k, v = (noise(seed + i, heads, len(mask), DIM) for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))
    plan = make_plan(Kernel.flex, segments, CPU, AttentionRules((rule,)))
    out = attend(plan, q, k, v, sliding_window=rule.window, softcap=softcap)
    torch.testing.assert_close(out, dense(mask, q, k, v, softcap=softcap), atol=1e-5, rtol=1e-4)


@settings(max_examples=100)
@given(image_trees(), RULES, st.sampled_from([2, 4]))
def test_flex_blocks_are_those_that_hold_a_visible_pair(
    drawn: tuple[list[Segment], NDArray[np.int64], int], rule: AttentionRule, size: int
) -> None:
    segments, types, _ = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_attention, "FLEX_BLOCK", size)
        mask: Any = make_plan(Kernel.flex, segments, CPU, AttentionRules((rule,))).by_window[rule.window]
    pairs = visible_pairs(segments, types, rule) > 0
    blocks = -(-len(pairs) // size)
    pad = (0, blocks * size - len(pairs))
    tiles, counts = (
        np.pad(x, pad).reshape(blocks, size, blocks, size).sum((1, 3)) for x in (pairs, np.ones_like(pairs))
    )
    partial, whole = (
        {(q, int(k)) for q in range(blocks) for k in indices[0, 0, q, : int(number[0, 0, q])]}
        for number, indices in (
            (mask.kv_num_blocks, mask.kv_indices),
            (mask.full_kv_num_blocks, mask.full_kv_indices),
        )
    )
    assert not partial & whole
    assert {(q, k) for q, k in zip(*np.nonzero(tiles), strict=True)} <= partial | whole
    assert all(tiles[block] == counts[block] for block in whole)


class Layer(torch.nn.Module):
    """An attention layer as transformers writes it."""

    def __init__(self, index: int, window: int | None) -> None:
        super().__init__()
        self.layer_idx, self.sliding_window, self.is_causal = index, window, True

    def forward(self, q: Tensor, softcap: float | None, **given: Any) -> Tensor:
        window = self.sliding_window
        return tree_attention_forward(self, q, q, q, None, 0.3, sliding_window=window, softcap=softcap, **given)[0]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_compiled_layers_are_compiled_once_per_window() -> None:
    """Not once per layer or size, and without a break in the graph."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    layers = [Layer(i, 3 if i % 2 else None) for i in range(6)]
    for layer in layers:
        layer.compile(backend=counter, dynamic=True, fullgraph=True)
    rules = AttentionRules((AttentionRule(), AttentionRule(3, image_runs=True)) * 3)
    for softcap, compiled in ((None, 2), (0.7, 4)):
        for lengths in ((4, 3, 5), (6, 2, 9), (16, 3, 7)):
            plan = make_plan(Kernel.flex, chain(*lengths), CPU, rules)
            q = noise(0, 1, HEADS, sum(lengths), DIM)
            for layer in layers:
                out = layer(q, softcap, tree_plan=plan, position_ids=torch.arange(sum(lengths))[None])
                options: dict[str, Any] = {"sliding_window": layer.sliding_window, "softcap": softcap}
                module: Any = SimpleNamespace(layer_idx=layer.layer_idx)
                plain = tree_attention_forward(module, q, q, q, None, 0.3, tree_plan=plan, **options)[0]
                torch.testing.assert_close(out, plain)
        assert counter.frame_count == compiled


def chain(*lengths: int) -> list[Segment]:
    """A prefix and branches that all begin at its end."""
    bounds = np.cumsum([0, *lengths])
    return [
        Segment(min(i, 1) - 1, np.arange(a, b), np.arange(a, b), image_ends(np.zeros(b - a, np.int64)))
        for i, (a, b) in enumerate(pairwise(bounds))
    ]


def test_a_prefix_outside_every_window_makes_no_block_and_a_short_tree_shares_the_blocks() -> None:
    rules = AttentionRules((AttentionRule(64), AttentionRule(), AttentionRule(8192)))
    segments = chain(4000, 300, 300)
    plan = plan_tree(segments, CPU, rules)
    assert blocks_of(plan, 8192) is blocks_of(plan)
    assert [(len(b.slots), b.mask is None) for b in blocks_of(plan).shared] == [(4000, True)]
    (near,) = blocks_of(plan, 64).shared
    assert len(near.slots) == 63, "rows further down see fewer of the 63 tokens before the branch"
    assert near.mask is not None
    assert near.mask.sum(1)[:65].tolist() == [*range(63, -1, -1), 0]
    work = [sum(block.mask.numel() for block in blocks_of(plan, window).local) for window in (None, 64)]
    assert work[0] > 10 * work[1]
    deep = chain(4000, 300)
    deep += [Segment(1, np.arange(4300, 4600), np.arange(4300, 4600))]
    plan = plan_tree(deep, CPU, AttentionRules((AttentionRule(64),)))
    assert [len(b.slots) for b in blocks_of(plan, 64).shared] == [63, 63]


def test_varlen_takes_windows_and_refuses_images() -> None:
    segments = [Segment(-1, np.arange(5), np.arange(5))]
    plan = make_plan(Kernel.varlen, segments, CPU, AttentionRules((AttentionRule(3), AttentionRule())))
    found = {window: each.window for window, each in plan.by_window.items() if isinstance(each, Sequences)}
    assert found == {3: 3, None: None}
    with pytest.raises(AssertionError, match="tokens of an image"):
        make_plan(Kernel.varlen, segments, CPU, AttentionRules((AttentionRule(image_runs=True),)))


def test_images_side_by_side_are_one_image_to_the_tree() -> None:
    """transformers lets their tokens attend to each other, so the first image depends on the second."""
    keys = ImageKeys()
    ids = np.array([7, 0, 0, 0, 0, 8])
    pair, other, apart = (
        keys.keys(ids, (Placeholder(1, 2, first), Placeholder(start, length, second)))
        for first, start, length, second in (("a", 3, 2, "b"), ("a", 3, 2, "c"), ("a", 4, 1, "b"))
    )
    assert (pair[:2] != other[:2]).tolist() == [False, True]
    assert len(set(pair[1:5])) == 1
    assert apart[1:5].tolist() == [apart[1], apart[1], 0, apart[4]]
    np.testing.assert_array_equal(pair, keys.keys(ids, (Placeholder(1, 2, "a"), Placeholder(3, 2, "b"))))


# ── what a layer may ask for ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ({"s_aux": torch.zeros(2)}, r"s_aux \(attention sinks\)"),
        ({"is_causal": False}, "is_causal"),
        ({"head_mask": torch.ones(2)}, "head_mask"),
        ({"position_bias": torch.ones(2), "indices": torch.ones(2)}, "indices, position_bias"),
        ({"sliding_window": 3}, "sliding_window=3"),
    ],
)
def test_an_argument_that_would_be_ignored_is_refused(argument: dict[str, Any], named: str) -> None:
    q = noise(0, 2, 5, DIM)
    plan = plan_tree([Segment(-1, np.arange(5), np.arange(5))], CPU)
    with pytest.raises(ModelError, match=f"SimpleNamespace calls attention with {named}"):
        attend(plan, q, q, q, **argument)
    harmless: dict[str, Any] = {"is_causal": True, "output_attentions": False, "head_mask": None, "position_ids": q}
    torch.testing.assert_close(attend(plan, q, q, q, **harmless), attend(plan, q, q, q), rtol=0, atol=0)


def test_a_window_that_differs_from_the_layers_mask_is_refused() -> None:
    q = noise(0, 2, 5, DIM)
    segments = [Segment(-1, np.arange(5), np.arange(5))]
    plan = plan_tree(segments, CPU, AttentionRules((AttentionRule(3), AttentionRule())))
    attend(plan, q, q, q, sliding_window=3)
    with pytest.raises(ModelError, match="sliding_window=None, but the model's own mask"):
        attend(plan, q, q, q)


def test_a_bidirectional_layer_is_refused() -> None:
    q = noise(0, 1, 2, 5, DIM)
    plan = plan_tree([Segment(-1, np.arange(5), np.arange(5))], CPU, CAUSAL)
    module: Any = type("Encoder", (), {"is_causal": False, "layer_idx": MODULE.layer_idx})()
    with pytest.raises(ModelError, match="Encoder calls attention with is_causal"):
        tree_attention_forward(module, q, q, q, None, tree_plan=plan)


# ── the rules of a model ────────────────────────────────────────────────────────────────────────────────────

FULL, SEEN = AttentionRule(), AttentionRule(image_runs=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gemma2", [AttentionRule(5), FULL] * 2),
        ("gemma3_text", [AttentionRule(5), FULL] * 2),
        ("gemma3", [AttentionRule(5, image_runs=True), SEEN] * 2),
        ("gemma4", [AttentionRule(5), FULL] * 2),
        ("gemma4_vision", [AttentionRule(5, image_runs=True), FULL] * 2),
        ("mistral", [AttentionRule(5)]),
        ("qwen2", [FULL, FULL, AttentionRule(5), AttentionRule(5)]),
        ("granite", [FULL]),
    ],
)
def test_rules_are_read_off_the_models_own_masks(name: str, expected: list[AttentionRule]) -> None:
    """Expected: what the modeling files of transformers 5.19 say."""
    class_name, config = kinds.MODELS[name]
    rules = attention_rules(getattr(transformers, class_name), config(5))
    assert list(rules.layers) == expected
    assert rules.image_runs == (name in ("gemma3", "gemma4_vision"))
    assert config(5).get_text_config()._attn_implementation != MASK_NAME


class Doubtful:
    """Masks that no rule describes."""

    shown: Any = None

    @classmethod
    def create_masks_for_generate(cls, config: Any, inputs_embeds: Any, **_: Any) -> Any:
        shown = cls.shown
        function = lambda batch, head, query, key: shown(query, key)  # noqa: E731
        return ALL_MASK_ATTENTION_FUNCTIONS[MASK_NAME](mask_function=function)


@pytest.mark.parametrize(
    ("shown", "verb"),
    [
        (lambda q, k: q // 16 == k // 16, "shows"),
        (lambda q, k: (k <= q) & (k != 3), "hides token 3"),
        (lambda q, k: (k <= q) | ((q < 9) & (k < 9)), "shows token"),
        (lambda q, k: (k <= q) & ((k == 0) | (k > q - 5)), "hides|shows"),
    ],
)
def test_a_mask_that_no_rule_describes_is_refused(shown: Any, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Doubtful, "shown", staticmethod(shown))
    with pytest.raises(ModelError, match=rf"Doubtful masks attention .* its mask ({verb})"):
        attention_rules(Doubtful, kinds.MODELS["granite"][1](5))


def test_layers_without_a_mask_of_their_own_are_refused() -> None:
    config = kinds.MODELS["granite"][1](5)
    config.layer_types = ["full_attention", "wheels"] * 2
    with pytest.raises(ModelError, match="does not know its layers, of type full_attention, wheels"):
        attention_rules(transformers.GraniteForCausalLM, config)
    config.layer_types = ["full_attention", "hybrid"] * 2
    with pytest.raises(ModelError, match="layers of type 'hybrid', for which its mask function makes no mask"):
        attention_rules(transformers.GraniteForCausalLM, config)
