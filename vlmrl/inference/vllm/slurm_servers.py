"""Servers on other tasks of the Slurm job (`inference.slurm_tasks`): how the run finds them.

    <run>/servers/<job>.<step>.<requeues>.<server>.json     {"url": …, "key": …} once it is healthy, or {"error": …}

Only the user can read the files (mode 0600), because the key allows replacing a server's weights. A restarted server
has a new key, and announces itself again.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlmrl.errors import EngineError
from vlmrl.ranks import slurm
from vlmrl.record.files import disk_errors

POLL_S = 0.5
"""Seconds between two checks for a file. A network disk shows it later than that anyway."""


@dataclass(frozen=True)
class Announced:
    """A healthy server."""

    url: str
    key: str | None
    path: Path | None = None
    """Its announcement."""


def announcement(run: Path, index: int) -> Path:
    """The path of the announcement of server `index`, for the run folder `run`."""
    return run / "servers" / f"{slurm.step_name()}.{index}.json"


def announce(path: Path, **content: str) -> None:
    """Write an announcement atomically: `url` and `key`, or `error`."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(content, file)
        temporary.replace(path)


async def find_servers(run: Path, timeout_s: float, on_progress: Callable[[str], None]) -> list[Announced]:
    """Wait until all servers of this Slurm step are announced. Raises `EngineError` where one fails or is too late."""
    paths = [announcement(run, index) for index in range(slurm.serving_tasks())]
    give_up = time.monotonic() + timeout_s
    while missing := [path for path in paths if not path.exists()]:
        if time.monotonic() > give_up:
            raise EngineError(
                f"inference.slurm_tasks: {len(missing)} of {len(paths)} servers were not up within "
                f"inference.startup_timeout_s={timeout_s:g}: raise it, or see in logs/vllm_<server>.log "
                "what they wait for"
            )
        on_progress(f"waiting for {len(missing)} of {len(paths)} servers on other tasks")
        await asyncio.sleep(POLL_S)
    return [announced(path) for path in paths]


def announced(path: Path) -> Announced:
    """Read an announcement. Raises `EngineError` with the error of a server that is given up."""
    content = json.loads(path.read_bytes())
    if "error" in content:
        raise EngineError(content["error"])
    return Announced(**content, path=path)
