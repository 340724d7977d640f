"""The feature cache of a frozen vision tower: it stays within its bytes, never returns features of other weights, and
saves encoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support.helpers import image
from vlmrl.models.families.positions import position_function
from vlmrl.models.features import FeatureCache, Levels
from vlmrl.models.policy import Policy
from vlmrl.types import ImageItem, MMItem

ITEMS: list[MMItem] = [image(1, 1), image(2, 1), image(2, 3), image(1, 1, seed=1)]
LEVELS, WIDTH = 2, 4
BYTES = LEVELS * WIDTH * 4
"""Bytes of one token's features at all levels."""


class Tower:
    """Two levels of features that encode their image and version. Records the images that it encodes."""

    def __init__(self) -> None:
        self.version = 0
        self.encoded: list[str] = []

    def __call__(self, items: Sequence[MMItem]) -> Levels:
        self.encoded += [item.hash for item in items]
        return [torch.cat([self.features(item, level) for item in items]) for level in range(LEVELS)]

    def features(self, item: MMItem, level: int) -> Tensor:
        number = 1000 * self.version + 10 * ITEMS.index(item) + level
        return torch.arange(item.num_tokens)[:, None] / 100 + torch.full((item.num_tokens, WIDTH), float(number))


@given(
    st.lists(st.tuples(st.lists(st.sampled_from(ITEMS), min_size=1, unique=True), st.booleans()), max_size=12),
    st.sampled_from([0, BYTES, 3 * BYTES, 9 * BYTES, 100 * BYTES]),
)
def test_features_are_those_of_the_current_weights(requests: list[tuple[list[ImageItem], bool]], capacity: int) -> None:
    tower, cache = Tower(), FeatureCache(capacity)
    for images, weights_change in requests:
        tower.version += weights_change
        tower.encoded.clear()
        features, encoded = cache.encode(images, tower.version, tower)
        for level, found in enumerate(features.levels):
            torch.testing.assert_close(found, torch.cat([tower.features(item, level) for item in images]))
        assert encoded == len(tower.encoded) == len(set(tower.encoded))
        assert 0 <= cache.num_bytes <= capacity
        if weights_change or capacity == 0:
            assert tower.encoded == [item.hash for item in images]


def test_the_least_recently_used_image_is_evicted_first() -> None:
    """ITEMS[0] and ITEMS[3] have one token, ITEMS[1] has two. There is room for three tokens."""
    tower, cache = Tower(), FeatureCache(3 * BYTES)
    for images in ([ITEMS[0], ITEMS[3]], [ITEMS[0]], [ITEMS[1]]):
        cache.encode(images, 0, tower)
    tower.encoded.clear()
    cache.encode([ITEMS[0], ITEMS[1]], 0, tower)
    assert tower.encoded == []
    cache.encode([ITEMS[3]], 0, tower)
    assert tower.encoded == [ITEMS[3].hash]


# ── in the policy ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def policy(tiny_model: Callable[[], Any]) -> Policy:
    return Policy(tiny_model(), position_function("mrope", 2), [], feature_cache_bytes=1 << 20)


def counted(policy: Policy) -> tuple[float, float]:
    counters = policy.take_image_counters()
    return counters["images/encoded"], counters["images/cached"]


def test_a_frozen_tower_encodes_an_image_once(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    policy.model.model.visual.requires_grad_(False)
    first = policy.encode_items(ITEMS[:3])
    assert counted(policy) == (3, 0)
    monkeypatch.setattr(policy.model.model, "get_image_features", None)  # a call would fail now
    for images in (ITEMS[:3], [ITEMS[2], ITEMS[0]]):
        again = policy.encode_items(images)
        assert first is not None
        assert again is not None
        assert counted(policy) == (0, len(images))
        for mine, theirs in zip(again.levels, first.levels, strict=True):
            for item in images:
                a, b = again.first[item.hash], first.first[item.hash]
                assert torch.equal(mine[a : a + item.num_tokens], theirs[b : b + item.num_tokens])


def test_features_that_the_engine_encoded_serve_a_backward_pass(policy: Policy) -> None:
    policy.model.model.visual.requires_grad_(False)
    with torch.inference_mode():
        policy.encode_items(ITEMS[:1])
    features = policy.encode_items(ITEMS[:1])
    assert counted(policy) == (1, 1)
    assert features is not None
    weight = torch.ones(features.levels[0].shape[1], requires_grad=True)
    (features.levels[0] * weight).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None


def test_weights_that_are_loaded_into_a_frozen_tower_are_another_version(policy: Policy) -> None:
    tower = policy.model.model.visual
    tower.requires_grad_(False)
    before = policy.encode_items(ITEMS[:1])
    with torch.no_grad():
        tower.patch_embed.proj.weight.copy_(2 * tower.patch_embed.proj.weight)
    after = policy.encode_items(ITEMS[:1])
    assert counted(policy) == (2, 0)
    assert before is not None
    assert after is not None
    assert float((before.levels[0] - after.levels[0]).abs().max()) > 1e-3


def test_a_trainable_tower_encodes_every_time(policy: Policy) -> None:
    for _ in range(2):
        policy.encode_items(ITEMS[:2])
    assert counted(policy) == (4, 0)
