"""The KV cache of the decoder for GPUs with a given number of free bytes, on the CPU: a batch that does not fit is
sampled in parts, and its completions are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from support.bench_numbers import config_of
from support.helpers import BANNED, TINY, image, prompt
from support.recurrent_models import text_model
from vlmrl.errors import EngineError
from vlmrl.inference.embedded import cache_memory, generator, kv_plan, prefill_chunks
from vlmrl.inference.embedded import prefill as embedded_prefill
from vlmrl.inference.embedded.generator import Generator
from vlmrl.inference.embedded.requests import Request, SessionCache
from vlmrl.inference.embedded.row_batch import Entering
from vlmrl.inference.embedded.row_decoding import RowDecoder
from vlmrl.models.families import family_of
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy
from vlmrl.preflight.estimate import memory as estimate
from vlmrl.preflight.estimate.sizes import find_sizes, from_numbers
from vlmrl.types import Completion, SamplingParams

TEXT = find_sizes(TINY).text
assert TEXT is not None
SLOT_BYTES = kv_plan.slot_bytes(TEXT.layers, TEXT.kv_heads, TEXT.head_dim, 4)
"""Of the tiny model, as `dry_run` counts them."""

SYSTEM = list(range(40, 70))
NEW = 9


@pytest.fixture(autouse=True)
def no_working_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests say how many slots there is memory for, and nothing else takes memory."""
    torch.set_num_threads(1)
    monkeypatch.setattr(generator, "decodes_by_rows", lambda policy: True)
    monkeypatch.setattr(kv_plan, "WORKING_BYTES", 0)
    monkeypatch.setattr(kv_plan, "LOGIT_COPIES", 0)
    monkeypatch.setattr(kv_plan, "KEPT_SHARE", 0.0)


@pytest.fixture
def policy(tiny_model: Callable[[], Any]) -> Policy:
    return Policy(tiny_model(), position_function("mrope", 2), BANNED)


def batch() -> list[Request]:
    """Three groups of four, in mixed order; their prompts share the system prompt."""
    asked = [prompt(SYSTEM, [number], image(2, 3, number), [7] * (5 + number)) for number in range(3)]
    return [
        Request(asked[index % 3], SamplingParams(NEW, 1.0, (), tuple(BANNED), index), SessionCache())
        for index in range(12)
    ]


def run(policy: Policy, requests: list[Request], slots: int) -> tuple[list[Completion], Generator, list[int]]:
    """The completions of a batch with memory for `slots` slots, and the sizes of its parts."""
    sizes: list[int] = []
    engine: Generator

    def free() -> int:
        pool = engine._model.kv_cache.pool
        return slots * SLOT_BYTES - sum(each.nbytes for pair in pool.calls.values() for each in pair)

    engine = Generator(policy, free=free)
    decode = RowDecoder.decode

    def counted(self: RowDecoder, version: int, entering: Entering, *rest: Any) -> Any:
        sizes.append(len(entering.requests))
        return decode(self, version, entering, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowDecoder, "decode", counted)
        return engine.run(requests, 0), engine, sizes


def same(found: list[Completion], wanted: list[Completion]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)


def distinct_tokens() -> int:
    """Rows of the three prompts as a prefix tree: they part behind the system prompt."""
    return len(SYSTEM) + sum(len(request.prompt.token_ids) - len(SYSTEM) for request in batch()[:3])


def test_a_batch_that_fits_takes_what_the_plan_says(policy: Policy) -> None:
    needed = kv_plan.batch_slots(distinct_tokens(), [NEW] * 12)
    _, engine, sizes = run(policy, batch(), needed)
    assert sizes == [12]
    assert engine._model.kv_cache.pool.capacity == needed
    held = sum(each.nbytes for pair in engine._model.kv_cache.pool.calls.values() for each in pair)
    assert held == needed * SLOT_BYTES, "the bytes that a slot was measured to take"


@pytest.mark.parametrize("share", [0.99, 0.5, 0.33])
def test_less_memory_makes_parts_and_the_same_completions(policy: Policy, share: float) -> None:
    wanted, _, _ = run(policy, batch(), 10**6)
    slots = int(share * kv_plan.batch_slots(distinct_tokens(), [NEW] * 12))
    found, engine, sizes = run(policy, batch(), slots)
    assert len(sizes) > 1
    assert sum(sizes) == 12
    assert engine._model.kv_cache.pool.capacity <= slots
    same(found, wanted)


def test_a_request_that_cannot_fit_is_refused(policy: Policy) -> None:
    with pytest.raises(EngineError, match=r"holds 40 tokens .* max_new_tokens=9 takes \d+: lower"):
        run(policy, batch(), 40)


def test_turns_are_forgotten_where_there_is_no_room_for_more(policy: Policy) -> None:
    """The second turns do not fit beside the first ones, which are computed again with them."""
    first = batch()
    needed = kv_plan.batch_slots(distinct_tokens(), [NEW] * 12)

    def second(completions: list[Completion], requests: list[Request]) -> list[Request]:
        return [
            Request(
                replace(each.prompt, token_ids=np.concatenate([each.prompt.token_ids, said.token_ids, [5, 6]])),
                replace(each.sampling, seed=100 + each.sampling.seed),
                each.session,
            )
            for each, said in zip(requests, completions, strict=True)
        ]

    said, roomy, _ = run(policy, first, 10**6)
    roomy.take_counters()
    wanted = roomy.run(second(said, first), 0)
    assert roomy.take_counters()["inference/rows_prefill"] == 12 * 3, "the last token of each first turn, and two more"
    again = batch()
    said, tight, _ = run(policy, again, 2 * needed)
    found = tight.run(second(said, again), 0)
    same(found, wanted)
    assert tight._model.kv_cache.pool.capacity <= 2 * needed
    assert tight.take_counters()["inference/rows_prefill"] > 2 * distinct_tokens(), "they were computed again"


def test_a_part_that_runs_out_of_memory_is_halved(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, _, _ = run(policy, batch(), 10**6)
    inner = Generator.prefilled
    tried: list[int] = []

    def cramped(self: Generator, requests: list[Request], *rest: Any) -> Any:
        tried.append(len(requests))
        if len(requests) > 4:
            raise torch.OutOfMemoryError("planted")
        return inner(self, requests, *rest)

    monkeypatch.setattr(Generator, "prefilled", cramped)
    found, _, _ = run(policy, batch(), 10**6)
    assert tried == [12, 6, 3, 3, 6, 3, 3]
    same(found, wanted)


def test_memory_goes_back_while_the_trainer_needs_it(policy: Policy) -> None:
    _, engine, _ = run(policy, batch(), 10**6)
    engine.clear_cache()
    assert engine._model.kv_cache.pool.calls == {}
    assert engine._rows is not None
    assert engine._rows._state is None
    assert engine._rows._pool is None


@pytest.mark.parametrize(("limit", "size"), [("PASS_ROWS", 20), ("PASS_KEYS", 40), ("PASS_PAIRS", 1)])
def test_prefill_in_several_passes_is_the_same(
    policy: Policy, limit: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, one, _ = run(policy, batch(), 10**6)
    passes: list[int] = []
    prefill = embedded_prefill.prefill

    def counted(model: Any, prompts: Any) -> Any:
        found = prefill(model, prompts)
        passes.append(found[1])
        return found

    monkeypatch.setattr(prefill_chunks, "prefill", counted)
    monkeypatch.setattr(prefill_chunks, limit, size)
    found, several, _ = run(policy, batch(), 10**6)
    same(found, wanted)
    assert len(passes) == 3
    assert sum(passes) == distinct_tokens(), "what a prompt shares with the one before is not computed again"
    assert several.take_counters() == one.take_counters()


def test_the_host_is_not_planned() -> None:
    assert cache_memory.free_bytes(torch.device("cpu")) == cache_memory.UNPLANNED


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2"])
def test_states_of_rows_are_measured_and_left_room(name: str) -> None:
    """Some layers have keys and values, the others states."""
    policy = Policy(text_model(name).float(), position_function("sequential"), [])
    engine = Generator(policy, free=lambda: 10**9)
    requests = [Request(prompt([5, 6, 7]), SamplingParams(NEW, 1.0, (), (), i), SessionCache()) for i in range(5)]
    engine.run(requests, 0)
    slot, state = engine._memory._measured()
    pool, decoder = engine._model.kv_cache.pool, engine._rows
    assert slot * pool.capacity == sum(each.nbytes for pair in pool.calls.values() for each in pair)
    assert decoder is not None
    assert decoder._state is not None
    layers = decoder._state.states._layers.values()
    held = sum(x.nbytes for each in layers for x in (*each.conv.values(), *each.recurrent.values()))
    assert held == state * decoder._state.room.rows > 0
    text = from_numbers(policy.config.to_dict(), "", family_of(TINY.vlm), None).text
    assert text is not None
    assert slot == estimate.slot_bytes(config_of("model.dtype=float32"), text), "`dry_run` says the same"
    assert state == estimate.state_bytes(config_of("model.dtype=float32"), text)
    kept = kv_plan.affordable_slots(10**9, slot, 5, 64) - kv_plan.affordable_slots(10**9, slot, 5, 64, state)
    assert kept == pytest.approx(2 * 5 * state / slot, abs=1)
    assert engine._memory._affordable(5) == kv_plan.affordable_slots(10**9, slot, 5, len(policy.banned), state)
