"""Prefix trees: the sequences can be read back, each distinct prefix has one row, branches begin at segment ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmrl.models.attention.prefix_tree import ImageKeys, PrefixTree, build_tree, common_prefix, sort_key
from vlmrl.types import IntArray, Placeholder

# Few distinct keys, so that prefixes coincide. Negative keys are images. Some sequences are prefixes of others.
key_lists = st.lists(st.integers(-3, 4), min_size=1, max_size=8)


def sequences_of(lists: list[list[int]]) -> list[IntArray]:
    """The sequences distinct and sorted, as `build_tree` requires."""
    arrays = [np.array(keys, np.int64) for keys in {tuple(keys) for keys in lists}]
    return sorted(arrays, key=sort_key)


sequence_sets = st.lists(key_lists, min_size=1, max_size=12).map(sequences_of)


def keys_by_row(sequences: list[IntArray], tree: PrefixTree) -> IntArray:
    """int64 [rows]: the key of each row, written once, by the sequence that added the row."""
    keys = np.full(tree.num_rows, 99)
    for sequence, rows, new_from in zip(sequences, tree.rows, tree.new_from, strict=True):
        assert (keys[rows[new_from:]] == 99).all(), "a row was added twice"
        keys[rows[new_from:]] = sequence[new_from:]
    assert not (keys == 99).any(), "a row that no sequence added"
    return keys


def path(tree: PrefixTree, segment: int) -> list[int]:
    """The rows from the root to the end of `segment`."""
    if segment < 0:
        return []
    parent, start, end = tree.segments[segment]
    return [*path(tree, parent), *range(start, end)]


@given(sequence_sets, st.booleans())
def test_each_sequence_is_read_back_from_its_rows(sequences: list[IntArray], share: bool) -> None:
    tree = build_tree(sequences, share=share)
    keys = keys_by_row(sequences, tree)
    for sequence, rows in zip(sequences, tree.rows, strict=True):
        np.testing.assert_array_equal(keys[rows], sequence)


@given(sequence_sets)
def test_each_distinct_prefix_has_one_row(sequences: list[IntArray]) -> None:
    tree = build_tree(sequences)
    prefixes = {
        tuple(s[: n + 1].tolist()): int(r[n]) for s, r in zip(sequences, tree.rows, strict=True) for n in range(len(s))
    }
    assert tree.num_rows == len(prefixes) == len(set(prefixes.values()))


@given(sequence_sets, st.booleans())
def test_segments_are_the_paths_and_branches_begin_at_their_ends(sequences: list[IntArray], share: bool) -> None:
    tree = build_tree(sequences, share=share)
    assert [row for _, start, end in tree.segments for row in range(start, end)] == list(range(tree.num_rows))
    ending_at = {end - 1: index for index, (_, _, end) in enumerate(tree.segments)}
    for rows in tree.rows:
        # The path ends with a segment, and the chain of parents is the path: a shared segment is shared as a whole.
        assert path(tree, ending_at[int(rows[-1])]) == rows.tolist()


@given(sequence_sets)
def test_segments_are_in_depth_first_order(sequences: list[IntArray]) -> None:
    tree = build_tree(sequences)
    open_path = [-1]
    for index, (parent, start, end) in enumerate(tree.segments):
        assert start < end
        while open_path[-1] != parent:
            open_path.pop()  # fails where the parent is no longer open
        open_path.append(index)


@given(sequence_sets)
def test_without_sharing_nothing_is_shared(sequences: list[IntArray]) -> None:
    tree = build_tree(sequences, share=False)
    assert tree.num_rows == sum(map(len, sequences))
    assert [parent for parent, _, _ in tree.segments] == [-1] * len(sequences)
    assert tree.new_from == [0] * len(sequences)
    assert len({int(row) for rows in tree.rows for row in rows}) == tree.num_rows


def test_equal_sequences_may_stand_side_by_side_unshared() -> None:
    twice = [np.array([1, 2]), np.array([1, 2])]
    assert build_tree(twice, share=False).num_rows == 4
    with pytest.raises(AssertionError, match="distinct and sorted"):
        build_tree(twice)


@given(key_lists, key_lists)
def test_sort_key_orders_and_prefixes_as_the_keys_do(a: list[int], b: list[int]) -> None:
    one, other = np.array(a, np.int64), np.array(b, np.int64)
    assert (sort_key(one) < sort_key(other)) == (a < b)
    assert sort_key(other).startswith(sort_key(one)) == (b[: len(a)] == a)
    shared = common_prefix(one, other)
    assert a[:shared] == b[:shared]
    assert shared in (len(a), len(b)) or a[shared] != b[shared]


IDS = np.array([5, 6, 7, 7, 7, 8, 9])


def shared_rows(numbers: ImageKeys, *hashes: str) -> int:
    """The number of rows that two sequences with equal token ids and these images share."""
    sequences = {sort_key(k): k for k in (numbers.keys(IDS, (Placeholder(2, 3, hash),)) for hash in hashes)}
    tree = build_tree([sequences[key] for key in sorted(sequences)])
    return len(hashes) * len(IDS) - tree.num_rows


def test_a_prefix_with_a_different_image_is_a_different_prefix() -> None:
    numbers = ImageKeys()
    assert shared_rows(numbers, "red", "green") == 2
    assert shared_rows(numbers, "red", "red") == len(IDS)
    # An image keeps its number, even if other images were numbered in between.
    assert shared_rows(numbers, "blue", "red", "blue") == len(IDS) + 2


def test_an_image_differs_from_a_sampled_image_token() -> None:
    numbers = ImageKeys()
    shown, sampled = numbers.keys(IDS, (Placeholder(2, 3, "red"),)), numbers.keys(IDS, ())
    np.testing.assert_array_equal(sampled, IDS)
    assert common_prefix(shown, sampled) == 2
    assert (shown[2:5] < 0).all()
    np.testing.assert_array_equal(shown[[0, 1, 5, 6]], IDS[[0, 1, 5, 6]])
