"""What mode=play prints: the prompts as the policy gets them, their images and videos, and what came of the answers."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from vlmrl.errors import safe_repr
from vlmrl.inference.stop_strings import text_before
from vlmrl.record.files import disk_errors
from vlmrl.rendering.filmstrip import described, filmstrip
from vlmrl.runs.build import RenderingParts
from vlmrl.runs.preview.screen import is_colored, plain, print_prompt
from vlmrl.tasks.base import Reply, Split
from vlmrl.types import Completion, ImageItem, Message, MMItem, Prompt, Rollout, Text

LONGEST = 100_000
"""Characters of a prompt on the screen."""

WIDEST = 64
"""Columns of an image on the screen."""

LONGEST_ANSWER = 500
"""Characters of an answer on the screen."""


class Screen:
    """Prints an episode, and writes the images and videos that the policy sees into a folder."""

    def __init__(self, parts: RenderingParts, folder: Path) -> None:
        self._parts = parts
        self._folder = folder
        self._episode = ""
        self._max_turns = 1

    def begin(self, episode: int, split: Split, index: int, max_turns: int) -> None:
        """An episode of at most `max_turns` begins. The problem's id comes at the end, because it may be the answer."""
        self._episode = f"episode_{episode:03d}"
        self._max_turns = max_turns
        print(f'\nepisode {episode}: problem("{split}", {index})')

    def prompt(self, prompt: Prompt, turn: int, num_known: int | None) -> None:
        """Print what is new in the prompt of a turn: what follows its first `num_known` tokens. None: it does not go on
        with the turn before, so it is printed whole."""
        new = len(prompt.token_ids) - (num_known or 0)
        print(f"\nturn {turn} of at most {self._max_turns}: {len(prompt.token_ids)} tokens, {new} of them new")
        if num_known is None:
            print("  (a new branch: this is all that the policy sees)")
        print_prompt(prompt, self._parts.tokenizer, LONGEST, num_known or 0)
        shown = zip(prompt.placeholders, prompt.mm_items, strict=True)
        numbers: Counter[str] = Counter()
        for item in (item for place, item in shown if place.offset >= (num_known or 0)):
            numbers[item.modality] += 1
            self._show(item, numbers[item.modality], turn)

    def _show(self, item: MMItem, number: int, turn: int) -> None:
        """Write an image as the policy sees it, or a video as a filmstrip, and name the file."""
        kind = item.modality
        if isinstance(item, ImageItem):
            seen = self._parts.processed_pixels(item)
            pixels, note = (item.pixels, " (as it came, before the processor)") if seen is None else (seen, "")
        else:
            pixels = filmstrip(item)
            note = f" ({described(item)}, in {item.num_tokens} tokens; as they came, before the processor)"
        path = self._folder / f"{self._episode}_turn_{turn:03d}_{kind}_{number}.png"
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(pixels).save(path)
        print(f"  {kind} {number}: {path}{note}")
        if is_colored():
            print(half_blocks(pixels, min(WIDEST, shutil.get_terminal_size().columns - 4)))

    def answer(self, completion: Completion) -> None:
        """Print what the task will score."""
        text = text_before(self._parts.renderer.decode(completion.token_ids), completion.stop)
        cut = ", cut by the budget of tokens" if completion.finish_reason == "length" else ""
        cut += f", ended by {safe_repr(completion.stop)}" if completion.stop is not None else ""
        print(f"  answered {safe_repr(text):.{LONGEST_ANSWER}} ({len(completion.token_ids)} tokens{cut})")

    def results(self, messages: Sequence[Message]) -> None:
        """Print what the tools reply to an answer."""
        for message in messages:
            parts = [safe_repr(part.text) if isinstance(part, Text) else "an image" for part in message.content]
            print(f"  tool {plain(message.name)}: {', '.join(parts):.{LONGEST_ANSWER}}")

    def reply(self, reply: Reply) -> None:
        """Print what the task says of an answer."""
        done = ", done" if reply.done else ""
        print(f"  turn reward {reply.turn_reward:g}, reward of the episode so far {reply.reward:g}{done}")

    def end(self, rollout: Rollout, *, is_left: bool, is_cut_unpaid: bool) -> None:
        """Print how an episode ended. `is_left`: the player left it. `is_cut_unpaid`: training pays 0 for its last
        answer, which is cut."""
        if is_left:
            print(f"\n{plain(rollout.problem_id)}: {rollout.error}")
            return
        turns = f"{len(rollout.turns)} turn{'' if len(rollout.turns) == 1 else 's'}"
        print(f"\n{plain(rollout.problem_id)} ended after {turns}: {rollout.stop_reason.value}")
        if rollout.error is not None:
            print("\n".join(f"  | {line}" for line in plain(rollout.traceback or rollout.error).splitlines()))
        total = sum(turn.reward for turn in rollout.turns)
        note = " (the last answer is cut, so training pays 0: algorithm.truncated=zero)" if is_cut_unpaid else ""
        print(f"  reward {rollout.reward:g}{note}, sum of the turn rewards {total:g}")
        for name, value in rollout.rewards.items():
            print(f"  reward/{plain(name)} {'abstains' if value is None else f'{value:g}'}")
        if rollout.reference is not None:
            print(f"  reference {safe_repr(rollout.reference):.200}")
        if rollout.metrics:
            print("  " + ", ".join(f"{plain(name)} {value:g}" for name, value in rollout.metrics.items()))

    def summary(self, rollouts: Sequence[Rollout]) -> None:
        """Print what several episodes have in common."""
        rewards = [rollout.reward for rollout in rollouts]
        turns = np.mean([len(rollout.turns) for rollout in rollouts])
        ends = Counter(rollout.stop_reason.value for rollout in rollouts)
        print(
            f"\n{len(rollouts)} episodes: reward {np.mean(rewards):.3f} on average, from {min(rewards):g} to "
            f"{max(rewards):g}; {turns:.1f} turns on average; "
            + ", ".join(f"{name} {count}" for name, count in ends.most_common())
        )


def half_blocks(pixels: np.ndarray, columns: int) -> str:
    """An image (uint8 [H, W, 3]) as lines of upper half blocks, two pixels each, in 24-bit colors. A wider image than
    `columns` is scaled down.

    >>> half_blocks(np.zeros((2, 1, 3), np.uint8), columns=8)
    '  \\x1b[38;2;0;0;0;48;2;0;0;0m▀\\x1b[0m'
    """
    height, width = pixels.shape[:2]
    scale = min(1.0, max(1, columns) / width)
    size = max(1, round(width * scale)), max(2, round(height * scale / 2) * 2)
    small = np.array(PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.BOX))
    lines = []
    for upper, lower in zip(small[::2], small[1::2], strict=True):
        cells = (
            "\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(*above, *below)
            for above, below in zip(upper.tolist(), lower.tolist(), strict=True)
        )
        lines.append("  " + "".join(cells) + "\x1b[0m")
    return "\n".join(lines)
