"""Programs behind their guard: what they print, how they end, and that nothing they started is left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from vlmrl.orchestrator.programs import guard
from vlmrl.orchestrator.programs.process import KEPT_BYTES, GuardedProcess, Tail, end_in_words, last_lines

DEADLINE_S = 30.0


def with_program(script: str, act: Callable[[GuardedProcess], Awaitable[object]]) -> GuardedProcess:
    """Start a Python script, `act` on its process, and see it gone."""

    async def main() -> GuardedProcess:
        process = await GuardedProcess.start([sys.executable, "-I", "-S", "-c", script], dict(os.environ))
        try:
            async with asyncio.timeout(DEADLINE_S):
                await act(process)
        finally:
            await process.gone()
        return process

    return asyncio.run(main())


async def waited(process: GuardedProcess) -> None:
    process.status = await process.wait()  # type: ignore[attr-defined]


def status_of(process: GuardedProcess) -> int:
    return process.status  # type: ignore[attr-defined, no-any-return]


def alive(pids: list[int]) -> list[int]:
    """Those that still run, after a moment in which killed ones may vanish."""
    until = time.monotonic() + DEADLINE_S
    while left := [pid for pid in pids if psutil.pid_exists(pid)]:
        if time.monotonic() > until:
            return left
        time.sleep(0.01)
    return []


def pids_in(folder: Path, count: int) -> list[int]:
    """The process ids that programs wrote as names of files, once there are so many."""
    until = time.monotonic() + DEADLINE_S
    while len(names := [path.name for path in folder.iterdir()]) < count:
        assert time.monotonic() < until, f"{names}: not {count} processes"
        time.sleep(0.01)
    return [int(name) for name in names]


NOTES_ITSELF = "import os; open(os.path.join({folder!r}, str(os.getpid())), 'w')\n"

DETACHED = """
import os, subprocess, sys
def note(): open(os.path.join({folder!r}, str(os.getpid())), "w")
note()
if os.fork() == 0:                       # a child in the same group
    note()
    while True: os.read(os.pipe()[0], 1)
if os.fork() == 0:                       # a daemon: another session, and its parent ends at once
    os.setsid()
    if os.fork(): os._exit(0)
    note()
    while True: os.read(os.pipe()[0], 1)
while len(os.listdir({folder!r})) < 3: pass
"""


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("pass", 0),
        ("raise SystemExit(7)", 7),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 139),
    ],
)
def test_the_exit_status_is_that_of_a_shell(script: str, status: int) -> None:
    assert status_of(with_program(script, waited)) == status


def test_a_command_that_is_not_there_ends_with_127_and_says_so() -> None:
    async def main() -> tuple[int, str]:
        process = await GuardedProcess.start(["no-such-program"], dict(os.environ))
        status = await process.wait()
        await process.gone()
        return status, process.printed.stderr

    assert asyncio.run(main()) == (127, "no-such-program cannot be started: No such file or directory\n")


def test_standard_input_is_the_problem_and_both_outputs_are_kept() -> None:
    async def act(process: GuardedProcess) -> None:
        await process.send(b"a line\n", is_last=True)
        await waited(process)

    script = "import sys; t = sys.stdin.read(); print('out', t, end=''); print('err', t, end='', file=sys.stderr)"
    printed = with_program(script, act).printed
    assert (printed.stdout, printed.stderr) == ("out a line\n", "err a line\n")


def test_much_output_does_not_block_the_program_and_its_end_is_kept() -> None:
    script = "import sys\nfor i in range(200000): print('line', i)\nprint('x' * 1000000, 'the end')"
    process = with_program(script, waited)
    assert status_of(process) == 0
    assert len(process.printed.stdout) == KEPT_BYTES + 1
    assert process.printed.stdout.startswith("…x")
    assert process.printed.stdout.endswith("x the end\n")


def test_a_program_that_does_not_read_its_input_is_no_error() -> None:
    async def act(process: GuardedProcess) -> None:
        await process.send(b"x" * (1 << 22), is_last=True)  # more than a pipe holds
        await waited(process)

    assert status_of(with_program("import os; os.close(0)", act)) == 0


def test_lines_that_may_be_objects_come_one_by_one_and_others_are_passed_over() -> None:
    found: list[bytes | None] = []

    async def act(process: GuardedProcess) -> None:
        found.extend([await process.next_object() for _ in range(3)])

    with_program("print('loading'); print('{\"a\": 1}'); print('noise'); print(' {\"b\": 2}', end='')", act)
    assert found == [b'{"a": 1}', b' {"b": 2}', None]


def test_children_of_a_program_that_ended_are_killed_also_those_that_detached(tmp_path: Path) -> None:
    process = with_program(DETACHED.format(folder=str(tmp_path)), waited)
    assert status_of(process) == 0
    pids = pids_in(tmp_path, 3)
    assert alive(pids) == []


def test_stop_ends_a_program_that_ignores_sigterm_and_all_below_it(tmp_path: Path) -> None:
    ignores = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"

    async def act(process: GuardedProcess) -> None:
        await asyncio.to_thread(pids_in, tmp_path, 3)

    script = ignores + DETACHED.format(folder=str(tmp_path)) + "while True: os.read(os.pipe()[0], 1)"
    with_program(script, act)
    assert alive(pids_in(tmp_path, 3)) == []


def test_a_program_hears_sigterm_before_it_is_killed(tmp_path: Path) -> None:
    script = (
        "import signal, sys\n"
        f"def stop(*_): open({str(tmp_path / 'stopped')!r}, 'w'); sys.exit()\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        + NOTES_ITSELF.format(folder=str(tmp_path))
        + "while True: signal.pause()"
    )

    async def act(process: GuardedProcess) -> None:
        await asyncio.to_thread(pids_in, tmp_path, 1)

    with_program(script, act)
    assert (tmp_path / "stopped").exists()


HOLDER = """
import asyncio, os, sys
from vlmrl.orchestrator.programs.process import GuardedProcess
async def main():
    await GuardedProcess.start([sys.executable, "-I", "-S", "-c", {script!r}], dict(os.environ))
    await asyncio.Event().wait()
asyncio.run(main())
"""


def test_a_run_that_is_killed_takes_its_programs_with_it(tmp_path: Path) -> None:
    script = DETACHED.format(folder=str(tmp_path)) + "while True: os.read(os.pipe()[0], 1)"
    run = subprocess.Popen([sys.executable, "-c", HOLDER.format(script=script)])
    try:
        pids = pids_in(tmp_path, 3)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert alive(pids) == []


def test_the_tests_of_the_guard_see_a_child_that_is_left(tmp_path: Path) -> None:
    """Without the guard the daemon stays: the check above can fail."""
    ended = subprocess.run([sys.executable, "-I", "-S", "-c", DETACHED.format(folder=str(tmp_path))], check=True)
    assert ended.returncode == 0
    pids = pids_in(tmp_path, 3)
    try:
        assert sum(psutil.pid_exists(pid) for pid in pids) >= 2
    finally:
        for pid in pids:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)


def test_the_guard_imports_the_standard_library_only() -> None:
    code = f"import runpy, sys; runpy.run_path({guard.__file__!r}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, capture_output=True, text=True)
    assert not {"vlmrl", "numpy", "asyncio"} & set(loaded.stdout.split())


# ── the ends of streams ─────────────────────────────────────────────────────────────────────────────────────


def test_a_tail_joins_lines_across_chunks_and_says_where_it_was_cut() -> None:
    tail = Tail()
    assert [tail.feed(chunk) for chunk in (b"a", b"b\nc", b"\nd\n", b"e")] == [[], [b"ab"], [b"c", b"d"], []]
    assert (tail.text, bytes(tail.line)) == ("ab\nc\nd\ne", b"e")
    assert tail.feed(b"y" * KEPT_BYTES) == []
    assert tail.feed(b"y\n") == [b"e" + b"y" * (KEPT_BYTES + 1)], "a long line is whole, although the text is cut"
    tail.feed(b"z" * KEPT_BYTES)
    assert tail.text == "…" + "z" * KEPT_BYTES
    assert Tail().text == ""


def test_output_that_is_no_utf_8_is_written_as_escapes() -> None:
    tail = Tail()
    tail.feed(b"\xff ok")
    assert tail.text == "\\xff ok"


def test_ends_in_words() -> None:
    assert [end_in_words(status) for status in (0, 1, 143, 200)] == [
        "exit code 0",
        "exit code 1",
        "SIGTERM",
        "exit code 200",
    ]


def test_last_lines_leave_out_empty_ones() -> None:
    assert last_lines("a\n\nb\n \nc\n", 2) == "b\nc"
