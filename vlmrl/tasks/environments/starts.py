"""Which seeds are start states of training, and which are held out.

    seed ─▶ first frame ─▶ hash ─▶ divisible by holdout_one_in? ─▶ held out, else trained on

An environment that is reset with two seeds may start in the same state. Seeds alone would then not keep the splits
apart, so a start state counts as what its first frame shows. The rule does not depend on the run's seed: all runs are
evaluated on the same start states.

`SCANNED` seeds are tried first. Where they show fewer start states than `holdout_one_in`, there is nothing to hold out:
training and evaluation take all of them, with different seeds, and the run says so.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass

from vlmrl.tasks.base import NotInSplit, Split

SCANNED = 128
"""Seeds whose first frames are counted: a second where a frame takes 5 ms and a reset little."""

TRIES = 64
"""Seeds that are tried for one problem, per share of the start states that its split has."""


@dataclass(frozen=True)
class Scan:
    """The start states of the scanned seeds."""

    held_out: frozenset[str]
    """Hashes of first frames. Empty where none is held out."""
    trained_on: frozenset[str]

    @property
    def count(self) -> int:
        return len(self.held_out) + len(self.trained_on)


class Starts:
    """The start states of an environment. Thread-safe.

    >>> corners = Starts(lambda seed: f"{seed % 4:x}", one_in=8, seed=0)
    >>> corners.in_words()
    '4 in 128 seeds, fewer than task.holdout_one_in=8: none is held out, and the evaluation starts in all of them'
    >>> mazes = Starts(lambda seed: f"{seed % 1000:x}", one_in=8, seed=0)
    >>> mazes.in_words()
    '128 in 128 seeds: 112 to train on, 16 held out (told apart by their first frames)'
    >>> {mazes.seed_of("eval", index) % 1000 % 8 for index in range(50)}
    {0}
    >>> 0 in {mazes.seed_of("train", index) % 1000 % 8 for index in range(50)}
    False
    """

    def __init__(self, first_hash: Callable[[int], str], *, one_in: int, seed: int) -> None:
        """`first_hash`: seed → hash of the first frame, in hexadecimal digits. `seed` is the run's."""
        self._first_hash = first_hash
        self._one_in = one_in
        self._seed = seed
        self._scanning = threading.Lock()
        self.seed_of = functools.lru_cache(maxsize=1 << 16)(self._seed_of)

    def in_words(self) -> str:
        """How many start states were found, and how many of them are held out."""
        scan = self._scan
        if not scan.held_out:
            return (
                f"{scan.count} in {SCANNED} seeds, fewer than task.holdout_one_in={self._one_in}: none is held out, "
                "and the evaluation starts in all of them"
            )
        return (
            f"{scan.count} in {SCANNED} seeds: {len(scan.trained_on)} to train on, {len(scan.held_out)} held out "
            "(told apart by their first frames)"
        )

    @property
    def _scan(self) -> Scan:
        with self._scanning:
            return self._scanned

    @functools.cached_property
    def _scanned(self) -> Scan:
        found = frozenset(self._first_hash(seed) for seed in range(SCANNED))
        if len(found) < self._one_in:
            return Scan(frozenset(), found)
        # Of few start states, none may have a hash that is divisible.
        held_out = frozenset(filter(self._is_divisible, found)) or frozenset([min(found)])
        return Scan(held_out, found - held_out)

    def _is_divisible(self, first: str) -> bool:
        return int(first, 16) % self._one_in == 0

    def is_held_out(self, first: str) -> bool:
        """Whether the start state with this hash of its first frame is held out."""
        held_out = self._scan.held_out
        return first in held_out or (bool(held_out) and self._is_divisible(first))

    def _seed_of(self, split: Split, index: int) -> int:
        """The environment's seed of a problem, in [0, 2**31). Those of the two splits are never equal.

        Raises `NotInSplit` where none of the seeds that belong to this index starts in the split.
        """
        stream = f"{self._seed}/{index}" if split == "train" else f"{index}"
        for attempt in range(TRIES * self._one_in):
            digest = hashlib.blake2b(f"{split}/{stream}/{attempt}".encode(), digest_size=4).digest()
            seed = int.from_bytes(digest, "big") >> 2 << 1 | (split == "train")
            if not self._scan.held_out or self.is_held_out(self._first_hash(seed)) == (split == "eval"):
                return seed
        raise NotInSplit(f"no seed of index {index} starts in a state of the split {split}")
