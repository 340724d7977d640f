"""`algorithm.gae` and `algorithm.value`: advantages from a value function, and how it is learned."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from vlmrl.config.fields import SMALLEST, Resume, setting


class GAELevel(Enum):
    """What an action is, for generalized advantage estimation (`vlmrl.orchestrator.gae`)."""

    token = "token"
    """Each token has an advantage of its own."""
    turn = "turn"
    """A turn is one action, valued before its first token; its tokens share an advantage."""


@dataclass
class GAEConfig:
    """Generalized advantage estimation (arXiv 1506.02438, eq. 16), for `algorithm.advantage=gae`. The reward of an
    episode is that of its last token, and the reward of a turn that of the turn's last token (`algorithm.credit`)."""

    level: GAELevel = setting(GAELevel.token, on_resume=Resume.noted)
    """What an action is: a token or a turn."""
    lam: float = setting(1.0, on_resume=Resume.noted, low=0, high=1, outside="it weights no later error, or grows")
    """λ, the weight of a value error that is one action further away, next to the discount. 1: the return minus the
    value, which has no bias; 0: the reward and the next value instead of the return."""
    gamma: float = setting(1.0, on_resume=Resume.noted, low=0, high=1, outside="it is not a discount factor")
    """γ, the weight of what is one token later. From one turn to the next, `algorithm.discount` is multiplied to it."""
    whiten: bool = setting(True, on_resume=Resume.noted)
    """Subtract the mean of the batch's advantages and divide by their standard deviation."""


@dataclass
class ValueConfig:
    """The value head on the policy's own trunk, for `algorithm.advantage=gae`: a linear layer in float32 on the last
    hidden states, which begins at zero (`vlmrl.models.value_head`)."""

    coef: float = setting(0.1, on_resume=Resume.noted, low=SMALLEST, high=10**6, outside="values would not be learned")
    """Weight of the value loss next to that of the policy."""
    clip: float | None = setting(
        0.2, on_resume=Resume.noted, low=SMALLEST, high=10**6, outside="a value would have no gradient"
    )
    """In units of the reward: values get no gradient that moves them further than this from those before the batch
    (PPO2). null: no such clip."""
