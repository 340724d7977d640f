"""The columns of rollouts/*.parquet, one row per rollout. docs/reading_a_run.md explains them to users.

    rollout_id   string      train/000012/03/07: split, step, group, index in the group
    step         int32       split: string, task: string, problem_id: string, index: int32
    reward       double      rewards: [{name, value}], reference: string
    stop_reason  string      dropped: string or null, filtered: [string], error: string or null
    stdout       string or null: the end of what a program printed (task=program)     stderr: string or null
    metrics      [{name, value}]
    seconds      double
    messages     [{role, content: [{type, text}]}]     the whole conversation, the policy's answers included
    images       [string]    ../images/<hash>.png of each {"type": "image"} part, in order
    videos       [{hash, frames, times, fps, tensors}]     each {"type": "video"} part, in order
    turns        [{branch, starts_over, tools, message_fields, new_messages, prompt_offset, prompt_token_ids, …}]

`rewards` and `metrics` are lists of pairs, because `datasets` has no maps, and because a struct would have other fields
in every run. `messages` and `images` are the form that TRL, `datasets` and `task=dataset` take, so a run's own answers
can be trained on. A video is the paths of its `frames` (../images/<hash>.png), the `times` at which they are shown in
seconds, and its average frames per second; `tensors` is the JSON of the digests of what the processor made of it, by
name. Both `images` and `videos` have an entry without a hash for a part that never reached a prompt.

Turn k adds `turns[k].new_messages` messages and then its answer, the next `assistant` message. With
`turns[k].starts_over`, these messages take the place of all before them: the policy saw nothing else.

`turns[k].tools` are the tools that the prompt describes, as JSON: `[{name, description, parameters}]`.
`turns[k].message_fields` is what its new messages have besides role and content, as a JSON list with an object per
message: `tool_calls`, `tool_call_id`, `name`, `reasoning`. Both are null where there is none. They stand here and not
in `messages`, whose form other programs read.

Within a branch nothing is stored twice. `prompt_offset` is the number of tokens that a turn's prompt shares with the
turn before it (that turn's prompt and completion); the turn stores only the prompt tokens and placeholders from there
on. The first turn of a branch stores everything, with `prompt_offset` 0. Offsets count from the start of the prompt.

    turn 0   prompt [5, 9, 9, 7]     completion [1, 2]
             → prompt_offset 0, prompt_token_ids [5, 9, 9, 7], placeholders [(1, 2, "ab…", [])]
    turn 1   prompt [5, 9, 9, 7, 1, 2, 6, 9, 9]
             → prompt_offset 6, prompt_token_ids [6, 9, 9], placeholders [(7, 2, "cd…", [])]

`support_sizes` and `support_ids` are null for a turn that was sampled from the whole vocabulary. Otherwise completion
token t was sampled from `support_sizes[t]` tokens, which stand one support after the other in `support_ids`. They are
stored because another batch or machine rounds logits differently, and a token at the edge would be in or out.

A placeholder whose hash is that of a video in the row stands for the video, and otherwise for an image. Its last part
is its gaps: {start, length} of each run of tokens in it that are not image (video) tokens.

Siblings share their first prompt. It is stored plainly, row after row: zstd replaces every repetition within a column
chunk by a reference of a few bytes. Floats are stored byte by byte (BYTE_STREAM_SPLIT), which keeps every bit and lets
zstd find that signs and exponents repeat.

This module imports pyarrow, which takes 0.4 s, so it is imported where a file is read or written.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

IMAGE_FOLDER = "../images/"
"""Where images/ is, seen from a file in rollouts/."""


def _list(of: Any) -> Any:
    return pa.list_(of)


def _struct(**fields: Any) -> Any:
    return pa.struct([pa.field(name, kind) for name, kind in fields.items()])


PAIRS = _list(_struct(name=pa.string(), value=pa.float64()))
PART = _struct(type=pa.string(), text=pa.string())
MESSAGE = _struct(role=pa.string(), content=_list(PART))
VIDEO = _struct(
    hash=pa.string(), frames=_list(pa.string()), times=_list(pa.float64()), fps=pa.float64(), tensors=pa.string()
)
GAP = _struct(start=pa.int32(), length=pa.int32())
PLACEHOLDER = _struct(offset=pa.int32(), length=pa.int32(), hash=pa.string(), gaps=_list(GAP))


def _turn(placeholder: Any, **later: Any) -> Any:
    """A turn with its `later` columns, which older files lack."""
    return _struct(
        branch=pa.int32(),
        **later,
        new_messages=pa.int32(),
        prompt_offset=pa.int32(),
        prompt_token_ids=_list(pa.int32()),
        placeholders=_list(placeholder),
        completion_ids=_list(pa.int32()),
        logprobs=_list(pa.float32()),
        versions=_list(pa.int32()),
        trainer_logprobs=_list(pa.float32()),
        entropies=_list(pa.float32()),
        finish_reason=pa.string(),
        reward=pa.float64(),
        advantage=pa.float64(),
    )


_TOOLS = {"starts_over": pa.bool_(), "tools": pa.string(), "message_fields": pa.string()}
_ENDS = {"stop": pa.string(), "sampling": pa.string()}
_SUPPORTS = {"support_sizes": _list(pa.int32()), "support_ids": _list(pa.int32())}
TURN = _turn(PLACEHOLDER, **_TOOLS, **_ENDS, **_SUPPORTS)
OLD_TURNS = (
    _list(_turn(PLACEHOLDER, **_TOOLS, **_ENDS)),  # written before a run could learn from a truncated distribution
    _list(_turn(PLACEHOLDER, **_TOOLS)),  # … before a stop string or a client could decide about a completion
    _list(_turn(PLACEHOLDER, starts_over=pa.bool_())),  # … before there were tools
    _list(_turn(PLACEHOLDER)),  # … before an env could replace the conversation
    _list(_turn(_struct(offset=pa.int32(), length=pa.int32(), hash=pa.string()))),  # … before placeholders had gaps
)
"""Types of the column `turns` in older files."""
SCHEMA = pa.schema(
    {
        "rollout_id": pa.string(),
        "step": pa.int32(),
        "split": pa.string(),
        "task": pa.string(),
        "problem_id": pa.string(),
        "index": pa.int32(),
        "reward": pa.float64(),
        "rewards": PAIRS,
        "reference": pa.string(),
        "stop_reason": pa.string(),
        "dropped": pa.string(),
        "filtered": _list(pa.string()),
        "error": pa.string(),
        "stdout": pa.string(),
        "stderr": pa.string(),
        "metrics": PAIRS,
        "seconds": pa.float64(),
        "messages": _list(MESSAGE),
        "images": _list(pa.string()),
        "videos": _list(VIDEO),
        "turns": _list(TURN),
    }
)
LATER = frozenset({"stdout", "stderr", "videos"})
"""Columns that older files lack. They are null where they are missing."""

SPLIT_BYTES = tuple(f"turns.list.element.{name}.list.element" for name in ("logprobs", "trainer_logprobs", "entropies"))
"""Paths of the columns that are stored byte by byte: their values differ from token to token."""
PLAIN = ("turns.list.element.prompt_token_ids.list.element", "seconds")
"""Paths of the columns that are stored as they are."""


def leaves(path: str, kind: Any) -> dict[str, Any]:
    """Path → type of each column of a field as Parquet names it."""
    if pa.types.is_list(kind):
        return leaves(f"{path}.list.element", kind.value_type)
    if pa.types.is_struct(kind):
        return {leaf: each for field in kind for leaf, each in leaves(f"{path}.{field.name}", field.type).items()}
    return {path: kind}


LEAVES: dict[str, Any] = {leaf: kind for field in SCHEMA for leaf, kind in leaves(field.name, field.type).items()}
"""Path → type of each column as Parquet names it, e.g. `turns.list.element.reward`."""
STRINGS = [path for path, kind in LEAVES.items() if kind == pa.string()]
DICTIONARIES = [path for path in LEAVES if path not in (*SPLIT_BYTES, *PLAIN)]
"""Paths of the columns that store each distinct value once per row group."""
