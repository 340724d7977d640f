"""What the trainer sends to servers."""

from __future__ import annotations

import torch

from vlmrl.weight_sync.servers import without_ties


def test_tied_tensors_are_sent_once_and_equal_ones_each() -> None:
    weight = torch.zeros(4, 2)
    tensors = {"embed": weight, "head": weight, "other": torch.zeros(4, 2), "view": weight[:2]}
    assert list(without_ties(tensors)) == ["embed", "other", "view"]
