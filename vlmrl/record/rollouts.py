"""Record every rollout, dropped ones too: rollouts/*.parquet, images/*.png and tokens.jsonl.

    Monitor ─▶ RolloutRecorder ─ queue ─▶ background thread ─▶ images ─▶ rollout_table.py ─▶ one file per step
    report, replay, faults ◀─ read_rollouts ◀─ rollout_rows.py (*.parquet) or rollout_lines.py (*.jsonl, older runs)

rollout_schema.py has the columns of a file. A file appears complete or not at all. An image is written before the
first file that names it. Logprobs are exact float32.

An image or video part of a message holds the hash of its item. The image parts of a turn's messages belong, in order,
to the last image placeholders of its prompt, and video parts to the last video placeholders (in a branch that renders
the whole conversation again, earlier placeholders belong to the messages of earlier turns).

Left out on purpose: `mm_kwargs`. The processor can compute them again from the pictures. Their digests are in the PNG
of an image, and in `videos` of the row for a video.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
from vlmrl.types import MMItem, Rollout, VideoItem

MAX_QUEUED_FILES = 4
"""Files that may wait for the disk. With that many waiting, `write` blocks until the oldest is written."""


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


class RolloutRecorder:
    """Writes files of rollouts in the order of the calls, in one thread with a bounded queue."""

    def __init__(self, run_dir: RunDir, max_mib: int | None = None) -> None:
        """`max_mib`: `monitor.max_rollouts_mib`."""
        self._run_dir = run_dir
        self._bound = None if max_mib is None else DiskBound(run_dir, max_mib)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")
        self._waiting: deque[Future[None]] = deque()
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

        Returns at once unless `MAX_QUEUED_FILES` files wait. The rollouts must not change after the call. Raises
        VlmrlError when an earlier file could not be written.
        """
        kind: RecordKind = "step" if "train" in rollouts else "eval"
        assert kind == "eval" or len(rollouts) == 1, f"one file for {list(rollouts)}"
        self._collect(leave=MAX_QUEUED_FILES - 1)
        self._waiting.append(self._thread.submit(self._write, kind, step, dict(rollouts)))

    def flush(self) -> None:
        """Wait until everything is on the disk. Raises VlmrlError where a file could not be written."""
        self._collect(leave=0)

    def close(self) -> None:
        """Flush and end the thread. Raises VlmrlError like `flush`."""
        try:
            self.flush()
        finally:
            self._thread.shutdown()

    def _collect(self, leave: int) -> None:
        while self._waiting and (len(self._waiting) > leave or self._waiting[0].done()):
            self._waiting.popleft().result()

    def _write(self, kind: RecordKind, step: int, rollouts: dict[RecordedSplit, Sequence[Rollout]]) -> None:
        # Images come last: where a frame has the same pixels, the PNG with the digests is written.
        items = sorted(_items(rollouts), key=lambda item: not isinstance(item, VideoItem))
        pictures = {hash: picture for item in items for hash, picture in pictures_of(item).items()}
        for hash, picture in pictures.items():
            file = self._run_dir.image(hash)
            if not file.exists():
                with disk_errors(file):
                    file.parent.mkdir(exist_ok=True)  # it may have been removed under the run
                    write_png(file, picture)
        if self._spellings is not None:
            self._spellings.add(_tokens(rollout for group in rollouts.values() for rollout in group))
        from vlmrl.record.rollout_table import encode  # pyarrow takes 0.4 s

        path, content = self._run_dir.rollouts_file(kind, step), encode(step, rollouts)
        with disk_errors(path):
            path.parent.mkdir(exist_ok=True)
            write_bytes_atomically(path, content)
        if self._bound is not None:
            self._bound.wrote(kind, step, pictures)


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
