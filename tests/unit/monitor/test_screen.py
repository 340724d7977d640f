"""Output that cannot fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from vlmrl.monitor.screen import lost_streams, unbreakable_output
with unbreakable_output():
    for _ in range(3):
        print("to the reader", flush=True)
        print("to the reader", file=sys.stderr)
    os.write(1, b"at a lower level")
    lost = lost_streams() + lost_streams()
open(sys.argv[1], "w").write("|".join(lost))
"""


def run(tmp_path: Path, command: str) -> tuple[int, str]:
    """The exit code, and what `lost_streams` said."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    line = command.format(python=f"{sys.executable} {script} {tmp_path / 'lost'}")
    ended = subprocess.run(["bash", "-c", line], env={**os.environ, "PYTHONPATH": os.getcwd()}, timeout=200)
    return ended.returncode, (tmp_path / "lost").read_text()


@pytest.mark.parametrize(
    ("command", "lost"),
    [
        ("set -o pipefail; {python} 2>/dev/null | true", ["standard output"]),
        ("{python} > /dev/full 2>&1", ["standard output", "standard error"]),
        ("{python} > /dev/full 2>/dev/null", ["standard output"]),
        ("{python} >&- 2>&- <&-", []),
        ("{python} > /dev/null 2>&1", []),
    ],
)
def test_a_stream_that_fails_is_given_up(command: str, lost: list[str], tmp_path: Path) -> None:
    code, said = run(tmp_path, command)
    assert code == 0, "also when the interpreter flushes its streams at the end"
    assert [text.partition(" cannot be written any more")[0] for text in filter(None, said.split("|"))] == lost


def test_what_is_written_arrives(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONIOENCODING": "latin-1:replace"}
    ended = subprocess.run([sys.executable, script, tmp_path / "lost"], env=environment, capture_output=True)
    assert ended.stdout == b"to the reader\n" * 3 + b"at a lower level"
    assert ended.stderr == b"to the reader\n" * 3
