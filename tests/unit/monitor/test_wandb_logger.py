"""The logger with the real wandb, offline."""

from __future__ import annotations

import importlib
import io
import json
import os
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import psutil
import pytest

import vlmrl
from support import TESTS
from support.rollout_builders import image, rollout
from vlmrl.config.monitor import WandbConfig, WandbMode
from vlmrl.monitor.loggers import GAP, MAX_HEIGHT, said, strip
from vlmrl.monitor.wandb_logger import COLUMNS, WandbLogger, settle_wandb
from vlmrl.record.run_dir import RunDir

ROOT = Path(vlmrl.__file__).parents[1]


def run_script(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    """Run `body` in a separate process, because wandb has global state and one service per process."""
    lines = f"""
    import signal, sys
    sys.path.insert(0, {str(TESTS)!r})
    from pathlib import Path
    from support.rollout_builders import rollout
    from vlmrl.config.monitor import WandbConfig, WandbMode
    from vlmrl.record.run_dir import RunDir
    from vlmrl.monitor.wandb_logger import WandbLogger
    run_dir = RunDir({str(tmp_path / "run")!r})
    run_dir.create(resume=True)
    """
    script = textwrap.dedent(lines) + textwrap.dedent(body)
    # A proxy on a closed port: every attempt to reach the network fails.
    env = {**os.environ, "HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
    env.pop("WANDB_MODE", None)
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=env
    )


def output_of(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def offline_records(run_dir: RunDir) -> Iterator[Any]:
    """The records of the offline runs: LevelDB's log format (32 KiB blocks; crc, length, type, data) of protobufs."""
    protobufs: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    for path in sorted(run_dir.wandb.glob("offline-run-*/*.wandb")):
        data, place, parts = path.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if 2**15 - place % 2**15 < 7:
                place += 2**15 - place % 2**15
                continue
            _, length, kind = struct.unpack_from("<IHB", data, place)
            parts += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # a complete record, or its last part
                record = protobufs.Record()
                record.ParseFromString(parts)
                parts = b""
                yield record


def histories(run_dir: RunDir) -> list[dict[str, Any]]:
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in offline_records(run_dir)
        if record.HasField("history")
    ]


def run_ids(run_dir: RunDir) -> set[str]:
    return {record.run.run_id for record in offline_records(run_dir) if record.HasField("run")}


LOG_TWO_STEPS = """
import shutil, sys, threading
from dataclasses import replace
from importlib.abc import MetaPathFinder

class Held(MetaPathFinder):  # the background thread imports wandb only when the logger has returned to its caller
    returned = threading.Event()
    def find_spec(self, name, path=None, target=None):
        if name == "wandb" and threading.current_thread() is not threading.main_thread():
            self.returned.wait(60)

sys.meta_path.insert(0, Held())
logger = WandbLogger(WandbConfig(rollouts=1, checkpoints=True, group="my_sweep"), run_dir, on_failure=print)
logger.start()
logger.log({"step": 1, "reward/mean": 0.25, "loss": None})
held_back = "wandb" in sys.modules
Held.returned.set()
logger.log({"warmup/step": 3, "warmup/loss": 1.5})
nothing = replace(rollout(2), turns=[])
logger.log_rollouts(1, {"trained on": [rollout(0)], "sampled": [rollout(0), rollout(1)], "greedy": [nothing]})
folder = run_dir.checkpoint(1)
folder.mkdir()
(folder / "model.safetensors").write_bytes(b"weights of step 1")
logger.log_checkpoint(1, folder)
shutil.rmtree(folder)
logger.finish(0)
import psutil
print("held back:", held_back, "children left:", psutil.Process().children(recursive=True))
"""


@pytest.fixture(scope="module")
def run_and_resume(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, list[str]]:
    """A run that is logged twice into the same folder, and the output of each process."""
    tmp_path = tmp_path_factory.mktemp("wandb")
    return RunDir(tmp_path / "run"), [output_of(run_script(tmp_path, LOG_TWO_STEPS)) for _ in range(2)]


def test_it_says_nothing_delays_nothing_and_leaves_no_process(run_and_resume: tuple[RunDir, list[str]]) -> None:
    """The caller does not even wait for the import of wandb."""
    _, outputs = run_and_resume
    assert outputs == ["held back: False children left: []\n"] * 2


def test_offline_leaves_figures_and_pictures(run_and_resume: tuple[RunDir, list[str]]) -> None:
    run_dir, _ = run_and_resume
    figures, warmup, logged = histories(run_dir)[:3]
    assert (figures["step"], figures["reward/mean"]) == (1, 0.25)
    assert "loss" not in figures
    assert (warmup["warmup/step"], warmup["warmup/loss"]) == (3, 1.5)
    assert logged["step"] == 1
    folder = min(run_dir.wandb.glob("offline-run-*"))
    (table,) = (json.loads(path.read_bytes()) for path in (folder / "files/media/table/eval").glob("*.table.json"))
    assert table["columns"] == list(COLUMNS)
    assert [row[0] for row in table["data"]] == ["trained on", "sampled", "greedy"]
    name, seen = "train/000001/00/00", "AB / AB"
    assert table["data"][0][:3] == ["trained on", name, "red-green"]
    assert table["data"][0][4:] == [seen, 0.75, "terminated", None]
    assert [row[3] for row in table["data"]] == ["Image", "Image", None], "the last rollout has no image"


def staged(run_dir: RunDir) -> list[bytes]:
    """The files that wait for `wandb sync`."""
    return [path.read_bytes() for path in (run_dir.wandb / "data/artifacts/staging").iterdir()]


def test_offline_keeps_pictures_and_checkpoints_in_the_run_folder(run_and_resume: tuple[RunDir, list[str]]) -> None:
    run_dir, _ = run_and_resume
    pictures = {content for content in staged(run_dir) if content.startswith(b"\x89PNG")}
    assert len(pictures) == 1, "the rollouts have the same image"
    with PIL.Image.open(io.BytesIO(pictures.pop())) as picture:
        assert picture.size == (3 * 8 + 2 * GAP, 8)
    assert b"weights of step 1" in staged(run_dir), "although the run has deleted them"
    logged = [r.artifact for r in offline_records(run_dir) if r.HasField("artifact")]
    logged += [r.request.log_artifact.artifact for r in offline_records(run_dir) if r.HasField("request")]
    models = [artifact for artifact in logged if artifact.type == "model"]
    assert {artifact.name for artifact in models} == {f"checkpoint-{run_dir.wandb_run_id.read_text()}"}
    assert {alias for artifact in models for alias in artifact.aliases} == {"latest", "step_000001"}
    tables = [json.loads(content) for content in staged(run_dir) if content.startswith(b'{"_type": "table"')]
    assert {row[3]["_type"] for table in tables for row in table["data"] if row[3]} == {"image-file"}


def test_the_runs_of_a_sweep_stand_together(run_and_resume: tuple[RunDir, list[str]]) -> None:
    run_dir, _ = run_and_resume
    groups = {record.run.run_group for record in offline_records(run_dir) if record.HasField("run")}
    assert groups == {"my_sweep"}


def test_a_resumed_run_keeps_its_id(run_and_resume: tuple[RunDir, list[str]]) -> None:
    run_dir, _ = run_and_resume
    assert len(list(run_dir.wandb.glob("offline-run-*"))) == 2
    assert run_ids(run_dir) == {run_dir.wandb_run_id.read_text()}


def test_a_killed_run_leaves_no_process_and_keeps_its_metrics(tmp_path: Path) -> None:
    process = run_script(
        tmp_path,
        """
        logger = WandbLogger(WandbConfig(), run_dir, on_failure=print)
        logger.start()
        logger.log({"step": 1, "reward/mean": 0.25})
        logger._collect(wait=True)
        print("logged", flush=True)
        signal.pause()
        """,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "logged\n"
    services = psutil.Process(process.pid).children(recursive=True)
    assert [service.name() for service in services] == ["wandb-core"]
    run_dir = RunDir(tmp_path / "run")
    until = time.monotonic() + 30
    while not histories(run_dir):  # written every FLUSH_EVERY_S seconds
        assert time.monotonic() < until
        time.sleep(0.05)
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(services, timeout=30)
    process.stdout.close()
    assert not alive
    assert gone
    assert [line["reward/mean"] for line in histories(run_dir)] == [0.25]


def test_online_without_a_key_is_reported_once_and_does_not_prompt(tmp_path: Path) -> None:
    output = output_of(
        run_script(
            tmp_path,
            """
            import os
            os.environ.update(HOME=str(run_dir.path), NETRC=str(run_dir.path / "none"), WANDB_API_KEY="")
            logger = WandbLogger(WandbConfig(mode=WandbMode.online), run_dir, on_failure=print)
            logger.start()
            for step in range(3):
                logger.log({"step": step})
                logger._collect(wait=True)
            logger.finish(0)
            """,
        )
    )
    assert output == (
        "Weights & Biases stopped logging, and the run goes on without it: monitor.wandb.mode=online has no API key, "
        "so nothing can be sent: run `wandb login`, set WANDB_API_KEY, or set monitor.wandb.mode=offline\n"
    )


def test_a_service_that_dies_is_reported_once(tmp_path: Path) -> None:
    output = output_of(
        run_script(
            tmp_path,
            """
            import psutil
            logger = WandbLogger(WandbConfig(), run_dir, on_failure=print)
            logger.start()
            logger.log({"step": 1})
            logger._collect(wait=True)
            (service,) = psutil.Process().children()
            service.kill()
            service.wait()
            for step in range(2, 200):
                logger.log({"step": step})
                logger._collect(wait=True)
            logger.finish(0)
            import os
            sys.stdout.flush()
            os._exit(0)  # skip wandb's exit hook, which would print a message
            """,
        )
    )
    assert output.startswith("Weights & Biases stopped logging, and the run goes on without it: ")
    assert output.count("\n") == 1


@pytest.mark.parametrize("mode", WandbMode)
@pytest.mark.parametrize("installed", [True, False])
def test_auto_logs_offline_where_wandb_is_installed(
    mode: WandbMode, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_spec(name: str) -> object:
        assert name == "wandb"
        return object() if installed else None

    monkeypatch.setattr("importlib.util.find_spec", find_spec)
    automatic = WandbMode.offline if installed else WandbMode.disabled
    expected = automatic if mode is WandbMode.auto else mode
    assert settle_wandb(WandbConfig(mode=mode, project="mine")) == WandbConfig(mode=expected, project="mine")


def test_auto_does_nothing_where_wandb_is_not_installed(tmp_path: Path) -> None:
    output = output_of(
        run_script(
            tmp_path,
            """
            import importlib.util
            importlib.util.find_spec = lambda name: None
            logger = WandbLogger(WandbConfig(), run_dir, on_failure=print)
            logger.start()
            logger.log({"step": 1})
            logger.finish(0)
            print("wandb" in sys.modules, run_dir.wandb.exists())
            """,
        )
    )
    assert output == "False False\n"


def test_disabled_does_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    logger = WandbLogger(WandbConfig(mode=WandbMode.disabled), RunDir(tmp_path), said.append)
    logger.start()
    logger.log({"step": 1})
    logger.log_rollouts(1, {"sampled": [rollout()]})
    logger.log_checkpoint(1, tmp_path)
    logger.finish(0)
    assert (said, list(tmp_path.iterdir())) == ([], [])


def test_a_wandb_folder_that_cannot_be_created_ends_only_the_logging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # restored afterwards
    (tmp_path / "wandb").touch()
    said: list[str] = []
    logger = WandbLogger(WandbConfig(), RunDir(tmp_path), said.append)
    logger.start()
    logger.finish(0)
    assert len(said) == 1
    assert "the run goes on without it" in said[0]


def test_a_strip_shows_images_side_by_side() -> None:
    picture = strip([image(10), image(20, size=4)])
    assert picture.shape == (8, 8 + GAP + 4, 3)
    assert np.unique(picture[:, :8]).tolist() == [10]
    assert np.unique(picture[:4, 8 + GAP :]).tolist() == [20]
    assert np.unique(picture[:, 8 : 8 + GAP]).tolist() == [255]


def test_large_images_are_scaled_down() -> None:
    assert strip([image(10, size=2 * MAX_HEIGHT)]).shape == (MAX_HEIGHT, MAX_HEIGHT, 3)


def test_what_was_said() -> None:
    assert said(rollout()) == "AB / AB"


def test_a_service_that_hangs_does_not_keep_the_run(tmp_path: Path) -> None:
    script = """
    import psutil
    from vlmrl.monitor import loggers
    loggers.FINISH_S = 1.0
    said = []
    logger = WandbLogger(WandbConfig(), run_dir, said.append)
    logger.start()
    logger.log({"step": 1, "reward/mean": 0.5})
    logger._collect(wait=True)
    (service,) = psutil.Process().children()
    service.suspend()
    logger.finish(0)
    service.wait(10)
    print(said)
    """
    assert "did not finish within 1 s, so its last metrics may be missing there" in output_of(
        run_script(tmp_path, script)
    )
