"""The comparisons of a replay: what was recorded against what today's code makes of it.

Each finding says whether the two are equal, and otherwise where the first difference is, in the order of the batch, and
how large it is. Logprobs that differ by at most `rounding` nats differ because of arithmetic (another packing, another
device), not because of the input; the state is then `rounding`, and the finding still names the first token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlmrl.runs.replay.recorded import RecordedItem
from vlmrl.runs.verdicts import State, Verdict, not_visible
from vlmrl.types import Completion, FloatArray, IntArray, Prompt, Rollout, Turn

Spelling = Mapping[int, str]
"""Token id → text (tokens.jsonl)."""


def first_difference(recorded: IntArray, today: IntArray) -> int | None:
    """Index of the first token that differs, or the end of the shorter one; None where they are equal.

    >>> first_difference(np.array([5, 6, 7]), np.array([5, 9, 7])), first_difference(np.array([5]), np.array([5, 6]))
    (1, 1)
    """
    n = min(len(recorded), len(today))
    differ = np.flatnonzero(recorded[:n] != today[:n])
    if len(differ):
        return int(differ[0])
    return None if len(recorded) == len(today) else n


def spelled(ids: IntArray, index: int, spelling: Spelling) -> str:
    """The token at `index`, e.g. `17 ' red'`; `no token` past the end."""
    if index >= len(ids):
        return "no token"
    id = int(ids[index])
    return f"{id} {spelling[id]!r}" if id in spelling else str(id)


# ── images and videos ───────────────────────────────────────────────────────────────────────────────────────


def pictures(name: str, items: Mapping[str, RecordedItem], rollouts: Sequence[Rollout]) -> Verdict:
    """Each image has the pixels whose hash is the name of its file, and each video has its frames and times."""
    changed = [item for item in items.values() if item.other_pixels]
    if not items:
        return not_visible(name, "the batch shows no image or video")
    kinds = _kinds(items.values())
    if not changed:
        return Verdict(name, State.SAME, f"{len(items)} distinct {kinds} have the pixels that the policy saw")
    where = _where_shown(changed[0], rollouts)
    return Verdict(
        name,
        State.DIFFERS,
        f"{len(changed)} of {len(items)} distinct {kinds} have other pixels than the policy saw; the first is "
        f"{changed[0].other_pixels}, shown in {where['rollout_id']}, turn {where['turn']}",
        first={changed[0].item.modality: changed[0].hash, **where},
        metrics={"changed": len(changed)},
    )


def _kinds(items: Iterable[RecordedItem]) -> str:
    """`images`, `videos`, or both."""
    return " and ".join(sorted({f"{item.item.modality}s" for item in items}))


def tensors(name: str, items: Mapping[str, RecordedItem], rollouts: Sequence[Rollout]) -> Verdict:
    """Today's processor makes tensors with the digests that were recorded."""
    noted = [item for item in items.values() if item.digests is not None]
    if not noted:
        return not_visible(name, "the run recorded no digests of the processor's tensors")
    for item in noted:
        if item.changed_tensors:
            where, kind = _where_shown(item, rollouts), item.item.modality
            changed = sum(bool(each.changed_tensors) for each in noted)
            return Verdict(
                name,
                State.DIFFERS,
                f"the {kind} processor makes other tensors of {changed} of {len(noted)} {_kinds(noted)}; the first is "
                f"{item.changed_tensors[0]} of {kind} {item.hash}, shown in {where['rollout_id']}, turn "
                f"{where['turn']}",
                first={"tensor": item.changed_tensors[0], kind: item.hash, **where},
                metrics={"changed": changed},
            )
    names = sorted({key for item in noted for key in item.item.mm_kwargs})
    return Verdict(name, State.SAME, f"{', '.join(names)} of {len(noted)} {_kinds(noted)}, by their SHA-256")


def _where_shown(item: RecordedItem, rollouts: Sequence[Rollout]) -> dict[str, object]:
    """The first place in the batch that shows the image or video."""
    for rollout in rollouts:
        for number, turn in enumerate(rollout.turns):
            for place in turn.prompt.placeholders:
                if place.hash == item.item.hash:
                    return {"rollout_id": rollout.rollout_id, "turn": number, "prompt_token": place.offset}
    raise AssertionError("every image and video was collected from the batch")


# ── tokens ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class RerenderedTurn:
    """A recorded turn, and its prompt rendered again."""

    rollout: Rollout
    number: int
    """The turn, from 0."""
    today: Prompt

    @property
    def turn(self) -> Turn:
        """The recorded turn."""
        return self.rollout.turns[self.number]


def prompts(name: str, turns: Sequence[RerenderedTurn], spelling: Spelling) -> Verdict:
    """Prompts rendered again from their messages have the recorded token ids and placeholders."""
    first: tuple[RerenderedTurn, int] | None = None
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
        return not_visible(name, "no rollout has a turn")
    if first is None:
        count = sum(len(each.today.token_ids) for each in turns)
        return Verdict(name, State.SAME, f"{len(turns)} prompts of {count} tokens, rendered again")
    each, index = first
    return Verdict(
        name,
        State.DIFFERS,
        f"{differing} of {len(turns)} prompts render differently; the first is {each.rollout.rollout_id}, turn "
        f"{each.number}, prompt token {index}: {spelled(each.turn.prompt.token_ids, index, spelling)} was recorded, "
        f"{spelled(each.today.token_ids, index, spelling)} is rendered today",
        first={"rollout_id": each.rollout.rollout_id, "turn": each.number, "prompt_token": index},
        metrics={"differing": differing},
    )


@dataclass(frozen=True, eq=False)
class ResampledTurn:
    """A recorded turn, and what the engine samples today for its prompt and seed."""

    rollout: Rollout
    number: int
    """The turn, from 0."""
    today: Completion

    @property
    def turn(self) -> Turn:
        """The recorded turn."""
        return self.rollout.turns[self.number]


def completions(name: str, turns: Sequence[ResampledTurn], exact: bool, spelling: Spelling) -> Verdict:
    """Completions sampled again with their seeds have the recorded token ids.

    Where dtypes differ (not `exact`), a random draw close to the border between two tokens may fall to the other one;
    such a difference counts as rounding.
    """
    others = [
        (each, index)
        for each in turns
        if (index := first_difference(each.turn.completion.token_ids, each.today.token_ids)) is not None
    ]
    if not others:
        count = sum(len(each.today.token_ids) for each in turns)
        finding = f"{len(turns)} completions of {count} tokens, sampled again with their seeds"
        return Verdict(name, State.SAME, finding)
    each, index = others[0]
    return Verdict(
        name,
        State.DIFFERS if exact else State.ROUNDING,
        f"{len(others)} of {len(turns)} completions are sampled differently; the first is {each.rollout.rollout_id}, "
        f"turn {each.number}, completion token {index}: {spelled(each.turn.completion.token_ids, index, spelling)} was "
        f"recorded, {spelled(each.today.token_ids, index, spelling)} is sampled today",
        first={"rollout_id": each.rollout.rollout_id, "turn": each.number, "completion_token": index},
        metrics={"differing": len(others)},
    )


# ── logprobs ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class ScoredTurn:
    """Logprobs of the first C completion tokens of a turn, twice."""

    rollout: Rollout
    number: int
    """The turn, from 0."""
    token_ids: IntArray
    """int64 [C]."""
    recorded: FloatArray
    """float32 [C]; natural log."""
    today: FloatArray
    """float32 [C]; natural log."""


def logprobs(
    name: str,
    turns: Sequence[ScoredTurn],
    rounding: float,
    spelling: Spelling,
    *,
    sides: tuple[str, str] = ("recorded", "today"),
) -> Verdict:
    """The two computations of the logprobs agree. `rounding`: largest difference in nats that dtypes explain for one
    token; `sides`: what the finding calls `ScoredTurn.recorded` and `ScoredTurn.today`."""
    recorded = np.concatenate([np.empty(0, np.float32), *(each.recorded for each in turns)])
    today = np.concatenate([np.empty(0, np.float32), *(each.today for each in turns)])
    if not len(recorded):
        return not_visible(name, "no token to compare")
    apart = np.zeros(len(recorded))
    unequal = recorded != today  # NaN differs even from NaN, and must
    apart[unequal] = np.abs(recorded[unequal].astype(np.float64) - today[unequal])
    apart[np.isnan(apart)] = np.inf
    metrics = {
        "tokens": len(apart),
        "differing": int(unequal.sum()),
        "beyond_rounding": int((apart > rounding).sum()),
        "largest": float(apart.max()),
        "mean": float(apart.mean()),
    }
    if not unequal.any():
        return Verdict(name, State.SAME, f"{len(apart)} logprobs, difference 0", metrics=metrics)
    place = int(np.flatnonzero(apart > rounding if metrics["beyond_rounding"] else unequal)[0])
    owner = np.repeat(np.arange(len(turns)), [len(each.recorded) for each in turns])[place]
    each, index = turns[owner], place - sum(len(before.recorded) for before in turns[:owner])
    return Verdict(
        name,
        State.DIFFERS if metrics["beyond_rounding"] else State.ROUNDING,
        f"{metrics['differing']} of {len(apart)} logprobs differ, {metrics['beyond_rounding']} of them by more than "
        f"{rounding:g} nats; the first is {each.rollout.rollout_id}, turn {each.number}, completion token {index} "
        f"({spelled(each.token_ids, index, spelling)}): {recorded[place]:.6g} {sides[0]}, {today[place]:.6g} "
        f"{sides[1]}, {apart[place]:.3g} apart (largest {metrics['largest']:.3g}, mean {metrics['mean']:.3g})",
        first={"rollout_id": each.rollout.rollout_id, "turn": each.number, "completion_token": index},
        metrics=metrics,
    )
