"""`algorithm`: from rewards to a loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum
from typing import Any

from vlmrl.config.critic import GAEConfig, ValueConfig
from vlmrl.config.fields import SMALLEST, Resume, setting


class Credit(Enum):
    """Which reward a turn's advantage is computed from (`vlmrl.orchestrator.credit` has the formulas)."""

    episode = "episode"
    """The episode's reward, for every turn of it."""
    turn = "turn"
    """Each turn's own reward."""
    vars()["return"] = "return"  # a keyword of Python, which no assignment can spell: `Credit["return"]`
    """The turn's own reward and the later ones, each turn further away multiplied by `discount` once more."""


class Compare(Enum):
    """Which turns of a group are compared with each other, where turns have rewards of their own."""

    turn = "turn"
    """The t-th turns of the siblings, whatever they saw."""
    state = "state"
    """Turns in which the policy was shown the same images (the same text, where there are none), whenever that was. A
    turn in which no sibling was shown the same is compared by its number."""


class Advantage(StrEnum):
    """The built-in ways to turn the rewards of a group into advantages (`vlmrl.orchestrator.advantages`)."""

    group_normalized = "group_normalized"
    group_centered = "group_centered"
    leave_one_out = "leave_one_out"
    none = "none"
    gae = "gae"
    """From a value function, and from no sibling (`vlmrl.orchestrator.gae`)."""


class Loss(StrEnum):
    """The built-in losses of a token (`vlmrl.trainer.loss`)."""

    grpo = "grpo"
    ppo = "ppo"
    dr_grpo = "dr_grpo"
    dapo = "dapo"
    rloo = "rloo"
    gspo = "gspo"
    cispo = "cispo"


class ImportanceCorrection(Enum):
    """How the loss corrects for tokens that older weights, or an engine that rounds differently, have sampled."""

    own = "own"
    """The loss uses its own ratio to the sampler's probability, clipped as its paper says."""
    truncated = "truncated"
    """Each token is weighted by its ratio, at most `importance_cap`; the loss itself treats the tokens as on-policy."""
    masked = "masked"
    """The same weight where the ratio is between 1 / `importance_cap` and `importance_cap`; no loss elsewhere."""
    none = "none"
    """No correction: the loss treats all tokens as on-policy. Its gradient is biased where they are not."""


class Truncated(Enum):
    """What a cut answer is paid: one whose token budget or context ran out before it ended. An answer that is complete
    keeps its reward, also where the episode then ends for want of turns or of room for the next prompt."""

    zero = "zero"
    """Nothing: a reward of the turn or of the episode that is above 0 becomes 0. It would teach the policy to ramble.
    One that is below 0 stays: rambling must not be the way around a penalty."""
    keep = "keep"
    """What the task says."""
    mask = "mask"
    """The rollout is left out of training, and out of the rewards that its siblings are compared with: a task cannot
    know what half an answer is worth."""


class KLEstimator(StrEnum):
    """How the loss estimates KL(π ‖ reference) from one sampled token, with d = log reference − log π (Schulman,
    "Approximating KL Divergence", 2020). As a term of the loss they differ in what their gradient is in expectation,
    where the tokens are on-policy (arXiv 2506.09477)."""

    k1 = "k1"
    """−d. Its gradient is zero in expectation, so as a loss it teaches nothing; as a penalty of the reward
    (`algorithm.kl.reward`), where no gradient goes through it, it is the right one."""
    k2 = "k2"
    """d² / 2. Its value is biased, its gradient is that of KL(π ‖ reference)."""
    k3 = "k3"
    """exp(d) − d − 1, GRPO's term (arXiv 2402.03300, eq. 4). Its value is unbiased and never negative, its gradient is
    that of KL(reference ‖ π)."""


@dataclass
class KLConfig:
    """What the distance to the reference (`reference=`) costs. Each number is a factor; 0 is no cost. All of them use
    the distribution that was sampled from: its temperature, and no banned tokens."""

    loss: float = setting(0.0, on_resume=Resume.noted, low=0, high=10**6, outside="it pulls away from the reference")
    """A term of the loss: this times the mean of `estimator` over the batch's tokens, with gradient. GRPO has 0.04."""
    estimator: KLEstimator = setting(KLEstimator.k3, on_resume=Resume.noted)
    """The estimator of that term."""
    reward: float = setting(0.0, on_resume=Resume.noted, low=0, high=10**6, outside="it pulls away from the reference")
    """A penalty: this times the sum of log μ − log reference over the tokens of what is rewarded (`credit`: the episode
    or the turn) is taken off its reward before rewards are compared; μ is the sampler. Rewards in the metrics and in
    the record are those of the task."""
    advantage: float = setting(
        0.0, on_resume=Resume.noted, low=0, high=10**6, outside="the policy would leave the reference"
    )
    """On-policy distillation: each token's advantage is lower by this times log μ − log reference, so that the loss
    descends KL(π ‖ reference) token by token. With `algorithm.advantage=none` nothing else is learned."""

    @property
    def is_on(self) -> bool:
        """Whether anything costs something."""
        return bool(self.loss or self.reward or self.advantage)


@dataclass
class OverlongConfig:
    """The soft overlong punishment of DAPO (arXiv 2503.14476, eq. 13): what a long answer loses before rewards are
    compared, whether it ends or is cut. Rewards in the metrics and in the record are those of the task."""

    tokens: int = setting(
        0, on_resume=Resume.noted, low=0, high=2**24, outside="it is not a number of tokens (0 is no punishment)"
    )
    """L_cache, a number of tokens: an answer with more than `longest` − `tokens` of them loses a part of `penalty` that
    grows linearly, to all of it at `longest`. 0 is no punishment. The paper has 4,096 of 20,480."""
    longest: int | None = setting(
        None, on_resume=Resume.noted, low=1, high=2**24, outside="no answer is shorter than that"
    )
    """L_max, in tokens: the length from which on an answer loses all of `penalty`. null: that of
    `orchestrator.max_new_tokens`."""
    penalty: float = setting(
        1.0, on_resume=Resume.noted, low=SMALLEST, high=10**6, outside="a long answer loses nothing, or gains"
    )
    """The reward that an answer of `longest` tokens loses. The paper has 1, with rewards of −1 and 1."""

    @property
    def is_on(self) -> bool:
        """Whether long answers lose something."""
        return self.tokens > 0


@dataclass
class VisionAdvantageConfig:
    """Looking as a signal: each turn's advantage is weighted by how much less likely its answer is with the images of
    another problem, its gap in nats per token (`vlmrl.orchestrator.vision_advantage` has the formula)."""

    weight: float = setting(
        0.0, on_resume=Resume.noted, low=0, high=10**4, outside="answers that look would be reinforced less"
    )
    """The weight of looking: a gap of one nat per token adds this to the factor 1; then all factors are divided by
    their mean. 0 is off, and above 0 each step scores its samples once more, without gradient."""
    cap: float = setting(2.0, on_resume=Resume.noted, low=SMALLEST, high=10**4, outside="no gap would have a weight")
    """The largest gap that counts, in nats per token: above it an answer is read off the image. A gap below 0 counts
    as 0."""

    @property
    def is_on(self) -> bool:
        """Whether advantages are weighted."""
        return self.weight > 0


class Divergence(StrEnum):
    """How far the policy π is from its teacher q where a token was sampled (`vlmrl.trainer.distill` has formulas)."""

    forward = "forward"
    """KL(q ‖ π): the policy learns to do all that the teacher does."""
    reverse = "reverse"
    """KL(π ‖ q): it learns to leave out what the teacher would not do."""
    jensen_shannon = "jensen_shannon"
    """GKD's generalized Jensen–Shannon divergence, between the two (arXiv 2306.13649, eq. 1)."""


@dataclass
class DistillConfig:
    """Distillation from the whole distributions of the reference, in place of its probability of the sampled token
    alone (`algorithm.kl.advantage`)."""

    top_k: int = setting(0, on_resume=Resume.noted, low=0, high=2**20, outside="it counts no tokens")
    """Tokens that the reference reports in each place: its most likely ones, and all others as one more outcome. They
    also reach a loss of your own. Each loss token takes 8 · `top_k` bytes of the host's memory; 0 reports none."""
    weight: float = setting(0.0, on_resume=Resume.noted, low=0, high=10**6, outside="it pulls away from the reference")
    """A term of the loss: this times the mean of `divergence` over the batch's tokens, with gradient. With
    `algorithm.advantage=none` nothing else is learned. 0 is no term."""
    divergence: Divergence = setting(Divergence.reverse, on_resume=Resume.noted)
    """The divergence of that term."""
    beta: float = setting(
        0.5, on_resume=Resume.noted, low=SMALLEST, high=1 - 2**-53, outside="the mixture is one of the two"
    )
    """For `jensen_shannon`: the teacher's share of the mixture, as in GKD. Towards 0 it becomes β times the forward KL,
    towards 1 it becomes 1 − β times the reverse one."""


class FilterMode(Enum):
    """What a filter does with the rollouts it finds. (Not called `off`, which YAML reads as a boolean.)"""

    none = "none"
    """The filter is disabled."""
    track = "track"
    """The rollouts are counted, as `rollouts/filtered/<filter>`."""
    drop = "drop"
    """The rollouts are counted and left out of training."""


@dataclass
class FilterConfig:
    """Filters for degenerate rollouts (`vlmrl.orchestrator.filters` has the formulas and papers)."""

    gibberish: FilterMode = setting(FilterMode.none, on_resume=Resume.noted)
    """Finds rollouts with a rare token that was less likely than under a uniform distribution."""
    rare_from: float = setting(
        0.66, on_resume=Resume.noted, low=0, high=1, outside="it is not a share of the vocabulary"
    )
    """For `gibberish`: token ids from this share of the vocabulary on are rare; 100,000 of Qwen3's 151,936."""
    rare_logprob_offset: float = setting(
        2.0,
        on_resume=Resume.noted,
        low=0,
        high=10**4,
        outside="ordinary tokens are rare",
    )
    """For `gibberish`: a rare token is found where its logprob lies this many nats or more below −log(vocabulary)."""
    repetition: FilterMode = setting(FilterMode.none, on_resume=Resume.noted)
    """Finds rollouts with a long row of tokens that the policy was almost certain of."""
    repetition_window: int = setting(
        3000, on_resume=Resume.noted, low=1, high=2**24, outside="every rollout is a repetition"
    )
    """For `repetition`: tokens in a row, as in MiniMax-M1. Lower it for short answers, which have no such row."""
    repetition_probability: float = setting(
        0.99, on_resume=Resume.noted, low=SMALLEST, high=1, outside="it is not a probability"
    )
    """For `repetition`: the probability above which the policy is almost certain of a token."""
    zero_advantage: FilterMode = setting(FilterMode.none, on_resume=Resume.noted)
    """Finds groups whose advantages are all zero. `algorithm.refill` drops them and samples others in their place."""


@dataclass
class RefillConfig:
    """Sample further groups in place of those whose advantages are all zero: DAPO's dynamic sampling
    (`vlmrl.orchestrator.refill`)."""

    budget: int = setting(1, on_resume=Resume.noted, low=1, high=10**4, outside="a step has no groups")
    """A step samples at most so many times `orchestrator.groups_per_step` groups. It ends as soon as `groups_per_step`
    of them have a gradient; the others are dropped as `zero_advantage`. 1: no refill."""

    @property
    def is_on(self) -> bool:
        """Whether groups are sampled in place of others."""
        return self.budget > 1


@dataclass
class AlgorithmConfig:
    """From rewards to a loss. There is one YAML file per algorithm; the functions name paper and equation."""

    loss: str = setting("grpo", on_resume=Resume.noted, choices=Loss)
    """The loss of a token: a built-in one, or a function of your own, `my_package.my_module:my_loss`
    (`vlmrl.trainer.loss.LossFunction`); `algorithm=my_package.my_module:my_loss` sets the same."""
    advantage: str = setting("group_normalized", on_resume=Resume.noted, choices=Advantage)
    """How the rewards of a group become advantages: a built-in way, or a function of your own
    (`vlmrl.orchestrator.advantages.Estimator`)."""
    args: dict[str, Any] = setting({}, on_resume=Resume.noted, free_form=True)
    """Settings for functions of your own, which read them from `config.args`; they are not checked."""
    credit: Credit = setting(Credit.episode, on_resume=Resume.noted)
    """Which reward a turn's advantage is computed from. A run takes it from `task.credit` unless it is set here."""
    compare: Compare = setting(Compare.turn, on_resume=Resume.noted)
    """For `credit=turn` and `credit=return`: which turns are compared with each other."""
    discount: float = setting(1.0, on_resume=Resume.noted, low=0, high=1, outside="it is not a discount factor")
    """For `credit=return`: the weight of a reward that comes one turn later; 0.9 counts the third reward 0.81 times."""
    truncated: Truncated = setting(Truncated.zero, on_resume=Resume.noted)
    """What a cut answer is paid in training, the same with every `credit`. An evaluation counts what the task says.
    `overlong` also punishes long answers that end."""
    overlong: OverlongConfig = field(default_factory=OverlongConfig)
    """What a long answer loses."""
    vision_advantage: VisionAdvantageConfig = field(default_factory=VisionAdvantageConfig)
    """Weights on the advantages of answers that depend on their images."""
    clip_low: float = setting(0.2, on_resume=Resume.noted, low=0, high=1, outside="it clips no ratio or every one")
    """Ratios below 1 − `clip_low` get no gradient where the advantage is negative."""
    clip_high: float = setting(0.28, on_resume=Resume.noted, low=0, high=math.inf, outside="it clips every ratio")
    """Ratios above 1 + `clip_high` get no gradient where the advantage is positive (clip-higher, DAPO)."""
    entropy_coef: float = setting(
        0.0, on_resume=Resume.noted, low=0, high=100, outside="the policy would learn to be certain, or nothing else"
    )
    """Weight of the entropy bonus: the loss is lower by this times the mean entropy of the loss tokens, in nats, so
    that the policy goes on exploring (A3C). 0.01 is a usual value; 0 is no bonus."""
    importance_correction: ImportanceCorrection = setting(ImportanceCorrection.own, on_resume=Resume.noted)
    """How the loss corrects for stale and mismatched tokens."""
    importance_cap: float = setting(
        2.0, on_resume=Resume.noted, low=1, high=math.inf, outside="it cuts tokens that are on-policy"
    )
    """For `truncated` and `masked`: ratios above it are cut; `masked` also cuts ratios below 1 / `importance_cap`. The
    default of 2 is that of truncated importance sampling for engines that round differently; the ratios of fresh
    tokens are within a percent of 1."""
    clip_dual: float | None = setting(
        None,
        on_resume=Resume.noted,
        low=math.nextafter(1.0, 2.0),
        high=10**6,
        outside="it would bound ratios that PPO's clip lets pass",
    )
    """Dual clip (arXiv 1912.09729, eq. 5), for the losses that clip: where the advantage is negative, a token counts at
    most this times its advantage, however large its ratio is. 3 is the paper's value; null is no such bound."""
    epochs: int = setting(1, on_resume=Resume.noted, low=1, high=1000, outside="a batch is not learned from")
    """Passes over the batch of a step (PPO's K, arXiv 1707.06347). Whatever it is, a step is one batch for
    `trainer.max_steps`, the learning rate, checkpoints, staleness and the policy version."""
    minibatches: int = setting(1, on_resume=Resume.noted, low=1, high=2**16, outside="a pass makes no optimizer step")
    """Optimizer steps of a pass, which divides the batch into as many parts, each time in a new random order. The
    siblings of a prompt stay together where there are enough prompts."""
    target_kl: float | None = setting(
        None, on_resume=Resume.noted, low=SMALLEST, high=10**6, outside="a batch is never learned from twice"
    )
    """In nats per token. Where the tokens of an optimizer step have a KL(π_old ‖ π) above it, that step and the rest of
    the batch's are left out. π_old: the policy before the batch. null makes them all."""
    gae: GAEConfig = field(default_factory=GAEConfig)
    """Advantages from a value function."""
    value: ValueConfig = field(default_factory=ValueConfig)
    """How the value function is learned."""
    kl: KLConfig = field(default_factory=KLConfig)
    """What the distance to the reference costs."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Distillation from the whole distributions of the reference."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Degenerate rollouts: count them or leave them out of training."""
    refill: RefillConfig = field(default_factory=RefillConfig)
    """Sample further groups in place of those without a gradient."""

    def for_answers_up_to(self, max_new_tokens: int) -> AlgorithmConfig:
        """The same with `overlong.longest` filled in, for a run whose answers have at most so many tokens.

        >>> AlgorithmConfig().for_answers_up_to(64).overlong.longest
        64
        """
        longest = self.overlong.longest
        return replace(self, overlong=replace(self.overlong, longest=max_new_tokens if longest is None else longest))
