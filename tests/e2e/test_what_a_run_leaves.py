"""The run directory of a short run, file by file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import yaml

from support.command_line import KEYS, Ended, keys_found, steady_rollouts, summary
from support.configs import checked
from vlmrl.config.parse import typed
from vlmrl.config.run import RunConfig
from vlmrl.record.metrics import read_metrics
from vlmrl.record.run_dir import RunDir
from vlmrl.record.step_keys import STEP_KEYS, missing_keys, step_key
from vlmrl.types import StopReason

pytestmark = pytest.mark.slow

STEPS = range(1, 7)
EVALUATED = (0, 2, 4, 6)


def picture(path: Path) -> PIL.Image.Image:
    with PIL.Image.open(path) as file:
        return file.convert("RGB")


def test_the_folder(never_stopped: Path) -> None:
    assert {path.name for path in never_stopped.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "supervised.jsonl", "rollouts", "images", "checkpoints", "logs", "wandb"),
        *("tokens.jsonl", "report.html", "summary.json"),
    }
    assert (never_stopped.parent / "latest").resolve() == never_stopped
    assert not list(never_stopped.rglob("*.tmp"))


def test_config_yaml(never_stopped: Path) -> None:
    tree = yaml.safe_load((never_stopped / "config.yaml").read_text())
    environment = tree.pop("environment")
    assert set(environment["packages"]) == {"vlmrl", "torch", "transformers", "renderers", "hydra-core", "numpy"}
    assert environment["git"] is None or len(environment["git"]["commit"]) == 40
    assert tree["inference"]["max_model_len"] == tree["trainer"]["seq_len"], "interpolations are resolved"
    config = checked(typed(RunDir(never_stopped).read_config()))
    assert isinstance(config, RunConfig)
    assert config.trainer.max_steps == 6
    assert config.output_dir == str(never_stopped)


def test_metrics_have_every_required_key(never_stopped: Path) -> None:
    lines = read_metrics(never_stopped / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, *STEPS]
    for line in lines:
        assert missing_keys(line) == []
        assert ("eval/reward" in line) == (line["step"] in EVALUATED)
        assert all(value is not None for value in line.values())


def test_metrics_have_the_keys_that_are_listed_and_no_others(never_stopped: Path) -> None:
    written = {key for line in read_metrics(never_stopped / "metrics.jsonl") for key in line}
    assert {key for key in written if step_key(key) is None} == set()
    unwritten = STEP_KEYS.keys() - {step_key(key) for key in written}
    vllm = {f"inference/{name}" for name in ("requests", "retries", "restarts", "timeouts")}
    vllm |= {f"wire/{name}" for name in ("bytes_saved", "images_sent", "images_forgotten")}
    importance = {f"importance/{name}" for name in ("cut_fraction", "weight_mean", "ess")}
    filters = {"rollouts/filtered/<filter>", "rollouts/dropped/<reason>"}
    replayed = {"rollouts/replayed", "eval/rollouts/replayed"}
    of_others: tuple[str, ...] = (
        "by_task/",
        "eval/by_task/",
        "data/",
        "curriculum/",
        "refill/",
        "reward/<term>",
        "eval/reward/<term>",
    )
    of_others += ("eval/<set>/", "eval/demonstration_loss", "credit/same_state", "history_cut_rate")
    of_others += ("tools/", "eval/tools/", "endpoint/", "tokens/unlearnable", "tokens/client_sampled")
    of_others += ("reference_kl/", "time/reference", "overlong/", "vision_advantage/", "time/vision_advantage")
    of_others += ("last_epoch/", "optimizer_steps", "epochs", "policy_kl/", "distill/", "support/")
    of_others += ("dpo/", "eval/dpo/")
    of_others += ("value/", "time/values")
    of_others += ("mismatch_kl/after_update", "compile/given_up")
    of_others += ("videos/", "vision_gap/order", "vision_gap/first_frame")
    others = {key for key in unwritten if key.startswith(of_others)}
    assert unwritten - filters - others == vllm | importance | replayed, "this run has no servers and no correction"
    assert {"reward/mean", "eval/reward"} <= written


def test_sampler_and_trainer_agree(never_stopped: Path) -> None:
    for line in read_metrics(never_stopped / "metrics.jsonl")[1:]:
        assert 0 < line["mismatch_kl/mean"] <= 1e-8
        assert line["mismatch_kl/max"] <= 1e-6
        assert line["policy_version"] == line["step"]
        assert line["staleness/max"] == 0
        assert line["wire/bytes_sent"] == 0


def test_the_run_learned_something(never_stopped: Path) -> None:
    """Gradients at every step, answers that end, second turns: otherwise equality with a resumed run means little."""
    for line in read_metrics(never_stopped / "metrics.jsonl")[1:]:
        assert line["grad_norm"] > 0
        assert line["rollouts/stop/terminated"] > 0
    losses = [line["loss"] for line in read_metrics(never_stopped / "supervised.jsonl")]
    assert len(losses) == 10
    assert losses[-1] < 0.6 * losses[0]


def test_every_rollout_is_there(never_stopped: Path) -> None:
    files = steady_rollouts(never_stopped)
    assert set(files) == {f"step_{s:06d}.parquet" for s in STEPS} | {f"eval_{s:06d}.parquet" for s in EVALUATED}
    lines = {line["step"]: line for line in read_metrics(never_stopped / "metrics.jsonl")}
    for step in STEPS:
        records = files[f"step_{step:06d}.parquet"]
        assert [record["rollout_id"] for record in records] == [
            f"train/{step:06d}/{group:02d}/{index:02d}" for group in range(2) for index in range(4)
        ]
        assert np.mean([record["reward"] for record in records]) == pytest.approx(lines[step]["reward/mean"])
        turns = [turn for record in records for turn in record["turns"]]
        assert sum(len(turn["completion_ids"]) for turn in turns) == lines[step]["tokens/completion"]
        assert sum(len(turn["prompt_token_ids"]) for turn in turns) == lines[step]["tokens/prompt"]
        assert {version for turn in turns for version in turn["versions"]} == {step - 1}
        assert (
            len({image for turn in turns for _, _, image, _ in turn["placeholders"]}) == lines[step]["images/distinct"]
        )
        assert {record["stop_reason"] for record in records} <= set(StopReason)
    for step in EVALUATED:
        records = files[f"eval_{step:06d}.parquet"]
        assert [record["split"] for record in records] == ["eval_sampled"] * 8 + ["eval_greedy"] * 8
        sampled = [record["reward"] for record in records if record["split"] == "eval_sampled"]
        assert np.mean(sampled) == lines[step]["eval/reward"]


def test_images_are_the_squares(never_stopped: Path) -> None:
    """Each distinct image is stored once, under the hash in the records."""
    shown = {
        image
        for records in steady_rollouts(never_stopped).values()
        for record in records
        for turn in record["turns"]
        for _, _, image, _ in turn["placeholders"]
    }
    pictures = {path.stem: picture(path) for path in (never_stopped / "images").iterdir()}
    assert set(pictures) == shown
    assert len({found.tobytes() for found in pictures.values()}) == len(pictures) == 9
    assert all(len(found.getcolors() or []) == 1 and found.size == (32, 32) for found in pictures.values())


def test_checkpoints(never_stopped: Path) -> None:
    assert sorted(path.name for path in (never_stopped / "checkpoints").iterdir()) == [
        "step_000002",
        "step_000004",
        "step_000006",
    ]
    loop = json.loads((never_stopped / "checkpoints/step_000004/loop.json").read_text())
    lines = read_metrics(never_stopped / "metrics.jsonl")
    history = [[line["eval/reward"], line["eval/reward_greedy"]] for line in lines if line["step"] in (0, 2, 4)]
    assert loop["evaluations"] == history


def test_summary(never_stopped: Path) -> None:
    lines = read_metrics(never_stopped / "metrics.jsonl")
    found = summary(never_stopped)
    assert found["exit_reason"] == "finished"
    assert found["step"] == found["policy_version"] == 6
    assert found["metrics"] == lines[-1]
    assert found["objective"] == found["eval/reward"] == lines[-1]["eval/reward"]
    assert found["warnings"] == []
    assert lines[-1]["time/elapsed"] <= found["wall_clock_s"]


def test_log_and_screen(finished: tuple[Path, Ended]) -> None:
    run, ended = finished
    log = (run / "logs/main.log").read_text()
    assert "plan: rollouts per step: 2 groups × 4 = 8" in log
    assert "finished: finished" in log
    assert "Traceback" not in log
    assert "rollouts per step   2 groups" in ended.out
    assert "evaluation after step 6 | sampled" in ended.out
    assert "\x1b" not in ended.out, "no terminal, no escape codes"
    assert ended.err == ""


def test_weights_and_biases_offline(never_stopped: Path) -> None:
    """One offline folder, whose file holds the metrics, with the images of some rollouts next to it."""
    offline = list((never_stopped / "wandb").glob("offline-run-*"))
    assert len(offline) == 1
    run_id = (never_stopped / "wandb/run_id").read_text()
    data = (offline[0] / f"run-{run_id}.wandb").read_bytes()
    assert b"mismatch_kl/mean" in data
    assert b"warmup/loss" in data
    tables = [json.loads(path.read_bytes()) for path in (offline[0] / "files/media/table/eval").iterdir()]
    assert len(tables) == len(EVALUATED)
    counts = [Counter(row[0] for row in table["data"]) for table in tables]
    assert sorted(count["trained on"] for count in counts) == [0, 2, 2, 2], "the first rollout of each group"
    assert all((count["sampled"], count["greedy"]) == (4, 4) for count in counts)
    staged = {path.read_bytes() for path in (never_stopped / "wandb/data/artifacts/staging").iterdir()}
    for checkpoint in (never_stopped / "checkpoints").iterdir():
        files = {path.read_bytes() for path in checkpoint.iterdir()}
        assert files <= staged, "every checkpoint waits for wandb sync, whole"


def test_no_key_is_written_anywhere(finished: tuple[Path, Ended]) -> None:
    """The environment of the run contained the API keys that it may use."""
    run, ended = finished
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"config.yaml", "main.log", "summary.json", "metrics.jsonl"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    assert keys_found(run) == set()
    assert not [name for name, key in KEYS.items() if key in ended.out + ended.err]
