"""Requests that enter a batch that runs: equal tokens at equal seeds, as by the reference decoder."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from support.helpers import BANNED, prompt
from support.played_rows import Turn, assert_equal_turns, groups, params, play, spelled
from support.recurrent_models import InDoublePrecision, text_model
from vlmrl.errors import NonFiniteLossError
from vlmrl.inference.embedded import generator
from vlmrl.inference.embedded.cache_memory import CacheMemory
from vlmrl.inference.embedded.engine import EmbeddedEngine
from vlmrl.inference.embedded.generator import Generator
from vlmrl.inference.embedded.row_batch import Entering, RowBatch
from vlmrl.inference.embedded.row_decoding import RowDecoder
from vlmrl.inference.embedded.sampled_row import SampledRow
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy
from vlmrl.types import Completion, Prompt, SamplingParams

Entry = tuple[int, int]
"""Rows that went on when some entered, and these."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def policy(tiny_model: Callable[[], Any]) -> Policy:
    return Policy(tiny_model(), position_function("mrope", 2), BANNED)


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> list[Entry]:
    found: list[Entry] = []
    enter = RowDecoder._enter

    def noted(self: RowDecoder, batch: RowBatch, entering: Entering, *rest: Any) -> Any:
        found.append((len(batch.rows), len(entering.requests)))
        return enter(self, batch, entering, *rest)

    monkeypatch.setattr(RowDecoder, "_enter", noted)
    return found


def uneven(asked: Sequence[tuple[Prompt, SamplingParams]]) -> list[tuple[Prompt, SamplingParams]]:
    """Answers of 3 to 40 tokens, so that turns end at different times."""
    lengths = (3, 40, 9, 25, 3, 17)
    return [(p, replace(s, max_new_tokens=lengths[i % 6])) for i, (p, s) in enumerate(asked)]


def texts() -> list[tuple[Prompt, SamplingParams]]:
    return uneven([(prompt([*range(10, 40), 7 + i % 2]), params(10 * i)) for i in range(14)])


def beside(entries: Sequence[Entry]) -> int:
    """Requests that entered beside others."""
    return sum(entered for running, entered in entries if running)


def test_turns_with_images(policy: Policy, entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = uneven(groups([5, 1, 6]))
    wanted, reference = play(policy, asked, 3, False, monkeypatch)
    found, engine = play(policy, asked, 3, True, monkeypatch, is_rolling=True)
    assert_equal_turns(wanted, found)
    assert beside(entries) >= 3
    for name, count in reference.metrics().items():
        if name == "inference/rows_prefill":  # what a prompt shares with others that came at another time is computed
            assert count <= engine.metrics()[name] <= 2 * count


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2"])
def test_layers_that_carry_a_state(name: str, entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(text_model(name), position_function("sequential"), [])
    with InDoublePrecision():
        wanted, _ = play(policy, texts(), 3, False, monkeypatch)
        found, _ = play(policy, texts(), 3, True, monkeypatch, is_rolling=True)
    assert_equal_turns(wanted, found)
    assert beside(entries) >= 3


def test_stop_strings_truncation_and_temperatures(
    policy: Policy, entries: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that the device goes on with behind a stop string leave no trace."""
    plain, _ = play(policy, texts(), 3, False, monkeypatch)
    stops = [spelled(turns[0][1].token_ids[1:3]) for turns in plain]
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"top_k": 5}, {"temperature": 0.5}]
    asked = [(p, replace(s, stop=(stops[i],), **kinds[i % 4])) for i, (p, s) in enumerate(texts())]
    wanted, _ = play(policy, asked, 3, False, monkeypatch)
    found, _ = play(policy, asked, 3, True, monkeypatch, is_rolling=True)
    assert_equal_turns(wanted, found)
    assert sum(turns[0][1].stop is not None for turns in found) >= 3
    assert beside(entries) >= 1


def test_slots_are_used_once(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in use after all answers is what was computed: prompts, and all tokens but the last of each answer."""
    monkeypatch.setattr(generator, "decodes_by_rows", lambda _: True)
    engine = EmbeddedEngine(policy, lambda: 0, 2048, spelled, is_rolling=True)
    found = asyncio.run(converse(engine, texts(), turns=2, hold=True))
    counters = engine.metrics()
    answers = sum(len(said.token_ids) - 1 for turns in found for _, said in turns)
    assert counters["inference/rows_decode"] == answers
    assert engine._generator.cached_slots == counters["inference/rows_prefill"] + answers


async def converse(
    engine: EmbeddedEngine, asked: Sequence[tuple[Prompt, SamplingParams]], turns: int, *, hold: bool = False
) -> list[list[Turn]]:
    """Conversations; their sessions stay open with `hold`."""

    async def one(session: Any, first: Prompt, sampling: SamplingParams) -> list[Turn]:
        found: list[Turn] = []
        for turn in range(turns):
            said = await session.generate(first, replace(sampling, seed=sampling.seed + turn))
            found.append((first, said))
            first = replace(first, token_ids=np.concatenate([first.token_ids, said.token_ids, [9, 8, 7]]))
        if not hold:
            await session.__aexit__()
        return found

    sessions = [engine.session(str(number)) for number in range(len(asked))]
    return await asyncio.gather(*(one(session, *each) for session, each in zip(sessions, asked, strict=True)))


def test_an_answer_comes_before_its_batch_has_ended(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the last ones come after it: only then may the last session close, and the trainer start."""
    monkeypatch.setattr(generator, "decodes_by_rows", lambda _: True)
    engine = EmbeddedEngine(policy, lambda: 0, 2048, spelled, is_rolling=True)
    asked = [(prompt([5, 6, 7]), params(i, tokens=n, stop_token_ids=())) for i, n in enumerate((2, 60, 60))]

    async def run() -> list[bool]:
        async def one(sampling: SamplingParams, text: Prompt) -> bool:
            async with engine.session(str(sampling.seed)) as session:
                await session.generate(text, sampling)
                return engine._running

        return await asyncio.gather(*(one(sampling, text) for text, sampling in asked))

    assert asyncio.run(run()) == [True, False, False]


def test_what_has_no_room_waits_for_the_next_batch(
    policy: Policy, entries: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, _ = play(policy, texts(), 3, False, monkeypatch)
    monkeypatch.setattr(CacheMemory, "has_room_beside", lambda *_: False)
    found, _ = play(policy, texts(), 3, True, monkeypatch, is_rolling=True)
    assert_equal_turns(wanted, found)
    assert not entries


def test_nothing_enters_before_all_parts_of_a_batch(
    policy: Policy, entries: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, _ = play(policy, texts(), 3, False, monkeypatch)
    parts = CacheMemory.parts

    def two(self: CacheMemory, requests: Sequence[Any]) -> Iterator[list[int]]:
        whole = [index for part in parts(self, requests) for index in part]
        yield from (part for part in (whole[:7], whole[7:]) if part)

    monkeypatch.setattr(CacheMemory, "parts", two)
    found, _ = play(policy, texts(), 3, True, monkeypatch, is_rolling=True)
    assert_equal_turns(wanted, found)
    assert not entries


@pytest.mark.parametrize("at", ["the prompts", "the rows"])
def test_memory_that_runs_out_where_requests_enter(
    at: str, policy: Policy, entries: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that have answers keep them, and all others are sampled again."""
    wanted, _ = play(policy, texts(), 3, False, monkeypatch)
    prefilled, enter, failed = Generator.prefilled, RowDecoder._enter, list[int]()

    def of_prompts(self: Generator, requests: Any, *rest: Any) -> Entering:
        if at == "the prompts" and threading.current_thread().name.startswith("embedded") and is_entering(requests):
            fail(len(requests))
        return prefilled(self, requests, *rest)

    def of_rows(self: RowDecoder, batch: RowBatch, entering: Entering, *rest: Any) -> Any:
        if at == "the rows":
            fail(len(entering.requests))
        return enter(self, batch, entering, *rest)

    def is_entering(requests: Sequence[Any]) -> bool:
        return len(requests) < 14

    def fail(count: int) -> None:
        if len(failed) < 2:
            failed.append(count)
            raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(Generator, "prefilled", of_prompts)
    monkeypatch.setattr(RowDecoder, "_enter", of_rows)
    found, _ = play(policy, texts(), 3, True, monkeypatch, is_rolling=True)
    assert_equal_turns(wanted, found)
    assert failed


def test_an_error_reaches_the_whole_batch(
    policy: Policy, entries: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were there from the start, and those that have entered. What waits still gets into the next one."""
    monkeypatch.setattr(generator, "decodes_by_rows", lambda _: True)
    engine = EmbeddedEngine(policy, lambda: 0, 2048, spelled, is_rolling=True)
    enter = RowDecoder._enter

    def broken(self: RowDecoder, *args: Any) -> Any:
        enter(self, *args)
        raise NonFiniteLossError("planted")

    monkeypatch.setattr(RowDecoder, "_enter", broken)

    async def run() -> list[Any]:
        async def one(text: Prompt, sampling: SamplingParams) -> Completion:
            async with engine.session(str(sampling.seed)) as session:
                for turn in range(9):
                    said = await session.generate(text, replace(sampling, seed=sampling.seed + turn))
                return said

        return await asyncio.gather(*(one(*each) for each in texts()), return_exceptions=True)

    found = asyncio.run(run())
    assert {type(each) for each in found} <= {NonFiniteLossError, Completion}
    assert sum(isinstance(each, NonFiniteLossError) for each in found) == sum(map(sum, entries)) > 0


def test_cancelled_requests_do_not_enter(policy: Policy, entries: list[Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    """The only request that could enter is cancelled while it waits."""
    monkeypatch.setattr(generator, "decodes_by_rows", lambda _: True)
    engine = EmbeddedEngine(policy, lambda: 0, 2048, spelled, is_rolling=True)
    goes_on, waits = threading.Event(), threading.Event()
    take = generator._Running.take

    def slow(self: Any, running: int) -> Any:
        waits.set()
        assert goes_on.wait(20)
        return take(self, running)

    monkeypatch.setattr(generator._Running, "take", slow)

    async def run() -> int:
        async with engine.session("a") as first, engine.session("b", is_awaited=False) as second:
            running = asyncio.ensure_future(first.generate(prompt([5, 6]), params(1, tokens=40, stop_token_ids=())))
            await asyncio.to_thread(waits.wait, 20)
            waiting = asyncio.ensure_future(second.generate(prompt([5, 6, 7]), params(2)))
            await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.sleep(0.01)
            goes_on.set()
            return len((await running).token_ids)

    assert asyncio.run(run()) == 40
    assert not entries


def test_the_comparison_finds_rows_that_are_laid_out_wrong(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted mistakes: a row that goes on from another token, and a prompt whose slots are another prompt's."""
    wanted, _ = play(policy, texts(), 2, False, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(SampledRow, "newest", property(lambda row: 5))
        with pytest.raises(AssertionError):
            assert_equal_turns(wanted, play(policy, texts(), 2, True, patch, is_rolling=True)[0])
    joined = RowBatch.joined

    def mixed_up(self: RowBatch, other: RowBatch) -> RowBatch:
        batch = joined(self, other)
        batch.shared.private = batch.shared.private[1:] + batch.shared.private[:1]
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(RowBatch, "joined", mixed_up)
        with pytest.raises(AssertionError):
            assert_equal_turns(wanted, play(policy, texts(), 2, True, patch, is_rolling=True)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")  # the compiler's own warnings
@pytest.mark.parametrize("name", ["qwen3_5_text", ""])
def test_on_a_gpu_with_graphs(
    name: str, tiny_model: Callable[[], Any], entries: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name:
        policy = Policy(text_model(name).to("cuda", torch.float32), position_function("sequential"), [])
    else:
        policy = Policy(tiny_model().to("cuda"), position_function("mrope", 2), BANNED)
    asked = texts() if name else uneven(groups([5, 1, 6]))
    wanted, _ = play(policy, asked, 3, False, monkeypatch)
    found, engine = play(policy, asked, 3, True, monkeypatch, is_rolling=True)
    assert isinstance(engine._generator, Generator)
    assert engine._generator._rows is not None
    assert engine._generator._rows._graphs._captures
    equal = [
        said.token_ids.tolist() == expected.token_ids.tolist()
        for theirs, ours in zip(wanted, found, strict=True)
        for (_, expected), (_, said) in zip(theirs, ours, strict=True)
    ]
    assert np.mean(equal) >= 0.9, "what follows an answer that differs in a rounding differs, too"
    assert beside(entries) >= 3
