r"""`reward=format`: 1 if the whole completion has the right form, else 0.

    think         <think>…</think> …
    think_answer  <think>…</think> <answer>…</answer>
    boxed         … \boxed{…} …
    think_boxed   <think>…</think> … \boxed{…} …

Each tag stands exactly once, so that a policy cannot earn the reward by repeating them. A term may have several forms,
all of which the completion must have; for a share of the reward per form, use one term per form.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from vlmrl.config.reward import FormatPreset, FormatTerm
from vlmrl.rewards.base import Attempt
from vlmrl.rewards.extract import SEARCH_TIMEOUT_S, compiled, last_boxed, timed_out

_THOUGHT = re.compile(r"<think>(?P<thought>.*?)</think>(?P<rest>.*)", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def format_of(term: FormatTerm, key: str) -> Callable[[Attempt], float | None]:
    """The function of the `FormatTerm` at `key`. Raises `ConfigError` where its pattern is no regular expression;
    the function raises `RewardError` where the search for the pattern takes too long."""
    pattern = None if term.pattern is None else compiled(term.pattern, f"{key}.pattern")
    presets = term.presets or ([FormatPreset.think_answer] if pattern is None else [])

    def score(attempt: Attempt) -> float | None:
        completion = attempt.completion.strip()
        if not all(has_form(completion, preset) for preset in presets):
            return 0.0
        if pattern is None:
            return 1.0
        try:
            return float(pattern.search(completion, timeout=SEARCH_TIMEOUT_S) is not None)
        except TimeoutError:
            raise timed_out(f"{key}.pattern", completion) from None

    return score


def has_form(completion: str, preset: FormatPreset) -> bool:
    """Whether a completion without white space at its ends has a form.

    >>> has_form("<think>Two and two.</think> <answer>4</answer>", FormatPreset.think_answer)
    True
    >>> has_form("<think>Two and two.</think> 4", FormatPreset.think_answer)
    False
    """
    if preset is FormatPreset.boxed:
        return last_boxed(completion) is not None
    thought = _THOUGHT.fullmatch(completion)
    if thought is None or any(completion.count(tag) != 1 for tag in ("<think>", "</think>")):
        return False
    rest = thought["rest"].strip()
    match preset:
        case FormatPreset.think_answer:
            counts = {completion.count(tag) for tag in ("<answer>", "</answer>")}
            return counts == {1} and _ANSWER.fullmatch(rest) is not None
        case FormatPreset.think_boxed:
            return last_boxed(rest) is not None
    return bool(rest)
