"""What a checkpoint knows about the run beside the training state: loop.json."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from vlmrl.errors import CheckpointError
from vlmrl.trainer.checkpoint_files import is_count, read_object


@dataclass(frozen=True)
class LoopState:
    """The evaluations so far, and the position in the data.

    A position is the index of the first problem that the weights have not learned from. It is None in a checkpoint of
    a version that recorded none; there it follows from the number of steps and the run's config.
    """

    evaluations: tuple[tuple[float, float], ...] = ()
    """(sampled, greedy) held-out reward of each."""
    is_evaluation_unfinished: bool = False
    """Whether the run was stopped during an evaluation, which is made again."""
    cursor: int | None = None
    """Position in the training problems of RL steps."""
    warmup_cursor: int | None = None
    """Position in the demonstrations of supervised steps (warm-up, mode=sft)."""
    rl_demonstrations_cursor: int | None = None
    """Position in the demonstrations that are mixed into RL steps (`trainer.warmup.rl_weight`)."""

    @property
    def has_position(self) -> bool:
        """Whether every cursor was recorded."""
        return None not in (self.cursor, self.warmup_cursor, self.rl_demonstrations_cursor)

    def write(self, path: Path) -> None:
        """Write loop.json. Raises OSError."""
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> LoopState:
        """Read loop.json. Raises `CheckpointError`."""
        content = read_object(path)
        evaluations = content.get("evaluations")
        if not isinstance(evaluations, list) or not all(map(_is_pair, evaluations)):
            raise CheckpointError(f"{path} is damaged (evaluations is no list of pairs of rewards)")
        cursors = {field.name: content.get(field.name) for field in dataclasses.fields(cls) if "cursor" in field.name}
        for name, cursor in cursors.items():
            if cursor is not None and not is_count(cursor):
                raise CheckpointError(f"{path} is damaged ({name}={str(cursor)[:40]} is no index of a problem)")
        unfinished = content.get("is_evaluation_unfinished", False)
        if not isinstance(unfinished, bool):
            raise CheckpointError(f"{path} is damaged (is_evaluation_unfinished is neither true nor false)")
        rewards = tuple((float(sampled), float(greedy)) for sampled, greedy in evaluations)
        return cls(rewards, unfinished, **cursors)


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(x, float) or _is_whole(x) for x in value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and is_count(abs(value)) and not isinstance(value, bool)
