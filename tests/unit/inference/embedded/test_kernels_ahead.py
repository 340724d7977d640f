"""What is compiled ahead is what the first step launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from support import attention_kinds as kinds
from support.helpers import BANNED
from support.played_rows import groups, params, play
from vlmrl.inference.embedded import kernels_ahead
from vlmrl.inference.embedded.kernels_ahead import KernelsAhead
from vlmrl.inference.embedded.row_decoding import RowDecoder
from vlmrl.models.attention import tree
from vlmrl.models.attention.decode import DecodeRows, KeysAndValues, attend_decode
from vlmrl.models.families.positions import position_function
from vlmrl.models.policy import Policy

Launch = tuple[object, ...]


@pytest.fixture
def policy(tiny_model: Callable[[], Any]) -> Policy:
    return Policy(tiny_model(), position_function("mrope", 2), BANNED)


def note_launches(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Launch], list[Launch]]:
    """What decides about the code of the kernels: launched ahead, and by steps."""
    found: tuple[list[Launch], list[Launch]] = ([], [])
    real = attend_decode

    def spied(launches: list[Launch]) -> Callable[..., Tensor]:
        def attend(
            query: Tensor, new: KeysAndValues, pool: KeysAndValues, slots: Tensor, plan: DecodeRows, *scale_and_cap: Any
        ) -> Tensor:
            out = real(query, new, pool, slots, plan, *scale_and_cap)
            tables = plan.tables
            arrays = (query, *new, *pool, slots, tables.own_slots, tables.own_length, tables.depth, tables.segments)
            launches.append(
                (
                    *(array.dtype for array in arrays),
                    *((len(array), array.shape[-1]) for array in (query, *new)),
                    *(tables.levels, tables.most_rows, plan.window, scale_and_cap[1:]),
                    *(query.shape[1], tables.own_slots.stride(0) % 16, tables.own_slots.shape[0]),
                )
            )
            return out

        return attend

    monkeypatch.setattr(kernels_ahead, "attend_decode", spied(found[0]))
    monkeypatch.setattr(tree, "attend_decode", spied(found[1]))
    init = RowDecoder.__init__

    def on_a_gpu(self: RowDecoder, model: Any, text_of: Any = None) -> None:
        init(self, model, text_of)
        self._ahead = KernelsAhead(model.policy)

    monkeypatch.setattr(RowDecoder, "__init__", on_a_gpu)
    return found


@pytest.mark.parametrize("sizes", [[1], [5], [16, 16], [1, 5, 16], [1] * 9])
def test_groups(sizes: Sequence[int], policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead, launched = note_launches(monkeypatch)
    play(policy, groups(sizes), 2, True, monkeypatch)
    assert len(ahead) == 1
    assert set(ahead) == {launched[0]}


@pytest.mark.parametrize(("length", "windows"), [(3, 1), (60, 2)])
def test_windows_and_soft_caps(length: int, windows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows count only where a conversation may get longer than they are."""
    policy = Policy(kinds.build("gemma2", 7), position_function("sequential"), [kinds.IMAGE])
    ahead, launched = note_launches(monkeypatch)
    asked = [(kinds.prompt([1 + i % 30 for i in range(length)]), params(i, 3)) for i in range(4)]
    play(policy, asked, 1, True, monkeypatch)
    layers = policy.config.get_text_config().num_hidden_layers
    assert len(ahead) == windows
    assert set(ahead) == set(launched[:layers])


def test_what_fails_ahead_reaches_the_rollouts(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    note_launches(monkeypatch)

    def fail(*_: Any) -> Tensor:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(kernels_ahead, "attend_decode", fail)
    with pytest.raises(RuntimeError, match="no kernel"):
        play(policy, groups([2]), 1, True, monkeypatch)


def test_a_full_gpu_leaves_it_to_the_step(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    note_launches(monkeypatch)

    def fail(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(kernels_ahead, "attend_decode", fail)
    ((turn,),), _ = play(policy, groups([1]), 1, True, monkeypatch)
    assert len(turn[1].token_ids)


@pytest.mark.parametrize(("name", "alike"), [("gemma3", True), ("gemma4", False), ("gemma4_vision", False)])
def test_heads_of_layers(name: str, alike: bool) -> None:
    """None where layers have heads of different sizes or numbers."""
    policy = Policy(kinds.build(name, 7), position_function("sequential"), [kinds.IMAGE])
    assert (kernels_ahead.heads_of(policy) is not None) == alike
