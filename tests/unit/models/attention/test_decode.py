"""Attention of decode steps, in parts, against one softmax in float64. Triton's interpreter runs the kernels."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support.attention_trees import MODULE
from support.triton_kernels import choose, compile_for_an_h100, each_way, run
from vlmrl.models.attention.decode import SEGMENT_FIELDS, DecodeRows, DecodeTables, attend_by_torch
from vlmrl.models.attention.plan import KVPool, TreePlan
from vlmrl.models.attention.rules import CAUSAL
from vlmrl.models.attention.tree import tree_attention_forward

KV_HEADS, POOL = 2, 4096

CLOSE = 1e-6
"""Largest difference in float32, where values have the standard deviation 1."""


@dataclass(frozen=True)
class Case:
    """Groups of siblings. `shared[l]` holds for each segment of level l (tokens, rows below it); rows below nothing of
    a level are left at its end."""

    name: str
    shared: tuple[tuple[tuple[int, int], ...], ...]
    own: tuple[int, ...]
    """Tokens of each row's own part."""
    group: int = 2
    """Query heads per key head."""
    key_size: int = 16
    value_size: int = 16
    window: int | None = None
    softcap: float | None = None

    @property
    def scale(self) -> float:
        return float(self.key_size**-0.5)


OWN_OF_5 = (1, 7, 64, 65, 130)
CASES = [
    Case("group of 5, prompt of 777", (((777, 5),),), OWN_OF_5),
    Case("two groups of 5", (((777, 5), (3, 5)),), OWN_OF_5 * 2),
    Case("three levels", (((100, 6),), ((65, 4), (9, 2)), ((1, 2), (200, 2))), (5, 1, 2, 70, 3, 4)),
    Case("a row without a segment", (((64, 2),),), (3, 4, 150)),
    Case("nothing shared", (), (33, 1, 129)),
    Case("groups of 1", (((50, 1), (70, 1)),), (8, 9)),
    Case("more entries than a tile", (((130, 70),),), tuple(range(1, 71))),
    Case("one head of its own", (((80, 3),),), (4, 5, 6), group=1),
    Case("five heads per key head", (((80, 3),),), (4, 5, 6), group=5),
    Case("head size 24, values of 40", (((80, 3),),), (4, 5, 6), key_size=24, value_size=40),
    Case("head size 128", (((80, 3),),), (4, 5, 6), key_size=128, value_size=128),
    Case("head size 512", (((40, 3),),), (4, 5, 6), key_size=512, value_size=512),
    Case("window inside the prompt", (((100, 3), (70, 2)),), (1, 90, 5, 2, 3), window=72),
    Case("window inside the own part", (((100, 3),),), (1, 90, 5), window=4),
    Case("window of 1, two levels", (((9, 3),), ((70, 2),)), (1, 66, 5), window=1),
    Case("window longer than all", (((100, 3),),), (1, 90, 5), window=1000),
    Case("soft cap", (((100, 3),),), (1, 90, 5), softcap=2.5),
    Case("soft cap and window", (((100, 3),),), (1, 90, 5), softcap=2.5, window=60),
]


def tables_of(case: Case, seed: int = 0) -> tuple[DecodeTables, list[list[int]]]:
    """The tables, with slots in arbitrary order, and for each row the slots of its whole path."""
    free = iter(np.random.default_rng(seed).permutation(POOL).tolist())
    paths: list[list[int]] = [[] for _ in case.own]
    segments: list[list[int]] = []
    segment_slots: list[int] = []
    for level, below in enumerate(case.shared):
        first = 0
        for tokens, rows in below:
            slots = [next(free) for _ in range(tokens)]
            segments.append([first, first + rows, len(segment_slots), tokens, len(paths[first]), level])
            segment_slots += slots
            for path in paths[first : first + rows]:
                path += slots
            first += rows
    segments.append([0] * SEGMENT_FIELDS)  # without rows
    own = torch.zeros(len(paths), max(case.own) + 3, dtype=torch.int32)
    for row, tokens in enumerate(case.own):
        slots = [next(free) for _ in range(tokens)]
        own[row, :tokens] = torch.tensor(slots)
        paths[row] += slots
    tables = DecodeTables(
        own_slots=own,
        own_length=torch.tensor(case.own, dtype=torch.int32),
        depth=torch.tensor([len(path) - 1 for path in paths], dtype=torch.int32),
        segment_slots=torch.tensor([*segment_slots, 0], dtype=torch.int32),
        segments=torch.tensor(segments, dtype=torch.int32),
        levels=len(case.shared),
        most_rows=max([rows for below in case.shared for _, rows in below], default=1),
        most_keys=max([tokens for below in case.shared for tokens, _ in below], default=1),
    )
    return tables, paths


def inputs_of(case: Case, seed: int = 0, sharpness: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """query [H, R, D], keys [KV, slots, D] and values [KV, slots, E]. Slots that no row reads are NaN."""
    generator = torch.Generator().manual_seed(seed)
    query = sharpness * torch.randn(KV_HEADS * case.group, len(case.own), case.key_size, generator=generator)
    pool = [torch.randn(KV_HEADS, POOL, size, generator=generator) for size in (case.key_size, case.value_size)]
    used = {slot for path in tables_of(case)[1] for slot in path} | {0}
    for each in pool:
        each[:, [slot for slot in range(POOL) if slot not in used]] = float("nan")
    return query, *pool  # type: ignore[return-value]


def one_softmax(case: Case, query: Tensor, key: Tensor, value: Tensor, paths: list[list[int]]) -> Tensor:
    """[R, H, E] float64, from the definition."""
    rows = []
    for row, path in enumerate(paths):
        slots = path if case.window is None else path[-case.window :]
        heads = []
        for head in range(len(query)):
            scores = key[head // case.group, slots].double() @ query[head, row].double() * case.scale
            if case.softcap is not None:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            heads.append(scores.softmax(-1) @ value[head // case.group, slots].double())
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def worst(found: Tensor, wanted: Tensor) -> float:
    """Largest difference."""
    return float((found.double() - wanted).abs().max())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_parts_are_one_softmax(case: Case) -> None:
    tables, paths = tables_of(case)
    inputs = inputs_of(case)
    wanted = one_softmax(case, *inputs, paths)
    plan = DecodeRows(tables, case.window)
    query, key, value = (x.double() for x in inputs)
    in_double = attend_by_torch(query, key, value, plan, case.scale, case.softcap)
    assert worst(in_double, wanted) < 1e-12
    assert worst(attend_by_torch(*inputs, plan, case.scale, case.softcap), wanted) < CLOSE


def test_rows_that_left_are_not_read() -> None:
    case = CASES[1]
    tables, paths = tables_of(case)
    query, key, value = inputs_of(case)
    kept = [1, 3, 4, 7]
    moved = replace(
        tables.first(4),
        own_slots=tables.own_slots[kept],
        own_length=tables.own_length[kept],
        depth=tables.depth[kept],
        segments=torch.tensor([[0, 3, 0, 777, 0, 0], [3, 4, 777, 3, 0, 0], [0] * 6], dtype=torch.int32),
    )
    query = query[:, kept]
    wanted = one_softmax(case, query, key, value, [paths[row] for row in kept])
    assert worst(attend_by_torch(query, key, value, DecodeRows(moved, None), case.scale), wanted) < CLOSE


def test_a_layer_writes_its_new_keys_and_attends_to_them() -> None:
    case = CASES[2]
    tables, paths = tables_of(case)
    query, key, value = inputs_of(case)
    own = torch.tensor([path[-1] for path in paths])
    pool = KVPool(POOL)
    pool.calls[0] = key.clone(), value.clone()
    for each in pool.calls[0]:
        each[:, own] = float("nan")  # not written yet
    plan = TreePlan(CAUSAL, {None: DecodeRows(tables, None)}, pool, row_slots=own)
    inputs = query[None], key[:, own][None], value[:, own][None]
    found, _ = tree_attention_forward(MODULE, *inputs, None, case.scale, tree_plan=plan)
    wanted = one_softmax(case, query, key, value, paths)
    assert worst(found[0], wanted) < CLOSE


def test_the_comparison_finds_a_key_too_few() -> None:
    """A planted mistake: each of these tables lacks one key, or one row's segment."""
    case = CASES[0]
    tables, paths = tables_of(case)
    inputs = inputs_of(case, sharpness=0.5)
    wanted = one_softmax(case, *inputs, paths)
    shorter = tables.segments.clone()
    shorter[0, 3] -= 1
    fewer = tables.segments.clone()
    fewer[0, 1] -= 1
    wrong = [
        replace(tables, segments=shorter),
        replace(tables, segments=fewer),
        replace(tables, own_length=(tables.own_length - 1).clamp(min=1)),
    ]
    for each in wrong:
        assert worst(attend_by_torch(*inputs, DecodeRows(each, None), case.scale), wanted) > 1e-4


@each_way
def test_the_kernels_are_one_softmax_and_compile(how: str) -> None:
    run(__file__, how)


def compile_all() -> None:
    """In half precision and for large heads, too."""
    from vlmrl.models.attention import decode_kernels as kernels

    for dtype, size, capped, windowed in (
        *(("bf16", 128, False, False), ("fp16", 256, True, True), ("bf16", 512, False, True)),
        ("fp32", 128, False, False),
    ):
        constants = {"H": 16, "K": 8, "D": size, "E": size, "DP": size, "EP": size}
        constants |= {"CAPPED": capped, "WINDOWED": windowed}
        kinds = {"scale": "fp32", "cap": "fp32", "part_out": "*fp32", "part_lse": "*fp32", "row_slots": "*i64"}
        kinds |= dict.fromkeys(("query", "keys", "values", "out", "new_keys", "new_values"), f"*{dtype}")
        kinds |= dict.fromkeys(("segments", "segment_slots", "depths", "own_slots", "lengths"), "*i32")
        most = 128 if size <= 128 else 32
        for kernel, options in (
            (kernels._segment_part, kernels.SEGMENT.options(32, size)),
            (kernels._segment_part, kernels.SEGMENT.options(most, size)),
            (kernels._own_part, kernels.OWN.options(16, size)),
        ):
            launched = {name: options[name] for name in ("num_warps", "num_stages")}
            compile_for_an_h100(kernel, constants | {name: options[name] for name in ("M", "N")}, kinds, launched)


def main(device: str) -> None:
    from vlmrl.models.attention.decode_kernels import attend_by_kernels

    for case in CASES:
        tables, paths = tables_of(case)
        inputs = inputs_of(case)
        wanted = one_softmax(case, *inputs, paths)
        query, key, value = (each.to(device) for each in inputs)
        moved: dict[str, Any] = {n: x.to(device) for n, x in vars(tables).items() if isinstance(x, Tensor)}
        tables = replace(tables, **moved)
        for laid_out in (query, query.transpose(0, 1).clone().transpose(0, 1), query.mT.clone().mT):
            newest = torch.tensor([path[-1] for path in paths], device=device)
            pool = key.clone(), value.clone()
            new = key[:, newest], value[:, newest].mT.contiguous().mT
            for each in pool:
                each[:, newest] = float("nan")  # not written yet
            plan = DecodeRows(tables, case.window)
            found = attend_by_kernels(laid_out, new, pool, newest, plan, case.scale, case.softcap)
            assert worst(found.cpu(), wanted) < (CLOSE if device == "cpu" else 5 * CLOSE), case.name
            for each, written in zip(pool, (key, value), strict=True):
                assert each[:, newest].equal(written[:, newest])


if __name__ == "__main__":
    choose(sys.argv[1], compiled=compile_all, on_device=main)
