"""Mixtures of experts inside vLLM: which of the trainer's tensors a layer of experts consists of, and what it holds.

vLLM keeps the experts of a layer in two tensors. A checkpoint has one tensor per projection and expert (Qwen3.5), or
two tensors for all experts, which some families store transposed (Qwen3-VL):

    w13_weight [E, 2I, H]   gate and up     experts.<e>.gate_proj, experts.<e>.up_proj [I, H]   gate_up_proj [E, 2I, H]
    w2_weight  [E, H, I]    down            experts.<e>.down_proj [H, I]                        down_proj    [E, H, I]

With tensor parallelism each rank has I / size of the rows of gate and up and of the columns of down. Left out on
purpose: experts that are spread over ranks (expert parallelism), biases, quantized experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmrl.models.digests import Slice

Shapes = Mapping[str, Sequence[int]]
"""The trainer's tensors: name → shape."""

BOTH, DOWN = "w13_weight", "w2_weight"
"""vLLM's names of a layer's two tensors."""


@dataclass(frozen=True)
class Piece:
    """A part of a weight, and the slices of the trainer's tensors that it must equal, byte for byte."""

    name: str
    """vLLM's name of the weight; where a weight has several pieces, with the part in brackets."""
    slices: list[Slice]
    held: Tensor


def has_experts(module: nn.Module) -> bool:
    """Whether `module` is a layer that holds the weights of experts."""
    return hasattr(module, BOTH) and hasattr(module, DOWN)


def trainers_name(path: str, rest: str) -> str:
    """The name below which the trainer's tensors of the layer at `path` are.

    >>> trainers_name("model.layers.0.mlp.experts.routed_experts", "gate_up_proj")
    'model.layers.0.mlp.experts.gate_up_proj'
    """
    return f"{path.removesuffix('.routed_experts')}.{rest}"


def expert_pieces(path: str, layer: Any, sources: Mapping[str, str], shapes: Shapes) -> dict[str, list[Piece]]:
    """vLLM's name of each weight of the layer → its pieces; empty where the trainer lacks a tensor for it. `sources`
    maps names as vLLM spells them to the trainer's.

    Raises `ValueError` for experts that are spread over ranks.
    """
    if getattr(layer, "use_ep", False):
        raise ValueError("vLLM runs with expert parallelism, under which weights cannot be proven: switch it off")
    parallel = layer.moe_config.moe_parallel_config
    w13, w2 = (unpacked(layer, getattr(layer, name)) for name in (BOTH, DOWN))
    width = w2.shape[2]
    start, stop = parallel.tp_rank * width, (parallel.tp_rank + 1) * width
    names = [getattr(layer, f"ckpt_{part}_proj_name", f"{part}_proj") for part in ("gate", "up", "down")]
    both, down = (sources.get(trainers_name(path, name)) for name in ("gate_up_proj", names[2]))
    if both is not None and down is not None:
        total = shapes[down][1] * shapes[down][2] // w2.shape[1]
        is_transposed = getattr(layer, "is_fused_checkpoint_transposed", shapes[both][1] == w13.shape[2])
        rows, columns = (2, 1) if is_transposed else (1, 2)

        def stored(held: Tensor) -> Tensor:
            return held.transpose(1, 2) if is_transposed else held

        return {
            f"{path}.{BOTH}": [
                Piece(f"{path}.{BOTH} (gate)", [(both, rows, start, stop)], stored(w13[:, :width])),
                Piece(f"{path}.{BOTH} (up)", [(both, rows, total + start, total + stop)], stored(w13[:, width:])),
            ],
            f"{path}.{DOWN}": [Piece(f"{path}.{DOWN}", [(down, columns, start, stop)], stored(w2))],
        }
    of_experts = [
        [sources.get(trainers_name(path, f"{expert}.{name}.weight")) for name in names] for expert in range(len(w13))
    ]
    if not all(name is not None for expert in of_experts for name in expert):
        return {}
    gates_and_ups = [(str(name), 0, start, stop) for gate, up, _ in of_experts for name in (gate, up)]
    downs = [(str(down), 1, start, stop) for _, _, down in of_experts]
    return {
        f"{path}.{BOTH}": [Piece(f"{path}.{BOTH}", gates_and_ups, w13)],
        f"{path}.{DOWN}": [Piece(f"{path}.{DOWN}", downs, w2)],
    }


# ── on a CPU ────────────────────────────────────────────────────────────────────────────────────────────────


def repack(layer: Any) -> None:
    """Finish an update of a layer on a CPU, whose kernel reads its weights in another order. vLLM brings them into
    this order when it starts; after an update it leaves them as they came."""
    experts = _packing(layer)
    if experts is not None:
        experts.process_weights_after_loading(layer)


def unpacked(layer: Any, weight: Tensor) -> Tensor:
    """The weight [E, rows, columns] in its own order, from what the kernel reads."""
    experts = _packing(layer)
    if experts is None:
        return weight
    from vllm._custom_ops import cpu_prepack_moe_weight

    # Packing only moves numbers. Where to is seen by packing the index of each number, a byte at a time, because
    # bfloat16 represents integers up to 256 only.
    count = weight[0].numel()
    index = torch.arange(count)
    order = torch.zeros(count, dtype=torch.int64)
    for shift in range(0, count.bit_length(), 8):
        byte = ((index >> shift) & 255).to(weight.dtype).view_as(weight[:1])
        order += cpu_prepack_moe_weight(byte, experts.isa).flatten().to(torch.int64) << shift
    original = torch.empty_like(weight).flatten(1)
    original[:, order] = weight.detach().flatten(1)
    return original.view_as(weight)


def _packing(layer: Any) -> Any:
    """vLLM's object that packs the weights of a layer on a CPU; None where they are not packed."""
    experts = getattr(getattr(layer.quant_method, "moe_kernel", None), "fused_experts", None)
    return experts if hasattr(experts, "isa") and not getattr(experts, "_use_zentorch", False) else None
