"""Find typical problems of a run in the newest lines of metrics.jsonl, and describe each one with its remedy.

A text says what is wrong, what the likely cause is, and what to set. It contains no numbers that change from step to
step, so a problem has the same text at every step and is reported once.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmrl.config.algorithm import Credit
from vlmrl.config.monitor import BlindGuard, MonitorConfig
from vlmrl.record.metrics import Record

EQUAL_COMPARED = "groups/equal_compared"
"""The share of groups whose compared rewards are equal; in the monitor's memory only, not in metrics.jsonl."""
WINDOW = 5
"""Optimizer steps that a problem must last (no signal, entropy) or is averaged over (drops, time)."""
HISTORY = 200
"""Newest lines that the rules see. A rise is measured against the first `WINDOW` of them."""
MAX_DROPPED = 0.2
"""Largest share of dropped rollouts without a warning."""
MAX_CUT = 0.5
"""Largest share of rollouts ended by a token budget without a warning."""
MAX_UNLEARNABLE = 0.5
"""Largest share of sampled tokens without a loss, because of how a client sampled them, without a warning."""
MAX_MISMATCH_KL_EXACT = 1e-3
"""Nats. Limit of `mismatch_kl/max` where engine and trainer compute in float32 and differ only by rounding."""
MAX_MISMATCH_KL = 0.05
"""Nats per token. Limit of the mean where one of them computes in a shorter format; with sharp logits, bfloat16 alone
gives half of it."""
MISMATCH_RISE = 10.0
"""Factor on the mean of the first lines that counts as a rise of the mismatch."""
MISMATCH_FLOOR = 1e-3
"""Nats per token. Below this mean, a rise of the mismatch is rounding."""
MIN_ENTROPY = 0.01
"""Nats per token. Entropy below which the policy no longer explores."""
SOLVED = 0.9
"""`reward/mean` from which a low entropy is expected."""
STARVED = 0.8
"""Share of the step time for which one side must wait for the other."""


def warnings_for(
    history: Sequence[Record],
    *,
    exact: bool,
    credit: Credit = Credit.episode,
    config: MonitorConfig | None = None,
) -> list[str]:
    """The problems that the newest lines show; empty where there are none.

    `exact`: engine and trainer both compute in float32. `credit`: which rewards the advantages compare. `config`: the
    limits of the guard against blind learning, by default those of a run that sets none. A line that
    lacks a key (step 0, or a null) neither raises nor clears the warnings that use it. Rollouts dropped as
    `zero_advantage` do not count as dropped.

    >>> quiet = {"step": 1, "rollouts/total": 64, "rollouts/dropped": 0}
    >>> warnings_for([quiet], exact=True)
    []
    >>> warnings_for([{**quiet, "rollouts/dropped": 32, "rollouts/dropped/fault": 32}], exact=True)[0]
    'More than 20% of the rollouts were dropped as fault: python -m vlmrl mode=faults run=<folder> lists them.'
    """
    lines = [record for record in history if record["step"] > 0]
    recent = lines[-WINDOW:]
    checks = (
        _no_signal(recent, credit),
        _dropped(recent),
        _cut(recent),
        _unlearnable(recent),
        _mismatch(lines, exact),
        _entropy(recent),
        _blind(lines, config or MonitorConfig()),
        _unmeasured(recent),
        _starved(recent),
        _given_up(recent),
    )
    return [text for text in checks if text is not None]


def _values(recent: Sequence[Record], key: str) -> list[float]:
    return [record[key] for record in recent if record.get(key) is not None]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _no_signal(recent: Sequence[Record], credit: Credit) -> str | None:
    shares = _values(recent, EQUAL_COMPARED)
    if len(shares) < WINDOW or min(shares) < 1.0:
        return None
    if credit is Credit.episode:
        compared, other = "the episode's reward", ""
    else:
        compared = "each turn's turn_reward" if credit is Credit.turn else "the turn_reward of each turn and later ones"
        other = "If the task sets only `reward`, set algorithm.credit=episode. "
    return (
        f"For {WINDOW} steps, the rewards that algorithm.credit={credit.name} compares ({compared}) have been equal "
        f"within every group, so there is nothing to learn from. {other}If the task is too hard, reward partial "
        "success or add warm-up steps. If the rollouts of a group are too similar, raise orchestrator.group_size or "
        "orchestrator.temperature. If the task is solved, stop the run."
    )


REMEDIES = {
    "fault": "python -m vlmrl mode=faults run=<folder> lists them.",
    "empty": "their first prompt fills the context. Raise trainer.seq_len, or shorten the task's prompts.",
    "no_reward": "every reward term abstains, as it does without a reference answer. Check task.columns.answer.",
    "stray_image_token": "they contain an image token that the engine should not have sampled. Run mode=doctor.",
    "truncated": "their last answer was cut. Raise orchestrator.max_new_tokens, or reward short answers.",
    "gibberish": "the policy collapses. Lower trainer.learning_rate and resume from an earlier checkpoint.",
    "repetition": "the policy collapses. Lower trainer.learning_rate and resume from an earlier checkpoint.",
    "stale": "the engine is too far behind the trainer. Raise orchestrator.max_staleness or inference.replicas, or "
    "lower orchestrator.max_new_tokens.",
}
"""`DropReason` → cause and remedy, the end of the warning."""


def _dropped(recent: Sequence[Record]) -> str | None:
    prefix = "rollouts/dropped/"
    reasons: dict[str, float] = {}
    for record in recent:
        for key, count in record.items():
            if key.startswith(prefix) and count:
                reasons[key.removeprefix(prefix)] = reasons.get(key.removeprefix(prefix), 0.0) + count
    filtered = reasons.pop("zero_advantage", 0.0)
    dropped = sum(_values(recent, "rollouts/dropped")) - filtered
    total = sum(_values(recent, "rollouts/total"))
    if dropped <= MAX_DROPPED * total or not reasons:
        return None
    most = max(reasons, key=lambda reason: reasons[reason])
    remedy = REMEDIES.get(most, "look at these rollouts in report.html.")
    return f"More than {MAX_DROPPED:.0%} of the rollouts were dropped as {most}: {remedy}"


def _cut(recent: Sequence[Record]) -> str | None:
    new_tokens = sum(_values(recent, "rollouts/stop/max_new_tokens"))
    context = sum(_values(recent, "rollouts/stop/context_full"))
    if len(recent) < WINDOW or new_tokens + context <= MAX_CUT * sum(_values(recent, "rollouts/total")):
        return None
    budget, what = (
        ("the context", "trainer.seq_len")
        if context > new_tokens
        else ("orchestrator.max_new_tokens", "orchestrator.max_new_tokens")
    )
    return (
        f"Most rollouts are cut by {budget} before they end, and a cut turn gets no reward: raise {what}, or ask for "
        "shorter answers in the prompt."
    )


def _unlearnable(recent: Sequence[Record]) -> str | None:
    unlearnable, sampled = sum(_values(recent, "tokens/unlearnable")), sum(_values(recent, "tokens/completion"))
    if unlearnable <= MAX_UNLEARNABLE * sampled:
        return None
    return (
        f"More than {MAX_UNLEARNABLE:.0%} of the sampled tokens have no loss, because the program samples them "
        "greedily, or with a top_p or top_k of which the engine does not report what it keeps. Have it send a "
        "temperature alone, or set task.sampling=run."
    )


def _mismatch(lines: Sequence[Record], exact: bool) -> str | None:
    causes = (
        "the engine may lack the newest weights, the images may differ, or the number formats may. "
        "Run mode=doctor with the same settings to find out which."
    )
    # Skip steps with stale tokens: older weights give other probabilities, and that is not a fault.
    lines = [line for line in lines if not line.get("staleness/max")]
    worst = _values(lines[-1:], "mismatch_kl/max")
    if exact and worst and worst[0] > MAX_MISMATCH_KL_EXACT:
        return (
            f"Engine and trainer disagree on a token (mismatch_kl/max above {MAX_MISMATCH_KL_EXACT:g}, both in "
            f"float32): {causes}"
        )
    means = _values(lines, "mismatch_kl/mean")
    if not means:
        return None
    now = _mean(means[-WINDOW:])
    if now > MAX_MISMATCH_KL:
        return f"Engine and trainer disagree (mismatch_kl/mean above {MAX_MISMATCH_KL:g}): {causes}"
    if len(means) >= 2 * WINDOW and now > max(MISMATCH_FLOOR, MISMATCH_RISE * _mean(means[:WINDOW])):
        return (
            f"mismatch_kl/mean has grown more than {MISMATCH_RISE:g}-fold, so engine and trainer drift apart. Set "
            "algorithm.importance_correction=truncated, a lower trainer.learning_rate or inference.dtype=float32. If "
            "it rose within one step, a weight sync may have failed: run mode=doctor."
        )
    return None


def _entropy(recent: Sequence[Record]) -> str | None:
    entropies = _values(recent, "entropy")
    rewards = _values(recent, "reward/mean")
    if len(entropies) < WINDOW or max(entropies) >= MIN_ENTROPY or not rewards or rewards[-1] >= SOLVED:
        return None
    return (
        f"The entropy has been below {MIN_ENTROPY:g} nats for {WINDOW} steps although the task is not solved, so the "
        "policy no longer explores. Resume from an earlier checkpoint with a lower trainer.learning_rate, a larger "
        "orchestrator.group_size, a higher algorithm.clip_high or a higher algorithm.entropy_coef."
    )


def is_blind(history: Sequence[Record], config: MonitorConfig) -> bool:
    """Whether the reward rises although the policy ignores its images, by the limits of `monitor.blind_guard`.

    It reads `vision_gap/shuffled` where it exists: a grey image is new to the policy and may change its answers just
    because of that. Measured: within 0.004 nats per token of 0 where every image is black; above 0.5 once the policy
    uses its images."""
    lines = [record for record in history if record["step"] > 0]
    gaps = [
        max(_values([record], "vision_gap/shuffled") or _values([record], "vision_gap/blank"))
        for record in lines
        if record.get("vision_gap/blank") is not None
    ]
    rewards = _values(lines, "reward/mean")
    controls = config.blind_controls
    if len(gaps) < controls or max(gaps[-controls:]) >= config.blind_gap or len(rewards) < 2 * WINDOW:
        return False
    return _mean(rewards[-WINDOW:]) - _mean(rewards[:WINDOW]) >= config.blind_rise


def _blind(lines: Sequence[Record], config: MonitorConfig) -> str | None:
    if config.blind_guard is BlindGuard.none or not is_blind(lines, config):
        return None
    return (
        f"The reward rises, but the policy ignores its images: other images would not change its answers (vision_gap "
        f"below {config.blind_gap:g} nats per token). Check that the images are not blank or broken (look at images/), "
        "that the prompt does not contain the answer, that no answer is right so often that guessing pays, and that "
        "problems have different images. Run mode=doctor to check that the pixels arrive."
    )


def _unmeasured(recent: Sequence[Record]) -> str | None:
    shares = _values(recent, "vision_advantage/measured")
    if len(shares) < WINDOW or max(shares) > 0:
        return None
    return (
        f"For {WINDOW} steps, algorithm.vision_advantage.weight has had no effect: no turn saw images that have a "
        "replacement of the same size in another problem of the step. Raise orchestrator.groups_per_step, bring the "
        "images to one size, or set algorithm.vision_advantage.weight=0."
    )


def _starved(recent: Sequence[Record]) -> str | None:
    def share(key: str) -> float:
        """Share of the steps' time; 0.0 unless all of the last `WINDOW` lines have the key."""
        seconds, steps = _values(recent, key), _values(recent, "time/step")
        return sum(seconds) / max(sum(steps), 1e-9) if len(seconds) == len(steps) == WINDOW else 0.0

    if share("time/rollout") > STARVED:
        return (
            f"The trainer waits for rollouts more than {STARVED:.0%} of the time. Raise inference.replicas, lower "
            "orchestrator.max_new_tokens, let both work at once (inference=vllm orchestrator.max_staleness=1), or make "
            "the task's code faster."
        )
    # Both conditions: the engine is also idle during a checkpoint, and rollouts may run while the trainer is busy.
    if min(share("time/engine_idle"), share("time/train")) > STARVED:
        return (
            f"The engine waits for the trainer more than {STARVED:.0%} of the time. Let both work at once "
            "(inference=vllm orchestrator.max_staleness=1), give the trainer more of the GPUs, or raise "
            "trainer.micro_batch_tokens."
        )
    return None


def _given_up(recent: Sequence[Record]) -> str | None:
    if not _values(recent[-1:], "compile/given_up"):
        return None
    return (
        "torch has compiled a function of the model for as many kinds of arguments as it may, and runs further kinds "
        "uncompiled, which is slower: logs/main.log names it. Set trainer.compile=false if the steps have become "
        "slower than that."
    )
