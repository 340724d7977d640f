"""The document of a page: exact numbers, each prompt once, the run's own pixels, no secrets."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from support.report_runs import IMAGE_TOKEN, noise, one_rollout, one_turn, ordinary_rollout, record
from vlmrl.config.run import RunConfig
from vlmrl.errors import ConfigError
from vlmrl.monitor.report import document as document_module
from vlmrl.monitor.report.document import document
from vlmrl.monitor.report.pictures import encode
from vlmrl.record.rollouts import RolloutRecord, read_rollouts
from vlmrl.record.run_dir import RunDir
from vlmrl.types import DropReason, StopReason

IMAGES = [noise(i, 8, 6 + i) for i in range(3)]


@pytest.fixture
def config(run_config: Callable[..., RunConfig]) -> RunConfig:
    return run_config(
        "orchestrator.groups_per_step=2",
        "orchestrator.group_size=4",
        "orchestrator.eval.problems=3",
        "orchestrator.eval.every=2",
    )


def small_run(path: Path, config: RunConfig, steps: int = 3, **kwargs: Any) -> RunDir:
    trained = [
        (step, [ordinary_rollout("train", step, group, index, IMAGES) for group in range(2) for index in range(4)])
        for step in range(1, steps + 1)
    ]
    evaluated = [
        (
            step,
            [ordinary_rollout("eval", step, problem, 0, IMAGES) for problem in range(3)],
            [ordinary_rollout("eval-greedy", step, problem, 0, IMAGES) for problem in range(3)],
        )
        for step in range(2, steps + 1, 2)
    ]
    return record(path, config, trained, evaluated, **kwargs)


def unpacked(text: str, dtype: str) -> Any:
    return np.frombuffer(base64.b64decode(text), dtype)


def assert_shown_as_recorded(run: dict[str, Any], shown: dict[str, Any], recorded: RolloutRecord) -> None:
    assert (shown["id"], shown["reward"], shown["stop"]) == (
        recorded["rollout_id"],
        recorded["reward"],
        recorded["stop_reason"],
    )
    columns = {
        name: unpacked(text, "<i4" if name in ("ids", "versions") else "<f4") for name, text in run["tokens"].items()
    }
    prompts = unpacked(run["prompt_ids"], "<i4")
    whole: list[int] = []
    for turn, wanted in zip(shown["turns"], recorded["turns"], strict=True):
        part = slice(turn["at"], turn["at"] + turn["count"])
        assert columns["ids"][part].tolist() == wanted["completion_ids"]
        assert columns["versions"][part].tolist() == wanted["versions"]
        assert columns["engine"][part].tobytes() == np.array(wanted["logprobs"], "<f4").tobytes()
        for name, key in (("trainer", "trainer_logprobs"), ("entropy", "entropies")):
            values = wanted[key]  # type: ignore[literal-required]
            assert np.array_equal(
                columns[name][part], [np.nan] * turn["count"] if values is None else np.array(values, "<f4"), True
            )
        assert turn["learned"] == (wanted["trainer_logprobs"] is not None)
        prompt = run["prompts"][turn["prompt"]]
        tail = prompts[prompt["at"] : prompt["at"] + prompt["count"]].tolist()
        whole = whole[: turn["offset"]] + tail
        assert whole == wanted["prompt_token_ids"]
        assert [tuple(place) for place in prompt["placeholders"]] == [
            place for place in wanted["placeholders"] if place[0] >= turn["offset"]
        ]
        whole += wanted["completion_ids"]


def test_every_rollout_of_a_short_run_is_there_exactly(tmp_path: Path, config: RunConfig) -> None:
    run_dir = small_run(tmp_path / "run", config)
    (run,) = document({"run": run_dir}, {})["runs"]
    recorded = [each for path in sorted(run_dir.rollouts.iterdir()) for each in read_rollouts(path)]
    assert len(run["rollouts"]) == len(recorded) == 3 * 8 + 6
    by_id = {shown["id"]: shown for shown in run["rollouts"]}
    for each in recorded:
        assert_shown_as_recorded(run, by_id[each["rollout_id"]], each)
    assert run["recorded"] == {"steps": 3, "evaluations": 1, "rollouts": 30, "shown": 30, "deleted": None}
    assert run["spellings"] == {
        str(id): "<|image_pad|>" if id == IMAGE_TOKEN else chr(id) for id in map(int, run["spellings"])
    }


def test_values_of_reward_terms_are_there(tmp_path: Path, config: RunConfig) -> None:
    scored = ordinary_rollout("train", 1, 0, 0, IMAGES)
    scored.rewards, scored.reference = {"exact": 0.5, "format": None}, "7"
    (run,) = document({"run": record(tmp_path / "run", config, [(1, [scored])], [])}, {})["runs"]
    (shown,) = run["rollouts"]
    assert (shown["rewards"], shown["reference"]) == ({"exact": 0.5, "format": None}, "7")


def test_siblings_share_their_prompt(tmp_path: Path, config: RunConfig) -> None:
    (run,) = document({"run": small_run(tmp_path / "run", config)}, {})["runs"]
    openings = {shown["turns"][0]["prompt"] for shown in run["rollouts"]}
    assert len(openings) == 3, "three different images are in the first prompts"
    assert len(run["messages"]) == 3


def test_a_long_run_is_sampled_and_the_page_knows_it(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_module, "MAX_ROLLOUTS", 40)
    (run,) = document({"run": small_run(tmp_path / "run", config, steps=20)}, {})["runs"]
    assert run["recorded"]["rollouts"] == 20 * 8 + 10 * 6
    assert 36 <= run["recorded"]["shown"] <= 48
    trained = [shown for shown in run["rollouts"] if shown["split"] == "train"]
    sizes = {shown["group"]: 0 for shown in trained}
    for shown in trained:
        sizes[shown["group"]] += 1
    assert set(sizes.values()) == {4}, "whole groups"


@pytest.mark.parametrize("limit", ["MAX_TOKENS", "MAX_IMAGE_BYTES"])
def test_long_or_heavy_rollouts_are_fewer(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    run_dir = small_run(tmp_path / "run", config, steps=10)
    whole = document({"run": run_dir}, {})
    size = {
        "MAX_TOKENS": len(unpacked(whole["runs"][0]["tokens"]["ids"], "<i4")),
        "MAX_IMAGE_BYTES": sum(len(image["src"]) for image in whole["images"].values()),
    }
    monkeypatch.setattr(document_module, limit, size[limit] // 2)
    assert document({"run": run_dir}, {})["runs"][0]["recorded"]["shown"] < whole["runs"][0]["recorded"]["shown"]


def test_images_are_the_files(tmp_path: Path, config: RunConfig) -> None:
    run_dir = small_run(tmp_path / "run", config)
    images = document({"run": run_dir}, {})["images"]
    assert set(images) == {image.hash for image in IMAGES}
    for image in IMAGES:
        shown = images[image.hash]
        kind, _, data = shown["src"].partition(",")
        assert kind == "data:image/png;base64"
        with PIL.Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert np.array_equal(np.asarray(picture), image.pixels)
        assert (shown["height"], shown["width"], shown["whole"]) == (*image.pixels.shape[:2], True)


def test_a_large_image_is_shown_smaller(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (700, 1400, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "large.png")
    shown = encode(tmp_path / "large.png")
    assert (shown["width"], shown["height"], shown["whole"]) == (1400, 700, False)
    kind, _, data = shown["src"].partition(",")
    with PIL.Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert picture.size == (512, 256)
    assert kind == "data:image/jpeg;base64"


def test_a_lost_image_and_a_rollout_without_turns(tmp_path: Path, config: RunConfig) -> None:
    turn = one_turn("ab", IMAGES[0], step=1, reward=1.0, advantage=1.0)
    broken = one_rollout("train", 1, 1, 0, [], stop=StopReason.IMAGE_ERROR, dropped=DropReason.FAULT, error="no PNG")
    run_dir = record(tmp_path / "run", config, [(1, [one_rollout("train", 1, 0, 0, [turn]), broken])])
    run_dir.image(IMAGES[0].hash).unlink()
    content = document({"run": run_dir}, {})
    assert content["images"] == {}
    (shown,) = [each for each in content["runs"][0]["rollouts"] if not each["turns"]]
    assert (shown["stop"], shown["dropped"], shown["error"]) == ("image_error", "fault", "no PNG")


def test_a_dropped_rollout_of_a_step_that_is_not_sampled_is_shown_with_its_group(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_module, "MAX_ROLLOUTS", 16)
    steps = []
    for step in range(1, 31):
        rollouts = [ordinary_rollout("train", step, group, index, IMAGES) for group in range(2) for index in range(4)]
        if step == 17:
            rollouts[6].dropped = DropReason.STALE
        steps.append((step, rollouts))
    (run,) = document({"run": record(tmp_path / "run", config, steps)}, {})["runs"]
    group = [shown for shown in run["rollouts"] if shown["group"] == "train/000017/01"]
    assert [shown["dropped"] for shown in group] == [None, None, "stale", None]


def test_a_run_that_was_killed_or_still_runs(tmp_path: Path, config: RunConfig) -> None:
    run_dir = small_run(tmp_path / "run", config)
    run_dir.metrics.write_bytes(run_dir.metrics.read_bytes() + b'{"step":4,"rew')
    run_dir.tokens.write_bytes(run_dir.tokens.read_bytes() + b'{"id":4')
    (run_dir.rollouts / ".step_000004.parquet.tmp").write_bytes(b'{"roll')
    (run,) = document({"run": run_dir}, {})["runs"]
    assert run["state"] is None
    assert run["metrics"]["step"] == [1, 2, 3]
    assert len(run["rollouts"]) == 30


def test_a_run_that_has_just_begun(tmp_path: Path, config: RunConfig) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.create()
    config.output_dir = str(run_dir.path)
    run_dir.write_config(config)
    (run,) = document({"run": run_dir}, {})["runs"]
    assert (run["metrics"], run["rollouts"]) == ({}, [])


def test_runs_side_by_side_show_the_same_steps_and_problems(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_module, "MAX_ROLLOUTS", 60)
    long = small_run(tmp_path / "long", config, steps=20)
    short = small_run(tmp_path / "short", replace(config, seed=1), steps=12)
    content = document({"long": long, "short": short}, {})
    ids = [{shown["id"] for shown in run["rollouts"]} for run in content["runs"]]
    assert ids[0] == ids[1]
    assert len(ids[0]) >= 24
    assert [run["config"]["seed"] for run in content["runs"]] == [0, 1]


def test_neither_the_environment_nor_a_secret_is_in_it(
    tmp_path: Path, run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "key-of-the-environment")
    config: Any = run_config("task=imported", "task.target=a.b:C", "++task.args.level=3", "inference=vllm")
    config.task.args["api_key"] = "key-of-the-task"  # such a config is refused, but an older run may have it
    config.inference.urls = ["https://me:key-of-the-url@127.0.0.1:1"]
    run_dir = record(tmp_path / "run", config, [])
    content = document({"run": run_dir}, {})
    said = str(content)
    assert "key-of" not in said
    assert content["runs"][0]["config"]["task.args.level"] == 3
    assert content["runs"][0]["config"]["inference.urls"] == ["https://(hidden)@127.0.0.1:1"]


@pytest.mark.parametrize("what", ["absent", "empty", "damaged", "other"])
def test_a_folder_without_a_run(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "run"
    if what != "absent":
        folder.mkdir()
    if what in ("damaged", "other"):
        (folder / "config.yaml").write_text("a: [" if what == "damaged" else "a: 1\n")
    with pytest.raises(ConfigError, match=r"run=.*/run holds no config\.yaml of a run"):
        document({"run": RunDir(folder)}, {})


def test_damage_costs_what_is_damaged(tmp_path: Path, config: RunConfig, caplog: pytest.LogCaptureFixture) -> None:
    """The page of a run shows everything else, and a warning names each damaged file."""
    run_dir = small_run(tmp_path / "run", config)
    whole = document({"run": run_dir}, {})["runs"][0]
    run_dir.rollouts_file("step", 2).write_bytes(run_dir.rollouts_file("step", 2).read_bytes()[:-99])
    (run_dir.rollouts / "step_x_y.parquet").write_text("{}\n")
    (run_dir.rollouts / "step_².parquet").write_text("{}\n")
    picture = min(run_dir.images.iterdir())
    picture.write_bytes(picture.read_bytes()[:20])
    run_dir.summary.write_bytes(b"")
    run_dir.doctor.write_bytes(b"[1]")
    run_dir.tokens.write_bytes(b"what?\n" + (run_dir.tokens.read_bytes() if run_dir.tokens.exists() else b""))
    run_dir.metrics.write_bytes(b"what?\n" + run_dir.metrics.read_bytes())
    damaged = document({"run": run_dir}, {})["runs"][0]
    assert damaged["metrics"] == whole["metrics"]
    assert damaged["spellings"] == whole["spellings"]
    trained = {each["step"] for each in damaged["rollouts"] if each["split"] == "train"}
    assert trained == {each["step"] for each in whole["rollouts"] if each["split"] == "train"} - {2}
    assert (damaged["summary"], damaged["doctor"]) == (None, None)
    for name in ("step_000002.parquet", picture.name, "summary.json", "doctor.json", "tokens.jsonl", "metrics.jsonl"):
        assert name in caplog.text


def test_what_the_run_deleted_itself_is_said(tmp_path: Path, config: RunConfig) -> None:
    run_dir = small_run(tmp_path / "run", config)
    assert document({"run": run_dir}, {})["runs"][0]["recorded"]["deleted"] is None
    run_dir.deleted_rollouts.write_text('{"max_rollouts_mib": 64, "step": 40, "eval": null}')
    said = document({"run": run_dir}, {})["runs"][0]["recorded"]["deleted"]
    assert said == "deleted the rollouts of the training steps up to 40, because monitor.max_rollouts_mib=64"
