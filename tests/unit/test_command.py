"""The process of the command ends with its exit code, whatever a task has left running."""

from __future__ import annotations

import subprocess
import sys

import pytest

LEAVES = """
import threading, time
import vlmrl.__main__ as command

def main():
    if {leaves}:
        threading.Thread(target=time.sleep, args=(600,), name="fetch").start()
    return 3

command.main = main
command.EXIT_PATIENCE_S = 0.2
command.run()
"""


@pytest.mark.parametrize("leaves", [True, False])
def test_threads_that_a_task_left_do_not_keep_the_process(leaves: bool) -> None:
    code = LEAVES.format(leaves=leaves)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    said = "warning: 1 threads of the task's code have not ended (fetch), so the process ends without them\n"
    assert (ended.returncode, ended.stderr) == (3, said if leaves else "")
