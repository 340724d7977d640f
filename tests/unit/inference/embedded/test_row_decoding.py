"""The decoder for GPUs, run on the CPU without graphs, against the reference: equal tokens at equal seeds."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.models.qwen3_5 import modeling_qwen3_5

from support import attention_kinds as kinds
from support import gpu_path as path
from support.helpers import BANNED, END, prompt
from support.played_rows import CLOSE, Turn, assert_equal_turns, groups, params, play
from support.recurrent_models import InDoublePrecision, text_model
from vlmrl.errors import NonFiniteLossError
from vlmrl.inference.embedded import generator, prefill_chunks, row_decoding
from vlmrl.inference.embedded.decode_state import DecodeState
from vlmrl.inference.embedded.device_sampling import Draw, Final, draw_tokens
from vlmrl.inference.embedded.kv_cache import KVCache
from vlmrl.inference.embedded.row_decoding import RowDecoder
from vlmrl.inference.embedded.row_layout import WHOLE
from vlmrl.inference.embedded.sampling import Shape
from vlmrl.inference.embedded.shared_prefixes import SharedPrefixes
from vlmrl.inference.embedded.step_graphs import CompiledLayers, StepGraphs
from vlmrl.models.attention import delta_rule, fused, row_step, tree
from vlmrl.models.attention.row_states import RowStates
from vlmrl.models.blocks import blocks
from vlmrl.models.families.positions import position_function
from vlmrl.models.logit_map import IDENTITY, LogitMap
from vlmrl.models.policy import Policy
from vlmrl.types import Completion, IntArray, Prompt, SamplingParams


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def policy(tiny_model: Callable[[], Any]) -> Policy:
    return Policy(tiny_model(), position_function("mrope", 2), BANNED)


def assert_same(
    policy: Policy, asked: Sequence[tuple[Prompt, SamplingParams]], patch: pytest.MonkeyPatch, turns: int = 1
) -> list[list[Turn]]:
    """Both decoders give the same completions → those of the reference."""
    wanted, _ = play(policy, asked, turns, False, patch)
    found, engine = play(policy, asked, turns, True, patch)
    assert isinstance(engine._generator, generator.Generator)
    assert isinstance(engine._generator._rows, RowDecoder)
    assert_equal_turns(wanted, found)
    return wanted


def test_groups_of_1_5_and_16_over_turns_with_images(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[int] = []
    prepare = RowDecoder._prepare

    def spy(self: RowDecoder, *args: Any) -> Any:
        kind = prepare(self, *args)
        levels.append(kind.levels)
        return kind

    monkeypatch.setattr(RowDecoder, "_prepare", spy)
    wanted = assert_same(policy, groups([1, 5, 16]), monkeypatch, turns=3)
    assert max(levels) == 2, "the system prompt and a group's own prompt"
    assert len({str(said.token_ids) for turns in wanted for _, said in turns}) > 40, "siblings must differ"


def test_an_answer_of_1_token_next_to_one_of_512(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    hidden = RowDecoder._hidden
    monkeypatch.setattr(RowDecoder, "_hidden", lambda self, kind: sizes.append(kind.rows) or hidden(self, kind))  # type: ignore[func-returns-value]
    (first, sampling), *others = groups([7], stop_token_ids=())
    asked = [
        (first, replace(sampling, max_new_tokens=512)),
        *((a, replace(b, max_new_tokens=1)) for a, b in others[:3]),
    ]
    asked += [(a, replace(b, max_new_tokens=40)) for a, b in others[3:]]
    assert_same(policy, asked, monkeypatch)
    assert sizes == [8] * 8 + [4] * 40 + [2] * 463, "rows leave when their results have been read, a reading behind"


def test_siblings_that_finish_at_the_first_token(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = groups([8], stop_token_ids=())
    first = {int(turns[0][1].token_ids[0]) for turns in assert_same(policy, asked, monkeypatch)}
    some = tuple(sorted(first))[: len(first) // 2]
    ended = assert_same(policy, [(a, replace(b, stop_token_ids=(END, *some))) for a, b in asked], monkeypatch, turns=2)
    lengths = [len(turns[0][1].token_ids) for turns in ended]
    assert 0 < lengths.count(1) < len(lengths)
    alone = [(a, replace(b, max_new_tokens=1)) for a, b in asked]
    assert_same(policy, alone, monkeypatch, turns=2)


def test_temperatures_truncations_and_stops_side_by_side(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    (first, _), *_ = groups([1])
    shapes: list[dict[str, Any]] = [
        {},
        {"temperature": 0.5},
        {"temperature": 0.0},
        {"top_k": 4},
        {"top_p": 0.5, "temperature": 1.5},
        {"min_p": 0.1},
        {"top_k": 9, "top_p": 0.8, "min_p": 0.05, "reports_support": True},
        {"top_p": 0.9, "reports_support": True, "temperature": 0.7},
        {"temperature": 0.0, "top_k": 3, "reports_support": True},
    ]
    asked = [(first, params(i, 20, stop_token_ids=(), **shape)) for i, shape in enumerate(shapes * 2)]
    wanted = assert_same(policy, asked, monkeypatch, turns=2)
    texts = [[f"<{token}>" for token in turns[0][1].token_ids] for turns in wanted]
    stops = ["".join(text[k : k + 2]) for k, text in enumerate(texts[:9])]
    assert_same(
        policy, [(a, replace(b, stop=(stops[i % 9], "none"))) for i, (a, b) in enumerate(asked)], monkeypatch, 2
    )


@pytest.mark.parametrize(("name", "window"), [("gemma3", 12), ("gemma4", 7), ("gemma2", 64)])
def test_families_with_windows_and_soft_caps(name: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(kinds.build(name, window), position_function("sequential"), [kinds.IMAGE])
    shown = [kinds.image(name, 1)] if name in kinds.SEE_IMAGES else []
    asked = [
        (kinds.prompt([*range(1, 31), number], *shown, [8]), params(10 * i + number, 24, stop_token_ids=(3,)))
        for number in range(2)
        for i in range(6)
    ]
    wanted = assert_same(policy, asked, monkeypatch)
    assert max(len(turns[0][1].token_ids) for turns in wanted) > 16


RECURRENT = ["qwen3_5_text", "qwen3_next", "lfm2"]


def recurrent_policy(name: str, dtype: torch.dtype = torch.float64) -> Policy:
    return Policy(text_model(name).to(dtype), position_function("sequential"), [])


def long_and_short(count: int, **others: Any) -> list[tuple[Prompt, SamplingParams]]:
    """Two groups whose answers have 3 to 30 tokens, so that rows leave."""
    plain: dict[str, Any] = {"stop_token_ids": (3,), **others}
    return [
        (prompt([*range(10, 40), 7 + number]), params(10 * i + number, 3 + 27 * (i % 3 == 0), **plain))
        for number in range(2)
        for i in range(count)
    ]


@pytest.mark.parametrize("name", RECURRENT)
def test_layers_that_carry_a_state(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over turns, with rows that leave and stop strings. A planted mistake: rows that are not alive go on."""
    policy = recurrent_policy(name)
    with InDoublePrecision():
        wanted = assert_same(policy, long_and_short(9), monkeypatch, turns=3)
        texts = ["".join(f"<{token}>" for token in turns[0][1].token_ids[1:3]) for turns in wanted]
        stopped = [(a, replace(b, stop=(texts[i],))) for i, (a, b) in enumerate(long_and_short(9))]
        found = assert_same(policy, stopped, monkeypatch, turns=2)
        assert sum(turns[0][1].stop is not None for turns in found) > 9
        step = RowStates.step

        def goes_on(self: RowStates, *args: Any, **kwargs: Any) -> torch.Tensor:
            self._alive = torch.ones_like(self._alive)
            return step(self, *args, **kwargs)

        monkeypatch.setattr(RowStates, "step", goes_on)
        with pytest.raises(AssertionError):
            assert_same(policy, long_and_short(9), monkeypatch, turns=2)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("name", RECURRENT)
def test_states_of_prompts_in_several_passes(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_chunks, "PASS_ROWS", rows)
    with InDoublePrecision():
        assert_same(recurrent_policy(name), long_and_short(3), monkeypatch, turns=2)


@pytest.mark.filterwarnings("ignore")  # the compiler's own warnings
@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2"])
def test_compiled_layers_around_a_state(name: str, graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another batch, with other sizes, compiles nothing."""
    policy, made = recurrent_policy(name), []
    with InDoublePrecision():
        for count in (9, 3, 17):
            assert_same(policy, long_and_short(count), monkeypatch)
            made.append(len(graphs))
    assert made[0]
    assert made == [made[0]] * 3


@pytest.mark.parametrize("name", [*RECURRENT, "olmo_hybrid"])
def test_steps_write_states_in_place_by_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with torch in place of the kernels (which test_state_kernels.py compares)."""
    calls: list[str] = []

    def step_by_kernel(*args: Any, normed: bool) -> torch.Tensor:
        calls.append("rule")
        *given, state, alive = args
        output, after = unwrapped_rule(*given, state.clone(), True, normed)
        state[alive] = after[alive]
        return torch.where(alive[:, None, None, None], output, 0.0)

    def shift_by_kernel(new: Any, window: Any, weight: Any, bias: Any, alive: Any) -> torch.Tensor:
        calls.append("shift")
        after = window.clone()
        output: torch.Tensor = unwrapped_shift(new, after, weight, bias)
        window[alive] = after[alive]
        return output

    unwrapped_rule = inspect.unwrap(modeling_qwen3_5.torch_recurrent_gated_delta_rule)
    unwrapped_rule = inspect.unwrap(getattr(unwrapped_rule, "_reference", unwrapped_rule))
    unwrapped_shift = inspect.unwrap(modeling_qwen3_5.causal_conv1d_update)
    unwrapped_shift = inspect.unwrap(getattr(unwrapped_shift, "_own", unwrapped_shift))
    kernels = SimpleNamespace(step_by_kernel=step_by_kernel, shift_by_kernel=shift_by_kernel)
    monkeypatch.setitem(sys.modules, "vlmrl.models.attention.state_kernels", cast("Any", kernels))
    for module in (delta_rule, row_step):
        monkeypatch.setattr(module, "uses_kernels", lambda _: True)
    with InDoublePrecision():
        assert_same(recurrent_policy(name), long_and_short(9), monkeypatch, turns=2)
    assert set(calls) == ({"shift"} if name == "lfm2" else {"rule", "shift"})


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2"])
def test_a_step_with_states_that_is_replayed_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_decoding, "StepGraphs", _Replayed)
    before = _Replayed.replays
    assert_same(recurrent_policy(name, torch.float32), long_and_short(2), monkeypatch, turns=2)
    assert _Replayed.replays > before + 20


def test_the_comparison_finds_a_row_at_another_place(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted mistakes: a shared part that one row does not read, and rows that leave in the wrong order."""
    table = SharedPrefixes.table

    def without_a_row(self: SharedPrefixes, row_prompts: IntArray) -> Any:
        found = table(self, row_prompts)
        found[-1, 1] -= 1
        return found

    with monkeypatch.context() as patch:
        patch.setattr(SharedPrefixes, "table", without_a_row)
        with pytest.raises(AssertionError):
            assert_same(policy, groups([5]), patch)
    asked = [(a, replace(b, max_new_tokens=6 if i % 2 else 60)) for i, (a, b) in enumerate(groups([4, 4]))]
    assert_same(policy, asked, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(DecodeState, "keep", lambda self, kept: None)
        with pytest.raises((AssertionError, IndexError)):
            assert_same(policy, asked, patch)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs of the layers, which are compiled as on a GPU, but run by torch itself."""
    found: list[Any] = []

    def backend(graph: Any, *_: Any, **__: Any) -> Any:
        found.append(graph)
        return graph.forward

    init, compiler = RowDecoder.__init__, torch.compile

    def compiled(self: RowDecoder, model: Any, text_of: Any = None) -> None:
        init(self, model, text_of)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", partial(compiler, backend=backend))
            self._layers = CompiledLayers(model.policy.model.base_model.get_decoder())

    monkeypatch.setattr(RowDecoder, "__init__", compiled)
    torch.compiler.reset()
    return found


@pytest.mark.filterwarnings("ignore")  # the compiler's own warnings
def test_compiled_layers_serve_all_sizes(policy: Policy, graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph, for all layers, prefill and all sizes of a step."""
    asked = [(a, replace(b, max_new_tokens=2 + 17 * (i < 9) + 17 * (i < 3))) for i, (a, b) in enumerate(groups([20]))]
    assert_same(policy, asked, monkeypatch, turns=2)
    assert_same(policy, [(prompt([5]), params(0))], monkeypatch)  # a prefill of one row is not compiled
    assert len(graphs) == 1
    layers = blocks(policy.model)
    assert len(layers) > 2
    assert not any("forward" in vars(layer) for layer in layers), "the trainer's layers are as they were"


@pytest.mark.filterwarnings("ignore")  # the compiler's own warnings
@pytest.mark.parametrize("name", ["gemma2", "gemma4"])
def test_compiled_layers_of_other_kinds(name: str, graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, soft caps, an input per layer: another batch, with other sizes, compiles nothing."""
    policy = Policy(kinds.build(name, 7), position_function("sequential"), [kinds.IMAGE])
    shown = [kinds.image(name, 1)] if name in kinds.SEE_IMAGES else []
    made = []
    for count, length in ((9, 30), (3, 50), (17, 11)):
        parts: list[Any] = [[1 + i % 30 for i in range(length)], *shown, [8]]
        asked = [(kinds.prompt(*parts), params(i, 20 - i, stop_token_ids=(3,))) for i in range(count)]
        assert_same(policy, asked, monkeypatch)
        made.append(len(graphs))
    assert made[0]
    assert made == [made[0]] * 3


class _Replayed(StepGraphs):
    """What CUDA graphs do: the operations of a kind's second step are recorded with the addresses and the numbers of
    that moment, and later steps repeat them without any Python."""

    replays = 0

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._captures = True

    def _run_apart(self, step: Callable[[], None]) -> None:
        step()

    def _capture(self, code: Any, step: Callable[[], None]) -> Any:
        recorded: list[Any] = []

        def replay() -> None:
            if recorded:
                type(self).replays += 1
                recorded[0]()
            else:
                recorded.append(make_fx(step)())  # which also runs it

        return SimpleNamespace(replay=replay)


def test_a_step_that_is_replayed_is_the_same(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step depends on nothing but its tensors, over turns and in several sizes. A planted mistake: one of the tensors
    moves to another address."""
    monkeypatch.setattr(row_decoding, "StepGraphs", _Replayed)
    asked = [(a, replace(b, max_new_tokens=4 if i else 22)) for i, (a, b) in enumerate(groups([2, 1]))]
    assert_same(policy, asked, monkeypatch, turns=2)
    assert _Replayed.replays > 20
    sample = RowDecoder._sample

    def moved(self: RowDecoder, hidden: torch.Tensor, kind: Any) -> None:
        sample(self, hidden, kind)
        assert self._state is not None
        self._state.rows = replace(self._state.rows, token=self._state.rows.token.clone())

    monkeypatch.setattr(RowDecoder, "_sample", moved)
    with pytest.raises(AssertionError):
        assert_same(policy, asked, monkeypatch)


def test_probabilities_that_are_not_finite_are_an_error(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        policy.model.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(NonFiniteLossError, match="version 0"):
        play(policy, groups([2]), 1, True, monkeypatch)


# ── sampling ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("vocabulary", [50, 128, 1000])
def test_a_token_is_drawn_by_the_inverse_of_the_cumulative_distribution(vocabulary: int) -> None:
    rows = 300
    generator_ = torch.Generator().manual_seed(vocabulary)
    output = torch.randn(rows, vocabulary, generator=generator_)
    banned = torch.zeros(vocabulary, dtype=torch.bool)
    banned[:10] = banned[-7:] = True
    temperature = torch.logspace(1, -1, rows)[:, None]
    logits = (4 * torch.tanh(output / 4) / temperature).masked_fill(banned, -torch.inf)
    uniforms = torch.rand(rows, generator=generator_, dtype=torch.float64)
    uniforms[:2], uniforms[2:4] = 0.0, 1.0 - 2.0**-53
    final = Final(banned, temperature, LogitMap(cap=4.0))
    nobody = torch.zeros(rows, dtype=torch.bool)
    how = Draw(final, uniforms, nobody, nobody.long(), [WHOLE], False)
    tokens, logprobs, supports = draw_tokens(output.clone(), how)
    slowly, slow_logprobs, _ = draw_tokens(output.clone(), replace(how, has_greedy=True))
    assert tokens.tolist() == slowly.tolist()
    np.testing.assert_allclose(logprobs, slow_logprobs, atol=2e-6)
    probabilities = torch.softmax(logits.double(), -1)
    cumulative = probabilities.cumsum(-1)
    below = torch.cat([torch.zeros(rows, 1, dtype=torch.float64), cumulative], -1).gather(1, tokens[:, None])[:, 0]
    assert (below <= uniforms + 1e-6).all()
    assert (uniforms <= cumulative.gather(1, tokens[:, None])[:, 0] + 1e-6).all()
    assert (tokens >= 10).all()
    assert (tokens < vocabulary - 7).all()
    np.testing.assert_allclose(logprobs, probabilities.gather(1, tokens[:, None])[:, 0].log(), atol=2e-6)
    assert supports == []


def test_truncations_of_one_batch_do_not_mix() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]] * 4).log()
    shapes = [WHOLE, Shape(1.0, 2, 1.0, 0.0, True)]
    how = Draw(
        Final(torch.zeros(4, dtype=torch.bool), torch.ones(4, 1), IDENTITY),
        torch.tensor([0.9, 0.9, 0.1, 0.9], dtype=torch.float64),
        torch.tensor([False, False, False, True]),
        torch.tensor([0, 1, 1, 0]),
        shapes,
        True,
    )
    tokens, logprobs, supports = draw_tokens(logits, how)
    assert tokens.tolist() == [3, 1, 0, 0]
    np.testing.assert_allclose(logprobs.exp(), [0.125, 1 / 3, 2 / 3, 0.5], rtol=1e-6)
    assert [None if each is None else each.tolist() for each in supports] == [None, [0, 1], [0, 1], None]


# ── prefill ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("most_keys", [fused.MOST_PATH_KEYS, 100])
@pytest.mark.parametrize("kind", ["qwen3_vl", "mistral", "gemma4"])
def test_prefill_by_flash_attention(policy: Policy, kind: str, most_keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its definition in place of the kernel: first turns that share a prompt, and later ones whose turns before are in
    the cache; with windows, too. Blocks compute what would copy too many keys."""
    asked = groups([1, 5, 16])
    if kind != "qwen3_vl":
        policy = Policy(kinds.build(kind, 4), position_function("sequential"), [kinds.IMAGE])
        asked = [
            (kinds.prompt([*range(1, 20), number], [8] * number), params(i, stop_token_ids=(3,)))
            for i, number in enumerate((1, 1, 1, 4, 9))
        ]
    wanted, _ = play(policy, asked, 3, False, monkeypatch)
    monkeypatch.setattr(fused, "varlen_attn", path.flash_by_definition)
    monkeypatch.setattr(fused, "MOST_PATH_KEYS", most_keys)
    monkeypatch.setattr(Policy, "_is_fused", True)
    plans: list[Any] = []
    attend = fused.attend_paths
    monkeypatch.setattr(tree, "attend_paths", lambda *a: plans.append(a[3]) or attend(*a))  # type: ignore[func-returns-value]
    found, _ = play(policy, asked, 3, True, monkeypatch)
    pairs = [(a, b) for x, y in zip(wanted, found, strict=True) for (_, a), (_, b) in zip(x, y, strict=True)]
    for expected, said in pairs:
        assert said.token_ids.tolist() == expected.token_ids.tolist()
        np.testing.assert_allclose(said.logprobs, expected.logprobs, atol=CLOSE, rtol=0)
    assert all(int(each.starts_of_paths[-1]) <= most_keys for each in plans)
    if most_keys > 100:
        assert any(each.longest < each.longest_path for each in plans), "later turns see keys in the cache"
        assert {each.window for each in plans} == {"qwen3_vl": {None}, "mistral": {4}, "gemma4": {None, 4}}[kind]


# ── the KV cache ────────────────────────────────────────────────────────────────────────────────────────────


def test_slots_behind_an_answer_are_taken_again() -> None:
    cache = KVCache()
    assert cache.take(5).tolist() == [0, 1, 2, 3, 4]
    cache.give_back(np.array([1, 3]))
    assert cache.used == 3
    assert cache.take(3).tolist() == [1, 3, 5]
    assert cache.allocate(2) == 6
    cache.clear()
    assert cache.take(2).tolist() == [0, 1]


def test_short_answers_leave_their_slots_to_later_turns(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two turns of at most 200 tokens that end after one hold no slot of the other 199."""
    (first, sampling), *_ = groups([1], stop_token_ids=tuple(range(300)))
    most = 0
    clear = KVCache.clear

    def spy(self: KVCache) -> None:
        nonlocal most
        most = max(most, self.used)
        clear(self)

    monkeypatch.setattr(KVCache, "clear", spy)
    ((_, (last, said)),), _ = play(policy, [(first, replace(sampling, max_new_tokens=200))], 2, True, monkeypatch)
    assert len(said.token_ids) == 1
    assert most == len(last.token_ids)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")  # the compiler's own warnings
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_on_a_gpu_with_graphs(
    tiny_model: Callable[[], Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16 the two round differently, so answers of 40 tokens part sooner or later; until then their
    probabilities are close."""
    policy = Policy(tiny_model().to("cuda", dtype), position_function("mrope", 2), BANNED)
    asked = groups([1, 5, 16], tokens=40)
    wanted, _ = play(policy, asked, 2, False, monkeypatch)
    found, _ = play(policy, asked, 2, True, monkeypatch)
    pairs = [(a, b) for x, y in zip(wanted, found, strict=True) for (_, a), (_, b) in zip(x, y, strict=True)]
    assert_close(pairs[::2], *((0.95, 1e-4) if dtype is torch.float32 else (0.3, 0.03)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")  # the compiler's own warnings
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2"])
def test_states_on_a_gpu_with_graphs(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = Policy(text_model(name).to("cuda", dtype), position_function("sequential"), [])
    wanted, _ = play(policy, long_and_short(9), 2, False, monkeypatch)
    found, engine = play(policy, long_and_short(9), 2, True, monkeypatch)
    assert isinstance(engine._generator, generator.Generator)
    assert engine._generator._rows is not None
    assert engine._generator._rows._graphs._captures
    if dtype is torch.float32:
        pairs = [(a, b) for x, y in zip(wanted, found, strict=True) for (_, a), (_, b) in zip(x, y, strict=True)]
        assert_close(pairs[::2], 0.95, 1e-4)
    # In half precision single logprobs of this model are 0.25 nats from float64 by either decoder.
    exact = text_model(name).cuda()
    with InDoublePrecision(), torch.no_grad():
        ours, theirs = (mean_error(exact, turns) for turns in (found, wanted))
    assert ours < (1e-5 if dtype is torch.float32 else 1.2 * theirs)


def mean_error(exact: Any, played: Sequence[Sequence[Turn]]) -> float:
    """Of the completions' logprobs against those of a model in float64."""
    errors: list[float] = []
    for given, said in (turn for turns in played for turn in turns):
        both = torch.from_numpy(np.concatenate([given.token_ids, said.token_ids])).cuda()
        logprobs = exact(input_ids=both[None], use_cache=False).logits[0].log_softmax(-1)
        first = len(given.token_ids)
        wanted = logprobs[torch.arange(first - 1, len(both) - 1), both[first:]].cpu().numpy()
        errors += np.abs(wanted - said.logprobs).tolist()
    return float(np.mean(errors))


def assert_close(pairs: Sequence[tuple[Completion, Completion]], equal: float, nats: float) -> None:
    """At least so many completions are equal, nearly all first tokens are, and logprobs of equal beginnings are within
    `nats`."""
    together = []
    for expected, said in pairs:
        shorter = min(len(expected.token_ids), len(said.token_ids))
        same = np.logical_and.accumulate(expected.token_ids[:shorter] == said.token_ids[:shorter])
        together.append(int(same.sum()))
        ours, theirs = said.logprobs[: together[-1]], expected.logprobs[: together[-1]]
        np.testing.assert_allclose(ours, theirs, atol=nats, rtol=0)
    whole = [n == max(len(a.token_ids), len(b.token_ids)) for n, (a, b) in zip(together, pairs, strict=True)]
    assert np.mean(whole) >= equal
    assert np.mean(np.array(together) > 0) >= 0.9
