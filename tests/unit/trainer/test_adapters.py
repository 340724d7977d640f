"""Training LoRA adapters: which weights change, what engines get, and that training resumes from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from support.helpers import Sampled, image, sample
from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Dtype, LoraConfig
from vlmrl.config.trainer import TrainerConfig
from vlmrl.config.weight_sync import FolderSyncConfig
from vlmrl.inference.embedded.engine import EmbeddedEngine
from vlmrl.inference.vllm.engine import VllmEngine
from vlmrl.models.families.positions import position_function
from vlmrl.models.lora import add_adapters
from vlmrl.models.policy import Policy
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import TrainingSample
from vlmrl.weight_sync.folder import FILE, FolderSync


def samples() -> list[TrainingSample]:
    return [sample(str(i), [40, 41], image(2, 3), [5], Sampled([100, i, 7]), seed=i) for i in range(4)]


def trainer_of(model: Any, *, adapted: bool = True) -> LocalTrainer:
    if adapted:
        pytest.importorskip("peft")
        torch.manual_seed(0)
        add_adapters(model, LoraConfig(rank=4))
    policy = Policy(model, position_function("mrope", 2), [], feature_cache_bytes=1 << 20)
    config = TrainerConfig(learning_rate=1e-2)
    return LocalTrainer(policy, config, AlgorithmConfig(), temperature=1.0, max_new_tokens=4)


def logprobs(trainer: LocalTrainer) -> Tensor:
    return torch.cat([torch.as_tensor(found) for found in trainer.logprobs(samples())])


def test_a_step_moves_adapters_alone_and_engines_get_them_merged(tiny_model: Callable[[], Any]) -> None:
    model, plain = tiny_model(), tiny_model()
    trainer = trainer_of(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):  # LoRA's B starts at 0, so the first step changes only B
        result = trainer.train_step(samples())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".lora_" in name}
    assert result.metrics["images/encoded"] == 0
    assert result.metrics["images/cached"] == 1, "the tower is frozen, so its features stay cached"

    weights = trainer.weights()
    assert weights.keys() == dict(plain.named_parameters()).keys()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(weights[name])
    torch.testing.assert_close(logprobs(trainer_of(plain, adapted=False)), logprobs(trainer), rtol=1e-5, atol=1e-5)

    engine = EmbeddedEngine(Policy(model, position_function("mrope", 2), []), lambda: trainer.version, 64)
    for name, tensor in engine.weights().items():
        assert torch.equal(tensor, weights[name])


def test_the_folder_that_servers_read_holds_them_merged(tiny_model: Callable[[], Any], tmp_path: Path) -> None:
    trainer = trainer_of(tiny_model())
    trainer.train_step(samples())
    config = VllmConfig(dtype=Dtype.float32, urls=["http://127.0.0.1:1"])
    engine = VllmEngine(config, tmp_path, tmp_path, lambda line: None, lambda line: None)
    sync = FolderSync(engine, trainer.weights, FolderSyncConfig(root=str(tmp_path)))
    sync._stage(1, trainer.weights())
    (written,) = sync.folder.glob(f"*/{FILE}")
    weights = trainer.weights()
    for name, tensor in load_file(written).items():
        assert torch.equal(tensor, weights[name])
    sync.close()


def test_a_checkpoint_of_adapters_continues(tiny_model: Callable[[], Any], tmp_path: Path) -> None:
    trainer, other = trainer_of(tiny_model()), trainer_of(tiny_model())
    trainer.train_step(samples())
    saved = trainer.save(str(tmp_path))
    if saved is not None:
        saved.result()
    other.load(str(tmp_path))
    for each in (trainer, other):
        each.train_step(samples())
    assert torch.equal(logprobs(trainer), logprobs(other))
