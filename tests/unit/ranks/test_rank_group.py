"""Ranks meet, run commands together, and end together, whichever rank ends first and how."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import TESTS, processes
from support.ranks import EndedRank, ended, environments, start
from vlmrl.errors import ConfigError
from vlmrl.ranks.commands import Command
from vlmrl.ranks.place import Place, find_place

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


def group_of_three(trouble: str) -> list[EndedRank]:
    return ended(start(3, [str(TESTS / "support/leading.py"), trouble]))


def test_each_rank_does_its_part() -> None:
    leader, *others = group_of_three("none")
    assert (leader.code, leader.out, leader.err) == (0, "[13.0, 13.0, 13.0]\n", "")
    assert [(other.code, other.out, other.err) for other in others] == [(0, "", "")] * 2


def test_a_rank_that_is_killed_ends_all() -> None:
    """The other ranks wait for it in a collective."""
    leader, killed, other = group_of_three("killed")
    assert killed.code == -signal.SIGKILL
    assert (leader.code, other.code) == (1, 1)
    assert leader.out.startswith("rank 1 (process ")
    assert leader.out.endswith(" has ended: it was killed, or its host is gone\n")


def test_a_rank_that_fails_says_why() -> None:
    leader, failed, other = group_of_three("raises")
    assert (leader.code, failed.code, other.code) == (1, 1, 1)
    assert leader.out.endswith(" has ended: ValueError: no such number\n")
    assert "Traceback" in failed.err


def test_no_rank_outlives_rank_0() -> None:
    leader, *others = group_of_three("leader killed")
    assert leader.code == -signal.SIGKILL
    assert [(other.code, other.err) for other in others] == [(1, "")] * 2


def test_a_rank_that_exits_says_so() -> None:
    leader, left, _ = group_of_three("exits")
    assert (leader.code, left.code) == (1, 1)
    assert leader.out.endswith(" has ended: SystemExit: no such number\n")


# ── ranks that hang ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_rank_that_is_stopped_ends_all_and_is_named() -> None:
    leader, stopped, other = group_of_three("stopped")
    assert stopped.code == -signal.SIGKILL, "it would outlive the run"
    assert (leader.code, other.code) == (1, 1)
    assert re.fullmatch(
        r"rank 1 \(process \d+ on \S+\) has not been heard for 3 s: it is stopped, or its host hangs\n", leader.out
    )


def test_ranks_end_when_rank_0_is_stopped() -> None:
    leader, *others = group_of_three("leader stopped")
    assert leader.code == -signal.SIGKILL
    for rank, other in enumerate(others, 1):
        assert other.code == 1
        assert (
            re.search(
                rf"error: rank 0 \(process \d+ on \S+\) has not been heard for 3 s: .*, so rank {rank} on \S+ ends",
                other.err,
            )
            or other.err == ""
        ), "the first one kills rank 0"
    assert any(other.err for other in others)


def test_a_rank_whose_work_stands_still_is_named_with_the_place() -> None:
    leader, stopped, _ = group_of_three("stands still")
    assert (leader.code, stopped.code) == (1, -signal.SIGKILL)
    assert re.search(r"rank 1 \(.*\) has not moved for \d+ s from threading.py:\d+ in wait, called at .*", leader.out)


@pytest.mark.parametrize("trouble", ["slow", "all suspended"])
def test_ranks_that_are_slow_or_suspended_together_go_on(trouble: str) -> None:
    leader, *others = group_of_three(trouble)
    assert (leader.code, leader.out, leader.err) == (0, "[13.0, 13.0, 13.0]\n", "")
    assert [(other.code, other.out, other.err) for other in others] == [(0, "", "")] * 2


# ── ranks that meet ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_never_comes_is_named(missing: int) -> None:
    command = [str(TESTS / "support/leading.py"), "one is missing"]
    (other,) = ended(start(2, command, leaving_out=missing))
    assert other.code == 1
    wanted = "does not answer at 127.0.0.1:" if missing == 0 else "rank 1 of 2 ranks did not start within 2 s"
    assert wanted in other.err


def test_a_rank_that_is_stopped_while_they_meet_is_named() -> None:
    started = start(2, [str(TESTS / "support/leading.py"), "stopped while they meet"])
    try:
        _, err = started[0].communicate(timeout=200)
    finally:
        for process in started:
            process.kill()
    assert started[0].returncode == 1
    assert re.search(r"rank 1 \(process \d+ on \S+\) of 2 ranks did not join torch.distributed within 4 s", err)


def test_strangers_on_every_port_keep_no_rank_out() -> None:
    """Also on the ports of torch's store and of gloo, and on all of them again and again."""
    before, over = listening(), threading.Event()

    def stranger(way: str) -> None:
        held = []
        while not over.is_set():
            for port in listening() - before:
                with suppress(OSError):
                    held.append(socket.create_connection(("127.0.0.1", port), 1))
                    if way == "junk":
                        held[-1].sendall(b"GET / HTTP/1.0\r\n\r\n")
                    if way == "close" or len(held) > 100:
                        held.pop().close()
            time.sleep(0.005)
        for each in held:
            each.close()

    strangers = [threading.Thread(target=stranger, args=(way,)) for way in ("close", "junk", "hold")]
    for each in strangers:
        each.start()
    try:
        leader, *others = ended(start(2, [str(TESTS / "support/leading.py"), "none"]))
    finally:
        over.set()
        for each in strangers:
            each.join()
    assert (leader.code, leader.out) == (0, "[11.0, 11.0]\n")
    assert [other.code for other in others] == [0]


def listening() -> set[int]:
    """The ports on which anything on this host listens."""
    found = set()
    for name in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            rows = [row.split() for row in Path(name).read_text().splitlines()[1:]]
            found |= {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A"}
    return found


# ── arrays ──────────────────────────────────────────────────────────────────────────────────────────────────

needs_memfd = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")


@needs_memfd
@pytest.mark.parametrize("way", ["shared", "nothing shared"])
def test_each_rank_gets_its_own_arrays_and_rank_0_keeps_nothing_open(way: str) -> None:
    leader, *others = group_of_three(way)
    assert (leader.code, leader.out, leader.err) == (
        0,
        f"[(21.0, {way == 'shared'}), (22.0, {way == 'shared'})] 0\n",
        "",
    )
    assert [(other.code, other.out, other.err) for other in others] == [(0, "", "")] * 2


@needs_memfd
def test_a_rank_that_is_killed_with_its_arrays_ends_all() -> None:
    leader, killed, other = group_of_three("killed looking")
    assert killed.code == -signal.SIGKILL
    assert leader.code == 1
    assert other.code in (0, 1)
    assert leader.out.endswith(" has ended: it was killed, or its host is gone\n")


@needs_memfd
def test_a_rank_without_room_for_its_arrays_says_so() -> None:
    leader, failed, _ = group_of_three("no room")
    assert (leader.code, failed.code) == (1, 1)
    assert leader.out.startswith("rank 1 (process ")
    assert "RankError: the shared memory with rank 0's message cannot be read: " in leader.out
    assert leader.out.endswith("Cannot allocate memory\n")


# ── commands ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_command_without_run_cannot_be_sent() -> None:
    @dataclass(frozen=True)
    class Incomplete(Command[None, int]):
        number: int

    with pytest.raises(TypeError, match=r"abstract method '?run"):
        Incomplete(1)  # type: ignore[abstract]


# ── places ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_step_of_slurm() -> None:
    place = find_place(SLURM)
    assert (place.rank, place.size, place.local_rank, place.address) == (3, 4, 1, "gpu03")
    assert 1024 < place.port == find_place({**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).port < 2**16
    assert place.port != find_place({**SLURM, "SLURM_STEP_ID": "1"}).port
    assert find_place({**SLURM, "SLURM_STEP_NUM_NODES": "1"}).address == "127.0.0.1"


def test_a_batch_script_is_one_process() -> None:
    assert find_place({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == Place()
    assert find_place({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == Place()


def test_torchrun_in_a_step_of_slurm() -> None:
    assert find_place({**SLURM, **TORCHRUN}) == Place(1, 2, 1, "a", 29500)


def test_half_of_what_a_launcher_says() -> None:
    with pytest.raises(ConfigError, match="LOCAL_RANK is not set, but other variables of its launcher are"):
        find_place({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("named", "nonsense"),
    [
        ("WORLD_SIZE", {"RANK": "0", "WORLD_SIZE": "0"}),
        ("WORLD_SIZE", {"RANK": "0"}),
        ("WORLD_SIZE", {"RANK": "0", "WORLD_SIZE": "-1"}),
        ("WORLD_SIZE", {"RANK": "0", "WORLD_SIZE": ""}),
        ("RANK", {"WORLD_SIZE": "2"}),
        ("RANK", {"RANK": "x", "WORLD_SIZE": "2"}),
        ("RANK", {"RANK": "x", "WORLD_SIZE": "1"}),
        ("RANK", {**TORCHRUN, "RANK": "2"}),
        ("RANK", {**TORCHRUN, "RANK": "1.0"}),
        ("LOCAL_RANK", {**TORCHRUN, "LOCAL_RANK": "first"}),
        ("MASTER_PORT", {**TORCHRUN, "MASTER_PORT": "http"}),
        ("MASTER_PORT", {**TORCHRUN, "MASTER_PORT": "65536"}),
        ("MASTER_ADDR", {**TORCHRUN, "MASTER_ADDR": " "}),
        ("SLURM_STEP_NUM_TASKS", {**SLURM, "SLURM_STEP_NUM_TASKS": "x"}),
        ("SLURM_STEP_NUM_TASKS", {"SLURM_STEP_NUM_TASKS": "0"}),
        ("SLURM_STEP_ID", {"SLURM_STEP_NUM_TASKS": "2"}),
        ("SLURM_STEP_ID", {**SLURM, "SLURM_STEP_ID": "batch"}),
        ("SLURM_PROCID", {**SLURM, "SLURM_PROCID": "4"}),
        ("SLURM_PROCID", {**SLURM, "SLURM_PROCID": "²"}),
        ("SLURM_STEP_NUM_NODES", {**SLURM, "SLURM_STEP_NUM_NODES": "all"}),
        ("SLURM_STEP_NODELIST", {**SLURM, "SLURM_STEP_NODELIST": "["}),
        ("SLURM_RESTART_COUNT", {**SLURM, "SLURM_RESTART_COUNT": "often"}),
        *(
            (name, {key: value for key, value in SLURM.items() if key != name})
            for name in SLURM
            if "NUM_TASKS" not in name
        ),
    ],
)
def test_nonsense_of_a_launcher_is_refused_by_its_name(named: str, nonsense: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=rf"^{named}( is |=)"):
        find_place(nonsense)


def test_the_command_line_says_which_variable_is_nonsense() -> None:
    for variables in (
        {"WORLD_SIZE": "0", "RANK": "0"},
        {"SLURM_STEP_NUM_TASKS": "x"},
        {**SLURM, "SLURM_JOB_ID": "../x"},
    ):
        environment = {
            **environments(1)[0],
            **variables,
            "SLURM_STEP_NUM_TASKS": variables.get("SLURM_STEP_NUM_TASKS", "1"),
        }
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            if name not in variables:
                del environment[name]
        process = processes.start("-m", "vlmrl", "dry_run=true", cwd=Path.cwd(), environment=environment)
        out, err = process.communicate(timeout=200)
        assert (process.returncode, out) == (2, ""), variables
        assert re.match(r"error: (WORLD_SIZE|SLURM_STEP_NUM_TASKS|SLURM_JOB_ID)=", err)
