"""color_codeword: read coloured squares, answer with their letters.

    system     Map the color of each square to a letter: red A, green B, … Reply with all letters so far, in order.
    user       Squares: ▇ ▇            red, blue
    assistant  AC
    user       Squares: ▇ ▇            black, green
    assistant  ACIB                    the codeword: reward 1

Nothing but the pixels says which letters are right, so a policy that answers held-out codewords has learned to see.

A codeword is held out for evaluation if SHA-256 of its letters, as a number, is divisible by `holdout_one_in`; in a
space so small that this holds out none, the codeword with the smallest hash is. The rule knows no seed, so all runs
are evaluated on the same problems. (With one square in the whole episode a held-out codeword is a colour that training
never shows: such a run shows that the machinery works, and its evaluation cannot be solved.)

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
"""Letters; up to here (531,441 codewords, about a second) the held-out codewords are listed."""
MAX_HOLDOUT_ONE_IN = 1000
"""So that a space beyond `ENUMERABLE_LENGTH` surely has held-out codewords, and drawing one is quick."""


# ── scoring ─────────────────────────────────────────────────────────────────────────────────────────────────


def parse_answer(text: str) -> str:
    """The longest run of A–I in a text, the last of several equally long ones; "" if there is none.

    The last, because an answer follows what is said about it.

    >>> parse_answer("The codeword is ACIB."), parse_answer("AC, no, IB"), parse_answer("acib")
    ('ACIB', 'IB', '')
    """
    return max(reversed(re.findall(f"[{LETTERS}]+", text)), key=len, default="")


def share_correct(answer: str, codeword: str) -> float:
    """Share of right positions, in [0, 1]; positions that only one of the two has are wrong.

    >>> share_correct("ACIB", "ACIB"), share_correct("AC", "ACIB"), share_correct("ACIBA", "ACIB")
    (1.0, 0.5, 0.8)
    """
    return sum(map(str.__eq__, answer, codeword)) / max(len(answer), len(codeword))


def score_turn(answer: str, codeword_so_far: str) -> float:
    """A turn's own reward, in [0, 1]: the mean of partial and exact match.

    >>> score_turn("AC", "AC"), score_turn("AB", "AC"), score_turn("", "AC")
    (1.0, 0.25, 0.0)
    """
    return 0.5 * share_correct(answer, codeword_so_far) + 0.5 * (answer == codeword_so_far)


# ── problems ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class CodewordProblem:
    """One codeword, and the one whose squares are shown: the same but in the control."""

    codeword: str
    shown: str

    @property
    def id(self) -> str:
        return self.codeword if self.shown == self.codeword else f"{self.codeword}_shown_{self.shown}"


def is_held_out(codeword: str, one_in: int) -> bool:
    """Whether a codeword is kept for evaluation (the rule at the top of this file).

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
    """A codeword, uniform over all of its length (64 bits to spare), that is a function of `key` alone."""
    number = int.from_bytes(hashlib.shake_256(repr(key).encode()).digest(length + 8), "big")
    letters = []
    for _ in range(length):
        number, digit = divmod(number, len(LETTERS))
        letters.append(LETTERS[digit])
    return "".join(letters)


# ── prompts ─────────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def square(letter: str, size: int) -> Image:
    """The square of a letter, `size` pixels per side; one object per letter and size in a process."""
    return Image(PILImage.new("RGB", (size, size), COLORS[letter][1]))


def _user_message(letters: str, size: int) -> Message:
    return Message.of("user", USER_TEXT, *(square(letter, size) for letter in letters))


class ColorCodewordEnv:
    """`turns` are the letters that each turn shows; the episode is scored against `codeword`.

    The episode's reward is 1.0 if the last answer is the whole codeword, else 0.0; that holds too for an episode that
    is cut before its last turn. Metrics: `exact_match` and `share_correct` of the last answer, against the whole.
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
    """Nine training codewords that show each letter once at each place; a function of its arguments alone.

    Nine independent draws would show some letters twice and others never, and a young policy takes up such chance
    frequencies faster than it learns to look. Where no such nine is free of held-out codewords (a codeword of one
    letter, say), those that are held out are replaced by letters of another nine.

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
    """The nine letters in an order that is a function of `key` alone."""
    digest = hashlib.shake_256(repr(key).encode()).digest(8 * len(LETTERS))
    return [LETTERS[i] for i in np.frombuffer(digest, np.uint64).argsort(kind="stable")]


class ColorCodeword(Task):
    """Infinite training problems from the seed, nine at a time (`balanced_block`); evaluation problems from the
    held-out codewords, the same for every seed: distinct ones while they last, then from the first again. Codewords of
    more than `ENUMERABLE_LENGTH` letters are drawn for evaluation too, and one may come twice.

    With `config.shuffle_images` each problem shows the squares of another codeword, drawn from all of them by a stream
    of its own. Leaving out the right one would tell the policy what the answer is not, so it is not left out.

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
                    f"task.{key}={getattr(config, key)} is below 1, so there is nothing to see: set it to 1 or more"
                )
        if not 2 <= config.holdout_one_in <= MAX_HOLDOUT_ONE_IN:
            raise ConfigError(
                f"task.holdout_one_in={config.holdout_one_in} is not in 2 … {MAX_HOLDOUT_ONE_IN}, so no codewords "
                "would be left for training or too few for evaluation: set it to 8, say"
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
        """True: the codeword so far after each turn. Random: letters from `seed` alone, as many as the true answer
        has, each answer extending the one before: the whole format, and nothing about the squares."""
        letters = _draw(self._length, "random answers", seed) if random_answers else problem.codeword
        messages = [Message.of("system", SYSTEM_PROMPT)]
        for turn, shown in enumerate(self._by_turn(problem.shown), start=1):
            messages.append(_user_message(shown, self._image_size))
            messages.append(Message.of("assistant", letters[: turn * self._images_per_turn]))
        return tuple(messages)

    def texts(self) -> tuple[str, ...]:
        """Letters one by one, so that no tokenizer makes a token of several: an answer is read letter by letter."""
        return (SYSTEM_PROMPT, USER_TEXT, *LETTERS)

    def _by_turn(self, letters: str) -> tuple[str, ...]:
        width = self._images_per_turn
        return tuple(letters[width * turn : width * (turn + 1)] for turn in range(self._max_turns))

    def _stream(self, split: Split) -> tuple[str | int, ...]:
        """Training problems depend on the run's seed, evaluation problems do not."""
        return (split, self._seed) if split == "train" else (split,)

    def _draw_held_out(self, index: int) -> str:
        """The first of a stream of draws that is held out."""
        for attempt in itertools.count():
            codeword = _draw(self._length, *self._stream("eval"), index, attempt)
            if is_held_out(codeword, self._one_in):
                return codeword
        raise AssertionError("itertools.count ended")
