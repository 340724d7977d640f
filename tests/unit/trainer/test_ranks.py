"""The number of ranks and the sharding do not change what is learned, nor who can load a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from support import TESTS, learning
from support.checkpoints import hash_again
from support.learning import CASES
from support.ranks import ended, start
from vlmrl.config.trainer import Sharding
from vlmrl.trainer.checkpoint_files import stored_tensors
from vlmrl.trainer.training_state import load_weights

EXACT = [
    name for name, case in CASES.items() if not ("float16" in name or "bits" in name or case.lora or case.text_first)
]
BY_FOUR = (
    *("whole", "one by one", "frozen", "tower alone, last pass of text", "referred", "text", "replicated"),
    *("kept whole", "kept whole one by one", "kept whole, last pass of text", "critic, kept whole", "epochs"),
)
"""Cases of four ranks, which differ from two in how a batch is divided and in nothing else."""
SIZES = [(2, case) for case in EXACT] + [(4, case) for case in BY_FOUR]
TEXT_FIRST = ("text first", "text first, replicated", "text first, kept whole")

Found = dict[str, NDArray[np.float64]]


def by_ranks(size: int, folder: Path, out: Path, *cases: str) -> dict[str, Found]:
    """Run `cases` on `size` ranks → what rank 0 found, per case."""
    out.mkdir(exist_ok=True)
    script = str(TESTS / "support/learning.py")
    for rank, each in enumerate(ended(start(size, [script, str(folder), str(out), *cases]))):
        assert each.code == 0, f"rank {rank}: {each.err}"
    return {case: dict(np.load(out / f"{case}.npz")) for case in (name.partition("@")[0] for name in cases)}


@pytest.fixture(scope="module")
def alone(tiny_folder: Path) -> Callable[[str], Found]:
    """`alone(case)`: what a single process finds."""
    known: dict[str, Found] = {}

    def find(case: str) -> Found:
        if case not in known:
            known[case] = learning.steps(learning.learner(str(tiny_folder), case, None), case)
        return known[case]

    return find


def assert_same(found: Found, wanted: Found, tolerance: float) -> None:
    """Assert equality up to rounding, except for metrics that depend on how the batch was divided."""
    divided = ("tokens/packed", "images/encoded", "images/cached", "images/cache_bytes", "micro_batches", "memory/")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if not key.partition("/")[2].startswith((*divided, learning.COLLECTIVES)):
            scale = np.abs(value).max() if value.size else 0.0
            error = np.abs(found[key] - value).max() / max(scale, 1e-2)
            assert error <= tolerance, f"{key} is off by {error} of {scale}"


@pytest.fixture(scope="module")
def ranks(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Found]]:
    """`ranks(2)`: what two ranks find, per case."""

    @cache
    def find(size: int) -> dict[str, Found]:
        cases = [case for each, case in SIZES if each == size]
        return by_ranks(size, tiny_folder, tmp_path_factory.mktemp("ranks"), *cases)

    return find


@pytest.mark.parametrize(("size", "case"), SIZES)
def test_ranks_learn_what_one_process_learns(
    size: int, case: str, ranks: Callable[[int], dict[str, Found]], alone: Callable[[str], Found]
) -> None:
    """Some micro-batches of some ranks are fillers, and some have no image."""
    found, wanted = ranks(size)[case], alone(case)
    assert_same(found, wanted, tolerance=1e-5)
    assert found["2/micro_batches"] >= wanted["2/micro_batches"]
    assert CASES[case].target_kl is None or 1 < wanted["2/optimizer_steps"] < 4, "it ends too early, or not at all"


@pytest.mark.parametrize(
    ("size", "case"),
    [
        (size, name)
        for size, name in SIZES
        if CASES[name].sharding is Sharding.optimizer and CASES[name].epochs == 1 and not CASES[name].critic
    ],
)
def test_what_is_kept_whole_is_gathered_once_a_step_and_reduced_once(
    size: int, case: str, ranks: Callable[[int], dict[str, Found]]
) -> None:
    found = ranks(size)[case]
    for step in (1, 2):
        gathered, reduced = found[f"{step}/collectives"]
        assert 0 < gathered <= found["units"]
        assert 0 < reduced <= gathered, "gradients of frozen weights are not reduced"
    if case in ("kept whole", "kept whole one by one", "kept whole, last pass of text"):
        assert gathered == reduced == found["units"]
    assert min(ranks(size)["one by one"]["2/collectives"]) > 2 * found["units"], (
        "with sharding=full each micro-batch gathers and reduces"
    )


def test_ranks_learn_adapters(tiny_folder: Path, tmp_path: Path, alone: Callable[[str], Found]) -> None:
    pytest.importorskip("peft")
    case, everywhere = "kept whole, adapters", "adapters everywhere"
    ranks = by_ranks(2, tiny_folder, tmp_path, case, everywhere)
    found = ranks[case]
    assert_same(found, alone(case), tolerance=1e-5)
    assert_same(ranks[everywhere], alone(everywhere), tolerance=1e-5)
    assert_same(alone(f"{everywhere}, one by one"), alone(everywhere), tolerance=1e-5)
    gathered, reduced = found["2/collectives"]
    assert 0 < reduced <= gathered <= found["units"]


def test_master_weights_are_float32(tiny_folder: Path) -> None:
    """Steps that bfloat16 would round to nothing add up in float32."""
    trainer = learning.learner(str(tiny_folder), "replicated bfloat16", None)
    before = {name: weight.detach().clone() for name, weight in trainer.weights().items()}
    for _ in range(12):
        trainer.supervised_step(learning.demonstrations(), lr=3e-5)
    moved = [name for name, weight in trainer.weights().items() if not torch.equal(weight, before[name])]
    assert {weight.dtype for weight in trainer.weights().values()} == {torch.bfloat16}
    assert any("layers.0.mlp" in name for name in moved)


def test_ranks_in_bfloat16(tiny_folder: Path, tmp_path: Path, alone: Callable[[str], Found]) -> None:
    for case, found in by_ranks(
        2, tiny_folder, tmp_path, "bfloat16", "replicated bfloat16", "kept whole in bfloat16"
    ).items():
        assert_same(found, alone(case), tolerance=2e-2)


def test_ranks_in_float16(tiny_folder: Path, tmp_path: Path, alone: Callable[[str], Found]) -> None:
    """float16 is eight times closer to float32 than bfloat16, and the loss scale is divided out of the gradient."""
    for case, found in by_ranks(
        2, tiny_folder, tmp_path, "float16", "replicated float16", "kept whole in float16"
    ).items():
        assert_same(found, alone(case), tolerance=3e-3)
    exact = {
        key: value for key, value in alone("small").items() if "grad_norm" in key or "loss" in key.partition("/")[2]
    }
    half = alone("float16")
    for key in exact.keys() - {"1/loss_scale", "2/loss_scale"}:
        np.testing.assert_allclose(half[key], exact[key], rtol=3e-3, atol=1e-4)
    assert half["2/loss_scale"] == 2**16


# ── checkpoints ─────────────────────────────────────────────────────────────────────────────────────────────


def test_any_number_of_ranks_goes_on_where_another_number_stopped(tiny_folder: Path, tmp_path: Path) -> None:
    by_one, by_two = str(tmp_path / "by one"), str(tmp_path / "by two")

    def one_process(case: str, checkpoints: str) -> Found:
        return learning.continued(learning.learner(str(tiny_folder), case, None), case, checkpoints)

    wanted = one_process("small", by_one)
    two = by_ranks(2, tiny_folder, tmp_path / "2", f"whole@{by_one}", f"small@{by_two}")
    assert_same(two["whole"], wanted, tolerance=1e-5)
    assert_same(two["small"], wanted, tolerance=1e-5)
    four = by_ranks(4, tiny_folder, tmp_path / "4", f"replicated@{by_two}", f"small@{by_two}", f"kept whole@{by_two}")
    assert_same(four["replicated"], wanted, tolerance=1e-5)
    assert_same(four["small"], wanted, tolerance=1e-5)
    assert_same(four["kept whole"], wanted, tolerance=1e-5)
    assert_same(one_process("one by one", by_two), wanted, tolerance=1e-5)
    by_slices = str(tmp_path / "by slices")
    kept = by_ranks(2, tiny_folder, tmp_path / "kept", f"kept whole@{by_slices}")["kept whole"]
    assert_same(kept, wanted, tolerance=1e-5)
    again = by_ranks(2, tiny_folder, tmp_path / "again", f"small@{by_slices}", f"whole@{by_slices}")
    assert_same(again["small"], wanted, tolerance=1e-5)
    assert_same(again["whole"], wanted, tolerance=1e-5)
    slices = {path.name[:11] for path in (tmp_path / "by two/step_000001").glob("*.safetensors")}
    assert slices == {"shard-00001", "shard-00002"}


def test_a_checkpoint_in_bfloat16_holds_the_float32_weights(tiny_folder: Path, tmp_path: Path) -> None:
    wanted = learning.continued(learning.learner(str(tiny_folder), "bfloat16", None), "bfloat16", str(tmp_path))
    again = learning.continued(learning.learner(str(tiny_folder), "bfloat16", None), "bfloat16", str(tmp_path))
    assert_same(again, wanted, tolerance=0.0)


def test_a_tower_that_had_no_gradient_before_the_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    """Where no image was seen yet, the optimizer has no averages of the vision tower. Its first gradient after the load
    does what it does in a run that was never stopped, whatever each rank holds and whoever wrote the checkpoint."""
    by_one = tmp_path / "one"

    def one_process(case: str, checkpoints: Path) -> Found:
        return learning.continued(learning.learner(str(tiny_folder), case, None), case, str(checkpoints))

    never_stopped = one_process("text first", by_one)
    assert not any("visual" in name for name in stored_tensors(by_one / "step_000001") if "/" in name)
    assert_same(one_process("text first", by_one), never_stopped, tolerance=0.0)
    written = [f"{case}@{tmp_path / case}" for case in TEXT_FIRST]
    two = by_ranks(2, tiny_folder, tmp_path / "2", *written)
    of_one = ("small", "replicated", "kept whole")
    again = by_ranks(2, tiny_folder, tmp_path / "again", *written, *(f"{case}@{by_one}" for case in of_one))
    for case in TEXT_FIRST:
        assert not any("visual" in name for name in stored_tensors(tmp_path / case / "step_000001") if "/" in name)
        assert_same(two[case], never_stopped, tolerance=1e-5)
        assert_same(again[case], two[case], tolerance=0.0)
        assert_same(one_process(case, tmp_path / case), never_stopped, tolerance=1e-5)
    for case in of_one:
        assert_same(again[case], never_stopped, tolerance=1e-5)


def test_any_number_of_ranks_goes_on_with_the_reference(tiny_folder: Path, tmp_path: Path) -> None:
    by_one, by_two = str(tmp_path / "by one"), str(tmp_path / "by two")

    def one_process(checkpoints: str) -> Found:
        return learning.continued(learning.learner(str(tiny_folder), "referred", None), "referred", checkpoints)

    never_stopped = one_process(by_one)
    assert never_stopped["2/reference_kl/mean"] > 1e-4
    assert_same(one_process(by_one), never_stopped, tolerance=0.0)
    pairs = learning.continued(learning.learner(str(tiny_folder), "pairs", None), "pairs", str(tmp_path / "pairs"))
    assert pairs["2/dpo/margin"] > 1e-4
    two = by_ranks(
        *(2, tiny_folder, tmp_path / "2"),
        *(f"referred@{by_one}", f"referred, kept whole@{by_two}", f"pairs@{tmp_path / 'pairs'}"),
    )
    assert_same(two["pairs"], pairs, tolerance=1e-5)
    assert_same(two["referred"], never_stopped, tolerance=1e-5)
    assert_same(two["referred, kept whole"], never_stopped, tolerance=1e-5)
    assert_same(one_process(by_two), never_stopped, tolerance=1e-5)
    averages = []
    for folder in (by_one, by_two):
        model = learning.parts(str(tiny_folder), "referred")[0].model
        load_weights(Path(folder) / "step_000001", dict(model.named_parameters()), averaged=True)
        averages.append(dict(model.named_parameters()))
    for name, average in averages[0].items():
        torch.testing.assert_close(averages[1][name], average, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["text first, in bfloat16", "text first, adapters"])
def test_a_tower_without_gradient_in_one_process(case: str, tiny_folder: Path, tmp_path: Path) -> None:
    if CASES[case].lora:
        pytest.importorskip("peft")
    never_stopped, again = (
        learning.continued(learning.learner(str(tiny_folder), case, None), case, str(tmp_path)) for _ in range(2)
    )
    assert_same(again, never_stopped, tolerance=0.0)


def test_what_one_rank_cannot_load_no_rank_loads(tiny_folder: Path, tmp_path: Path) -> None:
    """The newest checkpoint has a NaN in the slice of rank 1 alone. All ranks go on from the one before it."""
    folder = tmp_path / "saved"
    wanted = by_ranks(2, tiny_folder, tmp_path / "2", f"small@{folder}")["small"]
    shutil.copytree(folder / "step_000001", folder / "step_000002")
    path = folder / "step_000002/shard-00002-model-00001-of-00002.safetensors"
    with safe_open(str(path), framework="pt") as file:
        slices, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path, slices)
    hash_again(folder / "step_000002")
    found = by_ranks(2, tiny_folder, tmp_path / "again", f"small@{folder}")["small"]
    assert_same(found, wanted, tolerance=0.0)


@pytest.mark.slow
def test_the_optimizer_in_8_bits(tiny_folder: Path, tmp_path: Path) -> None:
    """torchao's optimizer is compiled; it works on slices and resumes from a checkpoint."""
    pytest.importorskip("torchao")
    wanted = learning.continued(learning.learner(str(tiny_folder), "8 bits", None), "8 bits", str(tmp_path / "saved"))
    ranks = by_ranks(2, tiny_folder, tmp_path, f"8 bits@{tmp_path / 'saved'}")["8 bits"]
    assert_same(ranks, wanted, tolerance=1e-2)
    case, folder = "text first, 8 bits", tmp_path / "text first"
    never_stopped = learning.continued(learning.learner(str(tiny_folder), case, None), case, str(folder))
    assert not any("visual" in name for name in stored_tensors(folder / "step_000001") if "/" in name)
    again = learning.continued(learning.learner(str(tiny_folder), case, None), case, str(folder))
    assert_same(again, never_stopped, tolerance=1e-3)
    two = by_ranks(2, tiny_folder, tmp_path, f"{case}@{tmp_path / 'of two'}")[case]
    assert_same(by_ranks(2, tiny_folder, tmp_path, f"{case}@{tmp_path / 'of two'}")[case], two, tolerance=1e-3)
