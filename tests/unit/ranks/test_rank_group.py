"""Ranks meet, run commands together, and end together, whichever rank ends first and how."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

import pytest

from support import TESTS
from support.ranks import EndedRank, ended, start
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
    assert find_place({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) == Place()


def test_torchrun_in_a_step_of_slurm() -> None:
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    assert find_place({**SLURM, **torchrun}) == Place(1, 2, 1, "a", 29500)


def test_half_of_what_a_launcher_says() -> None:
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 is set without LOCAL_RANK, MASTER_ADDR, MASTER_PORT, so"):
        find_place({"RANK": "0", "WORLD_SIZE": "2"})
