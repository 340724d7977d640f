"""The policy with what the embedded engine caches for one policy version: keys and values, and image features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vlmrl.inference.embedded.kv_cache import KVCache
from vlmrl.models.attention.plan import TreePlan
from vlmrl.models.attention.prefix_tree import ImageKeys
from vlmrl.models.features import FeatureCache, Levels, VisionFeatures, to_device
from vlmrl.models.policy import Policy
from vlmrl.types import MMItem


class CachedPolicy:
    """Runs forward passes whose rows attend to the KV cache. All caches belong to `version`."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.kv_cache = KVCache()
        self.image_keys = ImageKeys()
        self.version = -1
        """Policy version of the caches; −1 while they are empty."""
        self._features = FeatureCache(limit_bytes=None)

    @property
    def device(self) -> torch.device:
        return self.policy.device

    def use_version(self, version: int) -> None:
        """Clear all caches unless they belong to policy version `version`."""
        if version != self.version:
            self.version = version
            self.kv_cache.clear()
            self._features.clear()
            self.image_keys = ImageKeys()

    def clear(self) -> None:
        """Have the next `use_version` clear all caches, and give their memory to the trainer."""
        self.version = -1
        self.kv_cache.release()
        self._features.clear()

    def forward(
        self,
        token_ids: np.ndarray,
        position_ids: np.ndarray,
        mm_token_type_ids: np.ndarray,
        images: Sequence[MMItem],
        plan: TreePlan,
        first_slot: int,
    ) -> Tensor:
        """Compute T rows and write their keys and values to the T slots from `first_slot` on → float [T, hidden].

        token_ids, mm_token_type_ids int64 [T]; position_ids int64 [4, T]; `images` in the order of their placeholders
        in the rows.
        """
        plan.pool, plan.first_slot = self.kv_cache.pool, first_slot
        features = self._encode(images)
        feature_rows = [np.empty(0, np.int64)]
        if features is not None:
            feature_rows += [
                np.arange(features.first[image.hash], features.first[image.hash] + image.num_tokens) for image in images
            ]
        return self.policy.hidden_states(
            to_device(token_ids, self.device),
            to_device(position_ids, self.device),
            to_device(mm_token_type_ids, self.device),
            plan,
            features,
            to_device(np.concatenate(feature_rows), self.device),
        )

    def _encode(self, images: Sequence[MMItem]) -> VisionFeatures | None:
        """Features of the distinct images. Each image is encoded once per policy version. None for no images."""
        if not images:
            return None
        distinct = list({image.hash: image for image in images}.values())
        return self._features.encode(distinct, self.version, self._encode_levels)[0]

    def _encode_levels(self, images: Sequence[MMItem]) -> Levels:
        features = self.policy.encode_items(images)
        assert features is not None, "the cache asks for at least one image"
        return features.levels
