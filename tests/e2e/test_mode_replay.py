"""mode=replay of a real run gives the same bits, and finds every change to the record where it was made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from support.command_line import Ended, Home, Scenarios
from support.rollout_files import edit
from vlmrl.inference.vllm.server import vllm_version
from vlmrl.record.rollouts import read_rollouts
from vlmrl.runs.replay.replay import COMPARISONS

pytestmark = pytest.mark.slow

STEP = 3
"""A step of the six-step run, whose checkpoints are of steps 2, 4 and 6."""

Outcome = tuple[Ended, dict[str, Any]]
"""The ended command, and replay.json with its lines by name."""

TamperWith = Callable[[list[dict[str, Any]]], None]
"""Changes the rows of a file of rollouts in place."""


def replay(home: Home, run: Path, *overrides: str, step: int = STEP) -> Outcome:
    ended = home.vlmrl("mode=replay", f"run={run}", f"step={step}", *overrides)
    content = json.loads((run / f"replay/step_{step:06d}/replay.json").read_bytes())
    assert [line["name"] for line in content["lines"]] == list(COMPARISONS)
    return ended, content | {line["name"]: line for line in content["lines"]}


def tampered(home: Home, run: Path, name: str, change: TamperWith) -> Outcome:
    """Change the batch in a copy of the run and replay it."""
    copy = home.copy(run, name)
    edit(copy / f"rollouts/step_{STEP:06d}.parquet", change)
    return replay(home, copy)


def another_completion_token(records: list[dict[str, Any]]) -> None:
    ids = records[5]["turns"][1]["completion_ids"]
    ids[1] = ids[1] + 1 if ids[1] < 200 else ids[1] - 1


def another_prompt_token(records: list[dict[str, Any]]) -> None:
    records[2]["turns"][1]["prompt_token_ids"][3] += 1


def another_logprob(records: list[dict[str, Any]]) -> None:
    records[6]["turns"][0]["trainer_logprobs"][2] -= 0.01


def another_picture(home: Home, run: Path) -> tuple[str, Outcome]:
    """Make one pixel of one image of the batch one shade brighter and replay it: (the image's hash, outcome)."""
    copy = home.copy(run, "another_picture")
    first, *_ = read_rollouts(copy / f"rollouts/step_{STEP:06d}.parquet")
    hash = first["turns"][1]["placeholders"][-1][2]
    with PIL.Image.open(copy / f"images/{hash}.png") as picture:
        pixels = np.array(picture)
    pixels[3, 5, 0] ^= 1
    PIL.Image.fromarray(pixels).save(copy / f"images/{hash}.png")
    return hash, replay(home, copy)


@pytest.fixture(scope="module")
def runs(home: Home, never_stopped: Path) -> Scenarios:
    run = home.copy(never_stopped, "replayed")
    return Scenarios(
        untouched=lambda: replay(home, run),
        first_step=lambda: replay(home, run, step=1),
        varlen=lambda: replay(home, home.copy(never_stopped, "replayed_varlen"), "trainer.packing=varlen"),
        bfloat16=lambda: replay(home, home.copy(never_stopped, "replayed_bfloat16"), "model.dtype=bfloat16"),
        completion=lambda: tampered(home, never_stopped, "another_completion", another_completion_token),
        prompt=lambda: tampered(home, never_stopped, "another_prompt", another_prompt_token),
        logprob=lambda: tampered(home, never_stopped, "another_logprob", another_logprob),
        picture=lambda: another_picture(home, never_stopped),
    )


def verdicts(content: dict[str, Any]) -> list[str]:
    return [line["verdict"] for line in content["lines"]]


def test_the_same_code_on_the_same_device_gives_the_same_bits(runs: Scenarios) -> None:
    ended, content = runs["untouched"]
    assert (ended.code, ended.err) == (0, "")
    assert content["identical"] is True
    assert content["first"] is None
    assert verdicts(content) == ["same"] * len(COMPARISONS)
    for name in ("logprobs, engine", "logprobs, trainer"):
        assert content[name]["figures"]["largest"] == 0
        assert content[name]["figures"]["tokens"] > 30
        assert content[name]["says"] in ended.out
    assert "the checkpoint of version 2" in ended.out


def test_the_weights_before_the_first_step_are_made_again(runs: Scenarios) -> None:
    """No checkpoint holds them; the model and its warm-up are repeated."""
    ended, content = runs["first_step"]
    assert (ended.code, ended.err) == (0, "")
    assert content["identical"] is True
    assert "version 0, made again: the model and 10 supervised steps" in ended.out


def test_another_packing_rounds_differently(runs: Scenarios) -> None:
    ended, content = runs["varlen"]
    assert (ended.code, ended.err) == (0, "")
    assert content["identical"] is False
    assert verdicts(content) == ["same"] * 5 + ["rounding"]
    assert 0 < content["logprobs, trainer"]["figures"]["largest"] < 1e-5


def test_another_dtype_rounds_more(runs: Scenarios) -> None:
    ended, content = runs["bfloat16"]
    assert (ended.code, ended.err) == (0, "")
    assert verdicts(content)[:3] == ["same"] * 3
    assert verdicts(content)[4:] == ["rounding"] * 2
    assert 1e-4 < content["logprobs, trainer"]["figures"]["mean"] < 0.1


def test_one_token_of_a_completion_is_found(runs: Scenarios) -> None:
    ended, content = runs["completion"]
    place = {"rollout_id": "train/000003/01/01", "turn": 1, "completion_token": 1}
    assert ended.code == 1
    assert "Traceback" not in ended.err
    assert content["first"]["name"] == "completions"
    assert content["completions"]["first"] == place
    assert content["completions"]["figures"] == {"differing": 1}
    assert content["logprobs, trainer"]["first"] == place, "the trainer sees the same change"
    assert ended.err.startswith("error: 2 of 6 lines failed, so today's code does not reproduce the recorded batch:\n")
    assert f"\n  completions: {content['completions']['says']}\n" in ended.err


def test_one_token_of_a_prompt_is_found(runs: Scenarios) -> None:
    ended, content = runs["prompt"]
    assert ended.code == 1
    assert content["first"]["name"] == "prompts"
    first = content["prompts"]["first"]
    assert (first["rollout_id"], first["turn"]) == ("train/000003/00/02", 1)
    assert content["prompts"]["figures"] == {"differing": 1}
    assert " was recorded, " in ended.err
    trainer = content["logprobs, trainer"]["first"]
    assert (trainer["rollout_id"], trainer["turn"]) == ("train/000003/00/02", 1)


def test_one_logprob_is_found(runs: Scenarios) -> None:
    ended, content = runs["logprob"]
    assert ended.code == 1
    assert verdicts(content) == ["same"] * 5 + ["DIFFERS"]
    line = content["logprobs, trainer"]
    assert line["first"] == {"rollout_id": "train/000003/01/02", "turn": 0, "completion_token": 2}
    assert line["figures"]["differing"] == 1
    assert line["figures"]["largest"] == pytest.approx(0.01, abs=1e-6)


def test_one_shade_of_one_pixel_is_found(runs: Scenarios) -> None:
    hash, (ended, content) = runs["picture"]
    assert ended.code == 1
    assert content["first"]["name"] == "pictures"
    assert content["pictures"]["first"]["image"] == hash
    assert content["pictures"]["figures"] == {"changed": 1}
    assert content["prompts"]["verdict"] == "same", "the tokens did not change"
    assert content["logprobs, trainer"]["verdict"] in ("rounding", "DIFFERS")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("step=4",), "step=4 was learned from by policy version 3, whose checkpoint is gone .* set step=1 or 3 or 5"),
        (("step=99",), "step=99 has no recorded batch .*step_000099.parquet is missing"),
        ((), "mode=replay needs run=<run folder> and step="),
        (("step=0",), "mode=replay needs run=<run folder> and step="),
        (("step=3", "task=imported"), "task=imported cannot be used in a replay, because the batch would not be"),
        (("step=3", "trainer.packin=tree"), "trainer.packin: there is no such key; did you mean trainer.packing"),
        (("step=3", "inference=vlm"), "inference=vlm: inference has only embedded, vllm"),
    ],
)
def test_what_cannot_be_replayed_is_refused(
    arguments: tuple[str, ...], message: str, never_stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    from vlmrl.cli.main import main

    assert main(["mode=replay", f"run={never_stopped}", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (never_stopped / "replay").exists()


@pytest.mark.vllm
@pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed")
def test_another_engine_answers_the_recorded_prompts(home: Home, never_stopped: Path) -> None:
    run = home.copy(never_stopped, "replayed_by_vllm")
    ended, content = replay(home, run, "inference=vllm", "weight_sync.verify=false")
    assert (ended.code, ended.err) == (0, "")
    assert verdicts(content) == ["same", "same", "same", "not visible", "rounding", "same"]
    assert 0 < content["logprobs, engine"]["figures"]["largest"] < 1e-4
