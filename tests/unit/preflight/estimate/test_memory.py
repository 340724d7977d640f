"""Estimated bytes against the bytes that a trainer holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from support import helpers
from vlmrl.config.inference import VllmConfig
from vlmrl.config.run import RunConfig
from vlmrl.preflight.estimate.episode import EpisodeEstimate
from vlmrl.preflight.estimate.memory import (
    StepTokens,
    TrainerMemory,
    engine_bytes,
    engine_parts,
    learning_bytes,
    learning_parameters,
    quantized_parameters,
    reference_bytes,
    trainer_memory,
)
from vlmrl.preflight.estimate.plan import tokens_of_micro_batch
from vlmrl.preflight.estimate.sizes import Sizes, find_sizes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("offload", [False, True])
def test_what_learns_holds_what_was_said(
    dtype: str, offload: bool, run_config: Callable[..., RunConfig], tiny_model: Callable[[], Any]
) -> None:
    """The tiny model's weights, masters, gradients and averages after a step, in bytes."""
    import torch

    from vlmrl.trainer.optimizer import make_optimizer
    from vlmrl.trainer.weights import PlainWeights

    config = run_config(f"model.dtype={dtype}", f"trainer.cpu_offload={offload}", "model.device=cpu")
    model = tiny_model().to(getattr(torch, dtype))
    weights = PlainWeights(model, offload=offload, ranks=1)
    optimizer = make_optimizer(config.trainer, weights.trainable())
    learning = list(weights.trainable().values())
    for parameter in model.parameters():
        parameter.sum().backward()
    optimizer.step()
    averages = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    gradients = [tensor.grad for tensor in learning if tensor.grad is not None]
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *learning, *gradients, *averages)}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    memory = trainer_memory(config, Sizes("a test", parameters, 0, None, None), StepTokens(0, 0), ranks=1)
    assert memory is not None
    assert memory.on_host == 0, "nothing moves where the model is on a CPU"
    assert memory.fixed == pytest.approx(sum(held.values()), rel=0.01)


def test_slices_and_eight_bits(run_config: Callable[..., RunConfig]) -> None:
    def bytes_of(*overrides: str, ranks: int = 1) -> tuple[float, float]:
        return learning_bytes(run_config("model=qwen3vl", *overrides), ranks)

    assert bytes_of() == (2 + 16, 0)
    assert bytes_of("trainer.optimizer=adamw_8bit") == (2 + 10, 0)
    assert bytes_of("trainer.ema=0.99") == (2 + 16 + 4, 0)
    assert bytes_of("trainer.cpu_offload=true") == (2, 16)
    assert bytes_of(ranks=4) == (4, 0)
    assert bytes_of("trainer.sharding=none", ranks=4) == (18, 0)
    assert bytes_of("trainer.sharding=optimizer", ranks=4) == (2 + 4 + 4, 0)
    assert bytes_of("trainer.sharding=optimizer", "trainer.cpu_offload=true", ranks=4) == (2 + 4, 4)
    assert bytes_of("trainer.sharding=optimizer") == bytes_of()
    assert bytes_of("trainer.cpu_offload=true", ranks=4) == (0, 4)
    assert bytes_of("model.dtype=float32") == (16, 0)


@pytest.mark.parametrize(
    ("overrides", "learns"),
    [
        ((), 428_480),
        (("model.vlm.freeze_vision=true",), 428_480 - 301_056),
        (("model.vlm.freeze_language=true",), 301_056),
    ],
)
def test_what_is_frozen_does_not_learn(
    overrides: tuple[str, ...], learns: int, run_config: Callable[..., RunConfig]
) -> None:
    config = run_config(*overrides)
    assert learning_parameters(config, find_sizes(config.model)) == (learns, 428_480 - learns)


def test_adapters_are_counted_exactly(run_config: Callable[..., RunConfig], tiny_model: Callable[[], Any]) -> None:
    pytest.importorskip("peft")
    from vlmrl.models.lora import add_adapters

    config = run_config("model/lora=all_linear")
    config.model.tiny = helpers.TINY.tiny
    model = tiny_model()
    parameters = sum(p.numel() for p in model.parameters())
    assert config.model.lora is not None
    add_adapters(model, config.model.lora)
    adapters = sum(p.numel() for p in model.parameters()) - parameters
    assert learning_parameters(config, find_sizes(config.model)) == (adapters, parameters)


def test_recomputed_layers_keep_their_inputs_alone(run_config: Callable[..., RunConfig]) -> None:
    def activations(*overrides: str) -> int:
        config = run_config("model=qwen3vl", "model/size=2b", *overrides)
        memory = trainer_memory(config, find_sizes(config.model), StepTokens(16384, 0), ranks=1)
        assert memory is not None
        assert memory.activations is not None
        return memory.activations

    assert activations() == pytest.approx(45e9, rel=0.01)
    assert activations("trainer.activation_checkpointing=true") == pytest.approx(4.23e9, rel=0.01)


def test_the_recipe_for_one_gpu_fits_next_to_its_server(run_config: Callable[..., RunConfig]) -> None:
    """On 80 GiB, of which the CUDA contexts of both processes take 2. With the 4B model it would not fit."""

    def fits(*overrides: str) -> bool:
        config = run_config("experiment=color_codeword_1gpu", *overrides)
        sizes, episode = find_sizes(config.model), EpisodeEstimate(turns=2, images=((256, 256),) * 4, characters=178)
        memory = trainer_memory(config, sizes, tokens_of_micro_batch(config, sizes, episode), ranks=1)
        assert isinstance(config.inference, VllmConfig)
        assert memory is not None
        assert memory.peak is not None
        assert memory.on_host == 0, "AdamW on the host took 4.8 of the 5.9 s of a step"
        return memory.peak + config.inference.gpu_memory_utilization * 80 * 2**30 <= (80 - 2) * 2**30

    assert fits()
    assert not fits("model/size=4b")


def test_shorter_answers_fill_the_micro_batches(run_config: Callable[..., RunConfig]) -> None:
    """Groups of 9,235 tokens: one to a micro-batch of 16,384. On an H200 such a step, whose siblings shared the first
    tokens of their answers, had a micro-batch of 16,254, and a peak of 74 GiB."""
    episode = EpisodeEstimate(turns=1, images=((1000, 1000),), characters=60)

    def of(*overrides: str) -> tuple[TrainerMemory, StepTokens]:
        config = run_config(
            *("model=qwen3vl", "model/size=2b", "model.init=random", "model.dtype=bfloat16", "model.device=cuda:0"),
            *("orchestrator.max_new_tokens=512", "orchestrator.groups_per_step=16", "orchestrator.group_size=16"),
            *("trainer=default", "trainer.seq_len=2048", *overrides),
        )
        sizes = find_sizes(config.model)
        step = tokens_of_micro_batch(config, sizes, episode)
        memory = trainer_memory(config, sizes, step, ranks=1, on_gpu=True)
        assert memory is not None
        assert memory.peak is not None
        assert memory.full_peak is not None
        return memory, step

    memory, step = of("trainer.micro_batch_tokens=16384")
    assert 9000 < step.rows < 9400
    assert step.full_rows == 16384
    assert memory.peak is not None
    assert memory.full_peak is not None
    assert memory.peak < 0.9 * 74 * 2**30 < memory.full_peak < 1.1 * 74 * 2**30
    alone, step = of("trainer.packing=none")
    assert alone.full_peak == alone.peak
    whole, step = of("trainer.micro_batch_tokens=1000000")
    assert step.full_rows == step.rows
    assert whole.full_peak == whole.peak


def test_a_base_in_4_bits_is_counted_exactly(
    run_config: Callable[..., RunConfig], tiny_model: Callable[[], Any]
) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    from vlmrl.models.lora import select_trainable
    from vlmrl.models.nf4 import Nf4Linear, in_4_bits

    config = run_config("model/lora=nf4", "trainer.feature_cache_mib=0")
    config.model.tiny = helpers.TINY.tiny
    model = tiny_model()
    select_trainable(model, config.model)
    sizes = find_sizes(config.model)
    assert quantized_parameters(config, sizes.text) == in_4_bits(model)
    held = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    held += sum(b.nbytes for module in model.modules() if isinstance(module, Nf4Linear) for b in module.buffers())
    memory = trainer_memory(config, sizes, StepTokens(0, 0), ranks=1)
    assert memory is not None
    assert memory.frozen == held


def test_the_cache_of_the_embedded_engine_on_a_gpu(run_config: Callable[..., RunConfig]) -> None:
    """64 groups of 16 on a 2B, with prompts of 1,043 tokens and answers of 512. By hand: 64 × 1,043 + 1,024 × 511 + 1
    slots of 2 × 28 layers × 8 heads × 128 numbers × 2 bytes, and two arrays of 1,024 × 151,936 logits, or passes of
    24,576 tokens with 2 × 2,048 + 3 × 6,144 numbers each. A pool leaves 4 GB besides. Of 4 ranks each has a quarter,
    and gathers the weights if it holds slices of them."""
    config = run_config("model=qwen3vl", "model/size=2b", "inference=embedded")
    sizes = find_sizes(config.model)
    text = sizes.text
    assert text is not None
    step = StepTokens(0, 0, prompts=64 * 1043, rollouts=64 * 1043 + 1024 * 512, sampled_at_a_time=1024)
    cache, working = 590_017 * 114_688, 4 * 10**9 + 2 * 4 * 1024 * 151_936
    logits, prefill = 2 * 4 * 1024 * 151_936, 24_576 * (2 * 2048 + 3 * 6144) * 2
    assert logits > prefill
    gathered, quarter = 2 * (sizes.parameters or 0), 16_688 * (2 * 2048 + 3 * 6144) * 2
    assert engine_bytes(config, sizes, step, 1, on_gpu=True) == cache + logits
    few = replace(step, rollouts=64 * 1043 + 64 * 512, sampled_at_a_time=64)
    assert engine_bytes(config, sizes, few, 1, on_gpu=True) == (64 * (1043 + 511) + 1) * 114_688 + prefill
    assert engine_parts(config, sizes, step, round((cache + working) / 0.95) + 10**6, 1) == 1
    assert engine_parts(config, sizes, step, round((cache / 2 + working) / 0.95), 1) == 3, "just less than half of it"
    assert engine_parts(config, sizes, step, 10**9, 1) == 0, "less than the logits"
    assert engine_bytes(config, sizes, step, 4, on_gpu=True) - gathered == -(-590_017 // 4) * 114_688 + quarter
    assert engine_parts(config, sizes, step, round((cache / 4 + working) / 0.95) + gathered, 4) == 1
    alike = run_config("model=qwen3vl", "model/size=2b", "inference=embedded", "trainer.sharding=none")
    assert engine_bytes(alike, sizes, step, 4, on_gpu=True) == -(-590_017 // 4) * 114_688 + quarter


def test_the_cache_of_the_embedded_engine(run_config: Callable[..., RunConfig]) -> None:
    """The pool doubles when it is full, and the old one is copied into the new one."""
    from vlmrl.inference.embedded.kv_cache import KVCache

    config = run_config("model=qwen3vl", "inference=embedded")
    sizes = find_sizes(config.model)
    text = sizes.text
    assert text is not None
    per_slot = 2 * text.layers * text.kv_heads * text.head_dim * 2
    for prompts, decoded, at_a_time in ((10_000, 9_000, 1), (1_000, 9_000, 1), (1_000, 9_000, 0)):
        cache, most = KVCache(), 0
        cache.allocate(prompts)
        for _ in range(decoded):
            before = cache.pool.capacity
            cache.allocate(1)
            grew = cache.pool.capacity != before
            most = max(most, cache.pool.capacity + (before if grew else 0))
        step = StepTokens(0, 0, prompts, prompts + decoded, at_a_time)
        assert engine_bytes(config, sizes, step, 1, on_gpu=False) == max(most, cache.pool.capacity) * per_slot + (
            48 * at_a_time * text.vocabulary
        )
    assert engine_bytes(run_config("inference=vllm"), sizes, step, 1, on_gpu=True) == 0


@pytest.mark.parametrize(
    ("overrides", "bytes_each"),
    [
        ((), 0),
        (("reference=initial",), 2),
        (("reference=initial", "reference.dtype=float32"), 4),
        (("reference=ema",), 2 + 4),
        (("reference=ema", "reference.dtype=float32"), 4),
        (("reference=initial", "reference.offload=true"), 0),
        (("reference=initial", "model/lora=all_linear"), 0),
        (("reference=initial", "model/lora=all_linear", "reference.refresh_every=10"), 2),
        (("reference=initial", "mode=sft"), 0),
    ],
)
def test_the_weights_of_the_reference(
    overrides: tuple[str, ...], bytes_each: int, run_config: Callable[..., RunConfig]
) -> None:
    config = run_config("model=qwen3vl", "model.dtype=bfloat16", "model.device=cuda", *overrides)
    assert reference_bytes(config, 1000) == 1000 * bytes_each
