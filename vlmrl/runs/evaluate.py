"""`mode=eval`: evaluate the model itself or, with `resume=`, a checkpoint of a run.

    resume=<run>                            its newest checkpoint         → <run>/eval/
    resume=<run>/checkpoints/step_000020    that one, or checkpoints/best → <run>/eval_step_000020/
    model.name=<Hugging Face folder>        the model                     → a folder of its own

The folder gets evaluation.json (scores, and the rewards of each problem), pass_rates.json (for `task.curriculum`), and
every rollout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence

from vlmrl.orchestrator.eval_scores import passes
from vlmrl.orchestrator.evaluation import Evaluated
from vlmrl.orchestrator.faults import FaultWatch
from vlmrl.orchestrator.interruption import stopped_before
from vlmrl.orchestrator.loop import ExitReason
from vlmrl.record.evaluation import EVALUATION, Evaluation, Mean, SetResult, write_evaluation
from vlmrl.record.pass_rates import PASS_RATES, PassRate, write_pass_rates
from vlmrl.runs.build import Run


async def evaluate(run: Run) -> ExitReason:
    """Evaluate the weights as they were loaded, on the main problems and on every named set.

    Raises `TooManyFaultsError` (`EngineError` where the engine failed most often) where every rollout failed; their
    record stays.
    """
    evaluated = await evaluate_after(run, run.restored_step)
    if evaluated is None:
        return "interrupted"
    run.monitor.table("scores", dict(score_lines(evaluated.results)))
    folder = run.run_dir.path
    model = run.config.model.name if run.config.resume is None else run.config.resume
    write_evaluation(folder / EVALUATION, Evaluation(model, run.restored_step, evaluated.results))
    write_pass_rates(folder / PASS_RATES, pass_rates(evaluated.results))
    rollouts = [rollout for of_split in evaluated.rollouts.values() for rollout in of_split]
    FaultWatch(run=str(folder)).check_evaluation(rollouts)
    return "finished"


async def evaluate_after(run: Run, step: int, also: Mapping[str, float] | None = None) -> Evaluated | None:
    """Evaluate the trainer's weights and record the result as that of `step`, with the metrics `also`. None if the run
    was asked to stop before."""
    run.monitor.phase("eval")
    await run.weight_sync.publish(run.trainer.version)
    evaluation = asyncio.create_task(run.evaluator.run(step))
    if await stopped_before(evaluation, run.stop):
        return None
    evaluated = evaluation.result()
    run.monitor.evaluation(step, evaluated.metrics | dict(also or {}), evaluated.rollouts)
    return evaluated


def score_lines(results: Sequence[SetResult]) -> Iterator[tuple[str, str]]:
    """The table of an evaluation: one line per set, and one per value of a column. ± is the standard error."""
    for result in results:
        yield result.name, f"{len(result.asked)} problems: {scores_in_words(result.scores)}"
        for column, values in result.by.items():
            for value, means in values.items():
                shown = {name: mean for name, mean in means.items() if name in ("reward", "reward_greedy")}
                count = max((mean.problems for mean in shown.values()), default=0)
                yield f"  {column} = {value}", f"{count} problems: {scores_in_words(shown)}"


def scores_in_words(scores: Mapping[str, Mean]) -> str:
    """Scores with their standard errors.

    >>> scores_in_words({"reward": Mean(0.5, 0.02, 128), "pass@8": Mean(0.75, None, 1)})
    'reward 0.500 ± 0.020, pass@8 0.750'
    """
    return ", ".join(
        f"{name} {mean.value:.3f}" + ("" if mean.se is None else f" ± {mean.se:.3f}") for name, mean in scores.items()
    )


def pass_rates(results: Sequence[SetResult]) -> dict[str, PassRate]:
    """How many sampled answers to each problem passed, over all sets; without the problems that no answer counts of."""
    rates: dict[str, PassRate] = {}
    for result in results:
        for asked in result.asked:
            if asked.rewards:
                before = rates.get(asked.problem_id, PassRate(0, 0))
                passed = sum(passes(reward, result.pass_at) for reward in asked.rewards)
                rates[asked.problem_id] = PassRate(before.passed + passed, before.samples + len(asked.rewards))
    return rates
