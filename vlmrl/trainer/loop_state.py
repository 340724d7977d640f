"""What a checkpoint knows about the run beside the training state: loop.json."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmrl.errors import CheckpointError
from vlmrl.record.difficulty import DIFFICULTY, Difficulty
from vlmrl.trainer.checkpoint_files import is_count, read_object


@dataclass(frozen=True)
class Cursor:
    """A place in a sequence of problems. In loop.json it is a number where every index before it was learned from."""

    index: int
    """The first index from which on none was learned from."""
    unlearned: tuple[tuple[int, int], ...] = ()
    """Ranges `[first, end)` before `index` that were handed out and not learned from, ascending: those of steps that
    were under way when the checkpoint was written."""

    @property
    def learned(self) -> int:
        """How many indices the weights have learned from, or passed over."""
        return self.index - sum(end - first for first, end in self.unlearned)

    def to_json(self) -> int | dict[str, Any]:
        return self.index if not self.unlearned else {"index": self.index, "unlearned": self.unlearned}

    @classmethod
    def from_json(cls, content: object) -> Cursor | None:
        """The cursor; None where `content` is none."""
        if isinstance(content, dict):
            ranges, index = content.get("unlearned"), content.get("index")
            if not isinstance(ranges, list) or not isinstance(index, int) or not is_count(index):
                return None
            if not all(isinstance(pair, list) and len(pair) == 2 and all(map(is_count, pair)) for pair in ranges):
                return None
            ends = [end for pair in ranges for end in pair]
            return cls(index, tuple(map(tuple, ranges))) if sorted({*ends, index}) == [*ends, index] else None
        return cls(content) if isinstance(content, int) and is_count(content) else None


@dataclass(frozen=True)
class Best:
    """The best evaluation so far, by `trainer.keep_best`."""

    metric: str
    step: int
    """The step after which it was made."""
    value: float
    evaluations_since: int = 0
    """Evaluations after it, none of which was better."""

    @classmethod
    def from_json(cls, content: object) -> Best | None:
        """The record; None where `content` is none."""
        match content:
            case {
                "metric": str(metric),
                "step": int(step),
                "value": int(value) | float(value),
                "evaluations_since": int(since),
            } if is_count(step) and is_count(since):
                return cls(metric, step, float(value), since)
        return None


@dataclass(frozen=True)
class LoopState:
    """The evaluations so far, and the position in the data.

    A position is None in a checkpoint of a version that recorded none; there it follows from the number of steps and
    the run's config.
    """

    evaluations: tuple[tuple[float, float], ...] = ()
    """(sampled, greedy) held-out reward of each main evaluation."""
    is_evaluation_unfinished: bool = False
    """Whether the run was stopped during an evaluation, which is made again."""
    cursor: Cursor | None = None
    """Position in the training problems of RL steps."""
    warmup_cursor: Cursor | None = None
    """Position in the demonstrations of supervised steps (warm-up, mode=sft)."""
    rl_demonstrations_cursor: Cursor | None = None
    """Position in the demonstrations that are mixed into RL steps (`trainer.warmup.rl_weight`)."""
    evaluation_count: int | None = None
    """Evaluations of any set; None where it was not recorded: as many as `evaluations`."""
    best: Best | None = None
    """The best of them, with `trainer.keep_best`."""

    difficulty: Difficulty | None = None
    """How often each problem was solved; None without `task.curriculum`. In a file of its own."""

    @property
    def has_position(self) -> bool:
        """Whether every cursor was recorded."""
        return None not in (self.cursor, self.warmup_cursor, self.rl_demonstrations_cursor)

    def write(self, path: Path) -> None:
        """Write loop.json, and difficulty.parquet next to it. Raises OSError."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        content["best"] = self.best and dataclasses.asdict(self.best)
        difficulty = content.pop("difficulty")
        if difficulty is not None:
            difficulty.write(path.with_name(DIFFICULTY))
        path.write_text(json.dumps(content, default=Cursor.to_json), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> LoopState:
        """Read what `write` has written. Raises `CheckpointError`."""
        content = read_object(path)
        evaluations = content.get("evaluations")
        if not isinstance(evaluations, list) or not all(map(_is_pair, evaluations)):
            raise CheckpointError(f"{path} is damaged (evaluations is no list of pairs of rewards)")
        recorded = {field.name: content.get(field.name) for field in dataclasses.fields(cls) if "cursor" in field.name}
        cursors = {name: Cursor.from_json(value) for name, value in recorded.items()}
        for name, value in recorded.items():
            if value is not None and cursors[name] is None:
                raise CheckpointError(f"{path} is damaged ({name}={str(value)[:40]} is no index of a problem)")
        unfinished = content.get("is_evaluation_unfinished", False)
        if not isinstance(unfinished, bool):
            raise CheckpointError(f"{path} is damaged (is_evaluation_unfinished is neither true nor false)")
        count, best = content.get("evaluation_count"), Best.from_json(content.get("best"))
        if count is not None and not is_count(count):
            raise CheckpointError(f"{path} is damaged (evaluation_count={str(count)[:40]} is no number of evaluations)")
        if content.get("best") is not None and best is None:
            raise CheckpointError(f"{path} is damaged (best={str(content['best'])[:80]} is no evaluation)")
        rewards = tuple((float(sampled), float(greedy)) for sampled, greedy in evaluations)
        return cls(
            rewards,
            evaluation_count=count,
            best=best,
            is_evaluation_unfinished=unfinished,
            difficulty=_read_difficulty(path.with_name(DIFFICULTY)),
            **cursors,
        )


def _read_difficulty(path: Path) -> Difficulty | None:
    try:
        return Difficulty.read(path) if path.exists() else None
    except OSError as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(x, float) or _is_whole(x) for x in value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and is_count(abs(value)) and not isinstance(value, bool)
