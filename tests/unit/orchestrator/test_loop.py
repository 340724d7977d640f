"""The loop with scripted parts that log each event: order, staleness, stopping, and the metrics of a step."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.drawn_problems import NumberedProblems
from support.loop_world import GROUPS, SIBLINGS, World, indices_of
from vlmrl.config.algorithm import Advantage, AlgorithmConfig, FilterConfig, FilterMode, KLConfig, Loss, RefillConfig
from vlmrl.config.critic import GAEConfig
from vlmrl.errors import NonFiniteLossError, TaskError
from vlmrl.orchestrator.best import BestWatch
from vlmrl.record.step_keys import missing_keys
from vlmrl.trainer.loop_state import Best, Cursor
from vlmrl.types import (
    DropReason,
    StepResult,
    TrainingSample,
)


def of_step(step: int, *, evaluated: bool = False) -> list[str]:
    evaluation = [f"sampled {step}", f"greedy {step}", f"evaluation {step}"] if evaluated else []
    return [f"train {step}", f"learn {step}", f"publish {step}", f"step {step}", *evaluation, f"checkpoint {step}"]


# ── order ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_on_policy_phases_run_one_after_the_other() -> None:
    world = World()
    assert world.run(steps=5, every=2) == "finished"
    assert world.events == [
        "publish 0",
        *("sampled 0", "greedy 0", "evaluation 0"),
        *of_step(1),
        *of_step(2, evaluated=True),
        *of_step(3),
        *of_step(4, evaluated=True),
        *of_step(5, evaluated=True),
    ]


def test_without_evaluation_there_is_none() -> None:
    world = World()
    assert world.run(steps=2) == "finished"
    assert world.events == ["publish 0", *of_step(1), *of_step(2)]


def test_a_resumed_run_publishes_before_it_rolls_out_and_goes_on_with_the_next_problems() -> None:
    world = World(version=3, cursor=9)
    assert world.run(steps=5, every=5) == "finished"
    assert world.events == ["publish 3", *of_step(4), *of_step(5, evaluated=True)]
    assert [indices_of(asked) for asked in world.asked[:2]] == [[9, 10], [11, 12]]


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
@pytest.mark.parametrize("last", [1, 2, 4])
def test_what_was_rolled_out_and_not_learned_is_rolled_out_again_once(max_staleness: int, last: int) -> None:
    """Stopped after step `last`, when later batches were under way, and resumed from the cursor of its checkpoint."""
    world = World()
    world.during[f"checkpoint {last}"] = lambda: world.stop.set()
    assert world.run(steps=9, max_staleness=max_staleness) == "interrupted"
    assert len(world.asked) > last, "a batch was under way"
    assert world.problems.indices.cursor(world.version) == Cursor(last * GROUPS)
    again = World(version=world.version, cursor=last * GROUPS)
    assert again.run(steps=9, max_staleness=max_staleness) == "finished"
    learned = [sample.rollout_id.split("/")[2] for batch in world.learned + again.learned for sample in batch]
    assert sorted(learned, key=int) == [str(index) for index in range(9 * GROUPS) for _ in range(SIBLINGS)]


def test_a_run_that_was_resumed_before_its_first_step_is_not_evaluated_twice() -> None:
    world = World()
    world.run(steps=1, every=1, history=[(0.0, 0.0)])
    assert world.events == ["publish 0", *of_step(1, evaluated=True)]


def test_each_step_takes_the_next_training_problems() -> None:
    world = World()
    world.run(steps=3, every=3)
    train = [asked for asked in world.asked if asked["split"] == "train"]
    assert [indices_of(asked) for asked in train] == [[0, 1], [2, 3], [4, 5]]
    assert all((asked["group_size"], asked["temperature"]) == (SIBLINGS, 1.0) for asked in train)
    held_out = [asked for asked in world.asked if asked["split"] == "eval"]
    assert [asked["temperature"] for asked in held_out] == [0.7, 0.0] * 2
    assert all((indices_of(asked), asked["group_size"]) == ([0, 1, 2, 3], 1) for asked in held_out)


# ── staleness ───────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=40)
@given(st.integers(0, 3), st.integers(0, 2**32), st.integers(1, 8))
def test_staleness_and_the_number_of_batches_keep_their_bounds(max_staleness: int, seed: int, steps: int) -> None:
    random = np.random.default_rng(seed)
    world = World(delay=lambda event: int(random.integers(0, 30)))
    versions_at_learning: list[int] = []
    learn = world.train_step

    def train_step(
        samples: list[TrainingSample], demonstrations: Sequence[TrainingSample] = (), steps: float | None = None
    ) -> StepResult:
        versions_at_learning.append(world.version)
        return learn(samples, demonstrations)

    world.train_step = train_step  # type: ignore[method-assign]
    assert world.run(steps=steps, max_staleness=max_staleness) == "finished"
    assert versions_at_learning == list(range(steps))
    for version, samples in zip(versions_at_learning, world.learned, strict=True):
        assert len(samples) == GROUPS * SIBLINGS, "no rollout may be stale"
        staleness = version - np.concatenate([s.versions[s.loss_mask] for s in samples])
        assert 0 <= staleness.min() <= staleness.max() <= max_staleness
    for step in range(1, steps + 1):
        # Not before its weights are published, and not later than max_staleness allows.
        assert world.events.index(f"publish {max(0, step - 1 - max_staleness)}") < world.events.index(f"train {step}")
        if step <= max_staleness + 1:
            assert world.events.index(f"train {step}") < world.events.index("learn 1")
        assert world.metrics_of[step]["rollouts/dropped"] == 0
    assert world.most_open == min(steps, max_staleness + 1)


def test_rollouts_run_while_the_trainer_learns() -> None:
    """The trainer waits for the next rollouts. It would wait forever if they did not run during training."""
    rolled_out = threading.Event()
    world = World(during={"train 2": rolled_out.set})

    def wait() -> None:
        assert rolled_out.wait(30)

    world.during["learn 1"] = wait
    world.delay = lambda event: 50 if event == "train 2" else 0
    assert world.run(steps=2, max_staleness=1) == "finished"


def test_stale_rollouts_are_dropped_and_counted() -> None:
    """The engine sampled with older weights: with max_staleness=0, every rollout is dropped."""
    world = World()
    publish = world.publish

    async def publish_late(version: int) -> None:
        await publish(version)
        world.published = version - 1

    world.publish = publish_late  # type: ignore[method-assign]
    world.run(steps=2)
    assert world.learned == [[], []]
    assert world.metrics_of[2][f"rollouts/dropped/{DropReason.STALE}"] == GROUPS * SIBLINGS


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_the_first_groups_of_a_step_are_opened_while_the_step_before_is_learned(max_staleness: int) -> None:
    world = World()
    opened_at: dict[int, list[int]] = {}
    world.during["step 2"] = lambda: opened_at.update({2: list(world.opened)})
    assert world.run(steps=6, max_staleness=max_staleness) == "finished"
    first = (1 + max_staleness) * GROUPS
    assert world.opened == list(range(first, 6 * GROUPS)), "each once, in order, and none after the last step"
    assert opened_at[2][-1] >= first + 2 * GROUPS - 1
    assert not world.discarded
    assert [indices_of(asked) for asked in world.asked] == [[2 * step, 2 * step + 1] for step in range(6)]


def test_groups_that_a_curriculum_chooses_are_not_opened_ahead() -> None:
    """Which problems a step plays rests on the rewards of the step before."""
    world = World()
    stream = NumberedProblems()
    stream.chooser = SimpleNamespace()  # type: ignore[assignment]
    assert world.run(steps=3, stream=stream) == "finished"
    assert not world.opened


def test_what_was_opened_for_a_step_that_is_not_played_is_discarded() -> None:
    world = World()
    world.during["learn 2"] = lambda: world.stop.set()
    assert world.run(steps=5) == "interrupted"
    assert world.opened == [2, 3, 4, 5]
    assert world.events[-1] == "train 3", "its rollouts had begun, so they close their envs themselves"
    ended = World(reward=lambda kind, index: 1.0)
    assert ended.run(steps=5, every=1, target=1.0, history=[(1.0, 1.0)]) == "target_reached"
    assert ended.discarded == ended.opened == [2, 3]


# ── ends ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_stop_during_rollouts_interrupts_at_once(max_staleness: int) -> None:
    world = World(delay=lambda event: 10**9 if event == "train 2" else 3)
    world.during["train 2"] = lambda: world.stop.set()
    assert world.run(steps=5, every=5, max_staleness=max_staleness) == "interrupted"
    assert world.version == (1 if max_staleness == 0 else 0)
    assert not {"learn 2", "checkpoint 2"} & set(world.events)


def test_a_stop_while_learning_loses_nothing_of_the_step() -> None:
    world = World()
    world.during["learn 2"] = lambda: world.stop.set()
    world.stop = asyncio.Event()
    assert world.run(steps=5) == "interrupted"
    assert world.events[:-1] == ["publish 0", *of_step(1), *of_step(2)]
    assert world.events[-1] == "train 3", "requested, then dropped"


@pytest.mark.parametrize("kind", ["sampled", "greedy"])
@pytest.mark.parametrize(("step", "max_staleness"), [(0, 0), (2, 0), (2, 1), (4, 0)])
def test_a_stop_during_an_evaluation_interrupts_at_once(kind: str, step: int, max_staleness: int) -> None:
    """The evaluation leaves nothing behind; the run that goes on makes it again, then the steps that are missing."""
    event = f"{kind} {step}"
    world = World(delay=lambda name: 10**9 if name == event else 3)
    world.during[event] = lambda: world.stop.set()
    assert world.run(steps=4, every=2, max_staleness=max_staleness) == "interrupted"
    assert world.version == step
    assert not {f"evaluation {step}", f"checkpoint {step}"} & set(world.events)
    assert world.evaluator.is_unfinished
    assert len(world.evaluator.history) == step // 2, "only whole evaluations"

    resumed = World(version=step)
    history = world.evaluator.history
    assert resumed.run(steps=4, every=2, history=history, is_unfinished=True) == "finished"
    again = [f"sampled {step}", f"greedy {step}", f"evaluation {step}"]
    rest = [event for later in range(step + 1, 5) for event in of_step(later, evaluated=later % 2 == 0)]
    assert resumed.events == [f"publish {step}", *again, *rest]
    assert not resumed.evaluator.is_unfinished
    assert resumed.evaluator.history == [(0.0, 0.0)] * 3


def test_a_stop_while_a_step_waits_for_demonstrations_interrupts_at_once() -> None:
    """The task's code makes them, and may hang. The step was not learned, so a resumed run makes it again."""
    world = World()
    world.during["demonstrations 2"] = lambda: world.stop.set()
    assert world.run(steps=5) == "interrupted"
    assert world.events == ["publish 0", *of_step(1), "train 2", "demonstrations 2"]


def test_a_stop_while_learning_does_not_wait_for_the_evaluation() -> None:
    world = World()
    world.during["learn 2"] = lambda: world.stop.set()
    assert world.run(steps=4, every=2) == "interrupted"
    assert world.events[-2:] == ["step 2", "sampled 2"], "requested, then dropped"
    assert world.evaluator.is_unfinished


def test_an_error_during_an_evaluation_is_raised() -> None:
    world = World(failing={"greedy 0": TaskError("gone")})
    with pytest.raises(TaskError, match="gone"):
        world.run(steps=4, every=2)
    assert world.evaluator.is_unfinished


def test_a_target_that_is_reached_ends_the_run() -> None:
    rewards = {0: 0.0, 2: 1.0, 4: 0.0, 6: 1.0, 8: 1.0}
    world = World(reward=lambda kind, index: float(index % 2) if kind == "train" else rewards[world.version])
    assert world.run(steps=20, every=2, target=0.95, max_staleness=1) == "target_reached"
    assert world.version == 8
    assert world.events[-1] == "checkpoint 8"


def test_a_target_reached_at_the_last_step_is_reached() -> None:
    world = World(reward=lambda kind, index: 1.0)
    assert world.run(steps=1, every=1, target=1.0) == "target_reached"
    assert world.version == 1


def test_a_resumed_run_whose_target_was_reached_does_nothing() -> None:
    world = World(version=4)
    assert world.run(steps=20, every=2, target=0.9, history=[(0.0, 0.0), (0.95, 0.9), (1.0, 0.99)]) == "target_reached"
    assert world.events == ["publish 4"]


def test_patience_ends_a_run_that_no_longer_improves() -> None:
    rewards = {0: 0.0, 2: 0.5, 4: 0.7, 6: 0.7, 8: 0.6, 10: 1.0}
    world = World(reward=lambda kind, index: float(index % 2) if kind == "train" else rewards[world.version])
    best = BestWatch("eval/reward", patience=2)
    assert world.run(steps=20, every=2, best=best) == "no_improvement"
    assert world.version == 8
    assert best.best == Best("eval/reward", 4, 0.7, evaluations_since=2)
    # The best evaluation before the first step asks for a checkpoint, too.
    assert next(event for event in world.events if event.startswith("checkpoint")) == "checkpoint 0"


def test_a_run_that_learns_blind_ends_after_the_step_that_shows_it() -> None:
    world = World(is_blind={3: True})
    assert world.run(steps=20, every=2, max_staleness=1) == "blind"
    assert world.version == 3
    assert world.events[-1] == "checkpoint 3"
    resumed = World(version=3, is_blind={3: True})
    assert resumed.run(steps=20, every=2, history=[(0.0, 0.0), (0.1, 0.1)]) == "blind"
    assert resumed.events == ["publish 3"]


def test_a_resumed_run_without_patience_left_does_nothing() -> None:
    world = World(version=4)
    best = BestWatch("eval/reward", 2, Best("eval/reward", 0, 0.9, evaluations_since=2))
    assert world.run(steps=20, every=2, history=[(0.9, 0.9), (0.5, 0.5), (0.5, 0.5)], best=best) == "no_improvement"
    assert world.events == ["publish 4"]


def test_a_step_without_samples_goes_on() -> None:
    world = World(reward=lambda kind, index: 0.5)
    assert (
        world.run(steps=5, algorithm=AlgorithmConfig(filters=FilterConfig(zero_advantage=FilterMode.drop)))
        == "finished"
    )
    assert world.learned == [[]] * 5
    assert world.version == 5
    assert world.metrics_of[5]["rollouts/dropped"] == GROUPS * SIBLINGS
    assert world.metrics_of[5][f"rollouts/dropped/{DropReason.ZERO_ADVANTAGE}"] == GROUPS * SIBLINGS


@pytest.mark.parametrize("failing", ["train 2", "train 1"])
def test_an_error_of_the_rollouts_ends_the_run_and_the_batches_ahead(failing: str) -> None:
    world = World(failing={failing: TaskError("gone")}, delay=lambda event: 10**9 if event == "train 3" else 3)
    with pytest.raises(TaskError, match="gone"):
        world.run(steps=5, max_staleness=2)
    assert world.version == (1 if failing == "train 2" else 0)


def test_a_loss_that_is_not_finite_records_the_rollouts_and_publishes_nothing() -> None:
    world = World(failing={"learn 2": NonFiniteLossError("nan")})
    with pytest.raises(NonFiniteLossError):
        world.run(steps=5)
    assert world.events == ["publish 0", *of_step(1), "train 2", "learn 2", "record 2"]


# ── refill and passes ───────────────────────────────────────────────────────────────────────────────────────


def refilled(budget: int, max_staleness: int = 0, steps: int = 4, **how: Any) -> World:
    """Only problems whose index ends with 0, 1 or 2 have rollouts of different rewards: 70 % are without signal."""
    world = World(**how)
    world.reward_of = lambda index, sibling: float(sibling % 2) if index % 10 < 3 else 0.0
    algorithm = AlgorithmConfig(refill=RefillConfig(budget=budget))
    assert world.run(steps=steps, algorithm=algorithm, max_staleness=max_staleness) == "finished"
    return world


def learned_from(world: World) -> list[list[int]]:
    """Indices of the problems of each step that the trainer got."""
    return [sorted({int(s.rollout_id.split("/")[2]) for s in samples}) for samples in world.learned]


def test_a_step_samples_on_until_it_has_its_groups_with_signal() -> None:
    world = refilled(budget=10)
    assert learned_from(world) == [[0, 1], [2, 10], [11, 12], [20, 21]], "no problem is lost or repeated"
    assert [world.metrics_of[step]["refill/sampled"] for step in (1, 2, 3, 4)] == [2.0, 9.0, 2.0, 9.0]
    assert [world.metrics_of[step]["refill/discarded"] for step in (1, 2, 3, 4)] == [0.0, 7.0, 0.0, 7.0]
    assert all(world.metrics_of[step]["refill/missing"] == 0.0 for step in (1, 2, 3, 4))
    assert world.metrics_of[2]["rollouts/dropped/zero_advantage"] == 7.0 * SIBLINGS
    assert [[d.index for d in asked["problems"]] for asked in world.asked[1:]][:3] == [[2, 3], [4], [5]]
    assert [asked["first_group"] for asked in world.asked[1:4]] == [0, 2, 3], "each group has its own number"


def test_the_budget_ends_the_refill() -> None:
    world = refilled(budget=3, steps=2)
    assert learned_from(world) == [[0, 1], [2]]
    assert world.metrics_of[2]["refill/sampled"] == 6.0
    assert world.metrics_of[2]["refill/missing"] == 1.0


def test_without_refill_nothing_is_sampled_again() -> None:
    world = refilled(budget=1)
    assert [len(asked["problems"]) for asked in world.asked] == [GROUPS] * 4
    assert not any(key.startswith("refill/") for key in world.metrics_of[2])
    assert world.metrics_of[3]["rollouts/dropped"] == 0.0, "and groups without signal are trained on"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 3), st.integers(1, 5), st.integers(1, 6))
def test_with_overlapping_steps_refill_loses_and_repeats_nothing(
    seed: int, max_staleness: int, last: int, budget: int
) -> None:
    """Whatever the timing, and wherever the run stops, each problem is learned from, or thrown away, exactly once."""
    random = np.random.default_rng(seed)
    world = World(delay=lambda event: int(random.integers(0, 30)))
    world.reward_of = lambda index, sibling: float(sibling % 2) if index % 10 < 3 else 0.0
    world.during[f"checkpoint {last}"] = lambda: world.stop.set()
    algorithm = AlgorithmConfig(refill=RefillConfig(budget=budget))
    ended = world.run(steps=last + 2, algorithm=algorithm, max_staleness=max_staleness)
    cursor = world.problems.indices.cursor(world.version)
    played = sorted(index for step in range(1, world.version + 1) for index in world.recorded[step])
    assert len(played) == len(set(played))
    unlearned = [index for first, end in cursor.unlearned for index in range(first, end)]
    assert sorted(played + unlearned) == list(range(cursor.index))
    assert ended == "interrupted"


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_run_ends_after_its_passes_and_the_learning_rate_decays_to_there(max_staleness: int) -> None:
    world = World(num_rows=7)
    assert world.run(steps=99, max_epochs=1.5, max_staleness=max_staleness, every=4) == "finished"
    assert world.version == 6, "12 rows of 2 per step are the first ones that make up 10.5"
    assert world.decays == [pytest.approx(10.5 / GROUPS)] * 6
    assert world.events[-2:] == ["evaluation 6", "checkpoint 6"], "an evaluation follows the last step"


def test_a_resumed_run_counts_the_passes_before() -> None:
    world = World(version=5, cursor=10, num_rows=7)
    assert world.run(steps=99, max_epochs=1.5) == "finished"
    assert world.version == 6
    assert World(version=6, cursor=12, num_rows=7).run(steps=99, max_epochs=1.5) == "finished"


# ── figures ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_step_reports_every_key_of_the_contract() -> None:
    world = World()
    world.run(steps=2, every=2)
    for step in (1, 2):
        metrics = world.metrics_of[step]
        assert missing_keys({"step": step, **metrics}) == []
        assert metrics["policy_version"] == step
        assert metrics["time/step"] >= metrics["time/rollout"] + metrics["time/train"] + metrics["time/sync"] > 0
        assert metrics["time/rollout_span"] > 0
        assert metrics["time/engine_idle"] >= metrics["time/train"]  # on-policy: no rollout runs during training
    assert world.metrics_of[0]["eval/reward"] == 0.0
    assert world.metrics_of[2]["eval/wire/bytes_sent"] == 0.0


def test_rollouts_that_run_while_the_trainer_learns_leave_the_engine_no_idle_time() -> None:
    world = World(delay=lambda event: 10**4 if event == "train 3" else 3)
    world.run(steps=4, max_staleness=2)
    assert world.metrics_of[1]["time/engine_idle"] < world.metrics_of[1]["time/step"] / 2
    assert world.metrics_of[3]["time/rollout"] > 0


def test_advantages_reach_the_samples() -> None:
    world = World()
    world.run(steps=1)
    (samples,) = world.learned
    # Rewards 0, 1, 0 in each group.
    low, high = -1 / np.sqrt(2), np.sqrt(2)
    for sample, advantage in zip(samples, [low, high, low] * GROUPS, strict=True):
        np.testing.assert_allclose(sample.advantages[sample.loss_mask], advantage, rtol=1e-4)


def test_the_demonstrations_of_a_step_go_to_the_trainer_with_it() -> None:
    world = World()
    world.run(steps=3)
    assert world.demonstrated == [[], world.learned[0][:2], world.learned[1][:3]]


def test_the_reference_scores_a_batch_before_its_rewards_are_compared() -> None:
    """The reference of `World` finds each token half a nat less likely than the sampler did."""
    learned = []
    for kl in (0.0, 3.0):
        world = World(has_reference=True)
        algorithm = AlgorithmConfig(kl=KLConfig(advantage=kl))
        assert world.run(steps=2, algorithm=algorithm) == "finished"
        named = ("train", "score", "learn", "publish")
        order = [event for event in world.events if event.split()[0] in named]
        assert order == ["publish 0", *(f"{event} {step}" for step in (1, 2) for event in named)]
        learned.append(world.learned)
        assert "time/reference" in world.metrics_of[1]
    for without, with_kl in zip(*(itertools.chain.from_iterable(each) for each in learned), strict=True):
        assert with_kl.reference_logprobs is not None
        lower = np.where(without.loss_mask, 1.5, 0.0)
        np.testing.assert_allclose(with_kl.advantages, without.advantages - lower, atol=1e-6)


def test_values_come_before_advantages_and_advantages_are_whitened_over_the_step() -> None:
    """Each value of `World` is 0.25; with λ = 1 an advantage is the return minus it, and rewards are 0, 1, 0."""
    world = World()
    algorithm = AlgorithmConfig(loss=Loss.ppo, advantage=Advantage.gae, gae=GAEConfig(whiten=False))
    assert world.run(steps=2, algorithm=algorithm) == "finished"
    named = ("train", "values", "learn", "publish")
    order = [event for event in world.events if event.split()[0] in named]
    assert order == ["publish 0", *(f"{event} {step}" for step in (1, 2) for event in named)]
    assert "time/values" in world.metrics_of[1]
    for sample, reward in zip(world.learned[0], [0.0, 1.0, 0.0] * GROUPS, strict=True):
        np.testing.assert_allclose(sample.advantages[sample.loss_mask], reward - 0.25)
        assert sample.before is not None
        assert sample.returns is not None
        np.testing.assert_allclose(sample.returns[sample.loss_mask], reward)
    again = World()
    again.run(steps=1, algorithm=replace(algorithm, gae=GAEConfig(whiten=True)))
    whitened = np.concatenate([sample.advantages[sample.loss_mask] for sample in again.learned[0]])
    assert whitened.mean() == pytest.approx(0.0, abs=1e-6)
    assert whitened.std(ddof=1) == pytest.approx(1.0, rel=1e-5)


def test_without_a_reference_nothing_is_scored() -> None:
    world = World()
    world.run(steps=1)
    assert not any(event.startswith("score") for event in world.events)
    assert world.learned[0][0].reference_logprobs is None
