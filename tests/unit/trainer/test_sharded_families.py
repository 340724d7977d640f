"""Two ranks with sharded weights (FSDP2, gloo) learn what one process learns, for the families of the zoo.

One pair of processes goes over several cases, since starting it costs more than a case. One family of each kind is
tested always: windows and a tied embedding, a vision tower that runs once per size, tiles, recurrent layers with
experts, text only. The others are for a release.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

from support import TESTS
from support.families.learning import LEARNING, Folder, learning
from support.families.sharded import batch, step, trainer_of
from support.ranks import ended, start

ALWAYS = ["full=gemma3", "full=mistral3", "full=qwen3", "full=qwen3_5_moe", "frozen=smolvlm", "kept=mistral3"]
MORE = [f"full={name}" for name in LEARNING if f"full={name}" not in ALWAYS]
MORE += [f"frozen={name}" for name in ("gemma4", "mistral3", "qwen2_5_vl")]
MORE += [f"kept={name}" for name in ("gemma3", "llava_onevision", "qwen3", "qwen3_5_moe")]
ADAPTED = [f"adapted={name}" for name in ("gemma4", "glm4v", "qwen3_5", "qwen3_vl_moe")]

AT_ONCE = 8
"""Cases of one pair of processes."""

TOLERANCE = 1e-5
"""Of the largest value of a tensor, or of 0.01."""

AFTER_A_STEP = 1e-3
"""Of logprobs after the step. Rounding grows with the step: with another packing, those of a single process differ by
3e-4 for Gemma 4."""

Found = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def by_two(family_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Found]:
    """What two ranks find in a case."""

    @cache
    def find(cases: tuple[str, ...]) -> dict[str, Found]:
        out = tmp_path_factory.mktemp("ranks")
        named = [f"{kind}={family_folder(name)}" for kind, _, name in (case.partition("=") for case in cases)]
        for rank, each in enumerate(ended(start(2, [str(TESTS / "support/families/sharded.py"), str(out), *named]))):
            assert each.code == 0, f"rank {rank}: {each.err[-3000:]}"
        return {case: dict(np.load(out / f"{case.replace('=', ' ', 1)}.npz")) for case in cases}

    def found(case: str) -> Found:
        cases = next(cases for cases in (ALWAYS, MORE, ADAPTED) if case in cases)
        first = cases.index(case) // AT_ONCE * AT_ONCE
        return find(tuple(cases[first : first + AT_ONCE]))[case]

    return found


@pytest.mark.parametrize("case", [*ALWAYS, *(pytest.param(case, marks=pytest.mark.release) for case in MORE)])
def test_ranks_learn_what_one_process_learns(case: str, by_two: Callable[[str], Found], family_folder: Folder) -> None:
    assert_same(case, by_two, family_folder)


@pytest.mark.release
@pytest.mark.parametrize("case", ADAPTED)
def test_ranks_learn_adapters(case: str, by_two: Callable[[str], Found], family_folder: Folder) -> None:
    pytest.importorskip("peft")
    assert_same(case, by_two, family_folder)


def assert_same(case: str, by_two: Callable[[str], Found], family_folder: Folder) -> None:
    torch.set_num_threads(1)
    kind, _, name = case.partition("=")
    found, folder = by_two(case), family_folder(name)
    wanted = step(trainer_of(kind, str(folder), None), batch(learning(folder)))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        scale = max(float(np.abs(value).max()), 1e-2)
        error = float(np.abs(found[key] - value).max()) / scale
        assert error <= (AFTER_A_STEP if key == "logprobs" else TOLERANCE), f"{key} is off by {error} of {scale}"
