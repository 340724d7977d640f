"""benchmarks/families.py: a cell is `ok` only where everything behind it holds; what it would miss is planted here."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.command_line import REPOSITORY, Home

REFUSED = "error: trainer.seq_len=8 is too short: raise it\n"


@pytest.fixture
def row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The row of a text model, of which nothing has run."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    made = importlib.import_module("family_cells").Row("qwen3", Home(tmp_path), 10.0)
    made.checkpoint = tmp_path
    return made


@pytest.fixture
def answers(row: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`answers(code, err, **files)`: every command ends like that and leaves these files."""
    ended = importlib.import_module("family_runs").Ended

    def prepare(code: int | None, err: str = "", **files: list[dict[str, Any]]) -> None:
        def vlmrl(*words: str) -> Any:
            folder = next(word.partition("=")[2] for word in words if word.startswith("hydra.run.dir="))
            (row.folder / folder).mkdir(exist_ok=True)
            if "checks" in files:
                content = json.dumps({"checks": files["checks"], "settings": {"renderer": "template"}})
                (row.folder / folder / "doctor.json").write_text(content)
            for name in ("metrics", "supervised"):
                lines = files.get(f"{name}_of_{folder}", files.get(name, ()))
                (row.folder / folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            return ended(" ".join(words), code, "", err, 1.0)

        monkeypatch.setattr(row.commands, "vlmrl", vlmrl)
        monkeypatch.setattr(row.commands, "torchrun", vlmrl)

    return prepare


def check(name: str, verdict: str, **figures: float) -> dict[str, Any]:
    return {"name": name, "verdict": verdict, "says": "what it found", "bound": "", "figures": figures}


def step(kl: float = 1e-12, norm: float = 1.0) -> dict[str, Any]:
    return {"step": 1, "mismatch_kl/mean": kl, "grad_norm": norm, "tokens/packed": 5, "tokens/unpacked": 10}


SOUND = [check("pixels", "ok"), check("logprobs, version 0", "ok", mismatch_kl=1e-12, max_delta=1e-6)]


def states(row: Any, *columns: str) -> list[str]:
    return [cell.state.value for cell in row.cells(columns)]


def test_a_certificate_is_one_verdict(row: Any, answers: Callable[..., None]) -> None:
    answers(0, checks=SOUND)
    assert states(row, "renderer", "embedded", "mismatch") == ["ok"] * 3


def test_one_failed_line_is_a_failed_certificate(row: Any, answers: Callable[..., None]) -> None:
    answers(1, "error: 1 of 2 lines failed\n", checks=[check("pixels", "FAILED"), SOUND[1]])
    (cell,) = row.cells(["embedded"])
    assert (cell.state, cell.says) == ("failed", "pixels: what it found")


def test_a_large_mismatch_fails(row: Any, answers: Callable[..., None]) -> None:
    answers(0, checks=[check("logprobs, version 1", "ok", mismatch_kl=1e-7, max_delta=1e-3)])
    assert states(row, "mismatch") == ["failed"]


@pytest.mark.parametrize(
    ("code", "err", "state"),
    [
        (2, REFUSED, "refused"),
        (1, "error: vLLM is causal here: set inference=embedded, or use a GPU\n", "refused"),
        (1, "error: the server died\n", "failed"),
        (1, "Traceback (most recent call last):\nValueError: inference=embedded\n", "failed"),
        (None, "", "failed"),
    ],
)
def test_a_command_that_ends_early(
    row: Any, answers: Callable[..., None], code: int | None, err: str, state: str
) -> None:
    answers(code, err)
    columns = ("renderer", "embedded", "mismatch", "packing", "resume", "export", "lora", "fsdp2")
    assert states(row, *columns) == [state] * len(columns)


@pytest.mark.parametrize(("line", "state"), [(step(), "ok"), (step(kl=1e-7), "failed"), (step(norm=0.0), "failed")])
def test_steps_have_a_gradient_and_the_engines_logprobs(
    row: Any, answers: Callable[..., None], line: dict[str, Any], state: str
) -> None:
    answers(0, checks=SOUND, metrics=[step(), line | {"step": 2}])
    assert states(row, "packing", "lora") == [state] * 2


@pytest.mark.parametrize(("norm", "state"), [(2.00001, "ok"), (2.001, "failed")])
def test_ranks_take_the_step_of_one_process(row: Any, answers: Callable[..., None], norm: float, state: str) -> None:
    alone = [{"step": 1, "loss": 1.0, "grad_norm": 2.0}]
    answers(0, supervised_of_alone=alone, supervised_of_sharded=[{"step": 1, "loss": 1.0, "grad_norm": norm}])
    assert states(row, "fsdp2") == [state]


def test_a_cell_whose_own_code_fails_does_not_end_the_row(row: Any, answers: Callable[..., None]) -> None:
    answers(0)
    first, second = row.cells(["lora", "image_tokens"])
    assert first.state == "failed"
    assert second.state == "ok"
