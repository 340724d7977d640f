"""`weight_sync=in_process`: the engine generates from the trainer's own tensors, so publishing copies nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from torch import Tensor

from vlmrl.models.digests import compare
from vlmrl.types import WeightComparison


class InProcessSync:
    """Weight sync for the embedded engine; implements `vlmrl.types.WeightSync`."""

    def __init__(
        self,
        trainer_version: Callable[[], int],
        trainer_weights: Callable[[], Mapping[str, Tensor]],
        engine_weights: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        """Both `*_weights` return the current tensors (not copies) under their names in a checkpoint."""
        self._trainer_version = trainer_version
        self._trainer_weights = trainer_weights
        self._engine_weights = engine_weights

    async def publish(self, version: int) -> None:
        """Do nothing: the engine holds the weights already. `version` must be the trainer's current version."""
        held = self._trainer_version()
        assert version == held, f"publishing version {version}, but the trainer holds version {held}"

    async def compare(self) -> WeightComparison:
        """Compare the digests of the trainer's and the engine's weights; see `vlmrl.types.WeightSync.compare`."""
        return await asyncio.to_thread(lambda: compare(self._trainer_weights(), self._engine_weights()))

    def close(self) -> None:
        """Do nothing: this transport holds no resources."""
