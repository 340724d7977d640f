"""`mode=rl`: the supervised warm-up, if `trainer.warmup.steps` asks for one, then reinforcement learning (loop.py)."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from vlmrl.inference.vllm.engine import VllmEngine
from vlmrl.orchestrator.faults import FaultWatch
from vlmrl.orchestrator.length import Length
from vlmrl.orchestrator.loop import ExitReason, Loop
from vlmrl.orchestrator.sampling import Truncation
from vlmrl.orchestrator.supervised import AFTER_WARMUP, demonstrate
from vlmrl.orchestrator.task_threads import TaskThreads
from vlmrl.orchestrator.vision_gap import VisionGap
from vlmrl.runs.build import Run
from vlmrl.runs.reference import has_reference
from vlmrl.runs.saving import save_if_due
from vlmrl.runs.sft import note, take_supervised_steps
from vlmrl.types import TrainingSample


async def train(run: Run) -> ExitReason:
    """Train from the policy version that the trainer holds to the last step or the evaluation target."""
    if run.trainer.version == 0 and not await take_supervised_steps(run, run.config.trainer.warmup.steps):
        return "interrupted"
    run.monitor.phase("rl")
    return await loop_of(run).run()


def loop_of(run: Run) -> Loop:
    """The training loop over the parts of a run."""
    config = run.config
    threads = TaskThreads()
    problems = run.problems.stream("rl", "train", indices=run.position.rl, chooser=run.curriculum)
    embeddings: Any = run.policy.model.get_input_embeddings()
    return Loop(
        config=config.orchestrator,
        algorithm=config.algorithm.for_answers_up_to(config.orchestrator.max_new_tokens),
        length=Length(problems, run.steps, config.trainer.max_epochs),
        vocab_size=embeddings.num_embeddings,
        runner=dataclasses.replace(
            run.evaluator.runner,
            truncation=Truncation.learned(config),
            prefetch=run.engine.prefetch if isinstance(run.engine, VllmEngine) else None,
        ),
        engine=run.engine,
        trainer=run.trainer,
        weight_sync=run.weight_sync,
        evaluator=run.evaluator,
        recorder=run.monitor,
        problems=problems,
        checkpoint=lambda step: save_if_due(run, step),
        demonstrations=lambda step: demonstrations(run, step, threads),
        vision_gap=VisionGap(config.monitor.vision_gap_every, run.renderer, run.trainer),
        has_reference=has_reference(config),
        stop=run.stop,
        faults=FaultWatch(config.task.max_fault_rate, run=config.output_dir),
    )


async def demonstrations(run: Run, step: int, threads: TaskThreads) -> list[TrainingSample]:
    """The supervised samples that are mixed into RL step `step`, from other problems than the warm-up's. Made in a
    daemon thread, because the task's code may block."""
    warmup = run.config.trainer.warmup
    if warmup.rl_weight == 0 or warmup.steps == 0:  # a task without a warm-up may have no demonstrations
        return []
    warmup = dataclasses.replace(warmup, batch_size=warmup.rl_batch_size)
    made = await threads.run(
        partial(
            demonstrate,
            run.task,
            run.renderer,
            warmup,
            step=AFTER_WARMUP + step,
            numbers=run.position.rl_demonstrations.each(step),
            seed=run.config.seed,
            seq_len=run.config.trainer.seq_len,
        )
    )
    note(run, step, "rl", made)
    return made.samples
