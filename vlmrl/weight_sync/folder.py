"""`weight_sync=folder`: the trainer writes a safetensors file to a folder, and vLLM loads it in place.

The file of the newest published version stays. A server that restarts in the middle of a training step loads it,
because the trainer's own weights are changing then.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from vlmrl.config.weight_sync import FolderSyncConfig
from vlmrl.errors import ConfigError
from vlmrl.inference.vllm.client import VllmClient
from vlmrl.inference.vllm.engine import VllmEngine
from vlmrl.inference.vllm.private_folder import PrivateFolder
from vlmrl.weight_sync.servers import ServerSync

FILE = "model.safetensors"


class FolderSync(ServerSync):
    """Weight sync for servers on this machine or on a shared disk. The folder is removed however the run ends."""

    def __init__(
        self,
        engine: VllmEngine,
        weights: Callable[[], Mapping[str, Tensor]],
        config: FolderSyncConfig,
        tower_version: Callable[[], int | None] = lambda: None,
    ) -> None:
        """Make a folder below `config.root`; otherwise as `ServerSync`. Raises `ConfigError` where that fails."""
        super().__init__(engine, weights, config, tower_version)
        try:
            self._private = PrivateFolder("weights", Path(config.root))
        except OSError as error:
            raise ConfigError(
                f"weight_sync.root={config.root} is not a folder that this process can write to ({error.strerror}), so "
                "no weights would reach the servers: set weight_sync.root to a folder that the trainer can write and "
                "the servers can read."
            ) from error
        self._folder = self._private.path
        engine.remove_if_killed(self._folder)
        self._current = self._folder

    @property
    def folder(self) -> Path:
        """The folder that holds the weights."""
        return self._folder

    def close(self) -> None:
        """Remove the folder. Otherwise the interpreter removes it when it exits."""
        self._private.remove()

    def _stage(self, version: int, tensors: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        before, self._current = self._current, Path(tempfile.mkdtemp(prefix=f"{version}-", dir=self._folder))
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, self._current / FILE)
        if before != self._folder:
            shutil.rmtree(before)

    async def _transfer(self, client: VllmClient) -> None:
        await client.call_workers("reload_weights", weights_path=str(self._current))

    def _staged(self) -> Mapping[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self._current / FILE)
