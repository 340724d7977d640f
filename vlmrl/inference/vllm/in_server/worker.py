"""What vLLM's workers tell about themselves (`--worker-extension-cls`).

vLLM keeps its weights under its own names, fused (q, k and v are one matrix), split over tensor-parallel ranks, and on
a CPU repacked for its kernels, the matrices themselves deleted. So each worker says of each of its weights which slices
of which of the trainer's tensors it must be made of, and the digest of what it holds. The trainer does the same from
its own tensors (`weight_sync/verify.py`) and compares.

Runs in vLLM's processes and uses the names of vLLM's own layers; imported by nobody else. Left out: quantized weights.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from vlmrl.models.digests import Slice, digest

SWITCH_INTERVAL_S = 1e-4
"""For how long another thread may keep the interpreter from one that wants it; Python's own is 5e-3."""

# vLLM's engine reads requests and writes answers in threads beside the one that launches a step's thousands of
# kernels. Each launch gives the interpreter up and asks for it again, and would wait a whole interval.
sys.setswitchinterval(SWITCH_INTERVAL_S)


class WorkerInspector:
    """Methods that a worker gets beside its own; called through `/collective_rpc`."""

    model_runner: Any
    vllm_config: Any

    def vlmrl_settings(self) -> dict[str, Any]:
        """What the run must know of the server, or refuses it for."""
        model, parallel = self.vllm_config.model_config, self.vllm_config.parallel_config
        images = model.multimodal_config
        return {
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": model.max_model_len,
            "logprobs_mode": model.logprobs_mode,
            "mm_device_do_normalize": bool(getattr(images, "mm_device_do_normalize", False)),
            # Elsewhere the engine has no images of its own, and one that goes by its hash kills it.
            "keeps_images": images is not None
            and images.mm_processor_cache_gb > 0
            and images.mm_processor_cache_type == "lru"
            and parallel.data_parallel_size == 1
            and parallel._api_process_count == 1,
        }

    def vlmrl_repack_head(self) -> None:
        """Finish a weight update. On a CPU a layer computes with a repacked copy of its weights, which `reload_weights`
        makes anew for every layer but a head that is tied to the embedding: that one would keep the old weights."""
        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)

    def vlmrl_weights(self, names: list[str], digests: bool) -> dict[str, Any]:
        """How the trainer's tensors `names` become this worker's weights.

        `unknown`: names that become nothing here. `missing`: weights that would not get all they are made of.
        `weights`, by vLLM's name: `slices` ([name, dim, start, stop] each, dim −1 for all of it), concatenated along
        dim 0, and with `digests` the `sha256` of what is there.
        """
        model: nn.Module = self.model_runner.get_model()
        parameters = dict(model.named_parameters(remove_duplicate=False))
        sources, unknown = _sources(model, names, parameters)
        weights: dict[str, Any] = {}
        missing = []
        for name, parameter in parameters.items():
            module = model.get_submodule(name.rpartition(".")[0])
            slices = _slices(module, name.rpartition(".")[2], sources.get(name, []))
            if not slices:
                missing.append(name)
                continue
            weights[name] = {"slices": slices}
            if digests:
                weights[name]["sha256"] = digest(_held(module, parameter))
        return {"unknown": unknown, "missing": missing, "weights": weights}


def _sources(
    model: Any, names: list[str], parameters: dict[str, nn.Parameter]
) -> tuple[dict[str, list[str]], list[str]]:
    """vLLM's name → the trainer's names that are fused into it, in order; and names that lead nowhere."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    fused = {
        part: (whole, place, len(parts))
        for whole, parts in getattr(model, "packed_modules_mapping", {}).items()
        for place, part in enumerate(parts)
    }
    found: dict[str, list[str | None]] = {}
    unknown = []
    for name in names:
        mapped = (mapper.apply_list([name]) if mapper is not None else [name]) or [name]
        module, _, kind = mapped[0].rpartition(".")
        parent, _, leaf = module.rpartition(".")
        if mapped[0] in parameters:
            found[mapped[0]] = [name]
        elif leaf in fused and f"{parent}.{fused[leaf][0]}.{kind}" in parameters:
            whole, place, count = fused[leaf]
            found.setdefault(f"{parent}.{whole}.{kind}", [None] * count)[place] = name
        else:
            unknown.append(name)
    whole = {name: [part for part in parts if part] for name, parts in found.items() if None not in parts}
    # Weights that are one with another, as a tied head is with the embedding, come with it.
    by_tensor = {id(parameters[name]): parts for name, parts in whole.items()}
    return {name: by_tensor[id(p)] for name, p in parameters.items() if id(p) in by_tensor}, unknown


def _slices(module: nn.Module, kind: str, sources: list[str]) -> list[Slice]:
    """Which parts of `sources` this rank's `weight` or `bias` is made of; empty where sources are missing."""
    if not sources:
        return []
    if isinstance(module, RowParallelLinear) and kind == "weight":
        width = module.input_size_per_partition
        return [(sources[0], 1, module.tp_rank * width, (module.tp_rank + 1) * width)]
    rows = _rows(module)
    if rows is None:
        return [(sources[0], -1, 0, 0)]
    if len(sources) == len(rows):
        return [(source, 0, start, stop) for source, (_, start, stop) in zip(sources, rows, strict=True)]
    assert len(sources) == 1, f"{len(sources)} tensors for {len(rows)} parts of {type(module).__name__}"
    slices: list[Slice] = []
    offset = 0
    for total, start, stop in rows:
        slices.append((sources[0], 0, offset + start, offset + stop))
        offset += total
    return slices


def _rows(module: nn.Module) -> list[tuple[int, int, int]] | None:
    """Per fused part: its rows in all, and the first and last of this rank's. None where every rank has all rows."""
    if isinstance(module, QKVParallelLinear):
        rank, shared = module.tp_rank, module.tp_rank // module.num_kv_head_replicas
        parts = [
            (module.total_num_heads, module.num_heads, module.head_size, rank),
            (module.total_num_kv_heads, module.num_kv_heads, module.head_size, shared),
            (module.total_num_kv_heads, module.num_kv_heads, module.v_head_size, shared),
        ]
        return [(total * size, at * heads * size, (at + 1) * heads * size) for total, heads, size, at in parts]
    if isinstance(module, MergedColumnParallelLinear | ColumnParallelLinear):
        sizes = getattr(module, "output_sizes", [module.output_size])
        shares = [(size, size // module.tp_size) for size in sizes]
        return [(size, module.tp_rank * share, (module.tp_rank + 1) * share) for size, share in shares]
    if isinstance(module, VocabParallelEmbedding):
        held = module.shard_indices
        return [(module.org_vocab_size, held.org_vocab_start_index, held.org_vocab_end_index)]
    return None


def _held(module: Any, parameter: Tensor) -> Tensor:
    """The parameter as the module computes with it, without rows that only pad the vocabulary."""
    if parameter.numel() == 0 or (isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear")):
        # Repacked for a CPU kernel. What the layer makes of the identity is the matrix, to the bit: every product but
        # one is with 0.
        identity = torch.eye(module.input_size_per_partition, dtype=parameter.dtype, device=parameter.device)
        with torch.inference_mode():
            parameter = module.quant_method.apply(module, identity, None).t()
    if isinstance(module, VocabParallelEmbedding):
        return parameter[: module.shard_indices.num_org_elements]
    return parameter
