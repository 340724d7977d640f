"""Checks of token ids: the renderer's prompts against the checkpoint's chat template."""

from __future__ import annotations

from collections.abc import Sequence

from vlmrl.runs.doctor.reference import Reference
from vlmrl.runs.verdicts import Verdict, failed, judged, not_visible
from vlmrl.types import Message, Rollout, Turn

SHOWN_TOKENS = 8
"""Tokens from the first difference on that a finding spells out."""


def first_turns(name: str, reference: Reference, rollouts: Sequence[Rollout]) -> Verdict:
    """The renderer's first prompt of each rollout has the chat template's token ids."""
    for rollout in rollouts:
        if not rollout.turns:
            return failed(name, f"{rollout.problem_id} gave no prompt ({rollout.stop_reason}): {rollout.error}")
    return _token_ids(name, reference, [_conversation(rollout, 1) for rollout in rollouts])


def later_turns(name: str, reference: Reference, rollouts: Sequence[Rollout]) -> Verdict:
    """The prompts of later turns have the chat template's token ids.

    The answers are scripted: token ids that a policy samples need not be those that the tokenizer makes of their text.
    """
    later = [_conversation(rollout, turns) for rollout in rollouts for turns in range(2, len(rollout.turns) + 1)]
    if not later:
        return not_visible(name, "no episode went on after its first turn")
    return _token_ids(name, reference, later)


def _conversation(rollout: Rollout, turns: int) -> tuple[str, list[Message], Turn]:
    """(where it is from, the messages up to the prompt of turn `turns` (from 1), that turn)."""
    last = rollout.turns[turns - 1]
    messages = [*rollout.messages_before(turns - 1), *last.messages]
    return f"problem {rollout.problem_id}, turn {turns}", messages, last


def _token_ids(name: str, reference: Reference, conversations: Sequence[tuple[str, list[Message], Turn]]) -> Verdict:
    if not reference.tokenizer.chat_template:
        return not_visible(name, "the checkpoint has no chat template")
    for where, messages, turn in conversations:
        theirs = reference.token_ids(messages, turn.prompt.mm_items, turn.tools)
        ours = turn.prompt.token_ids.tolist()
        if ours != theirs:
            at = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
            )
            shown = [reference.tokenizer.decode(ids[at : at + SHOWN_TOKENS]) for ids in (ours, theirs)]
            return failed(
                name,
                f"{where}: the renderer made {len(ours)} tokens, the chat template {len(theirs)}; from token {at} on "
                f"the renderer has {shown[0]!r}, the chat template {shown[1]!r}",
            )
    tokens = sum(len(turn.prompt.token_ids) for _, _, turn in conversations)
    finding = f"{len(conversations)} prompts of {tokens} tokens are the chat template's"
    return judged(name, True, finding, prompts=len(conversations), tokens=tokens)
