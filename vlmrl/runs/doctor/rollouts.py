"""Checks of the rollouts as a whole: they were played without a fault, and their tokens name the right version."""

from __future__ import annotations

from collections.abc import Sequence

from vlmrl.runs.doctor.evidence import Evidence
from vlmrl.runs.verdicts import Verdict, failed, judged


def rollouts(name: str, evidence: Evidence) -> Verdict:
    """Every rollout was played without a fault, and tokens were sampled."""
    played = evidence.rollouts()
    turns = [turn for rollout in played for turn in rollout.turns]
    tokens = sum(len(turn.completion.token_ids) for turn in turns)
    for rollout in played:
        if rollout.stop_reason.is_fault:
            return failed(name, f"{rollout.rollout_id} ended as {rollout.stop_reason}: {rollout.error}")
        if not rollout.turns:
            return failed(name, f"{rollout.rollout_id}: the first prompt leaves no room for an answer")
    finding = f"{len(played)} rollouts, {len(turns)} turns, {tokens} tokens sampled"
    return judged(name, tokens > 0, finding, rollouts=len(played), turns=len(turns), tokens=tokens)


def versions(name: str, evidence: Sequence[Evidence]) -> Verdict:
    """Each sampled token carries the policy version that was published when it was sampled.

    `evidence` is in the order of the versions, from 0.
    """
    wrong, tokens = 0, 0
    for version, of_version in enumerate(evidence):
        for sample in of_version.samples:
            named = sample.versions[sample.loss_mask]
            wrong += int((named != version).sum())
            tokens += len(named)
    finding = f"{tokens} tokens of versions 0 to {len(evidence) - 1}: {wrong} name another version"
    return judged(name, wrong == 0, finding, "0", tokens=tokens, wrong=wrong)
