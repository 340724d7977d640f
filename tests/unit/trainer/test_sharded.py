"""What torch.compile sees of layers that FSDP2 shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from vlmrl.models.blocks import blocks
from vlmrl.trainer.weights import ShardedWeights

CPU = torch.device("cpu")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group with this process as its only rank."""
    dist.init_process_group("gloo", store=FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # torch.compile's own warnings
def test_only_the_number_of_rows_of_a_sharded_layer_is_a_dynamic_size(
    tiny_model: Callable[[], Any], alone: None
) -> None:
    model = tiny_model()
    tower = model.get_encoder(modality="image")
    layer = next(block for block in blocks(model) if block in set(tower.modules()))
    symbols: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        symbols.extend(
            node.name for node in graph.graph.nodes if isinstance(node.meta.get("example_value"), torch.SymInt)
        )
        return graph.forward

    layer.compile(dynamic=True, backend=backend)
    weights = ShardedWeights(model, CPU, offload=False)
    width, head = model.config.vision_config.hidden_size, layer.attn.head_dim

    def forward(patches: int) -> Tensor:
        angles = torch.zeros(patches, head)
        found: Tensor = layer(
            torch.ones(patches, width),
            cu_seqlens=torch.tensor([0, patches], dtype=torch.int32),
            position_embeddings=(angles.cos(), angles.sin()),
        )
        return found

    for patches in (8, 12):
        torch.autograd.backward(weights.compute(partial(forward, patches), last=True).sum())
    assert symbols, "no size is dynamic, so the test shows nothing"
    assert not [name for name in symbols if "head_dim" in name or "num_heads" in name]
