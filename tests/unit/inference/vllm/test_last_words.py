"""The cause of a server's end, as it is found in the output of real processes that fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vlmrl.inference.vllm.last_words import LONGEST_CAUSE, cause_of, remedy_of

CHAINED = """
try:
    {}["rope"]
except KeyError as error:
    raise ValueError("the config has no rope") from error
"""
IN_TWO_PROCESSES = """
import subprocess, sys
subprocess.run([sys.executable, "-c", "raise OSError('No available memory for the cache blocks.')"])
raise RuntimeError("Engine core initialization failed. See root cause above.")
"""
WITHOUT_WORDS = """
def check(size):
    assert size == 64
check(32)
"""
OF_ARGPARSE = """
import argparse
parser = argparse.ArgumentParser("api_server.py")
parser.add_argument("--max-num-seqs", type=int)
parser.parse_args(["--max-num-seqs", "many"])
"""


@pytest.mark.parametrize(
    ("program", "cause", "remedy"),
    [
        (CHAINED, "ValueError: the config has no rope", None),
        (IN_TWO_PROCESSES, "OSError: No available memory for the cache blocks.", "inference.kv_cache_gib"),
        (WITHOUT_WORDS, "AssertionError at assert size == 64", None),
        (OF_ARGPARSE, "error: argument --max-num-seqs: invalid int value: 'many'", "inference.extra_args"),
        ("print('ValueError in a sentence')", None, None),
        (f"raise ValueError('x' * {2 * LONGEST_CAUSE})", f"ValueError: {'x' * (LONGEST_CAUSE - 12)}", None),
        ("import ctypes, faulthandler\nfaulthandler.enable()\nctypes.string_at(0)", "Fatal Python error: ", None),
    ],
)
def test_the_cause_of_an_end(program: str, cause: str | None, remedy: str | None, tmp_path: Path) -> None:
    file = tmp_path / "server.py"
    file.write_text(program)
    ended = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=60, check=False)
    found = cause_of(ended.stdout + ended.stderr)
    if cause is None:
        assert found is None
        return
    assert found is not None
    assert found.startswith(cause)
    assert remedy is None or remedy in (remedy_of(found) or "")


def test_a_warning_is_no_cause() -> None:
    assert cause_of("(EngineCore pid=8) WARNING 11-23 20:40:17 [x.py:1] ImportError: no flashinfer") is None


def test_a_kill_by_the_kernel_has_a_remedy_without_any_error() -> None:
    assert "memory" in (remedy_of("ended with status -9") or "")
    assert remedy_of("ended with status 1") is None
