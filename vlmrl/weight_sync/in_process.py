"""`weight_sync=in_process`: the engine reads the trainer's own weights, so publishing is a check and no copy."""

from __future__ import annotations

from vlmrl.types import Trainer


class InProcessSync:
    """For the embedded engine; see `vlmrl.types.WeightSync`."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    async def publish(self, version: int) -> None:
        """The weights are there already; the version must be the one that the trainer holds."""
        assert version == self._trainer.version, f"publishing {version} while the trainer holds {self._trainer.version}"

    def close(self) -> None:
        """Nothing was made."""
