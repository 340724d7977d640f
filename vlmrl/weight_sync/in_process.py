"""`weight_sync=in_process`: the engine reads the trainer's own weights, so publishing is a check and no copy."""

from __future__ import annotations

import asyncio

from vlmrl.inference.embedded import EmbeddedEngine
from vlmrl.models import digests as verify
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import WeightComparison


class InProcessSync:
    """For the embedded engine; see `vlmrl.types.WeightSync`."""

    def __init__(self, trainer: LocalTrainer, engine: EmbeddedEngine) -> None:
        self._trainer = trainer
        self._engine = engine

    async def publish(self, version: int) -> None:
        """The weights are there already; the version must be the one that the trainer holds."""
        assert version == self._trainer.version, f"publishing {version} while the trainer holds {self._trainer.version}"

    async def compare(self) -> WeightComparison:
        """See `vlmrl.types.WeightSync.compare`."""
        return await asyncio.to_thread(verify.compare, self._trainer.weights(), self._engine.weights())

    def close(self) -> None:
        """Nothing was made."""
