"""The embedded engine over layers that carry a state: logprobs are those of transformers' own forward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from support.recurrent_models import InDoublePrecision, text_model
from vlmrl.inference.embedded import generator
from vlmrl.inference.embedded.generator import Generator
from vlmrl.inference.embedded.requests import Request, SessionCache
from vlmrl.models.attention.layer_cache import State
from vlmrl.models.attention.recurrent import StatePlan
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy
from vlmrl.types import Completion, IntArray, Prompt, SamplingParams

CLOSE = 1e-6
"""Nats, computed in float64 and recorded in float32."""

NAMES = ["qwen3_5_text", "qwen3_next", "lfm2"]


@pytest.fixture(autouse=True, params=[False, True], ids=["branches", "rows"])
def by_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both decoders: the reference, and the one for GPUs."""
    chosen: bool = request.param
    monkeypatch.setattr(generator, "decodes_by_rows", lambda _: chosen)
    return chosen


class Engine:
    """A generator of a small model, and the same model with transformers' own forward."""

    def __init__(self, name: str) -> None:
        self.model = text_model(name)
        policy = Policy(copy.deepcopy(self.model), position_function("sequential"), [])
        self._generator = Generator(policy)

    def run(
        self, prompts: Sequence[IntArray], sessions: Sequence[SessionCache], *, tokens: int = 5
    ) -> list[Completion]:
        """One batch, a completion of `tokens` tokens for each prompt, whose logprobs are compared with `model`."""
        requests = [
            Request(Prompt(ids, (), ()), SamplingParams(tokens, 1.0, (), (), seed), session)
            for seed, (ids, session) in enumerate(zip(prompts, sessions, strict=True))
        ]
        with InDoublePrecision():
            completions = self._generator.run(requests, 0)
            for ids, completion in zip(prompts, completions, strict=True):
                np.testing.assert_allclose(completion.logprobs, self._expected(ids, completion.token_ids), atol=CLOSE)
        return completions

    def _expected(self, ids: IntArray, completion: IntArray) -> Any:
        both = torch.from_numpy(np.concatenate([ids, completion]))
        with torch.no_grad():
            logprobs = self.model(input_ids=both[None], use_cache=False).logits[0].log_softmax(-1)
        return logprobs[torch.arange(len(ids) - 1, len(both) - 1), both[len(ids) :]].numpy()

    def rows(self) -> tuple[float, float]:
        """Rows computed since the last call: of prompts, of completions."""
        counters = self._generator.take_counters()
        return counters["inference/rows_prefill"], counters["inference/rows_decode"]


def sessions(number: int) -> list[SessionCache]:
    return [SessionCache() for _ in range(number)]


def tokens(length: int, seed: int = 0) -> IntArray:
    return np.random.default_rng(seed).integers(3, 60, length)


def then(*parts: IntArray) -> IntArray:
    return np.concatenate(parts)


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 150])
@pytest.mark.parametrize("name", NAMES)
def test_branches_of_prompts(name: str, length: int) -> None:
    """Two prompts with a common prefix, four completions each: branches that split and branches that do not."""
    prompts = [then(tokens(length), tokens(n, seed=n)) for n in (2, 67)]
    Engine(name).run(prompts * 4, sessions(8))


@pytest.mark.parametrize("name", NAMES)
def test_a_second_turn_starts_from_the_end_of_the_first(name: str) -> None:
    engine, kept = Engine(name), sessions(2)
    first = engine.run([tokens(70)] * 2, kept)
    assert engine.rows()[0] == 70
    prompts = [then(tokens(70), c.token_ids, tokens(3, seed)) for seed, c in enumerate(first)]
    assert first[0].token_ids.tolist() != first[1].token_ids.tolist()
    second = engine.run(prompts, kept)
    assert engine.rows()[0] == 8, "the last token of each completion and the reply"
    engine.run([then(p, c.token_ids, tokens(1)) for p, c in zip(prompts, second, strict=True)], kept, tokens=1)
    assert engine.rows()[0] == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_turn_of_one_token_ends_where_its_prompt_ends(name: str) -> None:
    engine, kept = Engine(name), sessions(1)
    (first,) = engine.run([tokens(5)], kept, tokens=1)
    engine.rows()
    engine.run([then(tokens(5), first.token_ids)], kept)
    assert engine.rows()[0] == 1


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_extend_the_last_turn_is_computed_again(name: str) -> None:
    """A changed token, the same prompt again, and the beginning of the turn."""
    for other in (then(tokens(69), tokens(4, 1)), tokens(70), tokens(40)):
        engine, kept = Engine(name), sessions(1)
        engine.run([tokens(70)], kept)
        engine.rows()
        engine.run([other], kept)
        assert engine.rows()[0] == len(other)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_that_leaves_a_cached_prefix_in_the_middle(name: str) -> None:
    """Its session has no state there, and the other session's turn has none either: both rows and states of the prefix
    are computed again, while the session that extends its turn starts from it."""
    engine, kept = Engine(name), sessions(2)
    first, _ = engine.run([tokens(70), tokens(9, 5)], kept)
    engine.rows()
    extended = then(tokens(70), first.token_ids, tokens(3, 1))
    engine.run([extended, then(tokens(50), tokens(4, 2))], kept)
    assert engine.rows()[0] == 4 + 54
    engine.run(
        [extended[:50], then(extended, tokens(2, 3)), then(extended[:72], tokens(2, 4))], [*kept, SessionCache()]
    )


@pytest.mark.parametrize("name", NAMES)
def test_sessions_that_share_their_turn(name: str) -> None:
    """The second prompt extends the first turn's prompt by another session's completion."""
    engine, kept = Engine(name), sessions(3)
    completions = engine.run([tokens(20)] * 3, kept)
    prompts = [then(tokens(20), c.token_ids, tokens(2, 1)) for c in completions]
    engine.run([prompts[1], prompts[0], then(prompts[2], prompts[0])], kept)


def zero(states: dict[int, State]) -> dict[int, State]:
    def of(state: State) -> State:
        return State(*({i: x * 0 for i, x in part.items()} for part in (state.conv, state.recurrent)))

    return {number: of(state) for number, state in states.items()}


@pytest.mark.parametrize(
    "turns", [test_branches_of_prompts, test_a_second_turn_starts_from_the_end_of_the_first], ids=["branches", "turns"]
)
@pytest.mark.parametrize("name", NAMES)
def test_states_that_are_lost_are_seen(name: str, turns: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    class Losing(dict[int, dict[int, State]]):
        def __getitem__(self, segment: int) -> dict[int, State]:
            return zero(super().__getitem__(segment))

    made = StatePlan.__init__

    def lose(plan: StatePlan, *args: Any, **kwargs: Any) -> None:
        made(plan, *args, **kwargs)
        plan.ends = Losing()

    monkeypatch.setattr(StatePlan, "__init__", lose)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        turns(name, *([64] if turns is test_branches_of_prompts else []))
