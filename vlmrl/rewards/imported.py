"""`reward=my_module:fn`: a reward function of your own, or one that was written for TRL, verl or EasyR1.

    target ─▶ function, or class or factory that makes one ─▶ signature, by its parameters ─▶ Reward

A function is recognized by the names of its parameters (`SIGNATURES`) and is given those that it takes. Others must
have defaults, or a value in `args`. It may be `async`. A function that is not `async` may block: it runs in a thread.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmrl.config.import_paths import import_named, user_code
from vlmrl.config.reward import ImportedTerm
from vlmrl.errors import ConfigError, UserFault, fenced, safe_repr
from vlmrl.rewards.base import Attempt, Reward, RewardError, RunBlocking, Score, Scored
from vlmrl.rewards.signatures import SIGNATURES, Signature, signature_of

log = logging.getLogger(__name__)

NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

VALUE_KEYS = ("score", "overall", "reward")
"""Keys of a returned dictionary that hold the value (verl, EasyR1, older verl); the other numbers are metrics."""


def imported(term: ImportedTerm, key: str, run_blocking: RunBlocking) -> Reward:
    """The reward of the `ImportedTerm` at `key`. Raises `ConfigError` where nothing is found at its path, or where its
    parameters are none that are known."""
    target = import_named(f"{key}.target", term.target, "reward function", callable, inspect.isfunction)
    function, args = target, dict(term.args)
    if (isinstance(target, type) or signature_of(target) is None) and _takes(target, args):
        # A class, or a function that makes the reward function, such as trl.rewards.get_cosine_scaled_reward.
        with user_code(f"{key}.target", term.target, f"{target.__name__}()", "reward function"):
            function, args = target(**args), {}
    signature = signature_of(function) if callable(function) else None
    if signature is None:
        raise ConfigError(_unknown(key, term, target))
    if missing := _missing(function, signature, args):
        raise ConfigError(
            f"{key}.target={term.target} has the parameters of {signature.name} and in addition {', '.join(missing)}, "
            f"which nothing fills, so it cannot be called: give values in {key}.args, or defaults"
        )
    if stray := [each for each in args if not _has_parameter(function, each)]:
        raise ConfigError(
            f"{key}.args.{stray[0]} is no parameter of {term.target}, so it would have no effect: remove it, or "
            "correct its name"
        )
    log.info("%s: %s is called as a reward function of this form: %s", key, term.target, signature.example)
    return Imported(function, signature, args, term.target, run_blocking)


def _takes(target: Callable[..., Any], args: Mapping[str, Any]) -> bool:
    """Whether `target` can be called with these arguments alone."""
    try:
        inspect.signature(target).bind(**args)
    except (TypeError, ValueError):
        return False
    return True


def _unknown(key: str, term: ImportedTerm, target: Any) -> str:
    known = "; ".join(f"{signature.example} ({signature.name})" for signature in SIGNATURES)
    try:
        parameters = str(inspect.signature(target))
    except (TypeError, ValueError):  # some builtins have none
        parameters = "()"
    return (
        f"{key}.target={term.target} is called as {term.target.rpartition(':')[2]}{parameters}, which is the form of "
        f"no reward function that is known, so no rollout can be scored: give it one of these forms: {known}"
    )


def _missing(function: Callable[..., Any], signature: Signature, args: Mapping[str, Any]) -> list[str]:
    """The parameters without default that are filled neither by `args` nor by the signature. TRL's may be columns, of
    which only the rows tell."""
    if signature.takes_columns:
        return []
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in NAMED
        and parameter.name not in signature.parameters
        and parameter.name not in args
    ]


def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


@dataclass(frozen=True)
class Imported(Reward):
    """A function of a known signature as a reward term."""

    function: Callable[..., Any]
    signature: Signature
    args: Mapping[str, Any]
    """Keyword arguments of every call."""
    path: str
    """The function's import path, for messages."""
    run_blocking: RunBlocking

    async def score(self, attempts: Sequence[Attempt]) -> Sequence[Score]:
        if not self.signature.per_group:
            return await asyncio.gather(*map(self._score_one, attempts))
        with fenced(f"{self.path}()", RewardError):
            values = list(await self._call(attempts))
        if len(values) != len(attempts):
            raise RewardError(
                f"{self.path}() returned {len(values)} values for the {len(attempts)} attempts of a group, so it is "
                "not clear whose they are: return one per attempt, None where it abstains"
            )
        return [_score_of(self.path, value) for value in values]

    async def _score_one(self, attempt: Attempt) -> Score:
        try:
            with fenced(f"{self.path}()", RewardError):
                return _score_of(self.path, await self._call([attempt]))
        except UserFault as fault:
            return fault

    async def _call(self, attempts: Sequence[Attempt]) -> Any:
        """Call the function with the arguments that it takes, in a thread unless it is `async`."""
        call = functools.partial(self.function, **self._given(attempts))
        if _is_async(self.function):
            return await call()

        def in_thread() -> Any:
            with fenced(f"{self.path}()", RewardError):  # here, because a thread passes no SystemExit on
                return call()

        returned = await self.run_blocking(in_thread)
        return await returned if inspect.isawaitable(returned) else returned

    def _given(self, attempts: Sequence[Attempt]) -> dict[str, Any]:
        """The arguments of one call. Raises `RewardError` where a column is missing."""
        known = {**self.signature.arguments(attempts), **self.args}
        parameters = inspect.signature(self.function).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return known
        for name, parameter in parameters.items():
            if name not in known and parameter.default is parameter.empty and parameter.kind in NAMED:
                columns = ", ".join(attempts[0].columns) or "none"
                raise RewardError(
                    f"{self.path}() takes {name}, and the row has no such column (it has {columns}): rename the "
                    f"parameter or the column, or give {name} a default"
                )
        return {name: value for name, value in known.items() if name in parameters}


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        inspect.getattr_static(type(function), "__call__", None)
    )


def _score_of(path: str, returned: Any) -> Score:
    """What a function returned for one attempt: a number, None, a dictionary, or a tuple that begins with the number
    (as verl takes it). Numbers are checked where all terms are (orchestrator/scoring.py)."""
    if isinstance(returned, Mapping):
        key = next((key for key in VALUE_KEYS if key in returned), None)
        if key is None:
            return RewardError(
                f"{path}() returned a dictionary with the keys {safe_repr(sorted(map(str, returned)))}, none of which "
                f"is the value: call it {' or '.join(VALUE_KEYS)}"
            )
        metrics = {
            name: value
            for name, value in returned.items()
            if name != key and isinstance(name, str) and not isinstance(value, str | bytes) and _is_number(value)
        }
        return Scored(returned[key], metrics)
    if isinstance(returned, tuple | list) and returned:
        return _score_of(path, returned[0])
    score: Score = returned
    return score


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True
