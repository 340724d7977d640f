"""The actions of an environment by name, and the action that an answer names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from vlmrl.errors import ConfigError


class Actions:
    """The actions of a Discrete space.

    >>> actions = Actions(["left", "down", "right", "up"], count=4)
    >>> actions.parse("Left"), actions.parse("not left, so <b>up</b>."), actions.parse("leftover"), actions.parse("")
    (0, 3, None, None)

    Without names they are called by their numbers:

    >>> Actions([], count=12).parse("action 11"), Actions([], count=12).parse("12")
    (11, None)
    >>> Actions([], count=12).parse("3.0")
    3
    """

    def __init__(self, names: Sequence[str], count: int, start: int = 0) -> None:
        """`count` actions are numbered from `start`. Raises ConfigError for names that do not fit them."""
        self.names = tuple(names) or tuple(str(start + number) for number in range(count))
        self._start = start
        shown = ",".join(names)
        if len(self.names) > count:
            raise ConfigError(
                f"task.actions=[{shown}] has {len(names)} names, and the environment has {count} actions, so some "
                f"names would be no action: write at most {count}, in the order of their numbers"
            )
        if twice := [name for name, times in Counter(map(str.casefold, self.names)).items() if times > 1]:
            raise ConfigError(
                f"task.actions=[{shown}] has {twice[0]} more than once (upper and lower case are the same), so an "
                "answer could mean either: give each action a name of its own"
            )
        self._numbers = {name.casefold(): start + number for number, name in enumerate(self.names)}
        longest_first = sorted(self._numbers, key=len, reverse=True)
        self._pattern = re.compile(rf"(?<!\w)(?<!\d\.)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")

    def parse(self, answer: str) -> int | None:
        """The number of the last action that an answer names as a whole word; None where it names none."""
        found = self._pattern.findall(answer.casefold())
        return self._numbers[found[-1]] if found else None

    def name(self, number: int) -> str:
        """The name of an action."""
        return self.names[number - self._start]

    def number_of(self, action: Any) -> int:
        """The number of an action that an expert gives by name or by number. Raises ValueError for one of neither."""
        known = self._numbers.get(action.casefold()) if isinstance(action, str) else int(action)
        if known not in self._numbers.values():
            raise ValueError(f"{action!r} is none of the actions {', '.join(self.names)}")
        assert known is not None
        return known
