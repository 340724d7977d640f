"""TRL's side of trl_step.py: GRPOTrainer on a checkpoint folder and a folder of prompts. Runs in TRL's environment.

    python benchmarks/trl_side.py '{"checkpoint": DIR, "prompts": DIR, "result": FILE, "steps": 12, …}'

Writes what it measured as JSON to `result`. Nothing of vlmrl is imported here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

# PyPI's torchvision for Linux is built for CUDA: beside a CPU torch its extension does not load, and importing it
# fails where it describes these two operators. Nothing here calls them.
_torchvision_ops = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
if not torch.cuda.is_available():
    for cuda_only in ("torchaudio", "torchcodec"):  # libraries that an installed vLLM brings
        sys.modules[cuda_only] = None  # type: ignore[assignment]  # importing it now fails as if it were not installed
    _torchvision_ops.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    _torchvision_ops.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]

from datasets import Dataset  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import AutoImageProcessor, AutoProcessor, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]  # noqa: E402


def main(job: dict[str, Any]) -> None:
    torch.set_num_threads(job["threads"])
    settings = job["settings"]
    folder = job["checkpoint"]
    processor = AutoProcessor.from_pretrained(folder, padding_side="left")  # type: ignore[no-untyped-call]
    if settings["image_processor"] == "pil":
        processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")  # type: ignore[no-untyped-call]
    tokenizer = processor.tokenizer
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    specials = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    batch_size = job["groups"] * job["group_size"]
    micro_batch = settings["micro_batch"]
    config = GRPOConfig(
        output_dir=job["scratch"],
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32", "attn_implementation": settings["attention"]},
        gradient_checkpointing=False,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=batch_size // micro_batch,  # one generation of the whole batch per optimizer step
        num_generations=job["group_size"],
        max_completion_length=job["max_new_tokens"],
        max_steps=job["steps"],
        num_iterations=1,
        temperature=1.0,
        cache_implementation=settings["cache"],
        # What the product cannot sample either; TRL suppresses the image token alone, and a sampled video token would
        # end its run.
        generation_kwargs={"suppress_tokens": sorted(specials - {end_of_turn}), "eos_token_id": end_of_turn},
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        loss_type="dapo",  # token-level, normalized over the batch: the product's grpo
        scale_rewards="group",
        learning_rate=1.5e-3,
        adam_beta2=0.95,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        optim=settings["optimizer"],
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=job["seed"],
    )
    clock = Clock()
    trainer = TimedGRPOTrainer(
        model=folder,
        reward_funcs=reward(end_of_turn),
        args=config,
        train_dataset=read_prompts(Path(job["prompts"])),
        processing_class=processor,
        callbacks=[clock],
    )
    clock.trainer = trainer
    trainer.train()
    Path(job["result"]).write_text(json.dumps(clock.steps))


class TimedGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """Notes a step's rollouts: prompts to tokens and pixels, generate(), rewards, advantages."""

    rollouts: dict[str, float]
    """Seconds; tokens over the batch."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        started = time.perf_counter()
        output = super()._generate_and_score_completions(inputs)
        self.rollouts = {
            "rollout": time.perf_counter() - started,
            "prompt": float(output["prompt_mask"].sum()),
            "completion": float(output["completion_mask"].sum()),
        }
        return output


class Clock(TrainerCallback):
    """Wall-clock from the end of one optimizer step to the end of the next (the first: from the start of training)."""

    trainer: TimedGRPOTrainer

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.last, self.last_cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now, cpu = time.perf_counter(), time.process_time()
        self.steps.append({"step": now - self.last, "cpu": cpu - self.last_cpu} | self.trainer.rollouts)
        self.last, self.last_cpu = now, cpu


def read_prompts(folder: Path) -> Dataset:
    """One row per problem, in the order of the product's run; images decoded once, before any clock runs."""
    rows = json.loads((folder / "prompts.json").read_text())
    images = {path.name: Image.open(path).convert("RGB") for path in folder.glob("*.png")}
    prompts = [
        [
            {
                "role": message["role"],
                "content": [
                    {"type": "image", "image": images[part["image"]]} if "image" in part else {"type": "text", **part}
                    for part in message["content"]
                ],
            }
            for message in row["messages"]
        ]
        for row in rows
    ]

    def fill(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        return {
            "prompt": [prompts[index] for index in batch["index"]],
            "answer": [rows[index]["answer"] for index in batch["index"]],
        }

    return Dataset.from_dict({"index": list(range(len(rows)))}).with_transform(fill)


def reward(end_of_turn: int) -> Callable[..., list[float]]:
    """The task's reward for one turn: the mean of the share of right positions and the exact match; 0.0 for an answer
    that does not end."""

    def turn_reward(
        completions: list[list[dict[str, str]]], completion_ids: list[list[int]], answer: list[str], **_: Any
    ) -> list[float]:
        rewards = []
        for (message,), ids, right in zip(completions, completion_ids, answer, strict=True):
            said = message["content"].strip()
            share = sum(map(str.__eq__, said, right)) / max(len(said), len(right))
            rewards.append(0.5 * share + 0.5 * (said == right) if ids[-1] == end_of_turn else 0.0)
        return rewards

    return turn_reward


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
