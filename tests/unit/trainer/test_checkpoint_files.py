"""A checkpoint that was edited, with hashes made anew, is refused in words, and the one before it is taken."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.checkpoints import (
    FILES,
    MODEL,
    OPTIMIZER,
    Learner,
    hash_again,
    refuse_warning,
    rewrite,
    save,
    saved,
)
from vlmrl.errors import CheckpointError
from vlmrl.trainer.checkpoint import Checkpoints
from vlmrl.trainer.loop_state import LoopState
from vlmrl.trainer.training_state import RANDOM

Harm = Callable[[Path], object]


def holds(name: str, content: str, encoding: str = "latin-1") -> Harm:
    return lambda folder: (folder / name).write_text(content, encoding)


def has(name: str, **values: Any) -> Harm:
    return lambda folder: rewrite(folder, name, lambda content: content | values)


def lacks(name: str, key: str) -> Harm:
    return lambda folder: rewrite(folder, name, lambda content: {k: v for k, v in content.items() if k != key})


def tensors(name: str, change: Callable[[dict[str, Tensor]], object]) -> Harm:
    """Change tensors of a file and keep what its header says about slices, for the tensors that are left."""

    def harm(folder: Path) -> None:
        found = load_file(folder / name)
        change(found)
        slices = {key: {"saved_offsets": [0] * tensor.dim()} for key, tensor in found.items()}
        save_file(found, folder / name, {"DCP_SHARDING_INFO": json.dumps(slices)})

    return harm


def header(name: str, slices: object) -> Harm:
    return lambda folder: save_file(
        load_file(folder / name),
        folder / name,
        {"DCP_SHARDING_INFO": slices if isinstance(slices, str) else json.dumps(slices)},
    )


def put(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda found: found.__setitem__(key, value)


def drop(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda found: found.pop(key)


def fifo(name: str) -> Harm:
    def harm(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return harm


def cut(name: str) -> Harm:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1])


DEEP = "[" * 100_000 + "]" * 100_000
NAN = float("nan")
EDITED: dict[str, tuple[Harm, str]] = {
    **{
        f"{name} {what}": (holds(name, content), name)
        for name in ("state.json", "loop.json")
        for what, content in {
            "is junk": "\xff\x00{",
            "is deep": DEEP,
            "is a list": "[]",
            "is a number": "7",
            "is null": "null",
            "is empty": "",
            "has no key": "{}",
        }.items()
    },
    "version is a text": (has("state.json", version="1"), "version is no number of steps"),
    "version is negative": (has("state.json", version=-1), "version is no number of steps"),
    "version is a fraction": (has("state.json", version=0.5), "version is no number of steps"),
    "version is true": (has("state.json", version=True), "version is no number of steps"),
    "version is huge": (has("state.json", version=10**40), "version is no number of steps"),
    "version is missing": (lacks("state.json", "version"), "version is no number of steps"),
    "names are a text": (has("state.json", trainable="weight"), "trainable is no list of names"),
    "names are numbers": (has("state.json", trainable=[1]), "trainable is no list of names"),
    "names are fewer": (has("state.json", trainable=["bias"]), "were frozen there are trainable here (weight)"),
    "names are more": (has("state.json", trainable=["bias", "weight", "x"]), "trainable there are frozen here (x)"),
    "evaluations are a text": (has("loop.json", evaluations="12"), "evaluations is no list of pairs"),
    "evaluations are single": (has("loop.json", evaluations=[[1.0]]), "evaluations is no list of pairs"),
    "evaluations are texts": (has("loop.json", evaluations=[["a", "b"]]), "evaluations is no list of pairs"),
    "evaluations are huge": (has("loop.json", evaluations=[[10**400, 0]]), "evaluations is no list of pairs"),
    "cursor is negative": (has("loop.json", cursor=-1), "cursor=-1 is no index of a problem"),
    "cursor is a text": (has("loop.json", cursor="8"), "cursor=8 is no index of a problem"),
    "cursor has no index": (has("loop.json", cursor={"unlearned": []}), "is no index of a problem"),
    "cursor is behind what is unlearned": (has("loop.json", cursor={"index": 4, "unlearned": [[2, 9]]}), "is no index"),
    "ranges of a cursor overlap": (has("loop.json", cursor={"index": 9, "unlearned": [[2, 5], [4, 6]]}), "is no index"),
    "a range of a cursor is none": (has("loop.json", cursor={"index": 9, "unlearned": [[2], 3]}), "is no index"),
    "cursor is a list": (has("loop.json", warmup_cursor=[8]), "warmup_cursor=[8] is no index"),
    "tensors are junk": (holds(MODEL, "\xff" * 100), MODEL),
    "tensors are empty": (holds(MODEL, ""), MODEL),
    "header is cut": (cut(MODEL), MODEL),
    "header is deep": (holds(MODEL, len(DEEP).to_bytes(8, "little").decode("latin-1") + DEEP), MODEL),
    "slices are junk": (header(MODEL, "{"), MODEL),
    "slices are deep": (header(MODEL, DEEP), MODEL),
    "slices are a list": (header(MODEL, [1]), "does not say where the slice of"),
    "slices are missing": (header(MODEL, {"weight": {"saved_offsets": [0, 0]}}), "where the slice of bias begins"),
    "slices begin nowhere": (header(MODEL, {"weight": {}, "bias": {}}), "does not say where the slice of"),
    "slices begin before 0": (
        header(MODEL, {"weight": {"saved_offsets": [-1, 0]}, "bias": {"saved_offsets": [0]}}),
        "where the slice of weight begins",
    ),
    "slices begin far away": (
        header(MODEL, {"weight": {"saved_offsets": [2**61, 0]}, "bias": {"saved_offsets": [0]}}),
        "slices of weight are missing",
    ),
    "an extra weight": (tensors(MODEL, put("more", torch.zeros(2))), "it has ['more'], which this model has not"),
    "a weight less": (tensors(MODEL, drop("bias")), "lacks ['bias']"),
    "an extra average": (tensors(OPTIMIZER, put("pace/bias", torch.zeros(2))), "'pace'"),
    "an average of no weight": (tensors(OPTIMIZER, put("step/more", torch.zeros(1))), "['step'] of more"),
    "an average less": (tensors(OPTIMIZER, drop("exp_avg/bias")), "['exp_avg_sq', 'step'] of bias"),
    "no random state": (tensors(OPTIMIZER, drop(RANDOM)), f"{RANDOM} is missing"),
    "a short random state": (tensors(OPTIMIZER, put(RANDOM, torch.zeros(9, dtype=torch.uint8))), RANDOM),
    "random state of another dtype": (tensors(OPTIMIZER, put(RANDOM, torch.zeros(5056))), "F32 instead of U8"),
    "a random state of zeros": (tensors(OPTIMIZER, put(RANDOM, torch.zeros(5056, dtype=torch.uint8))), RANDOM),
    "another shape": (tensors(MODEL, put("bias", torch.zeros(3))), "bias has shape (3,) there and (2,) here"),
    "another rank": (tensors(MODEL, put("bias", torch.zeros(2, 1))), "bias has shape (2, 1) there and (2,) here"),
    "an average of another shape": (tensors(OPTIMIZER, put("exp_avg/bias", torch.zeros(3))), "exp_avg/bias has shape"),
    "whole numbers": (tensors(MODEL, put("bias", torch.zeros(2, dtype=torch.int64))), "bias is I64 instead of F32"),
    "half of the bits": (tensors(MODEL, put("bias", torch.zeros(2, dtype=torch.bfloat16))), "is BF16 instead of F32"),
    "NaN in a weight": (tensors(MODEL, put("bias", torch.tensor([0.0, NAN]))), "bias holds values that are not finite"),
    "infinity in a weight": (tensors(MODEL, put("bias", torch.tensor([0.0, math.inf]))), "bias holds values"),
    "NaN in an average": (tensors(OPTIMIZER, put("exp_avg/bias", torch.tensor([NAN, 0.0]))), "exp_avg/bias holds"),
    "a negative square": (tensors(OPTIMIZER, put("exp_avg_sq/bias", torch.tensor([-1.0, 0]))), "exp_avg_sq/bias holds"),
    "NaN in a counter": (tensors(OPTIMIZER, put("step/bias", torch.tensor([NAN]))), "step/bias holds"),
}
"""What an editor may do to a checkpoint, whose hashes are then made anew, and a part of the message."""


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two saved")
    saved(folder, 1, 2)
    return folder


@pytest.fixture
def two(two_saved: Path, tmp_path: Path) -> Checkpoints:
    """Checkpoints of steps 1 and 2 in `tmp_path`."""
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    return Checkpoints(tmp_path, 9)


@pytest.mark.parametrize("what", EDITED)
def test_an_edited_one_is_passed_over(what: str, two: Checkpoints, tmp_path: Path) -> None:
    harm, message = EDITED[what]
    expected = Learner()
    expected.load(str(tmp_path / "step_000001"))
    harm(tmp_path / "step_000002")
    hash_again(tmp_path / "step_000002")
    learner, warnings = Learner(), list[str]()
    assert two.load_newest(learner, warnings.append) == (1, LoopState(((0.25, 1),)))
    assert all(map(torch.equal, learner.weights(), expected.weights()))
    assert len(warnings) == 1
    assert message in warnings[0]
    assert "step_000002" in warnings[0]
    shutil.rmtree(tmp_path / "step_000001")
    with pytest.raises(CheckpointError, match=r"Put back .* from a copy, or start a new run"):
        two.load_newest(learner, refuse_warning)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (holds("sha256.json", "{}"), "sha256.json has no hash of loop.json"),
        (holds("sha256.json", DEEP), "sha256.json"),
        (holds("sha256.json", "[]"), "holds no JSON object"),
        (holds("sha256.json", '{"state.json": 1, "loop.json": {}}'), "has no hash of"),
        (lambda folder: rewrite_hashes(folder, {"../step_000001/state.json": "0"}), "is missing"),
        (lambda folder: rewrite_hashes(folder, {"state.json": None}), "state.json is damaged"),
        (lambda folder: shutil.copy(folder / MODEL, folder / "shard-00003.safetensors"), "has no hash of shard-00003"),
        *((fifo(name), f"{name} is no regular file") for name in FILES),
    ],
)
@pytest.mark.timeout(30)
def test_hashes_that_do_not_vouch_for_every_file(harm: Harm, message: str, two: Checkpoints, tmp_path: Path) -> None:
    warnings = list[str]()
    harm(tmp_path / "step_000002")
    assert two.load_newest(Learner(), warnings.append) is not None
    assert message in warnings[0]


def rewrite_hashes(folder: Path, values: dict[str, Any]) -> None:
    recorded = json.loads((folder / "sha256.json").read_text())
    (folder / "sha256.json").write_text(json.dumps(recorded | values))


def test_names_that_are_no_checkpoint(tmp_path: Path) -> None:
    """Folders and files that only look like a checkpoint are neither read nor deleted."""
    checkpoints = saved(tmp_path, 1, 2, keep=2)
    odd = ["step_²", "step_٢", "step_", "step_x", "step_-00003", "step_3", "step_0000003", "step_000003.bak", "stept"]
    for name in odd:
        (tmp_path / name).mkdir()
    (tmp_path / "step_000009").write_text("a file")
    assert checkpoints.steps() == [1, 2]
    save(checkpoints, 3, Learner(), LoopState())
    assert checkpoints.steps() == [2, 3]
    assert {path.name for path in tmp_path.iterdir()} == {*odd, "step_000002", "step_000003", "step_000009"}
