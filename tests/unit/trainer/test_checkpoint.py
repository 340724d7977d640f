"""Checkpoints: the next step after a load is the same, a save that ended early leaves none, and damage is found."""

from __future__ import annotations

import json
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from support.checkpoints import FILES, MODEL, OPTIMIZER, Learner, refuse_warning, rewrite, save, saved
from vlmrl.errors import CheckpointError, NonFiniteLossError, VlmrlError
from vlmrl.trainer.checkpoint import Checkpoints
from vlmrl.trainer.checkpoint_files import stored_tensors
from vlmrl.trainer.loop_state import Best, Cursor, LoopState

# ── what comes back ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_next_step(tmp_path: Path) -> None:
    torch.manual_seed(1)
    learner, checkpoints = Learner(), Checkpoints(tmp_path / "made by save", 1)
    learner.train_step([])
    save(checkpoints, 1, learner, LoopState(((0.5, 0.25),)))
    learner.train_step([])

    torch.manual_seed(2)
    other = Learner()
    assert checkpoints.load_newest(other, refuse_warning) == (1, LoopState(((0.5, 0.25),)))
    assert other.version == 1
    other.train_step([])
    assert all(map(torch.equal, learner.weights(), other.weights()))


def test_before_the_first_step(tmp_path: Path) -> None:
    """Before its first step AdamW has no averages to save."""
    checkpoints, learner = Checkpoints(tmp_path, 1), Learner()
    save(checkpoints, 0, learner, LoopState())
    other = Learner()
    assert checkpoints.load_newest(other, refuse_warning) == (0, LoopState())
    assert all(map(torch.equal, learner.weights(), other.weights()))


def test_a_parameter_that_had_no_gradient_yet(tmp_path: Path) -> None:
    """It has no averages in the checkpoint. Later it gets them, and a step counter that starts at 1, as in a run that
    was never stopped."""
    torch.manual_seed(1)
    learner, checkpoints = Learner(sees_images=False), Checkpoints(tmp_path, 1)
    for _ in range(3):
        learner.train_step([])
    save(checkpoints, 3, learner, LoopState())
    assert not any(name.endswith("/bias") for name in stored_tensors(tmp_path / "step_000003"))
    other = Learner(sees_images=False)
    assert checkpoints.load_newest(other, refuse_warning) is not None
    assert list(other.optimizer.state) == [other.model.weight]
    for sees_images in (False, True, True):
        random = torch.get_rng_state()
        learner.sees_images = other.sees_images = sees_images
        learner.train_step([])
        torch.set_rng_state(random)
        other.train_step([])
    assert all(map(torch.equal, learner.weights(), other.weights()))
    steps = [float(each.optimizer.state[each.model.bias]["step"]) for each in (learner, other)]
    assert steps == [2.0, 2.0]


def test_an_older_one_that_lists_no_names(tmp_path: Path) -> None:
    """Versions before listed nothing, so what has averages must be trainable here, and the rest may be."""
    learner, checkpoints = Learner(sees_images=False), Checkpoints(tmp_path, 1)
    learner.train_step([])
    save(checkpoints, 1, learner, LoopState())
    rewrite(tmp_path / "step_000001", "state.json", lambda content: {"version": content["version"]})
    other = Learner()
    assert checkpoints.load_newest(other, refuse_warning) is not None
    assert all(map(torch.equal, learner.weights(), other.weights()))
    with pytest.raises(CheckpointError, match=r"1 parameters that were trainable there are frozen here \(weight\)"):
        checkpoints.load_newest(Learner(frozen=True), refuse_warning)


def test_optimizer_settings_are_the_configs(tmp_path: Path) -> None:
    """A resumed run may change them, so loading a checkpoint does not restore the old ones."""
    checkpoints = saved(tmp_path, 1)
    other = Learner(betas=(0.5, 0.6))
    checkpoints.load_newest(other, refuse_warning)
    assert other.optimizer.param_groups[0]["betas"] == (0.5, 0.6)
    assert set(other.optimizer.state[other.model.weight]) == {"step", "exp_avg", "exp_avg_sq"}


def test_none_at_all(tmp_path: Path) -> None:
    (tmp_path / "partial_000001").mkdir()
    assert Checkpoints(tmp_path, 1).load_newest(Learner(), refuse_warning) is None
    assert Checkpoints(tmp_path / "absent", 1).steps() == []


def test_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000003", "step_000004"]
    save(checkpoints, 1_234_567, Learner(), LoopState())
    assert checkpoints.steps() == [4, 1_234_567]


def test_the_same_step_again(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    save(checkpoints, 2, Learner(), LoopState(cursor=Cursor(9, ((2, 4),))))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000002"]
    assert checkpoints.load_newest(Learner(), refuse_warning) == (2, LoopState(cursor=Cursor(9, ((2, 4),))))


# ── damage ──────────────────────────────────────────────────────────────────────────────────────────────────


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [truncate, empty, flip, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_one_is_passed_over(harm: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    expected = Learner()
    expected.load(str(tmp_path / "step_000001"))
    harm(tmp_path / "step_000002" / name)
    learner, warnings = Learner(), list[str]()
    assert checkpoints.load_newest(learner, warnings.append) == (1, LoopState(((0.25, 1),)))
    assert all(map(torch.equal, learner.weights(), expected.weights()))
    assert len(warnings) == 1
    assert "step_000002" in warnings[0]
    assert warnings[0].endswith("continuing from step 1 instead")


def test_files_are_all_there_are(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    assert sorted(path.name for path in (tmp_path / "step_000001").iterdir()) == sorted(FILES)


def test_one_that_was_asked_for_is_not_replaced_by_another(tmp_path: Path) -> None:
    """A replay needs the weights of one step and no other."""
    checkpoints = saved(tmp_path, 1, 2)
    flip(tmp_path / f"step_000002/{MODEL}")
    with pytest.raises(CheckpointError, match=r"is damaged .*put .*step_000002 back from a copy, or choose another"):
        checkpoints.load(2, Learner())


def test_all_damaged(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1, 2)
    flip(tmp_path / f"step_000001/{OPTIMIZER}")
    (tmp_path / "step_000002/state.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load_newest(Learner(), refuse_warning)
    assert f"{tmp_path}/step_000001/{OPTIMIZER} is damaged" in str(caught.value)
    assert f"{tmp_path}/step_000002 is not a complete checkpoint" in str(caught.value)
    assert "state.json" in str(caught.value)


def test_leftovers_of_any_kind_are_removed(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path / "checkpoints", 1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints/partial_000001").write_text("a file")
    (tmp_path / "checkpoints/partial_000002").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "checkpoints/partial_000003_deleted").mkdir()
    save(checkpoints, 2, Learner(), LoopState())
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_000001", "step_000002"}
    assert (tmp_path / "elsewhere").is_dir()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Learner(inputs=4), r"weight has shape \(2, 3\) there and \(2, 4\) here"),
        (Learner(frozen=True), r"1 parameters that were trainable there are frozen here \(weight\)"),
    ],
)
def test_of_another_model(other: Learner, message: str, tmp_path: Path) -> None:
    checkpoints, before = saved(tmp_path, 1), other.weights()
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load_newest(other, refuse_warning)
    assert all(map(torch.equal, other.weights(), before)), "nothing was changed"


def test_of_another_architecture(tmp_path: Path) -> None:
    checkpoints, other = saved(tmp_path, 1), Learner()
    other.model = torch.nn.Sequential(torch.nn.Linear(3, 2))  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"has \['bias', 'weight'\], .* lacks \['0.bias', '0.weight'\]"):
        checkpoints.load_newest(other, refuse_warning)


# ── ended while saving ──────────────────────────────────────────────────────────────────────────────────────


class Killed(BaseException):
    """Stands in for SIGKILL: no cleanup runs, so only what was on the disk before remains."""


class Killer:
    """Ends a save before its n-th file operation. An audit hook cannot be removed, so all tests share one."""

    def __init__(self) -> None:
        self.left = -1
        self.seen: list[str] = []
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[1] not in ("r", "rb", None)
        if self.left < 0 or not (writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")):
            return
        self.seen.append(event)
        self.left -= 1
        if self.left < 0:
            raise Killed

    @contextmanager
    def after(self, operations: int) -> Iterator[None]:
        self.left, self.seen = operations, []
        try:
            yield
        finally:
            self.left = -1


KILLER = Killer()


@pytest.mark.parametrize("step", [2, 3], ids=["the same step again", "a later step"])
def test_killed_at_any_moment(step: int, tmp_path: Path) -> None:
    """The newest complete checkpoint loads without a warning, and the next save removes what the killed one left."""
    for operations in range(100):
        folder = tmp_path / str(operations)
        checkpoints = saved(folder, 1, 2, keep=2)
        learner = Learner()
        try:
            with KILLER.after(operations):
                save(checkpoints, step, learner, LoopState(cursor=Cursor(9, ((2, 4),))))
        except (Killed, CheckpointError):  # torch's writer wraps what it catches
            found = checkpoints.load_newest(Learner(), refuse_warning)
            assert found is not None
            assert found in [
                (1, LoopState(((0.25, 1),))),
                (2, LoopState(((0.25, 2),))),
                (step, LoopState(cursor=Cursor(9, ((2, 4),)))),
            ]
            assert found[0] >= step - 1, "only the checkpoint that was being written is lost"
            save(checkpoints, 4, learner, LoopState())
            assert sorted(path.name[:5] for path in folder.iterdir()) == ["step_", "step_"]
        else:
            break
    assert {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"} <= set(KILLER.seen)
    assert operations > 10


def test_killed_after_the_last_checkpoint_was_complete(tmp_path: Path) -> None:
    """A run that was killed at its end has nothing left to save when it continues; `tidy` finishes what was begun."""
    best, ended = Best("reward/mean", 1, 0.5), 0
    for operations in range(100):
        folder = tmp_path / str(operations)
        checkpoints = saved(folder, 1, 2, 3, keep=2)
        try:
            with KILLER.after(operations):
                save(checkpoints, 4, Learner(), LoopState(best=Best("reward/mean", 4, 0.75)))
        except (Killed, CheckpointError):
            if 4 in checkpoints.steps():
                ended += 1
                checkpoints.tidy(4, Best("reward/mean", 4, 0.75))
                assert checkpoints.steps() == [3, 4]
                assert sorted(path.name for path in folder.iterdir()) == ["best.json", "step_000003", "step_000004"]
                assert json.loads((folder / "best.json").read_bytes())["step"] == 4
            else:
                checkpoints.tidy(3, None)
                assert sorted(path.name for path in folder.iterdir()) == ["step_000002", "step_000003"]
        else:
            break
    assert ended >= 3, "before best.json, and before, amid and after an old one is deleted"
    kept = saved(tmp_path / "kept", 1, 2, 3, 4, keep=4)
    Checkpoints(tmp_path / "kept", 1).tidy(2, best)
    assert kept.steps() == [1, 2, 4], "the best one, the one that the run continues from, the newest"


def checked(checkpoints: Checkpoints) -> None:
    """Check as the loop does after each step, until the writing has ended."""
    while True:
        checkpoints.check()


@pytest.mark.parametrize("limit", [200, 2000], ids=["the model's file", "the optimizer's"])
@pytest.mark.parametrize("told", [checked, Checkpoints.finish])
def test_a_full_disk(told: Callable[[Checkpoints], None], limit: int, tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        checkpoints.save(2, Learner(), LoopState())
        with pytest.raises(CheckpointError, match=r"step_000002 cannot be written.*File too large"):
            told(checkpoints)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    checkpoints.finish()  # the error is raised only once
    found = checkpoints.load_newest(Learner(), refuse_warning)
    assert found is not None
    assert found[0] == 1
    save(checkpoints, 2, Learner(), LoopState())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001", "step_000002"]


def test_complete_only_once_the_run_has_recorded_its_steps(tmp_path: Path) -> None:
    checkpoints, reached, recorded = saved(tmp_path, 1, keep=1), threading.Event(), threading.Event()

    def wait_for_it() -> None:
        reached.set()
        assert recorded.wait(60)

    checkpoints.save(2, Learner(), LoopState(), wait_for_it)
    assert reached.wait(60)
    assert checkpoints.steps() == [1]
    recorded.set()
    checkpoints.finish()
    assert checkpoints.steps() == [2]


def test_not_complete_where_the_run_cannot_record_its_steps(tmp_path: Path) -> None:
    checkpoints, error = saved(tmp_path, 1, keep=1), VlmrlError("step_000002.parquet cannot be written")

    def fail() -> None:
        raise error

    checkpoints.save(2, Learner(), LoopState(), fail)
    with pytest.raises(VlmrlError) as caught:
        checkpoints.finish()
    assert caught.value is error
    assert checkpoints.steps() == [1]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """Such a checkpoint would replace the last one from which the run can be resumed."""
    checkpoints, learner = saved(tmp_path, 1, keep=1), Learner()
    with torch.no_grad():
        learner.model.weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteLossError, match=r"^weight holds values that are not finite"):
        save(checkpoints, 2, learner, LoopState())
    assert checkpoints.load_newest(Learner(), refuse_warning) == (1, LoopState(((0.25, 1),)))


def test_what_is_written_is_what_was_there_when_it_was_saved(tmp_path: Path) -> None:
    """The next steps change the weights while the checkpoint is being written."""
    checkpoints, learner = Checkpoints(tmp_path, 1), Learner()
    learner.train_step([])
    before = learner.weights()
    checkpoints.save(1, learner, LoopState())
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.fill_(7.0)
        for state in learner.optimizer.state.values():
            state["exp_avg"].fill_(7.0)
    checkpoints.finish()
    other = Learner()
    checkpoints.load_newest(other, refuse_warning)
    assert all(map(torch.equal, other.weights(), before))
    assert all(float(state["exp_avg"].abs().max()) < 7 for state in other.optimizer.state.values())


def test_json_is_plain(tmp_path: Path) -> None:
    """A user can read state.json in an editor."""
    saved(tmp_path, 1)
    assert json.loads((tmp_path / "step_000001/state.json").read_text()) == {
        "version": 1,
        "trainable": ["bias", "weight"],
    }
