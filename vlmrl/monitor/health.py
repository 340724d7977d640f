"""Warnings in plain words, computed from the newest lines of metrics.jsonl.

The texts hold no changing figures, so that the same trouble is the same text at every step and is said once.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmrl.monitor.metrics import ZERO_ADVANTAGE, Record

WINDOW = 5
"""Optimizer steps that a trouble must last (no signal, entropy) or is averaged over (drops)."""
MAX_DROPPED = 0.2
"""Share of rollouts."""
MAX_MISMATCH_KL = 1e-3
"""Of a single token (`mismatch_kl/max`)."""
MIN_ENTROPY = 0.01
"""Nats per token."""
SOLVED = 0.9
"""`reward/mean` from which a low entropy is what one wants."""


def warnings_for(history: Sequence[Record]) -> list[str]:
    """What looks wrong in the newest lines; empty where nothing does.

    Lines without a key (step 0, a null) neither raise nor clear the warning that is computed from it. Drops by
    the algorithm's own filter (`zero_advantage`) do not count as drops.

    >>> quiet = {"step": 1, "rollouts/total": 64, "rollouts/dropped": 0}
    >>> warnings_for([quiet])
    []
    >>> warnings_for([{**quiet, "rollouts/dropped": 32, "rollouts/dropped/fault": 32}])[0]
    'More than 20% of the rollouts were dropped (most of them: fault). The records under rollouts/ say why.'
    """
    recent = [record for record in history if record["step"] > 0][-WINDOW:]
    checks = (_no_signal(recent), _dropped(recent), _mismatch(recent), _entropy(recent))
    return [text for text in checks if text is not None]


def _figures(recent: Sequence[Record], key: str) -> list[float]:
    return [record[key] for record in recent if record.get(key) is not None]


def _no_signal(recent: Sequence[Record]) -> str | None:
    shares = _figures(recent, ZERO_ADVANTAGE)
    if len(shares) < WINDOW or min(shares) < 1.0:
        return None
    return (
        f"All rollouts of every group have had equal rewards for {WINDOW} steps: there is nothing to learn from. "
        "The task may be too hard or solved, group_size too small, temperature too low, or the reward constant."
    )


def _dropped(recent: Sequence[Record]) -> str | None:
    prefix = "rollouts/dropped/"
    reasons: dict[str, float] = {}
    for record in recent:
        for key, count in record.items():
            if key.startswith(prefix) and count:
                reasons[key.removeprefix(prefix)] = reasons.get(key.removeprefix(prefix), 0.0) + count
    filtered = reasons.pop("zero_advantage", 0.0)
    dropped = sum(_figures(recent, "rollouts/dropped")) - filtered
    total = sum(_figures(recent, "rollouts/total"))
    if dropped <= MAX_DROPPED * total:
        return None
    most = f" (most of them: {max(reasons, key=lambda reason: reasons[reason])})" if reasons else ""
    return f"More than {MAX_DROPPED:.0%} of the rollouts were dropped{most}. The records under rollouts/ say why."


def _mismatch(recent: Sequence[Record]) -> str | None:
    worst = _figures(recent[-1:], "mismatch_kl/max")
    if not worst or worst[0] <= MAX_MISMATCH_KL:
        return None
    return (
        f"Sampler and trainer disagree on a token (mismatch_kl/max above {MAX_MISMATCH_KL:g}): "
        "different precision, weights that did not arrive, or images that differ on the way."
    )


def _entropy(recent: Sequence[Record]) -> str | None:
    entropies = _figures(recent, "entropy")
    rewards = _figures(recent, "reward/mean")
    if len(entropies) < WINDOW or max(entropies) >= MIN_ENTROPY or not rewards or rewards[-1] >= SOLVED:
        return None
    return (
        f"The entropy has been below {MIN_ENTROPY:g} nats for {WINDOW} steps while the task is not solved: the policy "
        "has settled on one answer. A lower learning rate, larger groups or a higher clip_high keep it exploring."
    )
