"""clip_direction: see in a clip which way a square moves, and which color it had first.

    frame 1        empty
    frames 2 to 5  a square moves from one side of the frame to the other: left, right, up or down
    frames 6 to 9  it moves the same way again, in another color

    user       Which way? … <video>
    assistant  L                          left
    user       Which color first? …
    assistant  2                          green: reward 1, because both answers are right

The frames alone say nothing of the answer but the axis and the two colors: each clip shows the square at all four
places in each of its colors, so the same frames in reverse order are as likely. The first frame says nothing at all. A
policy that answers held-out clips has learned to see time: the two controls (`task.frames`) leave at most one clip in
four, and one in sixteen.

Left out on purpose: shapes, speeds and lengths. One square that crosses the frame is the least that needs time. (Where
it comes back in on the other side, from any place on, one of two seeds did not find out which way it goes.)
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from dataclasses import dataclass

import numpy as np

from vlmrl.config.clip_direction import ClipDirectionConfig, Frames
from vlmrl.rendering.images import Pixels
from vlmrl.tasks.base import Reply, Split, Task
from vlmrl.types import Message, Video

WAYS: dict[str, tuple[str, int, int]] = {
    "L": ("left", 1, -1),
    "R": ("right", 1, 1),
    "U": ("up", 0, -1),
    "D": ("down", 0, 1),
}
"""Letter → name, axis of a frame [H, W, 3], and step along it."""

COLORS: dict[str, tuple[str, tuple[int, int, int]]] = {
    "1": ("red", (255, 0, 0)),
    "2": ("green", (0, 255, 0)),
    "3": ("blue", (0, 0, 255)),
    "4": ("yellow", (255, 255, 0)),
}
"""Digit → name and RGB, 0 to 255."""

PLACES = 4
"""Places of the square along its way. It is half a frame wide."""

LANES = 16
"""Places of its way across it."""

STEPS = 2 * PLACES
"""Frames that show the square: once across in each color."""

GREY = 128
"""Background; the middle of what a processor makes of a pixel."""


@dataclass(frozen=True)
class Clip:
    """A clip, as a function of these four."""

    way: str
    first: str
    second: str
    lane: int
    """Place across the way, 0 to 15."""

    @property
    def id(self) -> str:
        return f"{self.way}{self.first}{self.second}_{self.lane}"

    @property
    def answer(self) -> str:
        return self.way + self.first


@functools.cache
def all_clips(colors: int) -> tuple[Clip, ...]:
    """Every clip with the first `colors` colors.

    >>> len(all_clips(4)), all_clips(2)[0].id
    (768, 'L12_0')
    """
    pairs = itertools.permutations(list(COLORS)[:colors], 2)
    return tuple(Clip(way, *pair, lane) for way, pair, lane in itertools.product(WAYS, pairs, range(LANES)))


@functools.lru_cache(maxsize=1024)
def draw(clip: Clip, size: int) -> Pixels:
    """uint8 [9, size, size, 3], read-only: the envs of a group share it.

    >>> frames = draw(Clip("R", "1", "2", 0), 32)
    >>> len(frames), [int(frame[0, :, 0].argmax()) for frame in frames[1:5]]
    (9, [0, 5, 10, 16])
    """
    _, axis, step = WAYS[clip.way]
    width = size // 2
    frames = np.full((1 + STEPS, size, size, 3), GREY, np.uint8)
    for number in range(STEPS):
        color = clip.first if number < PLACES else clip.second
        place = number % PLACES if step > 0 else PLACES - 1 - number % PLACES
        corner = [clip.lane * width // LANES] * 2
        corner[axis] = place * width // (PLACES - 1)
        top, left = corner
        frames[1 + number, top : top + width, left : left + width] = COLORS[color][1]
    frames.setflags(write=False)
    return frames


@functools.lru_cache(maxsize=1024)
def video(clip: Clip, size: int, shown: Frames) -> Video:
    """The clip as a task shows it: one object, so that it is decoded once for all envs."""
    frames = draw(clip, size)
    if shown is Frames.first:
        frames = np.repeat(frames[:1], len(frames), axis=0)
    if shown is Frames.shuffled:
        seed = np.frombuffer(hashlib.sha256(clip.id.encode()).digest(), np.uint32)
        frames = frames[np.random.default_rng(seed).permutation(len(frames))]
    return Video(frames)


def parse_answer(text: str, choices: str) -> str:
    """The last of `choices` in a text; "" if there is none.

    >>> parse_answer("It goes up: U.", "LRUD"), parse_answer("left", "LRUD")
    ('U', '')
    """
    return next((letter for letter in reversed(text) if letter in choices), "")


class ClipDirectionEnv:
    """One episode of two questions about a clip. Each turn's reward is 1 for the right answer and else 0; that of the
    episode is 1 if both are right, and else 0. Metrics are `exact_match`, `way` and `first_color`, each 0 or 1."""

    def __init__(self, clip: Clip, turns: tuple[tuple[Message, ...], ...]) -> None:
        """`turns` are the messages of each turn."""
        self._clip = clip
        self._turns = turns
        self._right: list[float] = []

    def reset(self) -> tuple[Message, ...]:
        return self._turns[0]

    def step(self, completion: str) -> Reply:
        turn = len(self._right)
        choices, right = (("".join(WAYS), self._clip.way), ("".join(COLORS), self._clip.first))[turn]
        self._right.append(float(parse_answer(completion, choices) == right))
        done = len(self._right) == len(self._turns)
        both = float(done and all(self._right))
        scores = dict(zip(("way", "first_color"), [*self._right, 0.0], strict=False))
        return Reply(
            turn_reward=self._right[-1],
            done=done,
            reward=both,
            messages=() if done else self._turns[turn + 1],
            metrics={"exact_match": both, **scores},
        )


class ClipDirection(Task):
    """See which way a square moves, and which color it had first.

    Training problems are unlimited and come from the seed, one of each answer at a time: 16 with four colors, so that
    no answer is more frequent than another. Evaluation problems are the held-out clips, equal for every seed and
    repeated when they run out.

    >>> task = ClipDirection(ClipDirectionConfig(), seed=0)
    >>> sorted(task.problem("train", index).answer for index in range(16))[:5]
    ['D1', 'D2', 'D3', 'D4', 'L1']
    >>> env = task.env(Clip("L", "2", "1", 0))
    >>> env.step("L").turn_reward, env.step("1").metrics
    (1.0, {'exact_match': 0.0, 'way': 1.0, 'first_color': 0.0})
    """

    def __init__(self, config: ClipDirectionConfig, *, seed: int) -> None:
        self._seed = seed
        self._size = config.clip_size
        self._frames = config.frames
        one_in = config.holdout_one_in
        clips = all_clips(config.colors)
        held_out = (clip for clip in clips if _hash(clip.id) % one_in == 0)
        self._held_out = sorted(held_out, key=lambda clip: _hash(clip.id))
        by_answer: dict[str, list[Clip]] = {}
        for clip in clips:
            if _hash(clip.id) % one_in:
                by_answer.setdefault(clip.answer, []).append(clip)
        self._by_answer = by_answer
        ways = ", ".join(f"{name} {letter}" for letter, (name, *_) in WAYS.items())
        names = ", ".join(f"{name} {digit}" for digit, (name, _) in list(COLORS.items())[: config.colors])
        self._questions = (f"Which way does the square move? {ways}.", f"Which color came first? {names}.")

    def problem(self, split: Split, index: int) -> Clip:
        if split == "eval":
            return self._held_out[index % len(self._held_out)]
        block, member = divmod(index, len(self._by_answer))
        random = np.random.default_rng([self._seed, block])
        answer = list(self._by_answer)[random.permutation(len(self._by_answer))[member]]
        clips = self._by_answer[answer]
        return clips[np.random.default_rng([self._seed, block, member]).integers(len(clips))]

    def env(self, problem: Clip) -> ClipDirectionEnv:
        return ClipDirectionEnv(problem, tuple((message,) for message in self._messages(problem)))

    def demonstration(self, problem: Clip, *, random_answers: bool, seed: int) -> tuple[Message, ...]:
        """The questions and their answers; random answers are drawn from `seed` alone, and teach only the format."""
        answers = list(self._by_answer)
        answer = answers[np.random.default_rng(seed).integers(len(answers))] if random_answers else problem.answer
        questions = self._messages(problem)
        pairs = zip(questions, answer, strict=True)
        return tuple(message for question, text in pairs for message in (question, Message.of("assistant", text)))

    def texts(self) -> tuple[str, ...]:
        """The questions, and each letter of an answer alone, so that no token has several."""
        return (*self._questions, *WAYS, *COLORS)

    def _messages(self, clip: Clip) -> tuple[Message, ...]:
        """The two questions; the first one shows the clip."""
        shown = video(clip, self._size, self._frames)
        return Message.of("user", self._questions[0], shown), Message.of("user", self._questions[1])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
