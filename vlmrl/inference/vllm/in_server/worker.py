"""Methods that the run adds to vLLM's workers (`--worker-extension-cls`): they report settings and weights.

vLLM keeps weights under its own names, fused (q, k and v are one matrix), split over tensor-parallel ranks, and on a
CPU repacked for its kernels, with the original matrices deleted. So each worker reports, for each of its weights, the
slices of the trainer's tensors that the weight must consist of, and the digest of the weight itself. The trainer
computes the digest of the same slices of its own tensors (`models/digests.py`) and compares.

Runs in vLLM's processes only, and uses the names of vLLM's own layers. Left out on purpose: quantized weights.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.platforms import current_platform

from vlmrl.inference.vllm.in_server.experts import Piece, Shapes, expert_pieces, has_experts, repack
from vlmrl.inference.vllm.in_server.items import ServedImages, takes_images
from vlmrl.inference.vllm.in_server.positions import count_as_the_trainer
from vlmrl.inference.vllm.in_server.unused_layers import is_behind_last_layer, layer_counts
from vlmrl.models.digests import Slice, digest

SWITCH_INTERVAL_S = 1e-4
"""How long a thread may hold the interpreter lock while another thread waits for it. Python's default is 5e-3."""

# vLLM's engine reads requests and writes answers in threads next to the thread that launches the thousands of kernels
# of a step. Each launch releases the lock and takes it again, and would wait up to a whole interval for it.
sys.setswitchinterval(SWITCH_INTERVAL_S)


class WorkerInspector:
    """Methods that a worker gets in addition to its own; the run calls them through `/collective_rpc`."""

    model_runner: Any
    vllm_config: Any
    _vlmrl_features: dict[str, Tensor]

    def vlmrl_settings(self) -> dict[str, Any]:
        """The settings that `settings.check_settings` reads."""
        model, parallel = self.vllm_config.model_config, self.vllm_config.parallel_config
        images = model.multimodal_config
        text = model.hf_text_config
        return {
            "architecture": model.architecture,
            "device": current_platform.device_type,
            "is_bidirectional": bool(model.is_mm_prefix_lm),
            "has_recurrent_layers": "linear_attention" in (getattr(text, "layer_types", None) or ()),
            "has_deepstack": bool(getattr(_vision_config(model), "deepstack_visual_indexes", None)),
            # vLLM looks up the per-layer inputs of image positions by id 0, transformers by this one.
            "image_input_id": text.pad_token_id if getattr(text, "hidden_size_per_layer_input", 0) else 0,
            "images": None if self.vlmrl_images is None else self.vlmrl_images.reported,
            "logit_scale": _logit_scale(self.model_runner.get_model()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "head_dtype": str(model.head_dtype).removeprefix("torch."),
            "quantization": model.quantization,
            "max_model_len": model.max_model_len,
            "logprobs_mode": model.logprobs_mode,
            "max_logprobs": model.max_logprobs,
            "mm_device_do_normalize": bool(getattr(images, "mm_device_do_normalize", False)),
            # Otherwise the engine has no image cache of its own, and it dies of a request with an image by its hash.
            "keeps_images": images is not None
            and images.mm_processor_cache_gb > 0
            and images.mm_processor_cache_type == "lru"
            and parallel.data_parallel_size == 1
            and parallel._api_process_count == 1,
        }

    @cached_property
    def vlmrl_images(self) -> ServedImages | None:
        """None for a text model."""
        # A copy made before the first update: `reload_weights` puts the folder of the weights into `model`, where
        # vLLM's processor would look for its files.
        model = copy(self.vllm_config.model_config)
        return ServedImages(model) if takes_images(model) else None

    def vlmrl_video_fields(self) -> dict[str, Any]:
        """What `ServedImages.video_fields` returns, or {"error": why the server takes no videos}. From then on, tokens
        after a video have the trainer's positions (positions.py)."""
        multimodal = self.vllm_config.model_config.multimodal_config
        if self.vlmrl_images is None or multimodal.get_limit_per_prompt("video") == 0:
            return {"error": "its --limit-mm-per-prompt allows none"}
        if multimodal.is_multimodal_pruning_enabled():
            return {"error": "it leaves out tokens of videos: start it without --video-pruning-rate"}
        try:
            fields = self.vlmrl_images.video_fields()
        except Exception as error:  # noqa: BLE001  code of any model
            return {"error": f"vLLM's processor made none of a test video ({type(error).__name__}: {error})"}
        if not fields["has_lead"]:
            count_as_the_trainer(self.model_runner.get_model(), self.vllm_config.model_config.hf_config)
        return fields

    def vlmrl_compare_images(self, documents: Mapping[str, str]) -> dict[str, Any]:
        """Hash → what `ServedImages.compare` returns, or {"error": why the image differs}. `documents`: hash → output
        of `image_fields.picture_document` in base64."""
        assert self.vlmrl_images is not None, "the client sends no images to a text model"
        found: dict[str, Any] = {}
        for hash, document in documents.items():
            try:
                found[hash] = self.vlmrl_images.compare(base64.b64decode(document))
            except ValueError as error:
                found[hash] = {"error": str(error)}
        return found

    def vlmrl_repack(self) -> None:
        """Finish a weight update. On a CPU a layer computes with a repacked copy of its weights. `reload_weights` makes
        a new copy for every layer except a head that is tied to the embedding, which would keep the old weights, and
        experts, which would compute with weights in the wrong order."""
        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)
            elif has_experts(module):
                repack(module)

    def vlmrl_set_features_aside(self) -> None:
        """Hold the features of encoded images through a weight update, which may clear them."""
        self._vlmrl_features = dict(_features(self.model_runner))

    def vlmrl_put_features_back(self) -> None:
        """The scheduler counts on these features still."""
        _features(self.model_runner).update(self._vlmrl_features)
        del self._vlmrl_features

    def vlmrl_weights(self, shapes: dict[str, list[int]], digests: bool) -> dict[str, Any]:
        """How this worker's weights consist of the trainer's tensors, which have these `shapes` by name.

        `unknown`: names that no weight here consists of. `missing`: weights that need a tensor that the trainer lacks,
        or one of another shape. `weights`, by vLLM's name: `slices`, each [name, dim, start, stop] with dim −1 for the
        whole tensor, which are concatenated along dim 0; and, if `digests`, the `sha256` of the weight that the worker
        holds.
        """
        model: nn.Module = self.model_runner.get_model()
        parameters = dict(model.named_parameters(remove_duplicate=False))
        sources, left = _sources(model, list(shapes), parameters)
        pieces = {
            name: pieces
            for path, module in model.named_modules(remove_duplicate=False)
            if has_experts(module)
            for name, pieces in expert_pieces(path, module, left, shapes).items()
        }
        weights: dict[str, Any] = {}
        missing = []
        for name, parameter in parameters.items():
            found = pieces.get(name)
            if found is None:
                owner, _, kind = name.rpartition(".")
                slices = _slices(model, owner, kind, parameter, sources.get(name, []), shapes)
                found = [Piece(name, slices, _held(model.get_submodule(owner), parameter))] if slices else []
            if not found or not all(_exist(piece.slices, shapes) for piece in found):
                missing.append(name)
                continue
            for piece in found:
                weights[piece.name] = {"slices": piece.slices}
                if digests:
                    weights[piece.name]["sha256"] = digest(piece.held)
        used = {source for weight in weights.values() for source, *_ in weight["slices"]}
        unknown = [name for name in left.values() if name not in used]
        return {"unknown": unknown, "missing": missing, "weights": weights}


def _features(model_runner: Any) -> dict[str, Tensor]:
    """The features of encoded images, by hash. vLLM's newer model runner keeps them in an object."""
    cache = model_runner.encoder_cache
    found: dict[str, Tensor] = getattr(cache, "encoder_outputs", cache)
    return found


def _logit_scale(model: nn.Module) -> float:
    """What vLLM multiplies the output of the head by."""
    return next((float(module.scale) for module in model.modules() if isinstance(module, LogitsProcessor)), 1.0)


def _vision_config(model: Any) -> Any:
    return getattr(model.hf_config, "vision_config", None)


def _sources(
    model: Any, names: list[str], parameters: dict[str, nn.Parameter]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Map vLLM's name of each weight to the trainer's names that are fused into it, in order; and as vLLM spells them,
    the names that belong to none of these weights → the trainer's."""
    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    if hasattr(mapper, "get_rename_mapper"):  # names that are fused stay apart
        mapper = mapper.get_rename_mapper()
    fused = {
        part: (whole, place, len(parts))
        for module in model.modules()  # a model of two parts may leave it to them
        for whole, parts in (getattr(module, "packed_modules_mapping", None) or {}).items()
        for place, part in enumerate(parts)
    }
    found: dict[str, list[str | None]] = {}
    left = {}
    counts = layer_counts(parameters)
    for name in names:
        mapped = (mapper.apply_list([name]) if mapper is not None else [name]) or [name]
        module, _, kind = mapped[0].rpartition(".")
        parent, _, leaf = module.rpartition(".")
        if mapped[0] in parameters:
            found[mapped[0]] = [name]
        elif leaf in fused and f"{parent}.{fused[leaf][0]}.{kind}" in parameters:
            whole, place, count = fused[leaf]
            found.setdefault(f"{parent}.{whole}.{kind}", [None] * count)[place] = name
        elif not is_behind_last_layer(mapped[0], counts):
            left[mapped[0]] = name
    whole = {name: [part for part in parts if part] for name, parts in found.items() if None not in parts}
    # A weight that shares its tensor with another (a tied head and the embedding) has the same sources.
    by_tensor = {id(parameters[name]): parts for name, parts in whole.items()}
    return {name: by_tensor[id(p)] for name, p in parameters.items() if id(p) in by_tensor}, left


def _slices(
    model: nn.Module, owner: str, kind: str, parameter: Tensor, sources: list[str], shapes: Shapes
) -> list[Slice]:
    """The parts of `sources` that this rank's `weight` or `bias` of the module `owner` consists of; empty if there are
    no sources, or if their rows are not those of the weight."""
    if not sources:
        return []
    module = model.get_submodule(owner)
    if isinstance(module, RowParallelLinear) and kind == "weight":
        width = module.input_size_per_partition
        return [(sources[0], 1, module.tp_rank * width, (module.tp_rank + 1) * width)]
    rows = _rows(model, owner, module, parameter, shapes[sources[0]])
    if rows is None:
        return [(sources[0], -1, 0, 0)]
    slices: list[Slice] = []
    for source in sources:  # each is one fused part, or several that follow each other
        offset = 0
        while rows and offset < shapes[source][0]:
            (total, start, stop), rows = rows[0], rows[1:]
            slices.append((source, 0, offset + start, offset + stop))
            offset += total
        if offset != shapes[source][0]:
            return []
    return [] if rows else slices


def _exist(slices: list[Slice], shapes: Shapes) -> bool:
    """Whether the trainer's tensors have all `slices`."""
    return all(dim < 0 or (dim < len(shapes[name]) and stop <= shapes[name][dim]) for name, dim, _, stop in slices)


def _rows(
    model: nn.Module, owner: str, module: Any, parameter: Tensor, shape: Sequence[int]
) -> list[tuple[int, int, int]] | None:
    """Per fused part: its number of rows, and the first and end of this rank's. None if every rank has all rows.
    `shape` is that of the trainer's first tensor for it."""
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
        outer = model.get_submodule(owner.rpartition(".")[0])
        if owner.endswith(".conv1d") and hasattr(outer, "key_dim"):  # queries, keys and values of linear attention
            sizes = [outer.key_dim, outer.key_dim, outer.value_dim]
        shares = [(size, size // module.tp_size) for size in sizes]
        return [(size, module.tp_rank * share, (module.tp_rank + 1) * share) for size, share in shares]
    if isinstance(module, VocabParallelEmbedding):
        held = module.shard_indices
        return [(module.org_vocab_size, held.org_vocab_start_index, held.org_vocab_end_index)]
    ranks = getattr(module, "tp_size", 1)
    if ranks > 1 and shape and parameter.shape[0] * ranks == shape[0]:  # numbers per head of linear attention
        share = parameter.shape[0]
        return [(shape[0], module.tp_rank * share, (module.tp_rank + 1) * share)]
    return None


def _held(module: Any, parameter: Tensor) -> Tensor:
    """The parameter that the module computes with, without the rows that pad the vocabulary."""
    if parameter.numel() == 0 or (isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear")):
        # Repacked for a CPU kernel. The layer's output for the identity matrix is the weight, bit for bit, because all
        # products but one are with 0.
        width = getattr(module, "input_size_per_partition", None) or module.input_size
        identity = torch.eye(width, dtype=parameter.dtype, device=parameter.device)
        with torch.inference_mode():
            parameter = module.quant_method.apply(module, identity, None).t()
    if (unpacked := getattr(module, "_cpu_unpacked_conv_weight", None)) is not None:
        from vllm._custom_ops import causal_conv1d_weight_pack

        # The kernel reads the packed weight. vLLM keeps the other one next to it, which counts if it packs to it.
        return unpacked if torch.equal(causal_conv1d_weight_pack(unpacked), parameter) else parameter
    if isinstance(module, VocabParallelEmbedding):
        return parameter[: module.shard_indices.num_org_elements]
    return parameter
