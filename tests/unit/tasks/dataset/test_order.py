"""The order of rows is a permutation in each epoch, without an array of the rows."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmrl.tasks.dataset.order import shuffled


@pytest.mark.parametrize("count", [*range(1, 70), 255, 256, 257, 1000, 1021, 4096])
def test_an_epoch_has_each_row_once(count: int) -> None:
    for epoch in (0, 1, 5):
        drawn = [shuffled(epoch * count + place, count, seed=3) for place in range(count)]
        assert sorted(drawn) == list(range(count))


@given(count=st.integers(1, 10**12), index=st.integers(0, 2**50), seed=st.integers(-(2**63), 2**63))
def test_any_index_of_any_size_is_a_row(count: int, index: int, seed: int) -> None:
    row = shuffled(index, count, seed)
    assert 0 <= row < count
    assert row == shuffled(index, count, seed)


@given(count=st.integers(10**6, 10**12), places=st.sets(st.integers(0, 10**6 - 1), min_size=2, max_size=50))
def test_no_two_places_of_an_epoch_have_one_row(count: int, places: set[int]) -> None:
    assert len({shuffled(place, count, seed=1) for place in places}) == len(places)


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(shuffled(epoch * 100 + place, 100, seed) for place in range(100))

    orders = {order(seed, epoch) for seed, epoch in itertools.product(range(10), range(10))}
    assert len(orders) == 100


@pytest.mark.parametrize("count", [3, 4, 5])
def test_every_order_of_few_rows_is_as_likely_as_any_other(count: int) -> None:
    """Pearson's chi-squared statistic over all orders; with k - 1 degrees of freedom it has the mean k - 1 and the
    standard deviation sqrt(2(k - 1))."""
    seeds = 6000
    orders = Counter(tuple(shuffled(place, count, seed) for place in range(count)) for seed in range(seeds))
    number = math.factorial(count)
    expected = seeds / number
    assert len(orders) == number
    chi_squared = sum((times - expected) ** 2 / expected for times in orders.values())
    assert chi_squared < (number - 1) + 4 * math.sqrt(2 * (number - 1))


def test_a_shuffled_million_has_no_trend() -> None:
    """Neighbours in the stream are unrelated rows: the correlation of 20,000 pairs is within four of its standard
    deviations, and each tenth of the rows is drawn about as often."""
    count = 10**6
    drawn = np.array([shuffled(place, count, seed=5) for place in range(20_000)])
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 4 / math.sqrt(len(drawn))
    assert abs(np.corrcoef(np.arange(len(drawn)), drawn)[0, 1]) < 4 / math.sqrt(len(drawn))
    tenths = np.bincount(drawn // (count // 10), minlength=10)
    assert np.all(np.abs(tenths - 2000) < 4 * math.sqrt(2000))


def test_no_array_of_the_rows_is_made() -> None:
    tracemalloc.start()
    try:
        for place in range(100):
            shuffled(place, 10**9, seed=0)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
