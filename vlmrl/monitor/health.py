"""Warnings in plain words, each with its remedy, computed from the newest lines of metrics.jsonl.

The texts hold no changing figures, so that the same trouble is the same text at every step and is said once. A text
says what is the matter, what it is likely to come from, and what to set.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmrl.record.metrics import ZERO_ADVANTAGE, Record

WINDOW = 5
"""Optimizer steps that a trouble must last (no signal, entropy) or is averaged over (drops, time)."""
HISTORY = 200
"""Lines that the rules may look back: what rises or climbs does so against the first `WINDOW` of them."""
MAX_DROPPED = 0.2
"""Share of rollouts."""
MAX_CUT = 0.5
"""Share of rollouts that a token budget ended."""
MAX_MISMATCH_KL_EXACT = 1e-3
"""Of a single token (`mismatch_kl/max`), where sampler and trainer compute in float32 and differ by rounding alone."""
MAX_MISMATCH_KL = 0.05
"""Mean per token, where either computes in a shorter format: bfloat16 alone makes half of it of sharp logits."""
MISMATCH_RISE = 10.0
"""Times the mean of the first lines …"""
MISMATCH_FLOOR = 1e-3
"""… counted from this mean on: below it a rise is rounding."""
MIN_ENTROPY = 0.01
"""Nats per token."""
SOLVED = 0.9
"""`reward/mean` from which a low entropy is what one wants."""
MIN_GAP = 0.01
"""Nats per token. Measured: within 0.004 of 0 where every image is black; above 0.5 once a policy looks."""
GAPS = 2
"""Blind controls in a row that must find no gap."""
MIN_CLIMB = 0.05
"""In `reward/mean`."""
STARVED = 0.8
"""Share of a step's time in which one side works and the other waits for it."""


def warnings_for(history: Sequence[Record], *, exact: bool) -> list[str]:
    """What looks wrong in the newest lines; empty where nothing does. `exact`: sampler and trainer compute in float32.

    Lines without a key (step 0, a null) neither raise nor clear the warning that is computed from it. Drops by
    the algorithm's own filter (`zero_advantage`) do not count as drops.

    >>> quiet = {"step": 1, "rollouts/total": 64, "rollouts/dropped": 0}
    >>> warnings_for([quiet], exact=True)
    []
    >>> warnings_for([{**quiet, "rollouts/dropped": 32, "rollouts/dropped/fault": 32}], exact=True)[0]
    'More than 20% of the rollouts were dropped as fault: `error` in rollouts/ says what was raised.'
    """
    lines = [record for record in history if record["step"] > 0]
    recent = lines[-WINDOW:]
    checks = (
        _no_signal(recent),
        _dropped(recent),
        _cut(recent),
        _mismatch(lines, exact),
        _entropy(recent),
        _blind(lines),
        _starved(recent),
    )
    return [text for text in checks if text is not None]


def _figures(recent: Sequence[Record], key: str) -> list[float]:
    return [record[key] for record in recent if record.get(key) is not None]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _no_signal(recent: Sequence[Record]) -> str | None:
    shares = _figures(recent, ZERO_ADVANTAGE)
    if len(shares) < WINDOW or min(shares) < 1.0:
        return None
    return (
        f"All rollouts of every group have had equal rewards for {WINDOW} steps: there is nothing to learn from. "
        "The task may be too hard (reward a part of it, or warm up), solved, or its reward constant; groups may be too "
        "small (raise orchestrator.group_size) or too alike (raise orchestrator.temperature)."
    )


REMEDIES = {
    "fault": "`error` in rollouts/ says what was raised.",
    "empty": "their first prompt fills the context. Raise trainer.seq_len, or shorten the task's prompts.",
    "stray_image_token": "they sampled an image token, which the engine should have banned: run mode=doctor.",
    "gibberish": "the policy falls apart. Lower trainer.learning_rate and resume from an earlier checkpoint.",
    "repetition": "the policy falls apart. Lower trainer.learning_rate and resume from an earlier checkpoint.",
    "stale": "the engine is too far behind the trainer. Raise orchestrator.max_staleness or inference.replicas, or "
    "lower orchestrator.max_new_tokens.",
}
"""`DropReason` → what to do about it."""


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
    if dropped <= MAX_DROPPED * total or not reasons:
        return None
    most = max(reasons, key=lambda reason: reasons[reason])
    remedy = REMEDIES.get(most, "the records under rollouts/ say why.")
    return f"More than {MAX_DROPPED:.0%} of the rollouts were dropped as {most}: {remedy}"


def _cut(recent: Sequence[Record]) -> str | None:
    new_tokens = sum(_figures(recent, "rollouts/stop/max_new_tokens"))
    context = sum(_figures(recent, "rollouts/stop/context_full"))
    if len(recent) < WINDOW or new_tokens + context <= MAX_CUT * sum(_figures(recent, "rollouts/total")):
        return None
    budget, what = (
        ("the context", "trainer.seq_len")
        if context > new_tokens
        else ("orchestrator.max_new_tokens", "orchestrator.max_new_tokens")
    )
    return (
        f"Most rollouts are cut by {budget} before they answer, and a cut turn earns nothing: raise {what}, or have "
        "the prompt ask for shorter answers."
    )


def _mismatch(lines: Sequence[Record], exact: bool) -> str | None:
    causes = (
        "weights that did not arrive, images that differ on the way, or another number format. "
        "Run mode=doctor with the same choices: it says which."
    )
    # Of tokens that older weights sampled it is no fault: those do give other probabilities.
    lines = [line for line in lines if not line.get("staleness/max")]
    worst = _figures(lines[-1:], "mismatch_kl/max")
    if exact and worst and worst[0] > MAX_MISMATCH_KL_EXACT:
        return (
            f"Sampler and trainer disagree on a token (mismatch_kl/max above {MAX_MISMATCH_KL_EXACT:g}, both in "
            f"float32): {causes}"
        )
    means = _figures(lines, "mismatch_kl/mean")
    if not means:
        return None
    now = _mean(means[-WINDOW:])
    if now > MAX_MISMATCH_KL:
        return f"Sampler and trainer disagree (mismatch_kl/mean above {MAX_MISMATCH_KL:g}): {causes}"
    if len(means) >= 2 * WINDOW and now > max(MISMATCH_FLOOR, MISMATCH_RISE * _mean(means[:WINDOW])):
        return (
            f"mismatch_kl/mean has risen more than {MISMATCH_RISE:g} times: sampler and trainer drift apart. "
            "Set algorithm.importance_correction=truncated, a lower trainer.learning_rate or inference.dtype=float32; "
            "if it came at once, a weight sync failed, and mode=doctor says so."
        )
    return None


def _entropy(recent: Sequence[Record]) -> str | None:
    entropies = _figures(recent, "entropy")
    rewards = _figures(recent, "reward/mean")
    if len(entropies) < WINDOW or max(entropies) >= MIN_ENTROPY or not rewards or rewards[-1] >= SOLVED:
        return None
    return (
        f"The entropy has been below {MIN_ENTROPY:g} nats for {WINDOW} steps while the task is not solved: the policy "
        "has settled on one answer. Resume from an earlier checkpoint with a lower trainer.learning_rate, a larger "
        "orchestrator.group_size or a higher algorithm.clip_high: they keep it exploring."
    )


def _blind(lines: Sequence[Record]) -> str | None:
    """`shuffled` decides where there is one: a grey image is new to the policy and may move it by that alone."""
    gaps = [
        max(_figures([record], "vision_gap/shuffled") or _figures([record], "vision_gap/blank"))
        for record in lines
        if record.get("vision_gap/blank") is not None
    ]
    rewards = _figures(lines, "reward/mean")
    if len(gaps) < GAPS or max(gaps[-GAPS:]) >= MIN_GAP or len(rewards) < 2 * WINDOW:
        return None
    if _mean(rewards[-WINDOW:]) - _mean(rewards[:WINDOW]) < MIN_CLIMB:
        return None
    return (
        f"The reward climbs, but the policy does not look: with other images it would say the same (vision_gap below "
        f"{MIN_GAP:g} nats per token). Likely causes: the task hands in blank or broken images (look at images/), the "
        "prompt's text gives the answer away, a few answers are right so often that guessing pays, all problems show "
        "one picture, or the pixels are lost on the way (run mode=doctor)."
    )


def _starved(recent: Sequence[Record]) -> str | None:
    def share(key: str) -> float:
        """Of the steps' time; 0.0 where not every one of `WINDOW` lines says."""
        seconds, steps = _figures(recent, key), _figures(recent, "time/step")
        return sum(seconds) / max(sum(steps), 1e-9) if len(seconds) == len(steps) == WINDOW else 0.0

    if share("time/rollout") > STARVED:
        return (
            f"The trainer is starved: it waits for rollouts more than {STARVED:.0%} of the time. Raise "
            "inference.replicas, lower orchestrator.max_new_tokens, or let both work at once "
            "(inference=vllm orchestrator.max_staleness=1); a task's own slow code counts too."
        )
    # Both: an engine is idle during a checkpoint too, and a trainer that is busy may have rollouts beside it.
    if min(share("time/engine_idle"), share("time/train")) > STARVED:
        return (
            f"The engine is starved: it waits for the trainer more than {STARVED:.0%} of the time. Let both work at "
            "once (inference=vllm orchestrator.max_staleness=1), give the trainer more of the GPUs, or raise "
            "trainer.micro_batch_tokens."
        )
    return None
