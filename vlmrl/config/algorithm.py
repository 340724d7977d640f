"""`algorithm`: from rewards to a loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any


class Credit(Enum):
    """What a turn's advantage is made of."""

    episode = "episode"
    """The episode's reward, for every turn."""
    turn = "turn"
    """Each turn's own reward, against the same turn of its siblings."""


class Advantage(StrEnum):
    """The built-in ways from the rewards of a group to advantages (advantages.py)."""

    group_normalized = "group_normalized"
    group_centered = "group_centered"
    leave_one_out = "leave_one_out"


class Loss(StrEnum):
    """The built-in losses of a token (trainer/loss.py)."""

    grpo = "grpo"
    dr_grpo = "dr_grpo"
    dapo = "dapo"
    rloo = "rloo"
    gspo = "gspo"
    cispo = "cispo"


class ImportanceCorrection(Enum):
    """What makes up for tokens that other weights, or another rounding, sampled (trainer/loss.py)."""

    own = "own"
    """The loss's own ratio against the sampler, clipped as its paper says."""
    truncated = "truncated"
    """Each token's ratio as a weight, at most `importance_cap`; the loss itself sees a policy that is on-policy."""
    masked = "masked"
    """The same weight where it is between 1 / `importance_cap` and `importance_cap`, and no loss elsewhere."""
    none = "none"
    """No correction: as if the weights that learn had sampled. Biased by as much as they had not."""


class FilterMode(Enum):
    """What a filter does about the rollouts that it finds. (Not called `off`, which YAML reads as a boolean.)"""

    none = "none"
    """It does not look."""
    track = "track"
    """They are counted, as `rollouts/filtered/<filter>`."""
    drop = "drop"
    """They are counted and not learned from."""


@dataclass
class FilterConfig:
    """Degenerate rollouts (filters.py has formulas and papers)."""

    gibberish: FilterMode = FilterMode.none
    """Rollouts with a rare token that was unlikelier than under a uniform draw."""
    rare_from: float = 0.66
    """Of `gibberish`: ids from this share of the vocabulary on are rare; 100,000 of Qwen3's 151,936."""
    rare_logprob_offset: float = 2.0
    """Of `gibberish`: nats below −log(vocabulary) at which a rare token is no accident of a broad distribution."""
    repetition: FilterMode = FilterMode.none
    """Rollouts with a long row of tokens of which the policy was all but certain."""
    repetition_window: int = 3000
    """Of `repetition`: tokens in a row, as in MiniMax-M1; to be lowered for short answers, which have no such row."""
    repetition_probability: float = 0.99
    """Of `repetition`: the probability above which a token is all but certain."""
    zero_advantage: FilterMode = FilterMode.none
    """Groups whose advantages are all zero: DAPO's dynamic sampling, without refill."""


@dataclass
class AlgorithmConfig:
    """From rewards to a loss. One YAML file per algorithm; the functions carry paper and equation."""

    loss: str = field(default="grpo", metadata={"choices": Loss})
    """The loss of a token: a built-in one, or a function of your own, `my_package.my_module:my_loss`
    (`vlmrl.trainer.loss.LossFunction`); `algorithm=my_package.my_module:my_loss` says the same."""
    advantage: str = field(default="group_normalized", metadata={"choices": Advantage})
    """How the rewards of a group become advantages: a built-in way, or a function of your own
    (`vlmrl.orchestrator.advantages.Estimator`)."""
    args: dict[str, Any] = field(default_factory=dict)
    """Settings of functions of your own, which find them in `config.args`; not checked here."""
    credit: Credit = Credit.episode
    """What a turn's advantage is made of: the episode's reward, or the turn's own."""
    clip_low: float = 0.2
    """Ratios below 1 − clip_low get no gradient where the advantage is negative."""
    clip_high: float = 0.28
    """Ratios above 1 + clip_high get no gradient where the advantage is positive (clip-higher, DAPO)."""
    importance_correction: ImportanceCorrection = ImportanceCorrection.own
    """What makes up for stale and mismatched tokens."""
    importance_cap: float = 2.0
    """Of `truncated` and `masked`: ratios above it (`masked`: below 1 over it too) are cut. 2, as in truncated
    importance sampling for engines that round otherwise; ratios of fresh tokens are within a percent of 1."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Rollouts that are degenerate: tracked or not learned from."""
