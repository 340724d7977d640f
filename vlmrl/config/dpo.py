"""`dpo`: learning from pairs of a better and a worse answer (mode=dpo)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from vlmrl.config.fields import SMALLEST, Resume, setting


class PreferenceLoss(Enum):
    """What a pair costs, from h: how much more the policy prefers the better answer than the reference does, in nats
    (`vlmrl.trainer.preference` has the formulas)."""

    sigmoid = "sigmoid"
    """−log σ(β h): DPO (arXiv 2305.18290, eq. 7)."""
    ipo = "ipo"
    """(h − 1 / 2β)²: IPO (arXiv 2310.12036, eq. 17), which stops at a distance instead of going on for ever."""


@dataclass
class DPOConfig:
    """mode=dpo: which pairs are learned from, and what they cost. The learning rate is `trainer.learning_rate`, the
    number of steps `trainer.max_steps` or `trainer.max_epochs`."""

    from_run: str | None = setting(None, on_resume=Resume.refused)
    """Folder of a run with recorded rollouts: of each of its groups, the rollout with the highest reward is the better
    answer, that with the lowest the worse one; of equal rewards, the sum of the turns' rewards decides. null: the
    pairs are those of the task (`task.columns.chosen`)."""
    eval_fraction: float = setting(
        0.1, on_resume=Resume.refused, low=0, high=1 - 2**-53, outside="no pair is left to train on"
    )
    """With `from_run`: the share of its problems whose pairs are held out. A task holds out pairs of its own."""
    batch_size: int = setting(32, on_resume=Resume.noted, low=1, high=2**16, outside="a step has nothing to learn from")
    """Pairs per optimizer step."""
    loss: PreferenceLoss = setting(PreferenceLoss.sigmoid, on_resume=Resume.noted)
    """What a pair costs."""
    beta: float = setting(0.1, on_resume=Resume.noted, low=SMALLEST, high=10**6, outside="nothing is learned")
    """β, the weight of a nat: how strongly the policy is held near the reference; a smaller one lets it go further. 0.1
    and 0.5 are usual values."""
    label_smoothing: float = setting(
        0.0, on_resume=Resume.noted, low=0, high=0.5, outside="the worse answer counts as the better one"
    )
    """Share of the pairs that are the wrong way round, for `loss=sigmoid` (conservative DPO; Mitchell, 2023)."""
    length_normalized: bool = setting(False, on_resume=Resume.noted)
    """Take means over the tokens of an answer in place of sums, so that `beta` means the same for long and short
    answers. h is then in nats per token."""
    sft_weight: float = setting(
        0.0, on_resume=Resume.noted, low=0, high=10**6, outside="the better answer is unlearned"
    )
    """Weight of the better answer's own negative log-likelihood, its mean over the answer's tokens (arXiv 2404.19733,
    eq. 1): it keeps the better answer likely, which a difference alone does not."""
