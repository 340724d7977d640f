"""Tree attention against a dense masked softmax in float64: output, every gradient, and what each block covers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.attention_trees import (
    CPU,
    DIM,
    HEADS,
    KV_HEADS,
    THRESHOLDS,
    Tree,
    assert_close,
    attend,
    dense,
    dense_mask,
    noise,
    plan_of,
    trees,
)
from support.helpers import blocks_of, seen
from vlmrl.errors import ModelError
from vlmrl.models.attention import fused as fused_attention
from vlmrl.models.attention import plan as plan_module
from vlmrl.models.attention.fused import Kernel, Sequences, plan_flex
from vlmrl.models.attention.plan import KVPool, make_plan, plan_tree
from vlmrl.models.attention.prefix_tree import Segment, image_ends
from vlmrl.models.attention.rules import AttentionRule, AttentionRules


@pytest.fixture(autouse=True)
def no_pass_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention for the few rows of these tests, too."""
    monkeypatch.setattr(plan_module, "SHORT_PASS_ROWS", 0)


@given(trees(pool=True), st.sampled_from(THRESHOLDS))
def test_blocks_cover_each_row_and_its_ancestors_exactly_once(tree: Tree, threshold: int) -> None:
    segments, _ = tree.segments()
    plan = plan_of(segments, threshold)
    mask = dense_mask(segments)
    np.testing.assert_array_equal(seen(plan, *mask.shape), mask)


@settings(max_examples=60)
@given(trees(), st.sampled_from(THRESHOLDS), st.integers(0, 2**32), st.sampled_from([1.0, 6.0]))
def test_output_and_gradients_are_those_of_dense_attention(
    tree: Tree, threshold: int, seed: int, sharpness: float
) -> None:
    segments, _ = tree.segments()
    length = sum(tree.lengths)
    mask = torch.from_numpy(dense_mask(segments))
    inputs = [noise(seed + i, heads, length, DIM) * sharpness for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))]
    grad = noise(seed + 3, HEADS, length, DIM)
    found = [x.clone().requires_grad_() for x in inputs]
    out = attend(plan_of(segments, threshold), *found)
    out.backward(grad)  # type: ignore[no-untyped-call]
    wanted = [x.double().requires_grad_() for x in inputs]
    reference = dense(mask, *wanted)
    reference.backward(grad.double())  # type: ignore[no-untyped-call]
    # The rounding error of a score is proportional to the size of q · k.
    assert_close(out, reference, 3e-6 * sharpness**2)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert_close(mine.grad, theirs.grad, 3e-6 * sharpness**2, terms=sharpness)


@settings(max_examples=60)
@given(trees(pool=True), st.sampled_from(THRESHOLDS), st.integers(0, 2**32))
def test_rows_see_the_keys_that_earlier_passes_left_in_the_pool(tree: Tree, threshold: int, seed: int) -> None:
    segments, first_slot = tree.segments()
    mask = dense_mask(segments)
    rows, slots = mask.shape
    q, k, v = (
        noise(seed, HEADS, rows, DIM),
        noise(seed + 1, KV_HEADS, slots, DIM),
        noise(seed + 2, KV_HEADS, slots, DIM),
    )
    # The pool is larger than its content; the unused slots hold NaN.
    pool = KVPool(slots + 5)
    empty = torch.full((KV_HEADS, slots + 5, DIM), torch.nan)
    pool.calls[0] = empty, empty.clone()
    pool.write(0, 0, k[:, :first_slot], v[:, :first_slot])
    plan = replace(plan_of(segments, threshold), pool=pool, first_slot=first_slot)
    with torch.no_grad():
        out = attend(plan, q, k[:, first_slot:], v[:, first_slot:])
    assert_close(out, dense(torch.from_numpy(mask), q.double(), k.double(), v.double()))
    keys, values = pool.calls[0]
    torch.testing.assert_close(keys[:, :slots], k, rtol=0, atol=0)
    torch.testing.assert_close(values[:, :slots], v, rtol=0, atol=0)
    assert bool(keys[:, slots:].isnan().all())


GROUPS = Tree(
    # A system prompt of 300, four problems of 60 below it, eight answers of 5 to 12 below each.
    parents=(-1, *[p for g in range(4) for p in (0, *[1 + 9 * g] * 8)]),
    lengths=(300, *[n for g in range(4) for n in (60, *range(5, 13))]),
    cached=(False,) * 37,
)


@pytest.mark.parametrize("lengths", [[200_000], [30_000, 30_000], [40_000, 30_000]])
def test_a_mask_that_no_memory_holds_is_refused_before_it_is_made(lengths: list[int]) -> None:
    """One long sequence, two that are padded to one block, and a long prefix with a long rest."""
    segments: list[Segment] = []
    first = 0
    for length in lengths:
        rows = np.arange(first, first + length)
        segments.append(Segment(0 if segments and lengths[0] == 40_000 else -1, rows, rows))
        first += length
    with pytest.raises(ModelError, match=r"attention of \d × [\d,]+ tokens to [\d,]+ tokens .* lower trainer\.seq_len"):
        plan_tree(segments, torch.device("cpu"))


def test_a_long_sequence_that_fits_is_planned() -> None:
    rows = np.arange(4096)
    assert len(blocks_of(plan_tree([Segment(-1, rows, rows)], torch.device("cpu"))).local) == 1


def test_a_group_of_rollouts_shares_its_prompt_at_the_default_threshold() -> None:
    segments, _ = GROUPS.segments()
    plan = blocks_of(plan_tree(segments, CPU))
    assert [len(block.slots) for block in plan.shared] == [300]
    assert [(block.start, block.end) for block in plan.shared] == [(300, sum(GROUPS.lengths))]
    lower = blocks_of(plan_of(segments, 4000))
    assert [len(block.slots) for block in lower.shared] == [300, 60, 60, 60, 60]
    work = [sum(block.mask.numel() for block in p.local) for p in (blocks_of(plan_of(segments, 10**9)), plan, lower)]
    assert work[0] > 2 * work[1] > 2 * work[2]


@pytest.mark.parametrize("threshold", [4000, 16384])
def test_bfloat16_is_as_exact_as_its_inputs(threshold: int) -> None:
    segments, _ = GROUPS.segments()
    mask = torch.from_numpy(dense_mask(segments))
    length = len(mask)
    inputs = [noise(i, heads, length, DIM).bfloat16() for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))]
    found = [x.clone().requires_grad_() for x in inputs]
    wanted = [x.double().requires_grad_() for x in inputs]
    grad = noise(5, HEADS, length, DIM).bfloat16()
    out, reference = attend(plan_of(segments, threshold), *found), dense(mask, *wanted)
    out.backward(grad)  # type: ignore[no-untyped-call]
    reference.backward(grad.double())  # type: ignore[no-untyped-call]
    assert out.dtype is torch.bfloat16
    assert_close(out, reference, 1e-2)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert_close(mine.grad, theirs.grad, 2e-2)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_gradients_are_finite_where_scores_span_more_than_float32(threshold: int) -> None:
    """Row 0 has a score of -250, a later row of its path one of +250; the shorter path next to it is padded."""
    segments, _ = Tree((-1, -1), (3, 2), (False, False)).segments()
    q = torch.ones(HEADS, 5, DIM).requires_grad_()
    k = (torch.ones(KV_HEADS, 5, DIM) * torch.tensor([-1, 0, 1, -1, 1])[:, None] * 104).requires_grad_()
    v = noise(0, KV_HEADS, 5, DIM).requires_grad_()
    attend(plan_of(segments, threshold), q, k, v).sum().backward()  # type: ignore[no-untyped-call]
    assert all(x.grad is not None and bool(x.grad.isfinite().all()) for x in (q, k, v))


def test_a_row_does_not_depend_on_another_branch() -> None:
    """Not even by values there that are not finite, which a padded or masked key would spread."""
    tree = Tree((-1, 0, 0), (4, 3, 2), (False,) * 3)
    segments, _ = tree.segments()
    q, k, v = noise(0, HEADS, 9, DIM), noise(1, KV_HEADS, 9, DIM), noise(2, KV_HEADS, 9, DIM)
    for threshold in THRESHOLDS:
        plan = plan_of(segments, threshold)
        before = attend(plan, q, k, v)
        poisoned_k, poisoned_v = k.clone(), v.clone()
        poisoned_k[:, 4:7], poisoned_v[:, 4:7] = torch.inf, torch.nan
        after = attend(plan, q, poisoned_k, poisoned_v)
        torch.testing.assert_close(after[:, :4], before[:, :4], rtol=0, atol=0)
        torch.testing.assert_close(after[:, 7:], before[:, 7:], rtol=0, atol=0)
        assert bool(after[:, 4:7].isnan().all())


@settings(max_examples=60)
@given(trees(), st.sampled_from([2, 4, 128]))
def test_flex_blocks_are_those_that_hold_a_visible_pair(tree: Tree, size: int) -> None:
    segments, _ = tree.segments()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_attention, "FLEX_BLOCK", size)
        mask = plan_flex(segments, CPU, AttentionRule())
    pairs = dense_mask(segments) > 0
    blocks = -(-len(pairs) // size)
    padded = np.pad(pairs, (0, blocks * size - len(pairs)))
    inside = np.pad(np.ones_like(pairs), (0, blocks * size - len(pairs)))
    tiles, counts = (x.reshape(blocks, size, blocks, size).sum((1, 3)) for x in (padded, inside))
    partial, whole = (
        {(q, int(k)) for q in range(blocks) for k in indices[0, 0, q, : int(number[0, 0, q])]}
        for number, indices in (
            (mask.kv_num_blocks, mask.kv_indices),
            (mask.full_kv_num_blocks, mask.full_kv_indices),
        )
        if number is not None and indices is not None
    )
    assert not partial & whole
    assert {(q, k) for q, k in zip(*np.nonzero(tiles), strict=True)} <= partial | whole
    assert all(tiles[block] == counts[block] for block in whole)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=30)
@given(trees(), st.integers(0, 2**32))
def test_flex_attention_is_dense_attention(tree: Tree, seed: int) -> None:
    segments, _ = tree.segments()
    length = sum(tree.lengths)
    q, k, v = (noise(seed + i, heads, length, DIM) for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))
    expected = dense(torch.from_numpy(dense_mask(segments)), q, k, v)
    torch.testing.assert_close(attend(make_plan(Kernel.flex, segments, CPU), q, k, v), expected, atol=1e-5, rtol=1e-4)


@settings(max_examples=30)
@given(trees(), st.sampled_from(THRESHOLDS), st.integers(0, 2**32))
def test_bfloat16_rounds_inputs_and_output_only(tree: Tree, threshold: int, seed: int) -> None:
    segments, _ = tree.segments()
    length = sum(tree.lengths)
    q, k, v = (noise(seed + i, heads, length, DIM).bfloat16() for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS)))
    plan = plan_of(segments, threshold)
    expected = attend(plan, q.float(), k.float(), v.float()).bfloat16()
    assert torch.equal(attend(plan, q, k, v), expected)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_varlen_plans_hold_the_bounds_of_the_sequences(lengths: list[int]) -> None:
    segments, _ = Tree((-1,) * len(lengths), tuple(lengths), (False,) * len(lengths)).segments()
    plan = make_plan(Kernel.varlen, segments, CPU).by_window[None]
    assert isinstance(plan, Sequences)
    assert plan.starts.dtype is torch.int32
    assert plan.starts.tolist() == np.concatenate([[0], np.cumsum(lengths)]).tolist()
    assert plan.longest == max(lengths)


def test_varlen_refuses_a_tree() -> None:
    segments, _ = Tree((-1, 0), (3, 2), (False, False)).segments()
    with pytest.raises(AssertionError, match="shared prefixes"):
        make_plan(Kernel.varlen, segments, CPU)


FULL = AttentionRule()


def agree_on_a_gpu(
    tree: Tree, kernel: Kernel, rule: AttentionRule = FULL, softcap: float | None = None, dim: int = 64
) -> None:
    """Output and gradients by `kernel` and by the blocks, in bfloat16. The second half of each segment is an image."""
    segments = [
        replace(segment, image_ends=image_ends((np.arange(len(segment.rows)) > len(segment.rows) // 2).astype(int)))
        for segment in tree.segments()[0]
    ]
    device, length = torch.device("cuda"), sum(tree.lengths)
    inputs = [noise(i, heads, length, dim) for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS, HEADS))]
    found = []
    for plan in (make_plan(each, segments, device, AttentionRules((rule,))) for each in (kernel, Kernel.blocks)):
        *qkv, grad = (x.to(device, torch.bfloat16) for x in inputs)
        leaves = [x.requires_grad_() for x in qkv]
        out = attend(plan, *leaves, sliding_window=rule.window, softcap=softcap)
        out.backward(grad)  # type: ignore[no-untyped-call]
        found.append([out.detach(), *(x.grad for x in leaves)])
    for fused, blocks in zip(*found, strict=True):
        assert fused is not None
        assert blocks is not None
        difference = (fused.float() - blocks.float()).norm() / blocks.float().norm()
        assert difference < 0.01, float(difference)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 2, 100])
def test_flash_attention_and_blocks_agree_on_a_gpu(window: int | None) -> None:
    """Not a window of 1, which leaves queries and keys no gradient but rounding."""
    agree_on_a_gpu(Tree((-1,) * 4, (300, 1, 64, 700), (False,) * 4), Kernel.varlen, AttentionRule(window))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")  # the compiler's own warnings
@pytest.mark.parametrize("lengths", [(300, 40, 500, 7, 130), (64, 1, 1, 1, 1), (2000, 100, 100, 100, 100)])
def test_one_kernel_and_blocks_agree_on_a_gpu(lengths: tuple[int, ...]) -> None:
    agree_on_a_gpu(Tree((-1, 0, 1, 1, 0), lengths, (False,) * 5), Kernel.flex)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")  # the compiler's own warnings
@pytest.mark.parametrize(
    ("rule", "softcap", "dim"),
    [
        (AttentionRule(100), None, 64),
        (AttentionRule(100, image_runs=True), 2.0, 256),
        (AttentionRule(image_runs=True), None, 72),
        (AttentionRule(image_runs=True), None, 512),
    ],
)
def test_rules_by_one_kernel_and_by_blocks_agree_on_a_gpu(rule: AttentionRule, softcap: float | None, dim: int) -> None:
    """Also heads of Gemma's sizes, 256 and 512, and of one that is no power of two."""
    tree = Tree((-1, 0, 1, 1, 0), (300, 40, 500, 7, 130), (False,) * 5)
    agree_on_a_gpu(tree, Kernel.flex, rule, softcap, dim)
