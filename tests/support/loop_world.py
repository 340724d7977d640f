"""A run with scripted parts that log each event, around the real loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from support.drawn_problems import NumberedProblems
from support.rollout_builders import prompt
from vlmrl.config.algorithm import AlgorithmConfig
from vlmrl.config.orchestrator import EvalConfig, OrchestratorConfig
from vlmrl.orchestrator.best import BestWatch
from vlmrl.orchestrator.evaluation import Evaluator
from vlmrl.orchestrator.length import Length
from vlmrl.orchestrator.loop import ExitReason, Loop
from vlmrl.orchestrator.stream import Drawn
from vlmrl.trainer.trainer import EMPTY_STEP
from vlmrl.types import (
    Completion,
    FloatArray,
    Group,
    ReferenceScores,
    Rollout,
    StepResult,
    StopReason,
    TokenMetrics,
    TrainingSample,
    Turn,
)

GROUPS, SIBLINGS = 2, 3


async def pass_the_turn(times: int) -> None:
    """Let other tasks run `times` times: a delay without a clock."""
    for _ in range(times):
        await asyncio.sleep(0)


def indices_of(asked: dict[str, Any]) -> list[int]:
    return [drawn.index for drawn in asked["problems"]]


def constant(_: str) -> int:
    return 3


def rollout(
    name: str, index: int, versions: Sequence[int], reward: float, problem_index: int, shades: Sequence[int] = ()
) -> Rollout:
    """One turn, one token per entry of `versions`, after images of these shades."""
    n = len(versions)
    completion = Completion(np.arange(n), np.full(n, -1.0, np.float32), np.array(versions, np.int64), "stop")
    turn = Turn(prompt([1, 2, 3], [*shades]), completion, "", [], branch=0, reward=reward)
    return Rollout(
        f"{name}/{index}",
        name,
        index,
        [turn],
        reward,
        {"share": reward},
        StopReason.TERMINATED,
        problem_index=problem_index,
    )


@dataclass(eq=False)
class World:
    """Runner, trainer, engine, weight sync, monitor and checkpoints in one."""

    delay: Callable[[str], int] = constant
    """How often an await of this event lets other tasks run."""
    reward: Callable[[str, int], float] = lambda kind, index: float(index % 2)
    reward_of: Callable[[int, int], float] | None = None
    """The reward of a problem's sibling, in place of `reward`."""
    recorded: dict[int, list[int]] = field(default_factory=dict)
    """Indices of the problems of each step's record."""
    version: int = 0
    published: int = -1
    events: list[str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    learned: list[list[TrainingSample]] = field(default_factory=list)
    demonstrated: list[Sequence[TrainingSample]] = field(default_factory=list)
    scored: list[tuple[int, int, int]] = field(default_factory=list)
    has_reference: bool = False
    """Whether the trainer has a reference; it finds each token less likely, by half a nat."""
    referred: list[Sequence[TrainingSample]] = field(default_factory=list)
    has_images: bool = False
    """Whether each problem shows an image of its own."""
    is_blind: dict[int, bool] = field(default_factory=dict)
    """Whether the reward rises blind after a step."""
    opened: list[int] = field(default_factory=list)
    """Indices of the problems whose groups were opened ahead, in order."""
    discarded: list[int] = field(default_factory=list)
    """Those that were opened and not played."""
    metrics_of: dict[int, dict[str, float]] = field(default_factory=dict)
    open_batches: set[int] = field(default_factory=set)
    most_open: int = 0
    failing: dict[str, Exception] = field(default_factory=dict)
    cursor: int = 0
    num_rows: int | None = None
    decays: list[float | None] = field(default_factory=list)
    during: dict[str, Callable[[], None]] = field(default_factory=dict)
    """A side effect of an event, e.g. Ctrl-C."""

    def happens(self, event: str) -> None:
        self.events.append(event)
        if event in self.during:
            self.during[event]()
        if event in self.failing:
            raise self.failing[event]

    # runner
    renderer = SimpleNamespace(image_token_ids=(99,))

    def open_ahead(self, drawn: Drawn, group_size: int) -> Drawn:
        self.opened.append(drawn.index)
        return drawn

    async def discard(self, problems: Sequence[Drawn]) -> None:
        self.discarded += [drawn.index for drawn in problems]

    async def run_groups(self, **asked: Any) -> list[Group]:
        self.asked.append(asked)
        step, split = asked["step"], asked["split"]
        kind = split if split == "train" else ("sampled" if asked["temperature"] else "greedy")
        if split == "train":
            self.open_batches.add(step)
            self.most_open = max(self.most_open, len(self.open_batches))
        self.happens(f"{kind} {step}")
        start = self.published
        await pass_the_turn(self.delay(f"{kind} {step}"))
        return [
            Group(
                drawn.problem_id,
                [
                    rollout(
                        f"{kind}/{step}/{drawn.index}",
                        i,
                        [start, self.published],
                        self.reward_for(kind, drawn.index, i),
                        problem_index=drawn.index,
                        shades=[drawn.index % 256] if self.has_images else [],
                    )
                    for i in range(asked["group_size"])
                ],
            )
            for drawn in asked["problems"]
        ]

    def reward_for(self, kind: str, index: int, sibling: int) -> float:
        return self.reward(kind, sibling) if self.reward_of is None else self.reward_of(index, sibling)

    # trainer
    def train_step(
        self, samples: list[TrainingSample], demonstrations: Sequence[TrainingSample] = (), steps: float | None = None
    ) -> StepResult:
        self.decays.append(steps)
        assert threading.current_thread() is not threading.main_thread(), "training must not block the event loop"
        self.happens(f"learn {self.version + 1}")
        self.learned.append(samples)
        self.demonstrated.append(demonstrations)
        self.open_batches.discard(self.version + 1)
        self.version += 1
        figures = [
            TokenMetrics(s.inference_logprobs[s.loss_mask] - self.version, np.ones(s.loss_mask.sum(), np.float32))
            for s in samples
        ]
        return StepResult(self.version, dict.fromkeys((*EMPTY_STEP, "memory/peak_bytes"), 0.0), figures)

    def reference_scores(self, samples: Sequence[TrainingSample]) -> list[ReferenceScores]:
        self.happens(f"score {self.version + 1}")
        self.referred.append(samples)
        return [ReferenceScores(sample.inference_logprobs[sample.loss_mask] - 0.5) for sample in samples]

    def token_metrics(self, samples: Sequence[TrainingSample]) -> list[TokenMetrics]:
        """Every value is 0.25."""
        self.happens(f"values {self.version + 1}")
        logprobs = [sample.inference_logprobs[sample.loss_mask] for sample in samples]
        return [TokenMetrics(each, np.ones_like(each), np.full_like(each, 0.25)) for each in logprobs]

    def logprobs(self, samples: Sequence[TrainingSample]) -> list[FloatArray]:
        """With other images, the tokens of odd siblings are half a nat less likely."""
        assert threading.current_thread() is not threading.main_thread(), "scoring must not block the event loop"
        return [s.inference_logprobs[s.loss_mask] - 0.5 * (int(s.rollout_id[-1]) % 2) for s in samples]

    async def demonstrations(self, step: int) -> list[TrainingSample]:
        if f"demonstrations {step}" in {*self.during, *self.failing}:
            self.happens(f"demonstrations {step}")
            await asyncio.sleep(60)
        return self.learned[-1][:step] if self.learned else []

    # blind control
    def vision_gap(self, step: int, samples: list[TrainingSample]) -> dict[str, float]:
        assert threading.current_thread() is not threading.main_thread(), "scoring must not block the event loop"
        self.scored.append((step, self.version, len(samples)))
        return {"vision_gap/blank": 0.5} if step == 1 else {}

    # weight sync
    async def publish(self, version: int) -> None:
        await pass_the_turn(self.delay(f"publish {version}"))
        self.happens(f"publish {version}")
        self.published = version

    # engine
    def metrics(self) -> dict[str, float]:
        return {"wire/bytes_sent": 0.0}

    # recorder
    def step(self, step: int, metrics: dict[str, float], groups: Sequence[Group]) -> None:
        self.metrics_of[step] = dict(metrics)
        self.recorded[step] = [group.rollouts[0].problem_index for group in groups]
        self.happens(f"step {step}")

    @property
    def ends_blind(self) -> bool:
        return self.is_blind.get(self.version, False)

    def record(self, step: int, groups: Sequence[Group]) -> None:
        self.happens(f"record {step}")

    def evaluation(self, step: int, metrics: dict[str, float], rollouts: dict[str, list[Rollout]]) -> None:
        assert {kind: len(of_kind) for kind, of_kind in rollouts.items()} == {"eval_sampled": 4, "eval_greedy": 4}
        self.metrics_of.setdefault(step, {}).update(metrics)
        self.happens(f"evaluation {step}")

    def checkpoint(self, step: int) -> None:
        self.happens(f"checkpoint {step}")

    # the loop itself
    def run(
        self,
        *,
        steps: int = 3,
        every: int = 0,
        max_staleness: int = 0,
        target: float | None = None,
        history: Sequence[tuple[float, float]] = (),
        is_unfinished: bool = False,
        algorithm: AlgorithmConfig | None = None,
        best: BestWatch | None = None,
        max_epochs: float | None = None,
        stream: Any = None,
        runner: Any = None,
        make_loop: Callable[..., Loop] = Loop,
    ) -> ExitReason:
        """Run the loop from `version` on. `stream`: a `ProblemStream` in place of the numbered problems. `runner`: one
        that plays, in place of this one. `make_loop`: what makes the loop of its parts."""

        async def main() -> ExitReason:
            neighbour: Any = self
            held_out: Any = NumberedProblems(split="eval")
            self.problems = NumberedProblems(self.cursor, num_rows=self.num_rows)
            problems: Any = stream or self.problems
            evaluation = EvalConfig(every=every, problems=4, target=target, consecutive=2)
            self.stop = asyncio.Event()
            self.evaluator = Evaluator(evaluation, neighbour, held_out, 0.7, list(history), is_unfinished)
            self.evaluator.count = len(history)
            self.evaluator.best = best or BestWatch()
            loop = make_loop(
                config=OrchestratorConfig(
                    groups_per_step=GROUPS, group_size=SIBLINGS, max_staleness=max_staleness, eval=evaluation
                ),
                algorithm=algorithm or AlgorithmConfig(),
                length=Length(problems, steps, max_epochs),
                vocab_size=100,
                runner=runner or neighbour,
                engine=neighbour,
                trainer=neighbour,
                weight_sync=neighbour,
                evaluator=self.evaluator,
                recorder=neighbour,
                problems=problems,
                checkpoint=self.checkpoint,
                demonstrations=self.demonstrations,
                vision_gap=self.vision_gap,
                has_reference=self.has_reference,
                stop=self.stop,
            )
            try:
                return await loop.run()
            finally:
                await pass_the_turn(2)  # so that cancelled tasks can end
                assert asyncio.all_tasks() == {asyncio.current_task()}, "a task was left behind"

        return asyncio.run(main())
