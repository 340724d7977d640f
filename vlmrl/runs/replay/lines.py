"""The lines of a replay's table: what was recorded against what today's code makes of it.

Each says whether the two are the same, and otherwise where the first difference is, in the order of the batch, and how
large it is. Logprobs that differ by less than `rounding` differ by arithmetic (another packing, another device) and not
by what went in; such a line says `rounding` and names the first token all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from vlmrl.runs.replay.recorded import RecordedImage
from vlmrl.types import Completion, FloatArray, IntArray, Prompt, Rollout, Turn


class Verdict(StrEnum):
    """What a line says."""

    SAME = "same"
    """To the last bit."""
    ROUNDING = "rounding"
    """Logprobs differ, none by more than number formats explain."""
    DIFFERS = "DIFFERS"
    HIDDEN = "not visible"
    """There is nothing to look at; the line says why."""


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    name: str
    verdict: Verdict
    says: str
    first: Mapping[str, object] | None = None
    """Where the first difference is, for machines."""
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """For the screen, beside the name."""
        return f"{self.verdict:<11}  {self.says}"


Spelling = Mapping[int, str]
"""Token id → text (tokens.jsonl)."""


def first_difference(recorded: IntArray, today: IntArray) -> int | None:
    """Index of the first token that differs, the end of the shorter one included; None where they are equal.

    >>> first_difference(np.array([5, 6, 7]), np.array([5, 9, 7])), first_difference(np.array([5]), np.array([5, 6]))
    (1, 1)
    """
    n = min(len(recorded), len(today))
    differ = np.flatnonzero(recorded[:n] != today[:n])
    if len(differ):
        return int(differ[0])
    return None if len(recorded) == len(today) else n


def token(ids: IntArray, index: int, spelling: Spelling) -> str:
    """`17 ' red'`, or `nothing` behind the end."""
    if index >= len(ids):
        return "nothing"
    id = int(ids[index])
    return f"{id} {spelling[id]!r}" if id in spelling else str(id)


# ── images ──────────────────────────────────────────────────────────────────────────────────────────────────


def pictures(name: str, images: Mapping[str, RecordedImage], rollouts: Sequence[Rollout]) -> Line:
    """Each file against the hash that it is called by."""
    changed = [image for hash, image in images.items() if image.item.hash != hash]
    if not images:
        return Line(name, Verdict.HIDDEN, "the batch shows no image")
    if not changed:
        return Line(name, Verdict.SAME, f"{len(images)} distinct images have the pixels that the policy saw")
    where = _where_shown(changed[0], rollouts)
    return Line(
        name,
        Verdict.DIFFERS,
        f"{len(changed)} of {len(images)} distinct images have other pixels than the policy saw; the first is "
        f"images/{changed[0].hash}.png, shown in {where['rollout_id']}, turn {where['turn']}",
        {"image": changed[0].hash, **where},
        {"changed": len(changed)},
    )


def tensors(name: str, images: Mapping[str, RecordedImage], rollouts: Sequence[Rollout]) -> Line:
    """What today's processor makes of the pictures against the digests that were recorded."""
    noted = [image for image in images.values() if image.digests is not None]
    if not noted:
        return Line(name, Verdict.HIDDEN, "the run noted no digests of the processor's tensors")
    for image in noted:
        if image.changed_tensors:
            where = _where_shown(image, rollouts)
            changed = sum(bool(each.changed_tensors) for each in noted)
            return Line(
                name,
                Verdict.DIFFERS,
                f"the processor makes other tensors of {changed} of {len(noted)} images; the first is "
                f"{image.changed_tensors[0]} of image {image.hash}, shown in {where['rollout_id']}, turn "
                f"{where['turn']}",
                {"tensor": image.changed_tensors[0], "image": image.hash, **where},
                {"changed": changed},
            )
    names = sorted({key for image in noted for key in image.item.mm_kwargs})
    return Line(name, Verdict.SAME, f"{', '.join(names)} of {len(noted)} images, by their SHA-256")


def _where_shown(image: RecordedImage, rollouts: Sequence[Rollout]) -> dict[str, object]:
    """The first place of the batch that shows the image."""
    for rollout in rollouts:
        for number, turn in enumerate(rollout.turns):
            for place in turn.prompt.placeholders:
                if place.hash == image.item.hash:
                    return {"rollout_id": rollout.rollout_id, "turn": number, "prompt_token": place.offset}
    raise AssertionError("it was found in the batch")


# ── tokens ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Rendered:
    """A recorded turn, and its prompt rendered again."""

    rollout: Rollout
    number: int
    """0-based turn."""
    today: Prompt

    @property
    def turn(self) -> Turn:
        return self.rollout.turns[self.number]


def prompts(name: str, turns: Sequence[Rendered], spelling: Spelling) -> Line:
    """Prompts as recorded against prompts rendered again from the messages."""
    first: tuple[Rendered, int] | None = None
    differing = 0
    for each in turns:
        index = first_difference(each.turn.prompt.token_ids, each.today.token_ids)
        if index is None and each.today.placeholders != each.turn.prompt.placeholders:
            pairs = zip(each.turn.prompt.placeholders, each.today.placeholders, strict=False)
            index = next((old.offset for old, new in pairs if old != new), 0)
        if index is not None:
            differing += 1
            first = first or (each, index)
    if not turns:
        return Line(name, Verdict.HIDDEN, "no rollout has a turn")
    if first is None:
        count = sum(len(each.today.token_ids) for each in turns)
        return Line(name, Verdict.SAME, f"{len(turns)} prompts of {count} tokens, rendered again")
    each, index = first
    return Line(
        name,
        Verdict.DIFFERS,
        f"{differing} of {len(turns)} prompts render otherwise; the first is {each.rollout.rollout_id}, turn "
        f"{each.number}, prompt token {index}: {token(each.turn.prompt.token_ids, index, spelling)} was recorded, "
        f"{token(each.today.token_ids, index, spelling)} it is today",
        {"rollout_id": each.rollout.rollout_id, "turn": each.number, "prompt_token": index},
        {"differing": differing},
    )


@dataclass(frozen=True, eq=False)
class Resampled:
    """A recorded turn, and what the engine samples today for its prompt and seed."""

    rollout: Rollout
    number: int
    today: Completion

    @property
    def turn(self) -> Turn:
        return self.rollout.turns[self.number]


def completions(name: str, turns: Sequence[Resampled], exact: bool, spelling: Spelling) -> Line:
    """Tokens as recorded against tokens sampled again. Where number formats differ (not `exact`), a draw that falls
    between two probabilities may fall to the other side."""
    others = [
        (each, index)
        for each in turns
        if (index := first_difference(each.turn.completion.token_ids, each.today.token_ids)) is not None
    ]
    if not others:
        count = sum(len(each.today.token_ids) for each in turns)
        return Line(name, Verdict.SAME, f"{len(turns)} completions of {count} tokens, sampled again with their seeds")
    each, index = others[0]
    return Line(
        name,
        Verdict.DIFFERS if exact else Verdict.ROUNDING,
        f"{len(others)} of {len(turns)} completions are sampled otherwise; the first is {each.rollout.rollout_id}, "
        f"turn {each.number}, completion token {index}: {token(each.turn.completion.token_ids, index, spelling)} was "
        f"recorded, {token(each.today.token_ids, index, spelling)} it is today",
        {"rollout_id": each.rollout.rollout_id, "turn": each.number, "completion_token": index},
        {"differing": len(others)},
    )


# ── logprobs ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Scored:
    """Logprobs of C tokens of a turn, then and now."""

    rollout: Rollout
    number: int
    token_ids: IntArray
    """int64 [C]; from the completion's first token on."""
    recorded: FloatArray
    """float32 [C]; natural log."""
    today: FloatArray
    """float32 [C]; natural log."""


def logprobs(
    name: str,
    turns: Sequence[Scored],
    rounding: float,
    spelling: Spelling,
    *,
    sides: tuple[str, str] = ("was recorded", "it is today"),
) -> Line:
    """`rounding` is in nats: what number formats may make of one token."""
    recorded = np.concatenate([np.empty(0, np.float32), *(each.recorded for each in turns)])
    today = np.concatenate([np.empty(0, np.float32), *(each.today for each in turns)])
    if not len(recorded):
        return Line(name, Verdict.HIDDEN, "no token to compare")
    apart = np.zeros(len(recorded))
    unequal = recorded != today  # NaN is unequal to itself, and so it should be
    apart[unequal] = np.abs(recorded[unequal].astype(np.float64) - today[unequal])
    apart[np.isnan(apart)] = np.inf
    figures = {
        "tokens": len(apart),
        "differing": int(unequal.sum()),
        "beyond_rounding": int((apart > rounding).sum()),
        "largest": float(apart.max()),
        "mean": float(apart.mean()),
    }
    if not unequal.any():
        return Line(name, Verdict.SAME, f"{len(apart)} logprobs, difference 0", figures=figures)
    verdict = Verdict.DIFFERS if figures["beyond_rounding"] else Verdict.ROUNDING
    place = int(np.flatnonzero(apart > rounding if figures["beyond_rounding"] else unequal)[0])
    owner = np.repeat(np.arange(len(turns)), [len(each.recorded) for each in turns])[place]
    each, index = turns[owner], place - sum(len(before.recorded) for before in turns[:owner])
    beyond = f", {figures['beyond_rounding']} of them by more than {rounding:g} nats"
    return Line(
        name,
        verdict,
        f"{figures['differing']} of {len(apart)} logprobs differ{beyond}; the first is {each.rollout.rollout_id}, turn "
        f"{each.number}, completion token {index} ({token(each.token_ids, index, spelling)}): "
        f"{recorded[place]:.6g} {sides[0]}, {today[place]:.6g} {sides[1]}, {apart[place]:.3g} apart "
        f"(largest {figures['largest']:.3g}, mean {figures['mean']:.3g})",
        {"rollout_id": each.rollout.rollout_id, "turn": each.number, "completion_token": index},
        figures,
    )
