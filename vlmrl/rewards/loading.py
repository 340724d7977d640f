"""Make the reward terms of a run from its config.

reward.terms.<name> ─▶ the function of its kind ─▶ Term(name, weight, extract, reward)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from vlmrl.config.reward import (
    AnlsTerm,
    ChoiceTerm,
    ExactTerm,
    F1Term,
    FormatTerm,
    ImportedTerm,
    IouTerm,
    JudgeTerm,
    MathTerm,
    NumberTerm,
    RewardConfig,
    RewardTerm,
)
from vlmrl.errors import ConfigError
from vlmrl.rewards.anls import score_anls
from vlmrl.rewards.base import PerAttempt, Reward, RunBlocking
from vlmrl.rewards.choice import choice
from vlmrl.rewards.exact import exact
from vlmrl.rewards.extract import Extractor, extractor
from vlmrl.rewards.f1 import score_f1
from vlmrl.rewards.format import format_of
from vlmrl.rewards.imported import imported
from vlmrl.rewards.iou import score_iou
from vlmrl.rewards.judge import JudgeReward
from vlmrl.rewards.math import MathReward
from vlmrl.rewards.number import score_number

TAKEN_NAMES = {"mean": "mean", "std": "standard deviation"}
"""Names that no term may have, because the metrics `reward/<name>` mean something else."""


@dataclass(frozen=True)
class Term:
    """One reward term of a run."""

    name: str
    """As in `reward.terms.<name>`; the value is logged as `reward/<name>`."""
    weight: float
    extract: Extractor
    """Finds the answer in a completion."""
    reward: Reward


def load_terms(config: RewardConfig, run_blocking: RunBlocking, key: str = "reward") -> tuple[Term, ...]:
    """Make the terms of a run, or of the task whose `reward` stands at `key`. A function that may block is called
    through `run_blocking`.

    Raises `ConfigError` where a term cannot be used: a pattern that is none, a function that cannot be called, a name
    that is taken.

    >>> from vlmrl.config.reward import ExactTerm
    >>> terms = load_terms(RewardConfig({"exact": ExactTerm(weight=0.5)}), run_blocking=None)
    >>> terms[0].name, terms[0].weight, terms[0].extract(" 7 ")
    ('exact', 0.5, '7')
    """
    for name in TAKEN_NAMES.keys() & config.terms.keys():
        raise ConfigError(
            f"{key}.terms.{name} would be logged as reward/{name}, which is the {TAKEN_NAMES[name]} of all rewards: "
            "choose another name"
        )
    return tuple(
        Term(
            name,
            term.weight,
            extractor(term.extract, config.extract, key=f"{key}.terms.{name}.extract", shared_key=f"{key}.extract"),
            _reward(term, f"{key}.terms.{name}", run_blocking),
        )
        for name, term in config.terms.items()
    )


def _reward(term: RewardTerm, key: str, run_blocking: RunBlocking) -> Reward:
    match term:
        case ExactTerm():
            return PerAttempt(exact(term))
        case ChoiceTerm():
            return PerAttempt(choice(term))
        case NumberTerm():
            return PerAttempt(partial(score_number, term))
        case MathTerm():
            return MathReward(term, run_blocking)
        case IouTerm():
            return PerAttempt(partial(score_iou, term))
        case F1Term():
            return PerAttempt(partial(score_f1, term))
        case AnlsTerm():
            return PerAttempt(partial(score_anls, term))
        case FormatTerm():
            return PerAttempt(format_of(term, key))
        case JudgeTerm():
            return JudgeReward(term, key, run_blocking)
        case ImportedTerm():
            return imported(term, key, run_blocking)
    raise AssertionError(f"no reward for {type(term).__name__}")
