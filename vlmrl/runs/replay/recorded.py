"""Read a step's recorded batch: rollouts/step_*.parquet and images/*.png become `Rollout`s again.

    rollouts/step_000021.parquet ───────────────────┐
    images/<hash>.png ─ today's renderer ─▶ MMItem ─┴─▶ Rollout, as the loop handed it to `make_samples`

The frames of a video are images/<hash>.png as well; which frames, and when each is shown, is in the row.

The batch of step N is replayed with the weights of policy version N − 1, which the checkpoint of that name holds. A run
saves every `trainer.checkpoint_every` steps and keeps the newest `trainer.keep_checkpoints`, so few steps can be
replayed. Step 1 always can: the model and its warm-up are a function of the config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image as PILImage

from vlmrl.config.run import RunConfig
from vlmrl.errors import VlmrlError
from vlmrl.record.files import read_errors
from vlmrl.record.image_files import mm_kwargs_digests, recorded_digests
from vlmrl.record.rollouts import RolloutRecord, TurnRecord, VideoRecord, read_rollouts
from vlmrl.record.run_dir import RunDir
from vlmrl.record.tool_fields import message_of, tools_of
from vlmrl.rendering.images import ImageError
from vlmrl.rendering.renderer import Renderer
from vlmrl.types import (
    Completion,
    DropReason,
    Image,
    ImageItem,
    Message,
    MMItem,
    Placeholder,
    Prompt,
    Rollout,
    StopReason,
    Supports,
    Text,
    TokenMetrics,
    Turn,
    TurnSampling,
    Video,
)


def replayed_batch(config: RunConfig) -> tuple[RunDir, int]:
    """The run and the step that `mode=replay` replays."""
    assert config.run is not None, "preflight refuses a replay without run="
    assert config.step is not None, "preflight refuses a replay without step="
    return RunDir(config.run), config.step


@dataclass(frozen=True, eq=False)
class RecordedItem:
    """One image or video of the batch, and what today's code makes of its files."""

    hash: str
    """The recorded hash, which names the file of an image."""
    part: Image | Video
    """What a message holds: the path of the image, or the paths and times of the frames."""
    item: MMItem
    """Today's pixels, hash and tensors."""
    digests: Mapping[str, str] | None
    """The recorded digests of the processor's tensors (`mm_kwargs_digests`); None where the run recorded none."""
    frame_hashes: tuple[str, ...] = ()
    """The recorded hashes of the frames of a video, which name their files."""

    @property
    def other_pixels(self) -> str:
        """Which file, or what about the video, is not what the policy saw; empty where all is."""
        if self.item.hash == self.hash:
            return ""
        if isinstance(self.item, ImageItem):
            return f"images/{self.hash}.png"
        for number, (then, now) in enumerate(zip(self.frame_hashes, self.item.frame_hashes, strict=True)):
            if then != now:
                return f"images/{then}.png, frame {number} of the video {self.hash}"
        return f"the order, the times or the rate of the frames of the video {self.hash}"

    @property
    def changed_tensors(self) -> list[str]:
        """Names of the tensors that today's processor makes differently, or that only one of the two made."""
        if self.digests is None:
            return []
        today = mm_kwargs_digests(self.item)
        return sorted(name for name in {*today, *self.digests} if today.get(name) != self.digests.get(name))


def load_items(run_dir: RunDir, records: Sequence[RolloutRecord], renderer: Renderer) -> dict[str, RecordedItem]:
    """Recorded hash → image or video, in the order in which the batch shows them. Raises VlmrlError where a file cannot
    be read."""
    hashes = dict.fromkeys(
        hash for record in records for turn in record["turns"] for _, _, hash, _ in turn["placeholders"]
    )
    videos = {hash: video for record in records for hash, video in record["videos"].items()}
    return {
        hash: _video(run_dir, hash, videos[hash], renderer) if hash in videos else _image(run_dir, hash, renderer)
        for hash in hashes
    }


def _image(run_dir: RunDir, hash: str, renderer: Renderer) -> RecordedItem:
    path = run_dir.image(hash)
    part = Image(path)
    try:
        (item,) = renderer.items([part])  # first: it refuses a pipe, whose opening may never end
        with PILImage.open(path) as picture:
            digests = recorded_digests(picture)
    except (OSError, ImageError) as error:
        raise VlmrlError(f"{path} cannot be read, so its batch cannot be replayed: {error}") from error
    return RecordedItem(hash, part, item, digests)


def _video(run_dir: RunDir, hash: str, video: VideoRecord, renderer: Renderer) -> RecordedItem:
    part = Video([run_dir.image(frame) for frame in video["frames"]], fps=video["fps"], times=video["times"])
    try:
        (item,) = renderer.items([part])
    except ImageError as error:
        raise VlmrlError(
            f"the video {hash} cannot be made of its frames in {run_dir.images}, so its batch cannot be replayed: "
            f"{error}"
        ) from error
    return RecordedItem(hash, part, item, video["tensors"], tuple(video["frames"]))


@read_errors()
def load_records(run_dir: RunDir, step: int) -> list[RolloutRecord]:
    """The step's rollouts, including dropped ones. Raises VlmrlError where the file cannot be read."""
    return list(read_rollouts(run_dir.recorded_rollouts("step", step)))


def rollout_of(record: RolloutRecord, items: Mapping[str, RecordedItem]) -> Rollout:
    """The rollout as the loop had it, with today's images and videos in its prompts."""
    return Rollout(
        rollout_id=record["rollout_id"],
        problem_id=record["problem_id"],
        index=record["index"],
        turns=[_turn(turn, items) for turn in record["turns"]],
        reward=record["reward"],
        metrics=record["metrics"],
        stop_reason=StopReason(record["stop_reason"]),
        error=record["error"],
        dropped=None if record["dropped"] is None else DropReason(record["dropped"]),
        seconds=record["seconds"],
    )


def _turn(record: TurnRecord, items: Mapping[str, RecordedItem]) -> Turn:
    shown = [items[hash].item for _, _, hash, _ in record["placeholders"]]
    placeholders = tuple(
        Placeholder(offset, length, item.hash, gaps, item.modality)
        for (offset, length, _, gaps), item in zip(record["placeholders"], shown, strict=True)
    )
    prompt = Prompt(
        np.array(record["prompt_token_ids"], np.int64),
        placeholders,
        tuple(shown),
    )
    completion = Completion(
        np.array(record["completion_ids"], np.int64),
        np.array(record["logprobs"], np.float32),
        np.array(record["versions"], np.int64),
        record["finish_reason"],
        record.get("stop"),
        _supports(record),
    )
    learned, entropies = record.get("trainer_logprobs"), record.get("entropies")
    return Turn(
        prompt=prompt,
        completion=completion,
        text=record["text"],
        messages=[_message(message, items) for message in record["messages"]],
        branch=record["branch"],
        starts_over=record["starts_over"],
        sampling=None if (sampling := record.get("sampling")) is None else TurnSampling(**sampling),
        tools=tools_of(record["tools"]),
        reward=record["reward"],
        advantage=record["advantage"],
        learned=None
        if learned is None or entropies is None
        else TokenMetrics(np.array(learned, np.float32), np.array(entropies, np.float32)),
    )


def _supports(record: TurnRecord) -> Supports | None:
    sizes, ids = record["support_sizes"], record["support_ids"]
    if sizes is None or ids is None:
        return None
    return Supports(np.array(ids, np.int32), np.cumsum([0, *sizes], dtype=np.int64))


def _message(record: Mapping[str, object], items: Mapping[str, RecordedItem]) -> Message:
    content = record["content"]
    assert isinstance(content, list)
    parts = (Text(part["text"]) if part["type"] == "text" else items[part["hash"]].part for part in content)
    role = record["role"]
    assert role in ("system", "user", "assistant", "tool")
    return message_of(role, tuple(parts), record)


def fits(rollout: Rollout) -> bool:
    """Whether each image and video still has as many features as its placeholder; one of another size would not."""
    return all(
        place.num_features == item.num_tokens
        for turn in rollout.turns
        for place, item in zip(turn.prompt.placeholders, turn.prompt.mm_items, strict=True)
    )
