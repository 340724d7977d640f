"""A value function is there for what reads it, and what concerns it has an effect."""

from __future__ import annotations

from vlmrl.config.algorithm import Advantage, Compare, Credit, FilterMode
from vlmrl.config.critic import GAEConfig, GAELevel, ValueConfig
from vlmrl.config.run import BY_REWARD, RunConfig
from vlmrl.errors import ConfigError


def value_settings_have_effect(config: RunConfig) -> None:
    """What only a value function reads is left alone without one."""
    algorithm = config.algorithm
    if config.mode not in BY_REWARD or algorithm.advantage == Advantage.gae:
        return
    for group, default in (("gae", GAEConfig()), ("value", ValueConfig())):
        chosen = getattr(algorithm, group)
        for name, value in vars(default).items():
            if getattr(chosen, name) != value:
                raise ConfigError(
                    f"algorithm.{group}.{name}={_text(getattr(chosen, name))} has no effect with algorithm.advantage="
                    f"{algorithm.advantage}, which has no value function: set algorithm.advantage=gae, or leave "
                    f"algorithm.{group}.{name} out"
                )


def values_are_of_tokens(config: RunConfig) -> None:
    """What works on groups or on turns is off where each token has an advantage from a value function."""
    algorithm = config.algorithm
    if config.mode not in BY_REWARD or algorithm.advantage != Advantage.gae:
        return
    for setting, is_on, remedy in (
        ("filters.zero_advantage=drop", algorithm.filters.zero_advantage is FilterMode.drop, "none"),
        (f"refill.budget={algorithm.refill.budget}", algorithm.refill.is_on, "1"),
    ):
        if is_on:
            raise ConfigError(
                f"algorithm.{setting} leaves out groups whose rewards are equal, but with algorithm.advantage=gae "
                f"their tokens have a gradient too: set algorithm.{setting.partition('=')[0]}={remedy}"
            )
    if algorithm.compare is Compare.state:
        raise ConfigError(
            "algorithm.compare=state has no effect with algorithm.advantage=gae, which compares no turns: set "
            "algorithm.compare=turn"
        )
    if algorithm.vision_advantage.is_on:
        raise ConfigError(
            f"algorithm.vision_advantage.weight={algorithm.vision_advantage.weight} weights turns, but with "
            "algorithm.advantage=gae each token has an advantage of its own: set algorithm.vision_advantage.weight=0"
        )
    gae = algorithm.gae
    if gae.level is GAELevel.turn and gae.gamma != 1:
        raise ConfigError(
            f"algorithm.gae.gamma={gae.gamma} discounts from token to token, and with algorithm.gae.level=turn a turn "
            "is one action: set algorithm.gae.gamma=1, and algorithm.discount for later turns"
        )
    if gae.level is GAELevel.turn and algorithm.credit is Credit.turn and gae.lam != 1:
        raise ConfigError(
            f"algorithm.gae.lam={gae.lam} has no effect with algorithm.gae.level=turn and algorithm.credit=turn, where "
            "each turn is an episode of one action: set algorithm.gae.lam=1, or algorithm.credit=return"
        )


def _text(value: object) -> object:
    return getattr(value, "name", value)
