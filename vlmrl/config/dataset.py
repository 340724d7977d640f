"""`task=dataset`: problems from files of questions, pictures, videos and answers, without code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from vlmrl.config.fields import PROSE, Form, Resume, setting
from vlmrl.config.task import TaskConfig

ROWS = Form(r"-?\d+|-?\d*:-?\d*(?<!^:)", "a range of rows such as 0:500, 500: or -500:", "no row is chosen")


@dataclass
class ColumnsConfig:
    """Which column plays which part. null: it is recognized by the names and types of the columns, and printed.

    A value is the name of a column, or a dotted path into a column that has fields: `reward_model.ground_truth`.
    """

    prompt: str | None = setting(None, on_resume=Resume.noted)
    """The question: a text, or a list of messages."""
    messages: str | None = setting(None, on_resume=Resume.noted)
    """A whole conversation. Its last assistant turn is the demonstration, and the answer where no column has one; the
    turns before it are the prompt."""
    images: Any = setting(None, on_resume=Resume.noted)
    """The pictures, one or a list per row; `[image_1,image_2]` takes several columns, `[]` shows none."""
    videos: Any = setting(None, on_resume=Resume.noted)
    """The videos, one or a list per row; a list of frames is one video. `[]` shows none."""
    answer: str | None = setting(None, on_resume=Resume.noted)
    """What rewards compare an answer with: a text, a number, a list of accepted answers, boxes, or the number or letter
    of a choice."""
    choices: Any = setting(None, on_resume=Resume.noted)
    """The options of a multiple-choice question: a list per row, or several columns (`[A,B,C,D]`). They are written
    below the question as `A. …`, unless the question has them already, and the answer becomes a letter. `[]`: none."""
    system: str | None = setting(None, on_resume=Resume.noted)
    """A system message of the row."""
    boxes: str | None = setting(None, on_resume=Resume.noted)
    """Boxes that stand for `<bbox>` and `<ref-object>` in the texts (ms-swift's `objects`); the answer where there is
    no other."""
    demonstration: str | None = setting(None, on_resume=Resume.noted)
    """What the assistant says in supervised steps with `trainer.warmup.demonstrations=correct`, for example a worked
    solution. null: the answer as it is written, or the last assistant turn of `messages`; the better answer of a data
    set that has nothing else."""
    chosen: str | None = setting(None, on_resume=Resume.noted)
    """The better answer of a pair (mode=dpo): a text, or messages that end with it, of which those before it are the
    prompt. null: it is recognized; with `messages` and a worse answer only, their last assistant turn."""
    rejected: str | None = setting(None, on_resume=Resume.noted)
    """The worse answer of a pair, in the same form."""


@dataclass
class DatasetConfig(TaskConfig):
    """Problems from files, without code: `task=dataset task.path=train.parquet reward=math`."""

    kind: str = setting("dataset", on_resume=Resume.refused)
    """Rows of files or of a hub data set."""
    target: str = setting("vlmrl.tasks.dataset.task:DatasetTask", on_resume=Resume.refused)
    """The built-in class."""
    max_turns: int = setting(1, on_resume=Resume.noted, low=1, high=10**5, outside="an episode has no turn")
    """The turns of an episode: a row is one prompt and its answer, and with `tool=` each turn that calls a tool comes
    on top."""
    path: Any = setting(MISSING, on_resume=Resume.noted)
    """Where the rows are: a file (.jsonl, .json, .csv, .parquet), a pattern of files, a folder of `save_to_disk`, a hub
    id such as `hiyouga/geometry3k`, or a list of these. What exists on this machine wins over a hub id."""
    name: str | None = setting(None, on_resume=Resume.noted)
    """Config (subset) of a hub data set; null: its only one or its default."""
    split: str | None = setting(None, on_resume=Resume.noted)
    """Split to train on; null: `train`, or the only one."""
    revision: str | None = setting(None, on_resume=Resume.noted)
    """Branch, tag or commit of a hub data set; null: its newest."""
    rows: str | None = setting(None, on_resume=Resume.noted, form=ROWS)
    """Train on these rows only, `first:end` as Python counts: `0:500` are the first 500. null: all."""
    eval_path: Any = setting(None, on_resume=Resume.noted)
    """Rows to evaluate on, as `path`. null: `eval_split`, or else `eval_fraction` of the rows."""
    eval_split: str | None = setting(None, on_resume=Resume.noted)
    """Split to evaluate on, of `eval_path` or else of `path`."""
    eval_fraction: float | None = setting(
        None, on_resume=Resume.refused, low=0, high=1 - 2**-53, outside="no row is left to train on"
    )
    """Share of the rows that is kept for evaluation and never trained on. A row's text and pixels decide, so that equal
    rows stay together and every seed agrees. null: 0.1, or 0 with `eval_path` or `eval_split`."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    """Which column plays which part."""
    image_root: str | None = setting(None, on_resume=Resume.noted)
    """Folder from which the paths of images start; null: the folder of the file that names them."""
    video_root: str | None = setting(None, on_resume=Resume.noted)
    """Folder from which the paths of videos and of their frames start; null: the folder of the file that names them."""
    ignore_video_settings: bool = setting(False, on_resume=Resume.noted)
    """Ignore what rows set for their videos (`fps`, `nframes`, `max_pixels` …): `model.vlm.video` decides for all.
    Otherwise rows that set any of it are bad rows."""
    fetch: bool = setting(False, on_resume=Resume.free)
    """Download images and videos that are http(s) URLs, once; they are kept in `~/.cache/vlmrl/images` and `videos`.
    Otherwise rows with URLs are bad rows."""
    system_prompt: str | None = setting(None, on_resume=Resume.noted, form=PROSE)
    """The system message of every prompt. It replaces that of a row."""
    template: str | None = setting(None, on_resume=Resume.noted, form=PROSE)
    """The text of the user's message as a Jinja template, inline or the path of a file. It sees every column by its
    name, and `content`: the text without a template. `{{ image }}` or `<image>` marks where an image stands, and `{{
    video }}` or `<video>` where a video does."""
    shuffle_images: bool = setting(False, on_resume=Resume.refused)
    """Blind control: show the images and videos of another row. Only what the texts alone say can be learned then."""
