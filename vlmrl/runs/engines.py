"""The inference engine of a run, and the weight sync that publishes the trainer's weights to it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from vlmrl.config.inference import Batching, EmbeddedConfig, VllmConfig
from vlmrl.config.run import RunConfig
from vlmrl.config.trainer import Sharding
from vlmrl.config.weight_sync import CudaIpcSyncConfig, FolderSyncConfig, NcclSyncConfig
from vlmrl.inference.embedded.engine import EmbeddedEngine
from vlmrl.inference.embedded.generator import BatchSampler, Generator, decodes_by_rows
from vlmrl.inference.embedded.ranked import RankedGenerator
from vlmrl.inference.vllm.engine import VllmEngine
from vlmrl.models.checkpoints.image_size import size_settings
from vlmrl.models.checkpoints.published import published_weights
from vlmrl.models.policy import Policy
from vlmrl.monitor.monitor import Monitor
from vlmrl.record.run_dir import RunDir
from vlmrl.rendering.renderer import Renderer
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import InferenceEngine, WeightSync
from vlmrl.weight_sync.cuda_ipc import CudaIpcSync
from vlmrl.weight_sync.folder import FolderSync
from vlmrl.weight_sync.gpu import WEIGHT_TRANSFERS
from vlmrl.weight_sync.in_process import InProcessSync
from vlmrl.weight_sync.nccl import NcclSync


def make_engine(
    config: RunConfig,
    folder: Path,
    policy: Policy,
    trainer: LocalTrainer,
    renderer: Renderer,
    run_dir: RunDir,
    monitor: Monitor,
) -> tuple[InferenceEngine, WeightSync]:
    """The inference engine and the weight sync that publishes the trainer's weights to it. vLLM servers load the
    checkpoint in `folder`."""
    if not isinstance(config.inference, VllmConfig):
        length = config.inference.max_model_len
        own = Generator(policy, renderer.decode)
        sampler: BatchSampler = own
        if trainer.ranks > 1:
            moves = config.trainer.sharding is not Sharding.none
            sampler = RankedGenerator(own, trainer.ranks, trainer.sample, weights_move=moves)
        batching = config.inference.batching if isinstance(config.inference, EmbeddedConfig) else Batching.together
        is_rolling = batching is Batching.rolling and decodes_by_rows(policy)
        engine = EmbeddedEngine(
            policy, lambda: trainer.version, length, renderer.decode, sampler, is_rolling=is_rolling
        )
        return engine, InProcessSync(lambda: trainer.version, trainer.weights, engine.weights)
    sync = config.weight_sync
    transfer = WEIGHT_TRANSFERS.get(sync.kind)
    servers = VllmEngine(
        config.inference,
        folder,
        run_dir.logs,
        monitor.status,
        monitor.warn,
        transfer,
        size_settings(config.model.vlm),
        policy.logit_map.scale,
        renderer.decode,
        config.orchestrator.top_k,
    )

    def weights() -> dict[str, Tensor]:
        return published_weights(policy.model, trainer.weights())

    def tower_version() -> int | None:
        return policy.tower_version

    if isinstance(sync, NcclSyncConfig):
        return servers, NcclSync(servers, weights, sync, tower_version)
    if isinstance(sync, CudaIpcSyncConfig):
        return servers, CudaIpcSync(servers, weights, sync, tower_version)
    assert isinstance(sync, FolderSyncConfig), "preflight refuses a weight sync that vLLM servers cannot receive"
    return servers, FolderSync(servers, weights, sync, tower_version)
