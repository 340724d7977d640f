"""Make preference pairs from a task's rows, and learn from pairs (mode=dpo).

    task.problem ─▶ task.preference ─▶ renderer, once per answer ─▶ short enough? ─▶ PreferencePair
                           any of these fails ─▶ a bad row or a fault, recorded; the step goes on without it

    pairs ─▶ logprobs of the reference ─▶ logprobs of the policy ─▶ preference_loss ─▶ weights of tokens ─▶ train_step

Both answers begin with the same tokens and images, so the prefix tree computes their prompt once, in each of the three
passes. The loss is on the answers alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vlmrl.config.dpo import DPOConfig
from vlmrl.errors import UserFault
from vlmrl.orchestrator.fit import bad_row, too_long
from vlmrl.orchestrator.stream import Drawn
from vlmrl.orchestrator.supervised import Made, rendered, supervised_sample, take_problems
from vlmrl.rendering.renderer import Renderer
from vlmrl.tasks.base import NoProblem, Problem, Task
from vlmrl.tasks.preferences import NoPreferencesError, get_preference
from vlmrl.trainer.preference import Doubles, PairLogprobs, PairLoss, preference_loss
from vlmrl.types import FloatArray, PreferencePair, Trainer, TrainingSample

OF_SAMPLING = ("mismatch_kl/", "staleness/", "demonstration_loss", "reference_kl/", "policy_kl/")
"""Metrics of a step that mean nothing where no policy has sampled the answers."""


# ── pairs of a task ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class PairBatch(Made):
    """The pairs of one step."""

    pairs: list[PreferencePair] = field(default_factory=list)
    """Those that can be learned from."""


@dataclass(frozen=True)
class PairMaker:
    """Makes pairs of a task's rows."""

    task: Task
    renderer: Renderer
    seq_len: int
    """`trainer.seq_len`: the most tokens of prompt and answer."""

    def batch(self, step: int, indices: Iterable[int], count: int) -> PairBatch:
        """The next `count` pairs of the training split, for `step`. `indices` are those to try, in order.

        Raises `TaskError` where the task has no pairs, `BadRowsError` where a whole pass over the rows has none.
        """
        made = PairBatch()

        def take(pair_id: str, index: int, problem: Problem, is_row: bool) -> None:
            made.pairs.append(self.pair(pair_id, problem, is_row))

        take_problems(self.task, made, indices, count, f"dpo/{step:06d}", take, NoPreferencesError)
        return made

    def held_out(self, drawn: Sequence[Drawn]) -> list[PreferencePair]:
        """The pairs of held-out problems. A problem without a pair that fits is left out."""
        pairs = []
        for number, one in enumerate(drawn):
            if one.problem is None:
                continue
            try:
                pairs.append(self.pair(f"dpo-eval/{number:03d}", one.problem, is_row=False))
            except (NoProblem, UserFault):
                continue
        return pairs

    def pair(self, pair_id: str, problem: Problem, is_row: bool) -> PreferencePair:
        """The pair of one problem. Raises `UserFault`, and `BadRow` in its place for a problem from a row."""
        preference = get_preference(self.task, problem)
        answers = []
        for name, answer in (("chosen", preference.chosen), ("rejected", preference.rejected)):
            try:
                prompt, learned = rendered(self.renderer, (*preference.prompt, answer), given=len(preference.prompt))
            except UserFault as fault:
                if is_row:
                    raise bad_row(problem, fault.text) from None
                raise
            if len(prompt.token_ids) > self.seq_len:
                reason = too_long(prompt, f"{name} answer", f"trainer.seq_len={self.seq_len}", "which do not fit")
                raise bad_row(problem, reason) if is_row else UserFault(reason)
            answers.append(supervised_sample(f"{pair_id}/{name}", prompt, learned))
        chosen, rejected = answers
        return PreferencePair(pair_id, (chosen,), (rejected,))


# ── learning ────────────────────────────────────────────────────────────────────────────────────────────────


def learn_pairs(
    trainer: Trainer, pairs: Sequence[PreferencePair], config: DPOConfig, steps: float | None = None
) -> dict[str, float]:
    """Take one optimizer step on the loss of `pairs` → its metrics. The learning rate decays over `steps`, by default
    `trainer.max_steps`. Without pairs the weights stay as they are and the step still counts.

    Raises `NonFiniteLossError` before the weights are touched.
    """
    samples, found, logprobs = _compared(trainer, pairs, config)
    weights = [
        weight
        for pair, chosen, rejected in zip(pairs, found.chosen_weights, found.rejected_weights, strict=True)
        for weight in [chosen] * len(pair.chosen) + [rejected] * len(pair.rejected)
    ]
    version = trainer.version
    learned = [
        replace(
            sample,
            advantages=np.where(sample.loss_mask, weight, 0.0).astype(np.float32),
            inference_logprobs=_at_tokens(sample, own),
            versions=np.where(sample.loss_mask, version, -1),
        )
        for sample, weight, own in zip(samples, weights, logprobs, strict=True)
    ]
    result = trainer.train_step(learned, steps=steps)
    own_metrics = {key: value for key, value in result.metrics.items() if not key.startswith(OF_SAMPLING)}
    of_pairs = {f"dpo/{key}": value for key, value in found.metrics.items()}
    return own_metrics | {"loss": found.loss, "dpo/pairs": float(len(pairs))} | of_pairs


def score_pairs(trainer: Trainer, pairs: Sequence[PreferencePair], config: DPOConfig) -> dict[str, float]:
    """What `pairs` cost, as `eval/dpo/…`; nothing is learned. Empty without pairs."""
    if not pairs:
        return {}
    _, found, _ = _compared(trainer, pairs, config)
    return {f"eval/dpo/{key}": value for key, value in {"loss": found.loss, **found.metrics}.items()}


def _compared(
    trainer: Trainer, pairs: Sequence[PreferencePair], config: DPOConfig
) -> tuple[list[TrainingSample], PairLoss, list[FloatArray]]:
    """The samples of all pairs, what the pairs cost, and the policy's logprobs of each sample's loss tokens."""
    samples = [sample for pair in pairs for sample in pair.samples]
    if not pairs:
        nothing = np.zeros(0)
        return [], PairLoss(0.0, nothing, nothing, {}), []
    reference = [scores.logprobs for scores in trainer.reference_scores(samples)]
    own = trainer.logprobs(samples)
    sizes = [(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    (chosen, rejected), (reference_chosen, reference_rejected), (chosen_tokens, rejected_tokens) = (
        _by_answer(values, sizes)
        for values in (_sums(own), _sums(reference), [float(sample.loss_mask.sum()) for sample in samples])
    )
    logprobs = PairLogprobs(
        chosen,
        rejected,
        reference_chosen,
        reference_rejected,
        chosen_tokens.astype(np.int64),
        rejected_tokens.astype(np.int64),
    )
    return samples, preference_loss(logprobs, config), own


def _sums(logprobs: Sequence[FloatArray]) -> list[float]:
    return [float(np.sum(each, dtype=np.float64)) for each in logprobs]


def _by_answer(values: Sequence[float], sizes: Sequence[tuple[int, int]]) -> tuple[Doubles, Doubles]:
    """One value per sample, summed over the samples of each answer → float64 [P] of the better and the worse ones.

    >>> _by_answer([1.0, 2.0, 3.0, 4.0, 5.0], [(1, 1), (2, 1)])
    (array([1., 7.]), array([2., 5.]))
    """
    remaining = iter(values)
    sums = [[sum(itertools.islice(remaining, size)) for size in pair] for pair in sizes]
    chosen, rejected = zip(*sums, strict=True)
    return np.array(chosen, np.float64), np.array(rejected, np.float64)


def _at_tokens(sample: TrainingSample, values: FloatArray) -> FloatArray:
    """float32 [L]; values of the loss tokens in their places, 0.0 elsewhere."""
    whole = np.zeros(len(sample.token_ids), np.float32)
    whole[sample.loss_mask] = values
    return whole
