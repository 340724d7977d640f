"""color_codeword: read coloured squares, answer with their letters.

    system     Map the color of each square to a letter: red A, green B, … Reply with all letters so far, in order.
    user       Squares: ▇ ▇            red, blue
    assistant  AC
    user       Squares: ▇ ▇            black, green
    assistant  ACIB                    the codeword: reward 1

Only the pixels say which letters are right, so a policy that answers held-out codewords has learned to see.

A codeword is held out for evaluation if the SHA-256 of its letters, as a number, is divisible by `holdout_one_in`. If
no codeword of that length is, the one with the smallest hash is held out. The rule does not depend on the seed, so all
runs are evaluated on the same problems. (With a single square in the episode, a held-out codeword is a colour that
training never shows: such a run shows that the code works, but its evaluation cannot be solved.)

Left out on purpose: textures, sizes and positions of squares. Colour is the least that needs a vision tower.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image as PILImage

from vlmrl.config.task import ColorCodewordConfig
from vlmrl.errors import ConfigError
from vlmrl.tasks.base import Reply, Split, Task
from vlmrl.types import Image, Message

COLORS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "A": ("red", (255, 0, 0)),
    "B": ("green", (0, 255, 0)),
    "C": ("blue", (0, 0, 255)),
    "D": ("yellow", (255, 255, 0)),
    "E": ("purple", (128, 0, 128)),
    "F": ("cyan", (0, 255, 255)),
    "G": ("orange", (255, 165, 0)),
    "H": ("white", (255, 255, 255)),
    "I": ("black", (0, 0, 0)),
}
"""Letter → name and RGB, 0 to 255."""

LETTERS = "".join(COLORS)

SYSTEM_PROMPT = (
    "Map the color of each square to a letter: "
    + ", ".join(f"{name} {letter}" for letter, (name, _) in COLORS.items())
    + ". Reply with all letters so far, in order."
)
USER_TEXT = "Squares:"

ENUMERABLE_LENGTH = 6
"""Letters; up to this length (531,441 codewords, about a second) all held-out codewords are listed."""
MAX_HOLDOUT_ONE_IN = 1000
"""Limit of `holdout_one_in`, so that a held-out codeword beyond `ENUMERABLE_LENGTH` exists and is found quickly."""


# ── scoring ─────────────────────────────────────────────────────────────────────────────────────────────────


def parse_answer(text: str) -> str:
    """The longest run of the letters A to I in a text; "" if there is none.

    Of several equally long runs it is the last, because an answer follows the reasoning about it.

    >>> parse_answer("The codeword is ACIB."), parse_answer("AC, no, IB"), parse_answer("acib")
    ('ACIB', 'IB', '')
    """
    return max(reversed(re.findall(f"[{LETTERS}]+", text)), key=len, default="")


def share_correct(answer: str, codeword: str) -> float:
    """Share of correct positions, in [0, 1]. Positions that only one of the two strings has count as wrong.

    >>> share_correct("ACIB", "ACIB"), share_correct("AC", "ACIB"), share_correct("ACIBA", "ACIB")
    (1.0, 0.5, 0.8)
    """
    return sum(map(str.__eq__, answer, codeword)) / max(len(answer), len(codeword))


def score_turn(answer: str, codeword_so_far: str) -> float:
    """Reward of one turn, in [0, 1]: the mean of partial and exact match.

    >>> score_turn("AC", "AC"), score_turn("AB", "AC"), score_turn("", "AC")
    (1.0, 0.25, 0.0)
    """
    return 0.5 * share_correct(answer, codeword_so_far) + 0.5 * (answer == codeword_so_far)


# ── problems ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class CodewordProblem:
    """A codeword, and the codeword whose squares are shown. They differ only in the control (`shuffle_images`)."""

    codeword: str
    shown: str

    @property
    def id(self) -> str:
        return self.codeword if self.shown == self.codeword else f"{self.codeword}_shown_{self.shown}"


def is_held_out(codeword: str, one_in: int) -> bool:
    """Whether a codeword is held out for evaluation, by the rule in the module's docstring.

    >>> [is_held_out(codeword, 8) for codeword in ("EBGH", "EFGF")]
    [True, False]
    """
    if _hash(codeword) % one_in == 0:
        return True
    return len(codeword) <= ENUMERABLE_LENGTH and held_out_codewords(len(codeword), one_in) == (codeword,)


@functools.cache
def held_out_codewords(length: int, one_in: int) -> tuple[str, ...]:
    """All held-out codewords of at most `ENUMERABLE_LENGTH` letters, in the order of their hashes; at least one."""
    assert length <= ENUMERABLE_LENGTH, length
    held_out = sorted(pair for pair in _hashed_codewords(length) if pair[0] % one_in == 0)
    return tuple(codeword for _, codeword in held_out or [min(_hashed_codewords(length))])


def _hashed_codewords(length: int) -> Iterator[tuple[int, str]]:
    return ((_hash(word), word) for word in map("".join, itertools.product(LETTERS, repeat=length)))


def _hash(codeword: str) -> int:
    return int.from_bytes(hashlib.sha256(codeword.encode()).digest(), "big")


def _draw(length: int, *key: str | int) -> str:
    """A codeword drawn uniformly from all of its length, as a function of `key` alone."""
    # 64 bits more than a codeword needs make the draw uniform to within 2**-64.
    number = int.from_bytes(hashlib.shake_256(repr(key).encode()).digest(length + 8), "big")
    letters = []
    for _ in range(length):
        number, digit = divmod(number, len(LETTERS))
        letters.append(LETTERS[digit])
    return "".join(letters)


# ── prompts ─────────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def square(letter: str, size: int) -> Image:
    """The square of a letter, `size` pixels per side. Each process has one object per letter and size."""
    return Image(PILImage.new("RGB", (size, size), COLORS[letter][1]))


def _user_message(letters: str, size: int) -> Message:
    return Message.of("user", USER_TEXT, *(square(letter, size) for letter in letters))


class ColorCodewordEnv:
    """One episode. `turns` are the letters that each turn shows; answers are scored against `codeword`.

    The episode's reward is 1.0 if the last answer is the whole codeword and else 0.0, also for an episode that is cut
    off before its last turn. Metrics are `exact_match` and `share_correct` of the last answer against the codeword.
    """

    def __init__(self, codeword: str, turns: tuple[str, ...], image_size: int) -> None:
        self._codeword = codeword
        self._turns = turns
        self._image_size = image_size
        self._turn = 0

    def reset(self) -> tuple[Message, ...]:
        return Message.of("system", SYSTEM_PROMPT), _user_message(self._turns[0], self._image_size)

    def step(self, completion: str) -> Reply:
        assert self._turn < len(self._turns), "step() after done"
        answer = parse_answer(completion)
        self._turn += 1
        done = self._turn == len(self._turns)
        exact_match = float(answer == self._codeword)
        return Reply(
            turn_reward=score_turn(answer, self._codeword[: self._turn * len(self._turns[0])]),
            done=done,
            reward=exact_match,
            messages=() if done else (_user_message(self._turns[self._turn], self._image_size),),
            metrics={"exact_match": exact_match, "share_correct": share_correct(answer, self._codeword)},
        )


@functools.lru_cache(maxsize=1024)
def balanced_block(length: int, one_in: int, *key: str | int) -> tuple[str, ...]:
    """Nine training codewords that show each letter once at each position, as a function of the arguments alone.

    Nine independent draws would show some letters twice and others never, and an untrained policy learns such chance
    frequencies faster than it learns to see. If every block contains a held-out codeword (as with codewords of one
    letter), the held-out ones are replaced by codewords of another block.

    >>> balanced_block(4, 8, "train", 0, 0)[:3]
    ('FEEC', 'DHDI', 'BFGE')
    """
    tries = 64
    for attempt in itertools.count():
        places = [_permutation(*key, attempt, place) for place in range(length)]
        block = tuple(map("".join, zip(*places, strict=True)))
        if attempt == 0:
            words = block
        if not any(is_held_out(word, one_in) for word in block):
            return block
        if attempt >= tries:
            words = tuple(new if is_held_out(old, one_in) else old for old, new in zip(words, block, strict=True))
            if not any(is_held_out(word, one_in) for word in words):
                return words
    raise AssertionError("itertools.count ended")


def _permutation(*key: str | int) -> list[str]:
    """The nine letters, shuffled as a function of `key` alone."""
    digest = hashlib.shake_256(repr(key).encode()).digest(8 * len(LETTERS))
    return [LETTERS[i] for i in np.frombuffer(digest, np.uint64).argsort(kind="stable")]


class ColorCodeword(Task):
    """Read coloured squares and answer with their letters.

    Training problems are unlimited and come from the seed, nine at a time (`balanced_block`). Evaluation problems are
    the held-out codewords, equal for every seed and repeated when they run out. Held-out codewords of more than
    `ENUMERABLE_LENGTH` letters are drawn at random, so one may appear twice.

    With `config.shuffle_images` each problem shows the squares of a codeword drawn independently from all of them. The
    draw may hit the right codeword, because excluding it would tell the policy what the answer is not.

    >>> task = ColorCodeword(ColorCodewordConfig(), seed=0)
    >>> [task.problem("train", index).id for index in range(3)]
    ['FEEC', 'DHDI', 'BFGE']
    >>> env = task.env(CodewordProblem("ACIB", shown="ACIB"))
    >>> [(message.role, len(message.content)) for message in env.reset()]
    [('system', 1), ('user', 3)]
    >>> env.step("AB").turn_reward
    0.25
    >>> env.step("ACIA").metrics
    {'exact_match': 0.0, 'share_correct': 0.75}
    """

    def __init__(self, config: ColorCodewordConfig, *, seed: int) -> None:
        for key in ("max_turns", "images_per_turn", "image_size"):
            if getattr(config, key) < 1:
                raise ConfigError(
                    f"task.{key}={getattr(config, key)} is below 1, so no square is shown: set it to 1 or more"
                )
        if not 2 <= config.holdout_one_in <= MAX_HOLDOUT_ONE_IN:
            raise ConfigError(
                f"task.holdout_one_in={config.holdout_one_in} is not from 2 to {MAX_HOLDOUT_ONE_IN}, so training has "
                "no codeword or evaluation too few: set it, for example, to 8"
            )
        self._seed = seed
        self._max_turns = config.max_turns
        self._images_per_turn = config.images_per_turn
        self._image_size = config.image_size
        self._shuffle_images = config.shuffle_images
        self._one_in = config.holdout_one_in
        self._length = config.max_turns * config.images_per_turn

    def problem(self, split: Split, index: int) -> CodewordProblem:
        if split == "eval" and self._length <= ENUMERABLE_LENGTH:
            held_out = held_out_codewords(self._length, self._one_in)
            index %= len(held_out)
            codeword = held_out[index]
        elif split == "eval":
            codeword = self._draw_held_out(index)
        else:
            block, member = divmod(index, len(LETTERS))
            codeword = balanced_block(self._length, self._one_in, split, self._seed, block)[member]
        if not self._shuffle_images:
            return CodewordProblem(codeword, shown=codeword)
        return CodewordProblem(codeword, shown=_draw(self._length, "shown", *self._stream(split), index))

    def env(self, problem: CodewordProblem) -> ColorCodewordEnv:
        return ColorCodewordEnv(problem.codeword, self._by_turn(problem.shown), self._image_size)

    def demonstration(self, problem: CodewordProblem, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        """A conversation in which each answer is the codeword so far.

        Random answers are letters drawn from `seed` alone, as many as the true answer has, and each answer extends the
        one before. They teach the format and nothing about the squares.
        """
        letters = _draw(self._length, "random answers", seed) if random_answers else problem.codeword
        messages = [Message.of("system", SYSTEM_PROMPT)]
        for turn, shown in enumerate(self._by_turn(problem.shown), start=1):
            messages.append(_user_message(shown, self._image_size))
            messages.append(Message.of("assistant", letters[: turn * self._images_per_turn]))
        return tuple(messages)

    def texts(self) -> tuple[str, ...]:
        """The prompts' texts, and each letter alone, so that no token has several letters."""
        return (SYSTEM_PROMPT, USER_TEXT, *LETTERS)

    def _by_turn(self, letters: str) -> tuple[str, ...]:
        width = self._images_per_turn
        return tuple(letters[width * turn : width * (turn + 1)] for turn in range(self._max_turns))

    def _stream(self, split: Split) -> tuple[str | int, ...]:
        """Key of random draws: with the run's seed for training problems, without it for evaluation problems."""
        return (split, self._seed) if split == "train" else (split,)

    def _draw_held_out(self, index: int) -> str:
        """The first held-out codeword in a stream of draws."""
        for attempt in itertools.count():
            codeword = _draw(self._length, *self._stream("eval"), index, attempt)
            if is_held_out(codeword, self._one_in):
                return codeword
        raise AssertionError("itertools.count ended")
