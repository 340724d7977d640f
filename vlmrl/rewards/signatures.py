"""The reward functions of other trainers: how each is recognized, and how it is called.

    ours     fn(attempt) -> 0.5                        fn(attempts) -> [0.5, …]                  once per group
    TRL      fn(completions, **columns) -> [0.5, …]    also prompts, completion_ids              once per group
    verl     compute_score(data_source, solution_str, ground_truth, extra_info) -> 0.5 | {"score": 0.5, …}
             compute_score(data_sources, solution_strs, ground_truths, extra_infos)              once per group
    EasyR1   compute_score(reward_input) -> {"overall": 0.5, …}, compute_score(reward_inputs)    once per group
             compute_score(predict, ground_truth), compute_score(predicts, ground_truths)        once per group

Read in: TRL 1.x `GRPOTrainer._calculate_rewards` and trl/rewards; verl `workers/reward_manager/naive.py` and
`batch.py`; EasyR1 `examples/reward_function` and `verl/workers/reward/function.py`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from vlmrl.rewards.base import Attempt
from vlmrl.types import Message, Text

Arguments: TypeAlias = Mapping[str, Any]
"""Parameter → argument."""

ANSWER_COLUMNS = ("solution", "answer", "ground_truth")
"""Names under which functions written for TRL expect the reference. A column of that name comes first."""


@dataclass(frozen=True)
class Signature:
    """One way to call a reward function."""

    name: str
    """Whose it is, for messages."""
    example: str
    """The function's head, for messages."""
    mark: str
    """The parameter by which it is recognized."""
    parameters: frozenset[str]
    """All that the call fills."""
    per_group: bool
    """Whether one call judges all attempts of a group."""
    arguments: Callable[[Sequence[Attempt]], Arguments]
    """Attempts → arguments. There is one attempt unless `per_group`."""
    takes_columns: bool = False
    """Whether other parameters are columns of the row."""


def signature_of(function: Callable[..., Any]) -> Signature | None:
    """The signature that a function's parameters match; None where none does.

    >>> signature_of(lambda completions, **kwargs: []).name
    'TRL'
    >>> signature_of(lambda text: 0.0) is None
    True
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some builtins have none
        return None
    found = next((each for each in SIGNATURES if each.mark in parameters), None)
    if found is not None and found.takes_columns and _says_text(parameters[found.mark]):
        return dataclasses.replace(found, arguments=_trl_text)
    return found


def _says_text(parameter: inspect.Parameter) -> bool:
    """Whether the annotation is `list[str]`, also where annotations are kept as text."""
    text = parameter.annotation if isinstance(parameter.annotation, str) else str(parameter.annotation)
    return text.removeprefix("typing.").lower() == "list[str]"


def _ours(attempts: Sequence[Attempt]) -> Arguments:
    return {"attempt": attempts[0]}


def _ours_of_group(attempts: Sequence[Attempt]) -> Arguments:
    return {"attempts": list(attempts)}


def _verl(attempts: Sequence[Attempt]) -> Arguments:
    attempt = attempts[0]
    return {
        "data_source": _data_source(attempt),
        "solution_str": attempt.completion,
        "ground_truth": attempt.reference,
        "extra_info": _extra_info(attempt),
    }


def _verl_of_group(attempts: Sequence[Attempt]) -> Arguments:
    return {
        "data_sources": [_data_source(attempt) for attempt in attempts],
        "solution_strs": [attempt.completion for attempt in attempts],
        "ground_truths": [attempt.reference for attempt in attempts],
        "extra_infos": [_extra_info(attempt) for attempt in attempts],
    }


def _data_source(attempt: Attempt) -> Any:
    """The column of that name, as in verl's files; else the name of the file."""
    return attempt.columns.get("data_source", attempt.problem_id.partition(":")[0])


def _extra_info(attempt: Attempt) -> dict[str, Any]:
    return dict(attempt.columns.get("extra_info") or {})


def _easyr1(attempts: Sequence[Attempt]) -> Arguments:
    attempt = attempts[0]
    predict = {"predict": attempt.completion, "predict_str": attempt.completion}
    return predict | {"ground_truth": attempt.reference, "extra_info": _extra_info(attempt)}


def _easyr1_of_group(attempts: Sequence[Attempt]) -> Arguments:
    completions = [attempt.completion for attempt in attempts]
    references = [attempt.reference for attempt in attempts]
    return {"predicts": completions, "predict_strs": completions, "ground_truths": references}


def _easyr1_input(attempts: Sequence[Attempt]) -> Arguments:
    return {"reward_input": _reward_input(attempts[0])}


def _easyr1_inputs(attempts: Sequence[Attempt]) -> Arguments:
    return {"reward_inputs": [_reward_input(attempt) for attempt in attempts]}


def _reward_input(attempt: Attempt) -> dict[str, Any]:
    return {
        "response": attempt.completion,
        "response_length": len(attempt.completion_ids),
        "ground_truth": attempt.reference,
    }


# ── TRL ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _trl(attempts: Sequence[Attempt]) -> Arguments:
    """Prompts and completions as messages, which is how TRL gives them for a data set of conversations or images, and
    as texts where the row's `prompt` is a text and there are no images. Columns are lists, too."""
    is_text = isinstance(attempts[0].columns.get("prompt"), str) and not attempts[0].shows_any
    return _trl_columns(attempts) | (_as_texts(attempts) if is_text else _as_messages(attempts))


def _trl_text(attempts: Sequence[Attempt]) -> Arguments:
    """For a function that says `completions: list[str]`."""
    return _trl_columns(attempts) | _as_texts(attempts)


def _trl_columns(attempts: Sequence[Attempt]) -> dict[str, Any]:
    names = [name for name in attempts[0].columns if name not in ("prompt", "completion", "completion_ids")]
    columns = {name: [attempt.columns.get(name) for attempt in attempts] for name in names}
    references = {name: [attempt.reference for attempt in attempts] for name in ANSWER_COLUMNS}
    return references | columns | {"completion_ids": [list(attempt.completion_ids) for attempt in attempts]}


def _as_texts(attempts: Sequence[Attempt]) -> dict[str, Any]:
    prompts = [attempt.columns.get("prompt", _text_of(attempt.prompt[-1:])) for attempt in attempts]
    return {"prompts": prompts, "completions": [attempt.completion for attempt in attempts]}


def _as_messages(attempts: Sequence[Attempt]) -> dict[str, Any]:
    return {
        "prompts": [[_as_dict(message) for message in attempt.prompt] for attempt in attempts],
        "completions": [[{"role": "assistant", "content": attempt.completion}] for attempt in attempts],
    }


def _as_dict(message: Message) -> dict[str, Any]:
    """A message as chat templates take it: its content is a text, or a list of parts where it has images or
    videos."""
    parts = [
        {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": part.modality}
        for part in message.content
    ]
    is_text = all(isinstance(part, Text) for part in message.content)
    return {"role": message.role, "content": _text_of([message]) if is_text else parts}


def _text_of(messages: Sequence[Message]) -> str:
    return "".join(part.text for message in messages for part in message.content if isinstance(part, Text))


# ── the table ───────────────────────────────────────────────────────────────────────────────────────────────

_VERL = frozenset({"data_source", "solution_str", "ground_truth", "extra_info"})
_VERL_GROUP = frozenset(f"{name}s" for name in _VERL)
_PREDICT = frozenset({"predict", "predict_str", "ground_truth", "extra_info"})
_PREDICTS = frozenset({"predicts", "predict_strs", "ground_truths"})

SIGNATURES = (
    Signature("ours", "fn(attempt)", "attempt", frozenset({"attempt"}), False, _ours),
    Signature("ours, per group", "fn(attempts)", "attempts", frozenset({"attempts"}), True, _ours_of_group),
    Signature("TRL", "fn(completions, **columns)", "completions", frozenset(), True, _trl, takes_columns=True),
    Signature(
        "verl", "fn(data_source, solution_str, ground_truth, extra_info=None)", "solution_str", _VERL, False, _verl
    ),
    Signature(
        "verl, per batch",
        "fn(data_sources, solution_strs, ground_truths, extra_infos)",
        "solution_strs",
        _VERL_GROUP,
        True,
        _verl_of_group,
    ),
    Signature("EasyR1", "fn(reward_input)", "reward_input", frozenset({"reward_input"}), False, _easyr1_input),
    Signature(
        "EasyR1, per batch", "fn(reward_inputs)", "reward_inputs", frozenset({"reward_inputs"}), True, _easyr1_inputs
    ),
    Signature("EasyR1", "fn(predict, ground_truth)", "predict", _PREDICT, False, _easyr1),
    Signature("EasyR1", "fn(predict_str, ground_truth)", "predict_str", _PREDICT, False, _easyr1),
    Signature("EasyR1, per batch", "fn(predicts, ground_truths)", "predicts", _PREDICTS, True, _easyr1_of_group),
    Signature(
        "EasyR1, per batch", "fn(predict_strs, ground_truths)", "predict_strs", _PREDICTS, True, _easyr1_of_group
    ),
)
"""The known signatures. The first whose `mark` is among a function's parameters is its signature."""
