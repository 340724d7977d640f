"""What the doctor's checks look at: rollouts, the prompts and requests behind them, and their training samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vlmrl.orchestrator.samples import make_samples
from vlmrl.rendering.images import image_hash
from vlmrl.types import FloatArray, Group, Image, IntArray, Message, Part, Prompt, Rollout, Text, TrainingSample, Video


@dataclass(frozen=True, eq=False)
class RenderedTurn:
    """One prompt that the renderer made, and the messages it was made from."""

    messages: tuple[Message, ...]
    """The new messages of this turn. Their images are arrays of pixels, and so are the frames of their videos, decoded
    before the renderer saw them. Videos that came as files have the frames and times that the renderer chose."""
    prompt: Prompt
    is_first: bool
    """Whether the prompt is of a first turn."""

    @property
    def hashes(self) -> tuple[str, ...]:
        """Hashes of the new images, in order."""
        return tuple(image_hash(part.source) for part in media_of(self.messages) if isinstance(part, Image))

    @property
    def videos(self) -> tuple[Video, ...]:
        """The new videos, in order."""
        return tuple(part for part in media_of(self.messages) if isinstance(part, Video))


@dataclass(eq=False)
class Evidence:
    """The rollouts of one policy version, and what was recorded while they were played."""

    groups: list[Group]
    rendered: list[RenderedTurn]
    requests: list[Prompt]
    """The prompts that the engine completed, in the order of its answers."""
    rows: IntArray | None
    """int64 [rows, 1 + position rows]: token id and positions of every row that the engine computed; None where the
    engine does not compute with the trainer's model."""
    sampled: list[TrainingSample] = field(init=False)
    """Samples of the rollouts at the run's temperature."""
    greedy: list[TrainingSample] = field(init=False)
    """Samples of the rollouts at temperature 0."""

    def __post_init__(self) -> None:
        self.sampled = [s for rollout in self.rollouts() if not _is_greedy(rollout) for s in _samples(rollout)]
        self.greedy = [s for rollout in self.rollouts() if _is_greedy(rollout) for s in _samples(rollout)]

    def rollouts(self) -> list[Rollout]:
        """All rollouts, group by group."""
        return [rollout for group in self.groups for rollout in group.rollouts]

    def rollouts_of(self, problems: int) -> set[str]:
        """The ids of the rollouts of the first `problems` problems."""
        chosen = list(dict.fromkeys(group.problem_id for group in self.groups))[:problems]
        return {rollout.rollout_id for group in self.groups if group.problem_id in chosen for rollout in group.rollouts}

    def openings(self) -> list[tuple[Message, ...]]:
        """The distinct messages of first turns that show an image or a video."""
        found = {
            (turn.prompt.token_ids.tobytes(), tuple(item.hash for item in turn.prompt.mm_items)): turn.messages
            for turn in self.rendered
            if turn.is_first and turn.prompt.mm_items
        }
        return list(found.values())

    @property
    def samples(self) -> list[TrainingSample]:
        """The samples of all rollouts."""
        return self.sampled + self.greedy


def _is_greedy(rollout: Rollout) -> bool:
    return "-greedy/" in rollout.rollout_id


def _samples(rollout: Rollout) -> list[TrainingSample]:
    """The rollout's samples. A rollout that ended with a fault counts too: its turns before the fault are evidence."""
    return make_samples(rollout) if rollout.turns else []


def media_of(messages: Sequence[Message]) -> list[Image | Video]:
    """The images and videos in the messages, in order."""
    return [part for message in messages for part in message.content if not isinstance(part, Text)]


def with_media(messages: Sequence[Message], media: Iterable[Image | Video]) -> tuple[Message, ...]:
    """The messages with `media` in place of their images and videos, in order."""
    remaining = iter(media)

    def replaced(part: Part) -> Part:
        return part if isinstance(part, Text) else next(remaining)

    return tuple(dataclasses.replace(m, content=tuple(map(replaced, m.content))) for m in messages)


def engine_logprobs(samples: Sequence[TrainingSample]) -> FloatArray:
    """float32 [loss tokens of all samples]: the logprobs that the engine reported."""
    return np.concatenate(
        [np.empty(0, np.float32), *(sample.inference_logprobs[sample.loss_mask] for sample in samples)]
    )
