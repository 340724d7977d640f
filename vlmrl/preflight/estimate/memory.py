"""Estimate the bytes that a run holds on the trainer's GPUs, on the servers' GPUs and on the host, by these formulas:

    learning     trainable parameters × (float32 weight 4 + gradient 4 + AdamW's averages 8, or 2 in 8 bits, + 4 for the
                 average of trainer.ema), on the host with trainer.cpu_offload, a slice of them on each rank with
                 trainer.sharding=full or optimizer;
                 + weight in the model's dtype, where that is not float32 and the ranks hold no slices;
                 + weight in the model's dtype and gradient 4 on the GPU, with trainer.sharding=optimizer
    frozen       the other parameters × weight in the model's dtype (model.lora, model.vlm.freeze_*), or 4.5 bits for
                 the language model's linear layers (model.lora.base_dtype=nf4), and trainer.feature_cache_mib where
                 the vision tower is among them
    reference    parameters × weight in reference.dtype, unless it is the policy without its adapters or is offloaded;
                 reference=ema keeps a float32 average besides, where that is not the dtype
    in transit   parameters × weight in the engine's dtype, for weight_sync=nccl and cuda_ipc
    activations  tokens of a micro-batch × layers × bytes
                 × (8 hidden + 2 (heads + 2 kv_heads) head_dim + 4 intermediate)
                 + 4 × 256 MiB for the chunks of logits, less where there are fewer logits;
                 with trainer.activation_checkpointing, `hidden` of every layer, and either the rest of one layer with
                 its gradients or the logits, which do not exist at the same time
    engine       with inference=embedded and while it samples: slots of the KV cache × 2 × layers × kv_heads × head_dim
                 × bytes; on a GPU + the larger of 8 bytes per logit of the rollouts that are sampled at a time and
                 new tokens of a pass of prefill × (2 hidden + 3 intermediate) × bytes; where less than that and 4 GB is
                 free, a batch is sampled in parts (inference/embedded/kv_plan.py); on a CPU the cache doubles when it
                 is full, + 48 bytes per logit; a rank samples its share of a batch, with parameters × bytes besides
                 where the weights are sliced; all of it is gone before the passes of a step, so the larger of the two
                 counts
    server       gpu_memory_utilization × the GPU, which holds parameters × weight / tensor_parallel_size, and
                 KV cache of 2 × layers × kv_heads × head_dim × bytes for each token
    pixels       distinct images alive × width × height × (bytes per pixel that the processor makes + 3)

Activations are the tensors that the layers keep for the backward pass: inputs of norms and projections, queries, keys,
values, and the outputs of attention and MLP. For the 2B model in bfloat16 they are 45 GB for 16,384 tokens. A step of
that model that held all logits at once (30 GB in float32, with their softmax and gradient) was measured on an H200 at
75 GB. Left out: the activations of the vision tower, which are small where answers are long, and fragmentation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import EVERY_LINEAR_LAYER, BaseDtype, Dtype, LoraConfig, Part
from vlmrl.config.reference import CopyConfig, EmaReferenceConfig
from vlmrl.config.run import BY_REWARD, Mode, RunConfig
from vlmrl.config.trainer import Optimizer, Sharding
from vlmrl.inference.embedded import kv_plan
from vlmrl.models.families import family_of
from vlmrl.preflight.estimate.sizes import Sizes, TextSizes

if TYPE_CHECKING:
    from vlmrl.preflight.estimate.episode import EpisodeEstimate

BYTES = {Dtype.float32: 4, Dtype.bfloat16: 2, Dtype.float16: 2}

LOGITS_BYTES = 256 << 20
"""Bytes of logits that the head computes at a time (models/head.py)."""

NF4_BYTES = 0.5 + 4 / 64
"""Bytes of a weight in 4 bits: half a byte, and a float32 magnitude for each block of 64 (models/nf4.py)."""

BYTES_PER_LOGIT = 48
"""Of the tokens that the embedded engine samples at a time: logits and logprobs in float32, and the cumulative
distribution in float64, with what comes between them (inference/embedded/sampling.py)."""

FIRST_CAPACITY_SLOTS = 4096
"""The smallest KV cache of the embedded engine (inference/embedded/kv_cache.py)."""

SERVER_BYTES = 3 * 10**9
"""What a vLLM server needs besides weights and KV cache: activations, CUDA graphs, the CUDA context."""


@dataclass(frozen=True)
class TrainerMemory:
    """Bytes that one rank holds."""

    learning: int
    """Weights, gradients and averages of the trainable parameters, on the rank's device."""
    frozen: int
    reference: int
    """Weights of the second model."""
    in_transit: int
    activations: int | None
    """Of a micro-batch where every answer is as long as it may be; None where the model's layers are not known."""
    full_activations: int | None
    """Of a micro-batch that shorter answers fill up to `trainer.micro_batch_tokens`; None likewise."""
    engine: int | None
    """KV cache and probabilities of the embedded engine while it samples a step's rollouts; 0 for servers, None where
    the layers are not known."""
    on_host: int
    """The part of the trainable parameters' bytes that is in the host's memory."""

    @property
    def fixed(self) -> int:
        """Bytes that the device holds from the first step to the last."""
        return self.learning + self.frozen + self.reference + self.in_transit

    @property
    def peak(self) -> int | None:
        """The most bytes on the device at a time where every answer is as long as it may be; None where the layers are
        not known."""
        return self._peak(self.activations)

    @property
    def full_peak(self) -> int | None:
        """The same with full micro-batches."""
        return self._peak(self.full_activations)

    def _peak(self, activations: int | None) -> int | None:
        if activations is None or self.engine is None:
            return None
        return self.fixed + max(activations, self.engine)


@dataclass(frozen=True)
class StepTokens:
    """Tokens of a step, as the plan estimates them (plan.py)."""

    rows: int
    """Of a micro-batch, packed."""
    loss_tokens: int
    """Of a micro-batch."""
    prompts: int = 0
    """Of the step's distinct first prompts: what the engine prefills at once."""
    rollouts: int = 0
    """Rows of the whole step as a prefix tree: what the engine's KV cache holds in the end."""
    sampled_at_a_time: int = 0
    """Rollouts of the step."""
    full_rows: int = 0
    """Of a full micro-batch, where that is more than `rows`."""

    @property
    def slots(self) -> int:
        """Slots of the embedded engine's KV cache on a GPU: the last token of an answer has none, and one slot is read
        by no rollout."""
        return self.rollouts - self.sampled_at_a_time + 1


def trainer_memory(
    config: RunConfig, sizes: Sizes, step: StepTokens, ranks: int, *, on_gpu: bool = False
) -> TrainerMemory | None:
    """Memory of a rank; None where the model is unknown. `on_gpu`: whether the embedded engine samples on a GPU."""
    if sizes.parameters is None:
        return None
    weight = BYTES[config.model.dtype]
    in_transit = 0
    if isinstance(config.inference, VllmConfig) and config.weight_sync.kind in ("nccl", "cuda_ipc"):
        in_transit = sizes.parameters * BYTES[config.inference.dtype]
    on_device, on_host = learning_bytes(config, ranks)
    learns, frozen = learning_parameters(config, sizes)
    cache = config.trainer.feature_cache_mib << 20 if vision_is_frozen(config) else 0
    rows = max(step.rows, step.full_rows)
    full = replace(step, rows=rows, loss_tokens=math.ceil(step.loss_tokens * rows / max(1, step.rows)))
    in_4_bits = quantized_parameters(config, sizes.text)
    return TrainerMemory(
        learning=math.ceil(learns * on_device),
        frozen=math.ceil((frozen - in_4_bits) * weight + in_4_bits * NF4_BYTES) + cache,
        reference=reference_bytes(config, sizes.parameters),
        in_transit=in_transit,
        activations=None if sizes.text is None else _activations(config, sizes.text, step),
        full_activations=None if sizes.text is None else _activations(config, sizes.text, full),
        engine=None if sizes.text is None else engine_bytes(config, sizes, step, ranks, on_gpu=on_gpu),
        on_host=math.ceil(learns * on_host),
    )


def reference_bytes(config: RunConfig, parameters: int) -> int:
    """Bytes of the reference's weights on each rank's device. A teacher from a folder counts as one of the policy's
    size."""
    chosen = config.reference
    if config.mode not in (*BY_REWARD, Mode.dpo) or not isinstance(chosen, CopyConfig) or config.reference_is_policy:
        return 0
    if chosen.offload and config.model.device != "cpu":
        return 0
    dtype = config.model.dtype if chosen.dtype is Dtype.auto else chosen.dtype
    averages = 4 if isinstance(chosen, EmaReferenceConfig) and dtype is not Dtype.float32 else 0
    return parameters * (BYTES[dtype] + averages)


def vision_is_frozen(config: RunConfig) -> bool:
    """Whether there is a vision tower that is not trained."""
    vlm = config.model.vlm
    lora = config.model.lora
    adapted = lora is not None and not set(lora.parts) <= {Part.language_model}
    return vlm is not None and (vlm.freeze_vision or (lora is not None and not adapted))


def learning_parameters(config: RunConfig, sizes: Sizes) -> tuple[int, int]:
    """Numbers of trainable parameters, adapters included, and of frozen ones."""
    assert sizes.parameters is not None, "only for a model whose parameters are known"
    vision = sizes.vision_parameters or 0
    if config.model.lora is not None:
        return adapter_parameters(config.model.lora, sizes.text), sizes.parameters
    if config.model.vlm is not None and config.model.vlm.freeze_language:
        return vision, sizes.parameters - vision
    return (sizes.parameters - vision, vision) if vision_is_frozen(config) else (sizes.parameters, 0)


def adapter_parameters(lora: LoraConfig, text: TextSizes | None) -> int:
    """rank × (columns + rows), summed over the language model's linear layers with an adapter; 0 where the layers are
    unknown. Adapters of the vision tower and of the projector are left out: they are less than a tenth of the others.

    >>> text = TextSizes(layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2, head_dim=32, vocabulary=448)
    >>> adapter_parameters(LoraConfig(rank=4, targets=["q_proj", "down_proj"]), text)
    3072
    """
    if text is None or Part.language_model not in lora.parts:
        return 0
    shapes = _linear_layers(text)
    names = shapes if EVERY_LINEAR_LAYER in lora.targets else lora.targets
    return sum(text.layers * lora.rank * sum(shapes.get(name, (0, 0))) for name in names)


def quantized_parameters(config: RunConfig, text: TextSizes | None) -> int:
    """How many weights are held in 4 bits; 0 where the layers are unknown."""
    lora = config.model.lora
    if text is None or lora is None or lora.base_dtype is not BaseDtype.nf4:
        return 0
    return text.layers * sum(columns * rows for columns, rows in _linear_layers(text).values())


def _linear_layers(text: TextSizes) -> dict[str, tuple[int, int]]:
    """The linear layers of one layer of the language model: columns and rows, by name. Experts are none."""
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    layers = {
        "q_proj": (text.hidden, queries),
        "k_proj": (text.hidden, keys),
        "v_proj": (text.hidden, keys),
        "o_proj": (queries, text.hidden),
    }
    if text.has_experts:
        return layers
    return layers | {
        "gate_proj": (text.hidden, text.intermediate),
        "up_proj": (text.hidden, text.intermediate),
        "down_proj": (text.intermediate, text.hidden),
    }


def learning_bytes(config: RunConfig, ranks: int) -> tuple[float, float]:
    """Bytes per trainable parameter that each rank holds on its device and on the host.

    A bfloat16 model that is trained in one process takes 2 + 4 + 4 + 8 bytes on its GPU, or 2 there and 16 on the host.
    """
    trainer, weight = config.trainer, BYTES[config.model.dtype]
    sharded = ranks > 1 and trainer.sharding is not Sharding.none
    kept_whole = sharded and trainer.sharding is Sharding.optimizer
    offloaded = trainer.cpu_offload and config.model.device != "cpu"
    averages = (8 if trainer.optimizer is Optimizer.adamw else 2) + (0 if trainer.ema is None else 4)
    learning = (4 + 4 + averages) / (ranks if sharded else 1)
    computed_with = 0 if sharded or (weight == 4 and not offloaded) else weight
    if kept_whole:
        computed_with = weight + 4
    return (computed_with, learning) if offloaded else (computed_with + learning, 0)


def _activations(config: RunConfig, text: TextSizes, step: StepTokens) -> int:
    of_row = BYTES[config.model.dtype] * step.rows
    layer = 8 * text.hidden + 2 * (text.heads + 2 * text.kv_heads) * text.head_dim + 4 * text.intermediate
    logits = min(step.loss_tokens * text.vocabulary * 4, LOGITS_BYTES) * 4
    if not config.trainer.activation_checkpointing:
        return of_row * text.layers * layer + logits
    gradients = 2 * text.hidden + 3 * text.intermediate
    return of_row * text.layers * text.hidden + max(of_row * (layer + gradients), logits)


def engine_bytes(config: RunConfig, sizes: Sizes, step: StepTokens, ranks: int, *, on_gpu: bool) -> int:
    """What the embedded engine holds on each rank for the rollouts of a step, if nothing else needs the memory."""
    text = sizes.text
    assert text is not None, "only for a model whose layers are known"
    if isinstance(config.inference, VllmConfig):
        return 0
    rows, whole = -(-step.sampled_at_a_time // ranks), gathered_bytes(config, sizes, ranks)
    if on_gpu:
        weight, prompts = BYTES[config.model.dtype], -(-step.prompts // ranks)
        prefill = kv_plan.prefill_bytes(prompts, text.hidden, text.intermediate, weight)
        working = max(prefill, kv_plan.logits_bytes(rows, text.vocabulary))
        states = kv_plan.states_bytes(rows, state_bytes(config, text))
        return -(-step.slots // ranks) * slot_bytes(config, text) + working + states + whole
    slots, before = max(FIRST_CAPACITY_SLOTS, 2 * step.prompts // ranks), 0
    while slots < step.rollouts / ranks:
        slots, before = 2 * (slots + 1), slots
    of_row = BYTES_PER_LOGIT * text.vocabulary + state_bytes(config, text)
    return (slots + before) * slot_bytes(config, text) + rows * of_row + whole


def slot_bytes(config: RunConfig, text: TextSizes) -> int:
    """Bytes of a token in the KV cache of the embedded engine."""
    layers = text.layers - text.stateful_layers
    return kv_plan.slot_bytes(layers, text.kv_heads, text.head_dim, BYTES[config.model.dtype])


def state_bytes(config: RunConfig, text: TextSizes) -> int:
    """Bytes of the states of a row in the embedded engine; 0 for a model whose layers carry none."""
    return BYTES[config.model.dtype] * text.conv_state + 4 * text.recurrent_state


def engine_parts(config: RunConfig, sizes: Sizes, step: StepTokens, free: int, ranks: int) -> int:
    """In how many parts the embedded engine samples a rank's share of a step with `free` bytes beside weights and
    optimizer state; 0 where its working memory alone does not fit."""
    text = sizes.text
    assert text is not None, "only for a model whose layers are known"
    rows, left = -(-step.sampled_at_a_time // ranks), max(0, free - gathered_bytes(config, sizes, ranks))
    states = state_bytes(config, text)
    held = kv_plan.affordable_slots(left, slot_bytes(config, text), rows, text.vocabulary, states)
    return -(-step.slots // (ranks * held)) if held else 0


def gathered_bytes(config: RunConfig, sizes: Sizes, ranks: int) -> int:
    """Bytes of the whole weights that a rank gathers in order to sample; 0 where it holds them anyway."""
    is_sliced = ranks > 1 and config.trainer.sharding is not Sharding.none
    return (sizes.parameters or 0) * BYTES[config.model.dtype] if is_sliced else 0


@dataclass(frozen=True)
class ServerMemory:
    """Bytes that a server holds on each of its GPUs."""

    weights: int
    cache_per_token: int | None


def server_memory(config: VllmConfig, sizes: Sizes) -> ServerMemory | None:
    """Memory of one server; None where the model is unknown."""
    if sizes.parameters is None:
        return None
    weight, parallel = BYTES[config.dtype], config.tensor_parallel_size
    cache = None
    if sizes.text is not None:
        kv_heads = max(1, sizes.text.kv_heads // parallel)
        cache = 2 * sizes.text.layers * kv_heads * sizes.text.head_dim * weight
    return ServerMemory(math.ceil(sizes.parameters * weight / parallel), cache)


def pixel_bytes(config: RunConfig, episode: EpisodeEstimate) -> int:
    """Bytes of the images and videos that may be alive at once: those of the batches ahead, of the one that is opened
    while a step is learned, and of an evaluation, all distinct."""
    problems = (config.orchestrator.max_staleness + 2) * config.orchestrator.groups_per_step
    problems += config.orchestrator.eval.problems
    per_pixel = 3 + family_of(config.model.vlm).processed_bytes_per_pixel
    # A frame of a video is half of a grid of patches, and an image is a grid of its own with its pixels twice.
    videos = sum(math.prod(video) for video in episode.videos) * (3 + 12)
    return problems * (sum(width * height * per_pixel for width, height in episode.images) + videos)
