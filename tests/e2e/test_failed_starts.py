"""A part that fails before the run proper leaves nothing: no process, thread, open file, temporary folder or lock."""

from __future__ import annotations

import json

import pytest

from support.command_line import SHORT, Home

pytestmark = pytest.mark.slow

PLACES = (
    "vlmrl.record.metrics:MetricsLog.__init__",
    "vlmrl.record.in_place:Folders.__init__",
    "vlmrl.record.rollouts:RolloutRecorder.__init__",
    "vlmrl.monitor.progress:Progress.start",
    "vlmrl.runs.build:make_policy",
    "vlmrl.runs.build:make_engine",
    "vlmrl.inference.embedded.engine:EmbeddedEngine.start",
    "vlmrl.runs.lifecycle:restore",
    "vlmrl.weight_sync.in_process:InProcessSync.publish",
)

FAIL_AT = """
import contextlib, gc, importlib, io, json, logging, os, sys, tempfile, threading
import psutil
from vlmrl.cli.main import main
from vlmrl.errors import VlmrlError
from vlmrl.record.run_dir import RunDir

def planted(*arguments, **options):
    raise VlmrlError("planted")

def left():
    gc.collect()
    files = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if
             os.path.exists(f"/proc/self/fd/{name}")]
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "processes": [child.name() for child in psutil.Process().children(recursive=True)],
        "files": [name for name in files if folder in name],
        "temporary": sorted(os.listdir(tempfile.gettempdir())),
        "logs": sum(type(each).__name__ == "_LogFile" for each in logging.getLogger().handlers),
    }

folder, *arguments = sys.argv[1:]
places = arguments.pop().split(",")
tempfile.tempdir = folder + "/temporary"
os.makedirs(tempfile.tempdir)
found = []
for number, place in enumerate(places):
    module, _, path = place.partition(":")
    owner, (*parts, name) = importlib.import_module(module), path.split(".")
    for part in parts:
        owner = getattr(owner, part)
    original, run, before, err = getattr(owner, name), f"{folder}/{number}", left(), io.StringIO()
    setattr(owner, name, planted)
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main([*arguments, f"hydra.run.dir={run}"])
    setattr(owner, name, original)
    with RunDir(run).lock("test"):
        pass
    found.append({"code": code, "err": err.getvalue(), "before": before, "after": left()})
print(json.dumps(found))
"""
"""The command line, several times in one process, each time with another part that fails."""


def test_nothing_is_left(home: Home) -> None:
    folder = home.path / "outputs/failed_starts"
    arguments = (*SHORT, "trainer.warmup.steps=0", ",".join(PLACES))
    ended = home.vlmrl(str(folder), *arguments, code=("-c", FAIL_AT))
    assert ended.code == 0, ended.err
    for place, found in zip(PLACES, json.loads(ended.out.splitlines()[-1]), strict=True):
        assert (found["code"], found["err"]) == (1, "error: planted\n"), place
        assert found["after"] == found["before"], place
        assert found["after"]["files"] == [], place
