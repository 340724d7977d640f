"""From a server's answer to a completion: its end, whoever found it."""

from __future__ import annotations

import numpy as np
import pytest

from vlmrl.errors import EngineError
from vlmrl.inference.vllm.completions import completion_of
from vlmrl.inference.vllm.wire import Answer
from vlmrl.types import Completion, IntArray, SamplingParams

END = 9


def spelled(token_ids: IntArray) -> str:
    return "".join("" if token == END else f"<{token}>" for token in token_ids)


def made(tokens: list[int], finish_reason: str, *, stop: tuple[str, ...] = (), versions: bool = True) -> Completion:
    count = len(tokens)
    logprobs = -np.arange(1, count + 1, dtype=np.float32)
    answer = Answer(np.array(tokens), logprobs, np.arange(count) if versions else None, finish_reason)
    params = SamplingParams(8, 1.0, (END,), (), seed=0, stop=stop)
    return completion_of("r", answer, 4, params, spelled)


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
def test_tokens_behind_a_stop_string_are_left_out(finish_reason: str) -> None:
    """A server that knows no stop strings samples on; what it sampled before is the same."""
    found = made([1, 2, 3, END], finish_reason, stop=("2><3", "<1><2>"))
    assert (found.token_ids.tolist(), found.finish_reason, found.stop) == ([1, 2], "stop", "<1><2>")
    assert (found.logprobs.tolist(), found.versions.tolist()) == ([-1.0, -2.0], [0, 1])


def test_a_stop_string_at_the_budget_ends_the_completion() -> None:
    found = made([1, 2, 3], "length", stop=("3",), versions=False)
    assert (found.token_ids.tolist(), found.finish_reason, found.stop) == ([1, 2, 3], "stop", "3")
    assert found.versions.tolist() == [4, 4, 4]


@pytest.mark.parametrize(("tokens", "reason"), [([1, END], "stop"), ([1, 2], "length")])
def test_without_a_stop_string_in_its_text_a_completion_ends_as_the_server_says(tokens: list[int], reason: str) -> None:
    found = made(tokens, reason, stop=("never",))
    assert (found.token_ids.tolist(), found.finish_reason, found.stop) == (tokens, reason, None)


@pytest.mark.parametrize(("tokens", "reason"), [([1, 2], "stop"), ([1, END], "length")])
def test_an_end_without_a_known_reason_is_an_error(tokens: list[int], reason: str) -> None:
    with pytest.raises(EngineError, match=rf"finish_reason={reason}, but .* none of the stop strings \['never'\]"):
        made(tokens, reason, stop=("never",))
    with pytest.raises(EngineError, match=rf"finish_reason={reason}, but the last token is {tokens[-1]} "):
        made(tokens, reason)
