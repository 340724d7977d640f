"""From a checked config to a run: builds every part once, in the order of the data path, and hands them to the loop.

mode=rl     warm-up (supervised, unless trainer.warmup.steps=0) ─▶ THE loop (orchestrator/loop.py)
mode=sft    supervised steps, then one evaluation
mode=eval   one evaluation; with resume=<run dir> of that run's newest checkpoint, recorded in its folder eval/
mode=replay the batch of a step that was recorded, and what today's code makes of it (replay/replay.py)
mode=export the newest checkpoint of resume=<run dir> as a Hugging Face folder (trainer/export.py)
mode=doctor a few rollouts, looked at closely (doctor/doctor.py); nothing is kept but what was seen

However a run ends, it can be continued: what is on the disk is whole at every moment, and whatever is random is a
function of the config and the step, so that a step which is done again is the same step.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmrl.config.inference import VllmConfig
from vlmrl.config.model import Dtype, Init
from vlmrl.config.parse import parse, typed
from vlmrl.config.run import Mode, RunConfig
from vlmrl.config.trainer import Packing, SFTConfig
from vlmrl.config.weight_sync import CudaIpcSyncConfig, FolderSyncConfig, NcclSyncConfig
from vlmrl.errors import ConfigError, EngineError, Interrupted, RankError, TaskError
from vlmrl.inference.embedded.engine import EmbeddedEngine
from vlmrl.inference.vllm.engine import VllmEngine
from vlmrl.inference.vllm.server import check_vllm
from vlmrl.models.checkpoints.load import check_available, load_image_processor, load_tokenizer, resolve_checkpoint
from vlmrl.models.checkpoints.scratch import write_weights
from vlmrl.models.policy import Policy
from vlmrl.monitor.monitor import Monitor
from vlmrl.orchestrator.evaluation import Evaluator
from vlmrl.orchestrator.loop import ExitReason, Loop
from vlmrl.orchestrator.rollout import RolloutRunner
from vlmrl.orchestrator.supervised import AFTER_WARMUP, demonstration_samples
from vlmrl.orchestrator.vision_gap import VisionGap
from vlmrl.preflight.check import check
from vlmrl.preflight.rules.ranks import ranks_work_together
from vlmrl.ranks.rank_group import RankGroup, follow, init_from_environment
from vlmrl.record.run_dir import RunDir
from vlmrl.rendering.renderer import Renderer, make_renderer
from vlmrl.runs.doctor.doctor import Doctor, conclude
from vlmrl.runs.export import export
from vlmrl.runs.parts import Following, begin, make_model, make_policy, make_trainer
from vlmrl.runs.replay.recorded import check_replayable
from vlmrl.runs.replay.replay import Replay, content
from vlmrl.runs.replay.replay import conclude as conclude_replay
from vlmrl.runs.stopping import Stop, asked_to_stop, rank_lost, stopped_before
from vlmrl.tasks.base import Task
from vlmrl.tasks.loading import load_task
from vlmrl.trainer.checkpoint import Checkpoints
from vlmrl.trainer.optimizer import check_optimizer
from vlmrl.trainer.trainer import LocalTrainer
from vlmrl.types import InferenceEngine, TrainingSample, WeightSync
from vlmrl.weight_sync.cuda_ipc import CudaIpcSync
from vlmrl.weight_sync.folder import FolderSync
from vlmrl.weight_sync.gpu import WEIGHT_TRANSFERS, check_transfer
from vlmrl.weight_sync.in_process import InProcessSync
from vlmrl.weight_sync.nccl import NcclSync


def execute(config: RunConfig) -> float | None:
    """Run `config`; returns the objective (the last held-out reward), for sweepers. Raises `VlmrlError`s.

    In a group of ranks: rank 0 does; the others help it until it is done, and return None.
    """
    with init_from_environment() as group:
        if group is None or group.rank == 0:
            return lead(config, group)
        if follow_leader(group) != 0:
            raise RankError(f"rank {group.rank} has ended early; rank 0 says why")
        return None


def follow_leader(group: RankGroup) -> int:
    """What a rank other than 0 does → exit code."""
    return follow(group, Following(group).make)


def lead(config: RunConfig, group: RankGroup | None) -> float | None:
    """The run itself: of one process, or of rank 0."""
    ranks_work_together(config, 1 if group is None else group.size)
    if config.mode is Mode.export:  # computes nothing, and needs no GPU
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, device="cpu"))
    check_available(config.model)
    check_optimizer(config.trainer)
    if config.mode is Mode.export:
        print(f"exported to {export(config, lambda text: print(f'warning: {text}'))}")
        return None
    if isinstance(config.inference, VllmConfig):
        check_vllm(config.inference)
        check_transfer(config.weight_sync, config.inference, config.model.device)
    run_dir = RunDir(config.output_dir)
    if config.mode is Mode.eval and config.resume:
        run_dir = RunDir(run_dir.path / "eval")
    replays = config.mode is Mode.replay
    if replays:
        check_replayable(*replayed_batch(config))
    run_dir.create(resume=config.resume is not None or replays)
    if config.mode is Mode.eval or not config.resume:
        run_dir.write_config(config)
    if not replays and (config.mode is not Mode.eval or not config.resume):
        run_dir.point_latest()
    with Monitor(config.monitor, run_dir, total_steps=config.trainer.max_steps, exact=is_exact(config)) as monitor:
        monitor.phase("preparing")
        run = Run.build(config, run_dir, monitor, group)
        monitor.table("plan", run.arithmetic())
        # What lives as long as the run (a million objects of imported libraries) need not be looked through for
        # garbage again and again.
        gc.freeze()
        try:
            reason, objective = asyncio.run(run.main())
        finally:
            gc.unfreeze()  # in a sweep, the next run needs the memory of this one
    if reason == "interrupted":
        if run.stop is not None:
            run.stop.requeue()
        raise Interrupted(run.how_to_continue())
    return objective


def is_exact(config: RunConfig) -> bool:
    """Whether sampler and trainer compute in float32; the embedded engine has the trainer's weights."""
    engine = config.inference.dtype if isinstance(config.inference, VllmConfig) else config.model.dtype
    return {config.model.dtype, engine} == {Dtype.float32}


def replayed_batch(config: RunConfig) -> tuple[RunDir, int]:
    """The run and the step of mode=replay."""
    assert config.run is not None, "config.check demands both"
    assert config.step is not None, "config.check demands both"
    return RunDir(config.run), config.step


def make_engine(
    config: RunConfig, folder: Path, policy: Policy, trainer: LocalTrainer, run_dir: RunDir, monitor: Monitor
) -> tuple[InferenceEngine, WeightSync]:
    """The sampler and how weights reach it. `folder` is the checkpoint's."""
    if not isinstance(config.inference, VllmConfig):
        engine = EmbeddedEngine(policy, lambda: trainer.version, config.inference.max_model_len)
        return engine, InProcessSync(lambda: trainer.version, trainer.weights, engine.weights)
    flat = config.model.vlm.flat_mm_kwargs if config.model.vlm is not None else []
    sync = config.weight_sync
    transfer = WEIGHT_TRANSFERS.get(sync.kind)
    servers = VllmEngine(config.inference, folder, run_dir.logs, flat, monitor.status, monitor.warn, transfer)
    if isinstance(sync, NcclSyncConfig):
        return servers, NcclSync(servers, trainer.weights, sync)
    if isinstance(sync, CudaIpcSyncConfig):
        return servers, CudaIpcSync(servers, trainer.weights, sync)
    assert isinstance(sync, FolderSyncConfig), "config.check demands one that servers understand"
    return servers, FolderSync(servers, trainer.weights, sync)


def fit_to_layers(config: RunConfig, policy: Policy, warn: Callable[[str], None]) -> RunConfig:
    """`config` for a model whose layers are not all softmax attention: its samples are trained one by one.

    Raises `ConfigError` where the embedded engine is asked for, whose cache holds keys and values alone.
    """
    if not policy.is_recurrent:
        return config
    if config.inference.kind == "embedded":
        raise ConfigError(
            "inference=embedded requires layers of softmax attention, else its cache of keys and values is not all "
            f"that a prefix leaves behind, and {config.model.name} has others (linear_attention): set inference=vllm"
        )
    if config.trainer.packing is Packing.none:
        return config
    warn(
        f"trainer.packing={config.trainer.packing.value} is none for {config.model.name}: layers of linear_attention "
        "carry a state from token to token, so its samples are trained one by one"
    )
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, packing=Packing.none))


@dataclass(eq=False)
class Run:
    """The parts of one run."""

    config: RunConfig
    run_dir: RunDir
    monitor: Monitor
    task: Task
    renderer: Renderer
    policy: Policy
    trainer: LocalTrainer
    engine: InferenceEngine
    weight_sync: WeightSync
    evaluator: Evaluator
    checkpoints: Checkpoints
    group: RankGroup | None
    stop: Stop | None = field(init=False, default=None)
    """Who asked the run to stop, if anybody did."""
    _saved: tuple[int, ...] | None = field(init=False, default=None)
    """What the newest checkpoint holds (`_progress`)."""

    @staticmethod
    def build(config: RunConfig, run_dir: RunDir, monitor: Monitor, group: RankGroup | None = None) -> Run:
        """Task, checkpoint, renderer, policy, trainer, engine, in the order of the data path."""
        begin(config)
        task = load_task(config.task, seed=config.seed)
        folder = resolve_checkpoint(config.model, task.texts())
        vlm = config.model.vlm
        model = make_model(config, folder, group)
        assert config.orchestrator.renderer is not None, "config.check demands a renderer"
        embeddings: Any = model.get_input_embeddings()
        tokenizer = load_tokenizer(folder)
        monitor.spell_with(tokenizer)
        renderer = make_renderer(
            config.orchestrator.renderer,
            config.model,
            tokenizer,
            load_image_processor(folder) if vlm is not None else None,
            embeddings.num_embeddings,
        )
        if config.model.init is Init.random and isinstance(config.inference, VllmConfig):
            folder = write_weights(model, folder, run_dir.path / "initial_model")
        policy = make_policy(config, model, renderer.banned_token_ids)
        config = fit_to_layers(config, policy, monitor.warn)
        orchestrator = config.orchestrator
        trainer = make_trainer(config, policy, task.texts(), renderer.banned_token_ids, group)
        engine, weight_sync = make_engine(config, folder, policy, trainer, run_dir, monitor)
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
            run_dir=run_dir,
            monitor=monitor,
            task=task,
            renderer=renderer,
            policy=policy,
            trainer=trainer,
            engine=engine,
            weight_sync=weight_sync,
            evaluator=Evaluator(orchestrator.eval, runner, orchestrator.temperature),
            checkpoints=Checkpoints(RunDir(config.output_dir).checkpoints, config.trainer.keep_checkpoints),
            group=group,
        )

    def arithmetic(self) -> dict[str, str]:
        """What the config's numbers come to, for the screen."""
        c, o = self.config, self.config.orchestrator
        rollouts = o.groups_per_step * o.group_size
        parameters = sum(p.numel() for p in self.policy.model.parameters())
        learning = sum(p.numel() for p in self.policy.model.parameters() if p.requires_grad)
        return {
            "model": f"{c.model.name}: {parameters:,} parameters, {learning:,} learn, {c.model.dtype.value} "
            f"on {self.policy.device}" + ("" if self.group is None else f", {self.group.size} ranks"),
            "task": f"{c.task.target.rpartition(':')[2]}, up to {c.task.max_turns} turns",
            "rollouts per step": f"{o.groups_per_step} groups × {o.group_size} = {rollouts}",
            "tokens per rollout": f"up to {c.inference.max_model_len}, {o.max_new_tokens} new per turn",
            "optimizer steps": f"{c.trainer.warmup.steps} supervised × {c.trainer.warmup.batch_size} conversations, "
            f"then {c.trainer.max_steps} × {rollouts} rollouts",
            "algorithm": f"{c.algorithm.loss}, {c.algorithm.advantage} advantages, credit per "
            f"{c.algorithm.credit.value}",
            "evaluation": f"{o.eval.problems} held-out problems, sampled and greedy, every {o.eval.every} steps"
            + ("" if o.eval.target is None else f"; done at {o.eval.target} {o.eval.consecutive} times in a row"),
        }

    async def main(self) -> tuple[ExitReason, float | None]:
        """Restore, run the mode, save, sum up → why it ended, the last sampled held-out reward."""
        try:
            await self.engine.start()
            with asked_to_stop(self.monitor.warn) as stop, rank_lost(self.group) as lost:
                self.stop = stop
                restored_step = self._restore()
                work = asyncio.create_task(self._run_mode(stop, restored_step))
                try:
                    if await stopped_before(work, lost):
                        assert self.group is not None
                        raise RankError(self.group.lost)
                    reason = work.result()
                except (TaskError, EngineError):  # nothing is wrong with the weights
                    self._save()
                    self.checkpoints.finish()
                    raise
                self._save()
                self.checkpoints.finish()
        except RankError as error:
            # At once: a collective that hangs in another thread may keep the process from a proper end.
            self.monitor.finish("error", {"error": f"RankError: {error}"})
            raise
        finally:
            await self.engine.stop()
            self.weight_sync.close()
        objective = self.evaluator.history[-1][0] if self.evaluator.history else None
        self.monitor.finish(reason, {"policy_version": self.trainer.version, "objective": objective})
        return reason, objective

    async def _run_mode(self, stop: asyncio.Event, restored_step: int) -> ExitReason:
        trainer, config = self.trainer, self.config
        if config.mode is Mode.doctor:
            return await self._examine(stop)
        if config.mode is Mode.replay:
            return await self._replay(stop)
        if config.mode is Mode.eval:
            return await self._evaluate(restored_step, stop)
        if trainer.version == 0 and not await self._supervised(config.trainer.warmup, stop):
            return "interrupted"
        if config.mode is Mode.sft:
            return await self._evaluate(trainer.supervised_steps, stop)
        self.monitor.phase("rl")
        embeddings: Any = self.policy.model.get_input_embeddings()
        return await Loop(
            config=config.orchestrator,
            algorithm=config.algorithm,
            max_steps=config.trainer.max_steps,
            vocab_size=embeddings.num_embeddings,
            runner=self.evaluator.runner,
            engine=self.engine,
            trainer=trainer,
            weight_sync=self.weight_sync,
            evaluator=self.evaluator,
            recorder=self.monitor,
            checkpoint=self._checkpoint,
            demonstrations=self._demonstrations,
            vision_gap=VisionGap(config.monitor.vision_gap_every, self.renderer, trainer),
            stop=stop,
        ).run()

    def _demonstrations(self, step: int) -> list[TrainingSample]:
        """The supervised samples that go along with RL step `step`, of other problems than the warm-up's."""
        sft = self.config.trainer.warmup
        if sft.rl_weight == 0 or sft.steps == 0:  # a task that is never warmed up may have no demonstrations
            return []
        sft = dataclasses.replace(sft, batch_size=sft.rl_batch_size)
        return demonstration_samples(self.task, self.renderer, sft, step=AFTER_WARMUP + step, seed=self.config.seed)

    async def _supervised(self, sft: SFTConfig, stop: asyncio.Event) -> bool:
        """The supervised steps that are left; False when asked to stop."""
        if self.trainer.supervised_steps < sft.steps:
            self.monitor.phase("warm-up")
        for step in range(self.trainer.supervised_steps + 1, sft.steps + 1):
            samples = demonstration_samples(self.task, self.renderer, sft, step=step - 1, seed=self.config.seed)
            metrics = await asyncio.to_thread(self.trainer.supervised_step, samples, sft.learning_rate)
            self.monitor.warmup(step, sft.steps, metrics)
            if self.config.mode is Mode.sft and step < sft.steps:  # the last one is saved with its evaluation
                self._checkpoint(step)
            if stop.is_set():
                return False
        return True

    async def _evaluate(self, step: int, stop: asyncio.Event) -> ExitReason:
        """One evaluation, recorded as that of `step`, unless asked to stop."""
        self.monitor.phase("eval")
        await self.weight_sync.publish(self.trainer.version)
        evaluation = asyncio.create_task(self.evaluator.run(step))
        if await stopped_before(evaluation, stop):
            return "interrupted"
        self.monitor.evaluation(step, *evaluation.result())
        return "finished"

    async def _examine(self, stop: asyncio.Event) -> ExitReason:
        """Do the parts agree? Raises `ParityError` where they do not, after the table is shown and written."""
        self.monitor.phase("doctor")
        doctor = Doctor(
            config=self.config,
            task=self.task,
            renderer=self.renderer,
            engine=self.engine,
            policy=self.policy,
            trainer=self.trainer,
            weight_sync=self.weight_sync,
            status=self.monitor.status,
        )
        examination = asyncio.create_task(doctor.examine())
        if await stopped_before(examination, stop):
            return "interrupted"
        lines = examination.result()
        for version, groups in doctor.groups.items():
            self.monitor.record(version, groups)
        self.run_dir.write_doctor([dataclasses.asdict(line) for line in lines])
        self.monitor.table("doctor", {line.name: line.text for line in lines})
        conclude(lines)
        return "finished"

    async def _replay(self, stop: asyncio.Event) -> ExitReason:
        """Where does the batch differ? Raises `ParityError` where it does by more than rounding, after the table is
        shown and written."""
        recorded, step = replayed_batch(self.config)
        checkpoints = Checkpoints(recorded.checkpoints, self.config.trainer.keep_checkpoints)
        if step - 1 in checkpoints.steps():
            checkpoints.load(step - 1, self.trainer)
            weights = f"the checkpoint of version {step - 1}"
        elif await self._supervised(self.config.trainer.warmup, stop):
            weights = f"version 0, made again: the model and {self.trainer.supervised_steps} supervised steps"
        else:
            return "interrupted"
        self.monitor.phase("replay")
        await self.weight_sync.publish(step - 1)
        then = parse(typed(recorded.read_config(key="run")))
        check(then)
        replay = Replay(
            recorded=recorded,
            step=step,
            config=self.config,
            renderer=self.renderer,
            engine=self.engine,
            trainer=self.trainer,
            exact=is_exact(self.config) and is_exact(then),
            same_engine=self.config.inference.kind == then.inference.kind,
            status=self.monitor.status,
        )
        replaying = asyncio.create_task(replay.run())
        if await stopped_before(replaying, stop):
            return "interrupted"
        lines = replaying.result()
        self.run_dir.write_replay(content(recorded, step, lines))
        self.monitor.table(f"replay of step {step}", {"weights": weights, **{line.name: line.text for line in lines}})
        conclude_replay(lines)
        return "finished"

    # ── checkpoints ─────────────────────────────────────────────────────────────────────────────────────────

    def _restore(self) -> int:
        """Load the newest checkpoint of a resumed run → the step that it is called after; 0 where there is none."""
        config = self.config
        if config.resume is None:
            return 0
        found = self.checkpoints.load_newest(self.trainer, self.monitor.warn)
        if found is not None:
            self.evaluator.history = [(sampled, greedy) for sampled, greedy in found[1]["evaluations"]]
            self._saved = self._progress
        if config.mode is not Mode.eval:
            self.run_dir.write_config(config)  # not before: an override that does not fit the checkpoint would stay
            self.monitor.resume_at(found[0] if found is not None else -1)
        elif found is None:
            raise ConfigError(
                f"resume={config.resume} has no checkpoint to evaluate: drop resume= to evaluate the model itself"
            )
        else:
            self.monitor.resume_at(-1)  # an earlier evaluation of this run is replaced
        return found[0] if found is not None else 0

    def _checkpoint(self, step: int) -> None:
        self.checkpoints.check()
        every = self.config.trainer.checkpoint_every
        if every and step % every == 0:
            self._save()

    def _save(self) -> None:
        """Unless it is saved already."""
        if self.config.mode in (Mode.eval, Mode.doctor, Mode.replay) or self._progress == self._saved:
            return
        self.monitor.flush()
        step = self.trainer.supervised_steps if self.config.mode is Mode.sft else self.trainer.version
        self.checkpoints.save(step, self.trainer, {"evaluations": self.evaluator.history})
        if self.config.monitor.wandb.checkpoints:
            self.checkpoints.finish()  # an artifact is made of a whole one
            self.monitor.checkpoint(step, self.checkpoints.path(step))
        self._saved = self._progress

    @property
    def _progress(self) -> tuple[int, ...]:
        return self.trainer.version, self.trainer.supervised_steps, len(self.evaluator.history)

    def how_to_continue(self) -> str:
        """What to say when the run was asked to stop and did."""
        if self.config.mode is Mode.eval:
            return "stopped before the evaluation was through: start it again"
        if self.config.mode is Mode.replay:
            return "stopped before the replay was through: start it again"
        if self.config.mode is Mode.doctor:
            return "stopped before the doctor was through: start it again"
        version, supervised, _ = self._progress
        at = f"step {version}" if version else f"supervised step {supervised}"
        return f"stopped after {at} and saved: continue with python -m vlmrl resume={self.config.output_dir}"
