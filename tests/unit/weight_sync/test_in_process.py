"""`weight_sync=in_process`, with plain tensors for trainer and engine."""

from __future__ import annotations

import asyncio

import pytest
import torch

from vlmrl.weight_sync.in_process import InProcessSync


def sync_of(trainer: dict[str, torch.Tensor], engine: dict[str, torch.Tensor], version: int = 3) -> InProcessSync:
    return InProcessSync(lambda: version, lambda: trainer, lambda: engine)


def test_only_the_version_that_the_trainer_holds_can_be_published() -> None:
    sync = sync_of({}, {})
    asyncio.run(sync.publish(3))
    with pytest.raises(AssertionError, match="publishing version 4, but the trainer holds version 3"):
        asyncio.run(sync.publish(4))
    sync.close()


def test_a_weight_that_differs_and_one_that_is_missing_are_found() -> None:
    shared = torch.zeros(2)
    trainer = {"shared": shared, "equal": torch.ones(2), "differing": torch.ones(2), "missing": torch.ones(2)}
    engine = {"shared": shared, "equal": torch.ones(2), "differing": torch.zeros(2)}
    compared = asyncio.run(sync_of(trainer, engine).compare())
    assert (compared.compared, compared.differing, compared.unmatched) == (3, ("differing",), ("missing",))
