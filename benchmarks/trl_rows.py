"""TRL's rows of trl_whole_step.py: GRPOTrainer with rollouts, in the process that the script starts for a row."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import zlib
from pathlib import Path
from typing import Any

ROWS: dict[str, dict[str, Any]] = {
    "trl_vllm": {"use_vllm": True, "vllm_mode": "colocate"},
    "trl_continuous": {"use_transformers_continuous_batching": True},
    "trl_generate": {},
}
"""Row → what its GRPOConfig has beside what all rows have."""
WARMUP_STEPS = 1
"""First steps that are not counted: kernels are compiled, allocators fill."""
ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "MASTER_ADDR": "127.0.0.1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # TRL writes weights into the model of an engine in its own process
    "VLLM_NO_USAGE_STATS": "1",
}
CPU_ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}
CPU_VLLM = {"dtype": "float32", "compilation_config": {"mode": 0, "cudagraph_mode": "NONE"}}
"""A rehearsal's settings for vllm.LLM."""


def trl(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """`GRPOTrainer.train`: what it does for each step."""
    gpu = arguments.device == "cuda"
    for name, value in (ENVIRONMENT if gpu else ENVIRONMENT | CPU_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    if arguments.row != "trl_vllm":  # the KV cache of `generate` grows with each token; vLLM's sleep mode forbids it
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    from trl_side import Clock, TimedGRPOTrainer  # before what it guards against

    # isort: split
    import torch
    from transformers import AutoProcessor
    from trl import GRPOConfig  # type: ignore[import-not-found]

    differences: list[float] = []

    class Timed(TimedGRPOTrainer):
        sampling = 0.0

        def _generate_single_turn(self, *words: Any, **named: Any) -> Any:
            started = time.perf_counter()
            output = super()._generate_single_turn(*words, **named)
            self.sampling = time.perf_counter() - started
            return output

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            self.rollouts["sampling"] = self.sampling
            differences.extend(self._metrics["train"]["sampling/sampling_logp_difference/mean"][-1:])
            return output

    class WritingClock(Clock):
        def on_step_end(self, *words: Any, **named: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
            super().on_step_end(*words, **named)
            if len(self.steps) > WARMUP_STEPS:  # now already, because the row may be killed during its next step
                part = arguments.result.with_suffix(".part")
                part.write_text(json.dumps(measured(self.steps[WARMUP_STEPS:])))
                part.replace(arguments.result)

    def measured(steps: list[dict[str, float]]) -> dict[str, Any]:
        return {
            "seconds": [step["step"] for step in steps],
            "sampling": statistics.mean(step["sampling"] for step in steps),
            "training": statistics.mean(step["step"] - step["rollout"] for step in steps),
            "answer": statistics.mean(step["completion"] for step in steps) / batch,
            "prompt": statistics.mean(step["prompt"] for step in steps) / batch,
            "peak": torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0,
            "difference": differences,
        }

    model = arguments.model or str(tiny_checkpoint())
    processor = AutoProcessor.from_pretrained(model, padding_side="left")  # type: ignore[no-untyped-call]
    tokenizer = processor.tokenizer
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    # As in the product. A sampled placeholder would end TRL's run, because it has no image.
    never = sorted({id for id, token in tokenizer.added_tokens_decoder.items() if token.special} - {ends})
    with_vllm = arguments.row == "trl_vllm"
    batch = arguments.groups * arguments.group_size
    config = GRPOConfig(
        output_dir=str(folder),
        use_cpu=not gpu,
        bf16=gpu,
        model_init_kwargs={"dtype": "bfloat16" if gpu else "float32", "attn_implementation": "sdpa"},
        gradient_checkpointing=False,
        per_device_train_batch_size=min(arguments.trl_micro_batch, batch),
        gradient_accumulation_steps=max(1, batch // arguments.trl_micro_batch),  # one generation per optimizer step
        num_generations=arguments.group_size,
        max_completion_length=arguments.new_tokens,
        max_steps=WARMUP_STEPS + arguments.steps,
        num_iterations=1,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        generation_kwargs={"logit_bias": dict.fromkeys(never, -1000.0)} if with_vllm else {"suppress_tokens": never},
        vllm_gpu_memory_utilization=arguments.trl_vllm_memory,
        vllm_max_model_length=arguments.seq_len,
        vllm_enable_sleep_mode=arguments.trl_sleep,
        beta=0.0,
        loss_type="dapo",
        learning_rate=1e-6,
        optim="adamw_torch_fused",
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **ROWS[arguments.row],
    )
    if with_vllm:
        prepare_vllm(arguments, folder, processor.image_token_id)
    clock = WritingClock()
    trainer = Timed(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=problems(arguments, config.max_steps * arguments.groups),
        processing_class=processor,
        callbacks=[clock],
    )
    clock.trainer = trainer
    trainer.train()
    return measured(clock.steps[WARMUP_STEPS:])


def prepare_vllm(arguments: argparse.Namespace, folder: Path, image_token: int) -> None:
    """Replace the class of TRL's colocated engine by one with the settings and prompts that the docstring of
    trl_whole_step.py names."""
    import torch
    import trl.generation.vllm_generation as generation  # type: ignore[import-not-found]

    if not hasattr(generation, "LLM"):  # vLLM is not installed, as TRL will say
        return
    gpu = arguments.device == "cuda"
    if not gpu:  # vLLM would pack its weights, and TRL could not write to them
        from vllm.model_executor.layers import utils

        utils.dispatch_cpu_unquantized_gemm = lambda layer, **_: setattr(
            layer, "cpu_linear", torch.nn.functional.linear
        )
    settings = {"dtype": "bfloat16"} | arguments.trl_vllm | ({} if gpu else CPU_VLLM)

    class Engine(generation.LLM):  # type: ignore[misc]
        def __init__(self, **named: Any) -> None:
            store = f"file://{folder}/store"
            torch.distributed.init_process_group("nccl" if gpu else "gloo", init_method=store, rank=0, world_size=1)
            super().__init__(**(settings | named))

        def generate(self, prompts: list[dict[str, Any]], **named: Any) -> Any:
            for prompt in prompts:
                ids = prompt["prompt_token_ids"]
                before = [None, *ids[:-1]]
                pairs = zip(before, ids, strict=True)
                prompt["prompt_token_ids"] = [id for last, id in pairs if not last == id == image_token]
            return super().generate(prompts, **named)

    generation.LLM = Engine


def problems(arguments: argparse.Namespace, count: int) -> Any:
    """A dataset of as many problems of noise_task.py, whose images are made before any clock runs."""
    import numpy as np
    from datasets import Dataset
    from noise_task import QUESTION, Look, Picture
    from PIL import Image

    prompts = []
    for index in range(count):
        (message,) = Look(Picture(str(index), index, arguments.side)).reset()
        noise: Any = message.content[0]
        picture = {"type": "image", "image": Image.fromarray(np.asarray(noise.source))}
        prompts.append([{"role": message.role, "content": [picture, {"type": "text", "text": QUESTION}]}])
    indices = Dataset.from_dict({"index": list(range(count))})
    return indices.with_transform(lambda rows: {"prompt": [prompts[index] for index in rows["index"]]})


def reward(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """noise_task.py's: siblings differ."""
    return [zlib.crc32(message["content"].encode()) / 2**32 for (message,) in completions]


def tiny_checkpoint() -> Path:
    """The folder of the checkpoint that vlmrl's rows use with `--size tiny`."""
    from noise_task import QUESTION

    from vlmrl.config.model import ModelConfig, TinyConfig, VLMConfig
    from vlmrl.models.checkpoints.tiny import ensure_tiny_checkpoint

    config = ModelConfig(name="qwen3vl_tiny", vlm=VLMConfig(family="qwen3_vl"), tiny=TinyConfig())
    return ensure_tiny_checkpoint(config, (QUESTION,))
