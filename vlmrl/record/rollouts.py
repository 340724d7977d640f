"""Record every rollout, dropped ones too: rollouts/*.parquet, images/*.png and tokens.jsonl.

    Monitor ─▶ RolloutRecorder ─ queue ─▶ one thread ─▶ images, several at once ─▶ rollout_table.py ─▶ a file per step
    report, replay, faults ◀─ read_rollouts ◀─ rollout_rows.py (*.parquet) or rollout_lines.py (*.jsonl, older runs)

rollout_schema.py has the columns of a file. A file appears complete or not at all. An image is written before the
first file that names it. Logprobs are exact float32. What waits in the queue is lost with a run that is killed, and
made again when it continues: a checkpoint is complete only once all that was recorded before it is on the disk.

An image or video part of a message holds the hash of its item. The image parts of a turn's messages belong, in order,
to the last image placeholders of its prompt, and video parts to the last video placeholders (in a branch that renders
the whole conversation again, earlier placeholders belong to the messages of earlier turns).

Left out on purpose: `mm_kwargs`. The processor can compute them again from the pictures. Their digests are in the PNG
of an image, and in `videos` of the row for a video.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np

from vlmrl.errors import VlmrlError
from vlmrl.record.disk_bound import DiskBound
from vlmrl.record.files import disk_errors, write_bytes_atomically
from vlmrl.record.image_files import pictures_of, write_png
from vlmrl.record.rollout_lines import read_lines
from vlmrl.record.run_dir import RecordKind, RunDir
from vlmrl.record.splits import RecordedSplit
from vlmrl.record.tokens import TokenSpellings
from vlmrl.types import ImageItem, MMItem, Rollout, VideoItem

log = logging.getLogger(__name__)

MAX_QUEUED_FILES = 32
"""Files that may wait. With that many waiting, `write` blocks until the oldest is written."""

MAX_QUEUED_BYTES = 2**32
"""Bytes of pixels and tensors that waiting files may keep in memory. `write` blocks while more would wait; a file that
is larger by itself waits alone. 4 GiB are some 160 pictures of a megapixel with their patches in float32."""

ENCODING_THREADS = 4
"""Images that are compressed at once. A PNG of a megapixel takes 0.1 to 0.2 s, nearly all of it inside Pillow, where
other threads go on."""


class PartRecord(TypedDict, total=False):
    """`{"type": "text", "text": …}`, `{"type": "image", "hash": …}` or `{"type": "video", "hash": …}`; hash is None if
    the prompt lacks it."""

    type: Literal["text", "image", "video"]
    text: str
    hash: str | None


class VideoRecord(TypedDict):
    """A video that a prompt shows (`vlmrl.types.VideoItem`); T frames."""

    frames: list[str]
    """[T]; the image hash of each frame: images/<hash>.png."""
    times: list[float]
    """[T]; when each frame is shown, in seconds."""
    fps: float
    """Frames per second, on average over the video."""
    tensors: dict[str, str]
    """The `mm_kwargs_digests` of the video."""


class ToolRecord(TypedDict):
    """A tool that a prompt describes (`vlmrl.types.ToolSpec`)."""

    name: str
    description: str
    parameters: dict[str, Any]


class CallRecord(TypedDict):
    """A tool call of a message (`vlmrl.types.ToolCall`)."""

    name: str
    arguments: dict[str, Any]
    id: str


class MessageRecord(TypedDict):
    """The keys after `content` are absent where they are empty."""

    role: str
    content: list[PartRecord]
    tool_calls: NotRequired[list[CallRecord]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    reasoning: NotRequired[str]


class TurnRecord(TypedDict):
    """One turn as `read_rollouts` returns it; P prompt tokens, C completion tokens."""

    branch: int
    starts_over: bool
    """Whether the env replaced the conversation, so that `messages` is all of the prompt."""
    tools: list[ToolRecord]
    """The tools that the prompt describes."""
    messages: list[MessageRecord]
    prompt_offset: int
    """Number of tokens shared with the turn before."""
    prompt_token_ids: list[int]
    """[P]; the file holds only those from `prompt_offset` on."""
    placeholders: list[tuple[int, int, str, tuple[tuple[int, int], ...]]]
    """(offset, length, hash, gaps) of each image and video in the prompt (`vlmrl.types.Placeholder`); a hash in
    `RolloutRecord.videos` is that of a video. The file holds only those from `prompt_offset` on."""
    completion_ids: list[int]
    """[C]."""
    logprobs: list[float]
    """[C]; natural log; NaN where no policy sampled the token (mode=play)."""
    versions: list[int]
    """[C]; policy version that sampled each token; -1 where no policy did."""
    trainer_logprobs: list[float] | None
    """[C]; natural log, under the weights before the step. None where the turn was not trained on."""
    entropies: list[float] | None
    """[C]; entropy of the trainer's distribution in nats. None where the turn was not trained on."""
    finish_reason: Literal["stop", "length"]
    stop: str | None
    """The stop string that ended the completion; None where a stop token or the token budget did."""
    sampling: dict[str, Any] | None
    """The fields of `vlmrl.types.TurnSampling`; None where it was sampled as the run samples."""
    support_sizes: list[int] | None
    """[C]; from how many tokens each token was sampled, 0 for the whole vocabulary. None: all from the whole
    vocabulary."""
    support_ids: list[int] | None
    """[sum of `support_sizes`]; these tokens, one support after the other."""
    text: str
    reward: float
    advantage: float


class RolloutRecord(TypedDict):
    """One rollout, one row of the file."""

    rollout_id: str
    problem_id: str
    step: int
    split: RecordedSplit
    task: str
    """The name of its task in a mixture; empty in a run of one task."""
    index: int
    reward: float
    rewards: dict[str, float | None]
    """The value of each reward term before its weight; None where it abstains."""
    reference: str | None
    """The answer of the data: a text as it is, anything else as JSON."""
    metrics: dict[str, float]
    stop_reason: str
    """A value of `StopReason`."""
    filtered: list[str]
    """Values of `DropReason`: the enabled filters that match, whether they drop or only track."""
    dropped: str | None
    """A value of `DropReason`; None where the rollout was trained on."""
    error: str | None
    stdout: str | None
    """The end of what the program printed that played it (task=program); None where no program did."""
    stderr: str | None
    """The same of its standard error."""
    seconds: float
    videos: dict[str, VideoRecord]
    """Hash → each distinct video in its prompts. Empty for a run from before there were videos."""
    turns: list[TurnRecord]


@dataclass
class _File:
    """A file that is not known to be written."""

    written: Future[None]
    size: int
    """How many bytes of pixels and tensors it keeps in memory."""
    is_reported: bool = False
    """Whether somebody was told already that it cannot be written."""

    def wait(self) -> None:
        """Wait until it is written. Raises VlmrlError where it cannot be."""
        try:
            self.written.result()
        except VlmrlError:
            self.is_reported = True
            raise


class RolloutRecorder:
    """Writes files of rollouts in the order of the calls, in the background with a bounded queue."""

    def __init__(self, run_dir: RunDir, max_mib: int | None = None) -> None:
        """`max_mib`: `monitor.max_rollouts_mib`."""
        self._run_dir = run_dir
        self._bound = None if max_mib is None else DiskBound(run_dir, max_mib)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")
        self._encoders = ThreadPoolExecutor(ENCODING_THREADS, thread_name_prefix="recorder-images")
        self._waiting: deque[_File] = deque()
        self._waited_s = 0.0
        self._spellings: TokenSpellings | None = None

    def spell_with(self, tokenizer: Any) -> None:
        """From now on, write the spelling of every token to tokens.jsonl."""
        self._spellings = TokenSpellings(self._run_dir.tokens, tokenizer)

    def resume_at(self, step: int) -> None:
        """Remove the files of steps after `step`, which the run writes again. Raises VlmrlError."""
        for path in self._run_dir.rollouts_after(step):
            with disk_errors(path):
                path.unlink()
        if self._bound is not None:
            self._bound.resume_at(step)

    def write(self, step: int, rollouts: Mapping[RecordedSplit, Sequence[Rollout]]) -> None:
        """Record the rollouts of a step in one file: {"train": …}, or {"eval_sampled": …, "eval_greedy": …}.

        Returns at once unless `MAX_QUEUED_FILES` files or `MAX_QUEUED_BYTES` wait; that the run had to wait is in the
        log. The rollouts must not change after the call. Raises VlmrlError when an earlier file could not be written.
        """
        kind: RecordKind = "step" if "train" in rollouts else "eval"
        assert kind == "eval" or len(rollouts) == 1, f"one file for {list(rollouts)}"
        size = sum(_size(item) for item in _items(rollouts))
        self._make_room(size)
        self._waiting.append(_File(self._thread.submit(self._write, kind, step, dict(rollouts)), size))

    def flush(self) -> None:
        """Wait until everything is on the disk. Raises VlmrlError where a file could not be written."""
        while self._waiting:
            self._collect()

    def so_far(self) -> Callable[[], None]:
        """Return a function that waits, in any thread, until what is recorded so far is on the disk. It raises
        VlmrlError where a file could not be written, of which `flush` then says nothing."""
        files = list(self._waiting)

        def wait_for_all() -> None:
            for file in files:
                file.wait()

        return wait_for_all

    def close(self) -> None:
        """Flush and end the threads. Raises VlmrlError like `flush`."""
        try:
            self.flush()
        finally:
            self._thread.shutdown()
            self._encoders.shutdown()
            if self._waited_s:
                log.info("the run waited %.1f s for rollouts/ and images/ to be written", self._waited_s)
                self._waited_s = 0.0

    def _make_room(self, size: int) -> None:
        """Wait until a file that keeps `size` bytes may wait as well. Raises VlmrlError like `flush`."""
        while self._waiting and self._waiting[0].written.done():
            self._collect()
        if not self._is_full(size):
            return
        if not self._waited_s:
            log.warning(
                "the run waits for %s: pictures come faster than they are compressed and written. A faster disk, more "
                "cores or smaller images help",
                self._run_dir.images,
            )
        begun = time.monotonic()
        try:
            while self._is_full(size):
                self._collect()
        finally:
            self._waited_s += time.monotonic() - begun

    def _is_full(self, size: int) -> bool:
        held = sum(file.size for file in self._waiting)
        return bool(self._waiting) and (len(self._waiting) >= MAX_QUEUED_FILES or held + size > MAX_QUEUED_BYTES)

    def _collect(self) -> None:
        """Wait for the oldest file. Raises VlmrlError where it could not be written, unless that is reported."""
        file = self._waiting.popleft()
        if not file.is_reported:
            file.wait()

    def _write(self, kind: RecordKind, step: int, rollouts: dict[RecordedSplit, Sequence[Rollout]]) -> None:
        # Images come last: where a frame has the same pixels, the PNG with the digests is written.
        items = sorted(_items(rollouts), key=lambda item: not isinstance(item, VideoItem))
        pictures = {hash: picture for item in items for hash, picture in pictures_of(item).items()}
        images = [self._encoders.submit(self._write_image, hash, picture) for hash, picture in pictures.items()]
        wait(images)  # all of them, also where one fails: no later file may write the same image meanwhile
        for image in images:
            image.result()
        if self._spellings is not None:
            self._spellings.add(_tokens(rollout for group in rollouts.values() for rollout in group))
        from vlmrl.record.rollout_table import encode  # pyarrow takes 0.4 s

        path, content = self._run_dir.rollouts_file(kind, step), encode(step, rollouts)
        with disk_errors(path):
            path.parent.mkdir(exist_ok=True)
            write_bytes_atomically(path, content)
        if self._bound is not None:
            self._bound.wrote(kind, step, pictures)

    def _write_image(self, hash: str, picture: ImageItem | np.ndarray) -> None:
        file = self._run_dir.image(hash)
        if not file.exists():
            with disk_errors(file):
                file.parent.mkdir(exist_ok=True)  # it may have been removed under the run
                write_png(file, picture)


def _size(item: MMItem) -> int:
    """Bytes of an item's pixels and tensors.

    >>> patches = {"pixel_values": np.zeros((4, 6), np.float32)}
    >>> _size(ImageItem("ab", np.zeros((8, 8, 3), np.uint8), patches, 1))
    288
    >>> frames, times = np.zeros((2, 8, 8, 3), np.uint8), np.arange(2.0)
    >>> _size(VideoItem("ab", frames, times, 1.0, ("c", "d"), {"pixel_values_videos": patches["pixel_values"]}, 1))
    480
    """
    pixels = item.pixels if isinstance(item, ImageItem) else item.frames
    return sum(array.nbytes for array in (pixels, *item.mm_kwargs.values()))


def _items(rollouts: Mapping[RecordedSplit, Sequence[Rollout]]) -> Iterable[MMItem]:
    """Each distinct image and video of the prompts."""
    turns = (turn for group in rollouts.values() for rollout in group for turn in rollout.turns)
    return {item.hash: item for turn in turns for item in turn.prompt.mm_items}.values()


def _tokens(rollouts: Iterable[Rollout]) -> set[int]:
    turns = [turn for rollout in rollouts for turn in rollout.turns]
    arrays = [array for turn in turns for array in (turn.prompt.token_ids, turn.completion.token_ids)]
    return set(np.unique(np.concatenate(arrays)).tolist()) if arrays else set()


def read_rollouts(
    path: Path,
    wanted: Callable[[str], bool] = lambda rollout_id: True,
    damaged: Callable[[str], None] | None = None,
) -> Iterator[RolloutRecord]:
    """Read the rollouts of a file, with whole prompts and placeholders, a few at a time. Those whose `rollout_id` is
    not `wanted` are skipped. Raises OSError and, where a rollout is damaged, VlmrlError; with `damaged`, it is skipped
    and `damaged` is called with a sentence about it."""
    for record in _reader(path)(path, wanted, _refuse if damaged is None else _skip(damaged)):
        yield _with_whole_prompts(record)


def _reader(path: Path) -> Callable[[Path, Callable[[str], bool], Callable[[str, str], None]], Iterator[Any]]:
    if path.suffix == ".jsonl":
        return read_lines
    from vlmrl.record.rollout_rows import read_rows  # pyarrow takes 0.4 s

    return read_rows


def _refuse(place: str, reason: str) -> None:
    raise VlmrlError(
        f"{place} cannot be read ({reason}), so the file was edited or damaged: remove the file, or restore it from a "
        "copy"
    )


def _skip(damaged: Callable[[str], None]) -> Callable[[str, str], None]:
    return lambda place, reason: damaged(f"{place} is damaged ({reason}) and is skipped")


def _with_whole_prompts(record: RolloutRecord) -> RolloutRecord:
    previous: TurnRecord | None = None
    for turn in record["turns"]:
        own = [
            (offset, length, hash, tuple((start, count) for part in gaps for start, count in part))
            for offset, length, hash, *gaps in turn["placeholders"]  # old records have no gaps
        ]
        turn["placeholders"] = own
        if previous is not None and turn["prompt_offset"]:
            shared = previous["prompt_token_ids"] + previous["completion_ids"]
            turn["prompt_token_ids"] = shared + turn["prompt_token_ids"]
            turn["placeholders"] = previous["placeholders"] + own
        previous = turn
    return record
