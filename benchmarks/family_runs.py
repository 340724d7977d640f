"""Runs commands of vlmrl for benchmarks/families.py, each in a process of its own and with a time limit."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from support.command_line import Home, steady
from support.processes import start


@dataclass(frozen=True)
class Ended:
    """A command that ended; `code` is None where the time limit ended it."""

    command: str
    code: int | None
    out: str
    err: str
    seconds: float

    @property
    def complaint(self) -> str:
        """Its last words, in one line, without the folders of this machine."""
        if self.code is None:
            return f"it had not ended after {self.seconds:.0f} s"
        said = self.err.rpartition("error: ")[2] if "error: " in self.err else (self.err.strip() or self.out.strip())
        return re.sub(r"(?<!\w)(/[\w.-]+)+/(?=[\w.-])", "", " ".join(said.split())) or f"exit code {self.code}"

    @property
    def is_refusal(self) -> bool:
        """Whether it is a refusal with its reason and remedy: of the configuration (exit code 2), or of a server that
        would not compute what the trainer computes."""
        if self.code is None or "Traceback" in self.err:
            return False
        return self.code == 2 or (self.code == 1 and "inference=embedded" in self.complaint)


class Commands:
    """Starts commands in a folder and reads what their runs left there."""

    def __init__(self, home: Home, folder: Path, limit_s: float) -> None:
        """Processes with the environment of one `home` come from one server (support/processes.py)."""
        self.folder = folder
        self._environment = home.environment
        self._limit_s = limit_s

    def vlmrl(self, *arguments: str) -> Ended:
        """`python -m vlmrl …`"""
        return self.python("-m", "vlmrl", *arguments)

    def torchrun(self, *arguments: str) -> Ended:
        """The same by two ranks, in the environment that torchrun gives them; rank 0's code and output."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        ranks = [place | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
        ended = self.python("-m", "vlmrl", *arguments, ranks=ranks)
        return replace(ended, command=ended.command.replace("python", "torchrun --nproc-per-node=2", 1))

    def python(self, *command: str, ranks: Sequence[Mapping[str, str]] = ({},)) -> Ended:
        """`python <command>`, once per rank with its further environment."""
        started = time.monotonic()
        processes = [
            start(*command, cwd=self.folder, environment={**self._environment, **rank}, new_session=True)
            for rank in ranks
        ]
        out, err, code = "", "", None
        try:
            out, err = processes[0].communicate(timeout=self._limit_s)
            code = processes[0].returncode
            for other in processes[1:]:
                other.communicate(timeout=self._limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # with the servers that it started
        words = " ".join(word.replace(f"{self.folder}/", "") for word in command)
        return Ended(f"python {words}", code, out, err, time.monotonic() - started)

    def certificate(self, name: str) -> dict[str, Any]:
        """The doctor.json of a run; empty where it wrote none."""
        path = self.folder / name / "doctor.json"
        found: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
        return found

    def checks(self, name: str) -> list[dict[str, Any]]:
        """The lines of a certificate."""
        checks: list[dict[str, Any]] = self.certificate(name).get("checks", [])
        return checks

    def metrics(self, name: str, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """The lines of a run's metrics, without what depends on the clock."""
        return steady(self.folder / name / file)
