"""From a checked config to a run: builds every part once, in the order of the data path, and hands them to the loop.

mode=rl     warm-up (supervised, unless trainer.warmup.steps=0) ─▶ THE loop (orchestrator/loop.py)
mode=sft    supervised steps, then one evaluation
mode=eval   one evaluation; with resume=<run dir> of that run's newest checkpoint
"""

from __future__ import annotations

import asyncio
import gc
import signal
from dataclasses import dataclass
from pathlib import Path

import torch

from vlmrl.config import Mode, RunConfig
from vlmrl.errors import ConfigError, Interrupted
from vlmrl.inference.embedded import EmbeddedEngine
from vlmrl.models.load import (
    check_available,
    load_image_processor,
    load_model,
    load_tokenizer,
    resolve_checkpoint,
)
from vlmrl.models.policy import Policy
from vlmrl.models.positions import position_function
from vlmrl.monitor.monitor import Monitor
from vlmrl.monitor.run_dir import RunDir
from vlmrl.orchestrator.evaluation import Evaluator
from vlmrl.orchestrator.loop import ExitReason, Loop
from vlmrl.orchestrator.renderer import Renderer, make_renderer
from vlmrl.orchestrator.rollout import RolloutRunner
from vlmrl.orchestrator.supervised import demonstration_samples
from vlmrl.tasks.base import Task
from vlmrl.tasks.loading import load_task
from vlmrl.trainer.checkpoint import Checkpoints
from vlmrl.trainer.config import SFTConfig
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import InferenceEngine, WeightSync
from vlmrl.weight_sync.in_process import InProcessSync


def execute(config: RunConfig) -> float | None:
    """Run `config`; returns the objective (the last held-out reward), for sweepers. Raises `VlmrlError`s."""
    check_available(config.model)
    run_dir = RunDir(config.output_dir)
    if config.mode is Mode.eval and config.resume:
        run_dir = RunDir(run_dir.path / "eval")
    run_dir.create(resume=config.resume is not None)
    run_dir.write_config(config)
    if config.mode is not Mode.eval or not config.resume:
        run_dir.point_latest()
    with Monitor(config.monitor, run_dir, total_steps=config.trainer.max_steps) as monitor:
        monitor.phase("preparing")
        run = Run.build(config, monitor)
        monitor.plan(run.arithmetic())
        # What lives as long as the run (a million objects of imported libraries) need not be looked through for
        # garbage again and again.
        gc.freeze()
        return asyncio.run(run.main())


@dataclass(eq=False)
class Run:
    """The parts of one run."""

    config: RunConfig
    monitor: Monitor
    task: Task
    renderer: Renderer
    policy: Policy
    trainer: LocalTrainer
    engine: InferenceEngine
    weight_sync: WeightSync
    evaluator: Evaluator
    checkpoints: Checkpoints

    @staticmethod
    def build(config: RunConfig, monitor: Monitor) -> Run:
        """Task, checkpoint, renderer, policy, trainer, engine, in the order of the data path."""
        torch.set_num_threads(config.trainer.threads)
        torch.manual_seed(config.seed)
        task = load_task(config.task, seed=config.seed)
        folder = resolve_checkpoint(config.model, task.texts())
        vlm = config.model.vlm
        model = load_model(folder, config.model)
        if vlm is not None and vlm.freeze_vision:
            model.base_model.visual.requires_grad_(False)
        assert config.orchestrator.renderer is not None, "config.check demands a renderer"
        renderer = make_renderer(
            config.orchestrator.renderer,
            config.model,
            load_tokenizer(folder),
            load_image_processor(folder) if vlm is not None else None,
            model.get_input_embeddings().num_embeddings,
        )
        merge = model.config.vision_config.spatial_merge_size if vlm is not None else 1
        positions = position_function(vlm.positions if vlm is not None else "sequential", merge)
        policy = Policy(model, positions, renderer.banned_token_ids)
        orchestrator = config.orchestrator
        trainer = LocalTrainer(
            policy,
            config.trainer,
            config.algorithm,
            temperature=orchestrator.temperature,
            max_new_tokens=orchestrator.max_new_tokens,
        )
        engine = EmbeddedEngine(policy, lambda: trainer.version, config.inference.max_model_len)
        runner = RolloutRunner(
            task=task,
            renderer=renderer,
            engine=engine,
            seed=config.seed,
            max_turns=config.task.max_turns,
            max_new_tokens=orchestrator.max_new_tokens,
            max_model_len=config.inference.max_model_len,
        )
        return Run(
            config=config,
            monitor=monitor,
            task=task,
            renderer=renderer,
            policy=policy,
            trainer=trainer,
            engine=engine,
            weight_sync=InProcessSync(trainer),
            evaluator=Evaluator(orchestrator.eval, runner, orchestrator.temperature),
            checkpoints=Checkpoints(Path(config.output_dir) / "checkpoints", config.trainer.keep_checkpoints),
        )

    def arithmetic(self) -> dict[str, str]:
        """What the config's numbers come to, for the screen."""
        c, o = self.config, self.config.orchestrator
        rollouts = o.groups_per_step * o.group_size
        parameters = sum(p.numel() for p in self.policy.model.parameters())
        learning = sum(p.numel() for p in self.policy.model.parameters() if p.requires_grad)
        return {
            "model": f"{c.model.name}: {parameters:,} parameters, {learning:,} learn, {c.model.dtype.value} "
            f"on {self.policy.device}",
            "task": f"{c.task.target.rpartition(':')[2]}, up to {c.task.max_turns} turns",
            "rollouts per step": f"{o.groups_per_step} groups × {o.group_size} = {rollouts}",
            "tokens per rollout": f"up to {c.inference.max_model_len}, {o.max_new_tokens} new per turn",
            "optimizer steps": f"{c.trainer.warmup.steps} supervised × {c.trainer.warmup.batch_size} conversations, "
            f"then {c.trainer.max_steps} × {rollouts} rollouts",
            "algorithm": f"{c.algorithm.loss.value}, {c.algorithm.advantage.value} advantages, credit per "
            f"{c.algorithm.credit.value}",
            "evaluation": f"{o.eval.problems} held-out problems, sampled and greedy, every {o.eval.every} steps"
            + ("" if o.eval.target is None else f"; done at {o.eval.target} {o.eval.consecutive} times in a row"),
        }

    async def main(self) -> float | None:
        """Restore, warm up, run the mode, save, sum up."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            # The second signal finds Python's own handler again and ends the process at once.
            loop.add_signal_handler(number, lambda n=number: (stop.set(), loop.remove_signal_handler(n)))
        await self.engine.start()
        try:
            saved = self._restore()
            reason = await self._run_mode(stop)
        finally:
            await self.engine.stop()
        step = self._step
        if self.config.mode is not Mode.eval and step != saved:
            self._save(step)
        objective = self.evaluator.history[-1][0] if self.evaluator.history else None
        self.monitor.finish(reason, {"policy_version": self.trainer.version, "objective": objective})
        if reason == "interrupted":
            raise Interrupted(
                f"stopped after step {step} and saved; continue with python -m vlmrl resume={self.config.output_dir}"
            )
        return objective

    @property
    def _step(self) -> int:
        return self.trainer.supervised_steps if self.config.mode is Mode.sft else self.trainer.version

    def _restore(self) -> int | None:
        """Load the newest checkpoint of a resumed run → its step."""
        if self.config.resume is None:
            return None
        found = self.checkpoints.load_newest(self.trainer, self.monitor.warn)
        if found is None:
            if self.config.mode is Mode.eval:
                raise ConfigError(
                    f"resume={self.config.resume} has no checkpoint to evaluate: drop resume= to evaluate the model itself"
                )
            self.monitor.resume_at(-1)
            return None
        step, state = found
        self.evaluator.history = [(sampled, greedy) for sampled, greedy in state["evaluations"]]
        self.monitor.resume_at(step if self.config.mode is not Mode.eval else -1)
        return step

    def _save(self, step: int) -> None:
        self.monitor.flush()
        self.checkpoints.save(step, self.trainer, {"evaluations": self.evaluator.history})

    def _checkpoint(self, step: int) -> None:
        every = self.config.trainer.checkpoint_every
        if every and step % every == 0:
            self._save(step)

    async def _run_mode(self, stop: asyncio.Event) -> ExitReason:
        trainer, config = self.trainer, self.config
        if config.mode is Mode.eval:
            self.monitor.phase("eval")
            self.monitor.evaluation(trainer.version, *await self.evaluator.run(trainer.version))
            return "finished"
        if trainer.version == 0 and not await self._supervised(config.trainer.warmup, stop):
            return "interrupted"
        if config.mode is Mode.sft:
            self.monitor.phase("eval")
            self.monitor.evaluation(trainer.supervised_steps, *await self.evaluator.run(trainer.supervised_steps))
            return "finished"
        self.monitor.phase("rl")
        return await Loop(
            config=config.orchestrator,
            algorithm=config.algorithm,
            max_steps=config.trainer.max_steps,
            runner=self.evaluator.runner,
            engine=self.engine,
            trainer=trainer,
            weight_sync=self.weight_sync,
            evaluator=self.evaluator,
            monitor=self.monitor,
            checkpoint=self._checkpoint,
            stop=stop,
        ).run()

    async def _supervised(self, sft: SFTConfig, stop: asyncio.Event) -> bool:
        """The supervised steps that are left; False when asked to stop."""
        if self.trainer.supervised_steps < sft.steps:
            self.monitor.phase("warm-up")
        for step in range(self.trainer.supervised_steps, sft.steps):
            samples = demonstration_samples(self.task, self.renderer, sft, step=step, seed=self.config.seed)
            metrics = await asyncio.to_thread(self.trainer.supervised_step, samples, sft.learning_rate)
            self.monitor.warmup(step + 1, sft.steps, metrics)
            if self.config.mode is Mode.sft:
                self._checkpoint(step + 1)
            if stop.is_set():
                return False
        return True
