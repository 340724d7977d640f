"""Ten kills by SIGKILL, a third of them inside a checkpoint write: the record is bit-equal to an undisturbed run.

benchmarks/kills.py does a hundred.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from support.command_line import Home, Scenarios
from support.kills import LONG, TASKS, Kill, Killed, differences, kill_and_resume

pytestmark = pytest.mark.slow

PLANS: dict[str, tuple[Kill, ...]] = {
    "color_codeword": ("write", "moment", "write", "moment", "moment"),
    "faults": ("write", "moment", "moment", "write", "moment"),
}
"""A write comes first: after a late moment there may be no checkpoint left to write."""


@pytest.fixture(scope="module")
def runs(home: Home, never_stopped: Path) -> Scenarios:
    """`never_stopped` comes first, because it builds the tiny checkpoint."""

    def both(name: str) -> tuple[Path, Killed, int]:
        undisturbed, seed = home.path / f"outputs/undisturbed_{name}", random.randrange(1 << 30)
        ended = home.vlmrl(*TASKS[name], *LONG, f"hydra.run.dir={undisturbed}")
        assert ended.code == 0, ended.err
        arguments = (*TASKS[name], *LONG)
        return undisturbed, kill_and_resume(home, f"killed_{name}", arguments, PLANS[name], seed, ended.seconds), seed

    return Scenarios(color_codeword=lambda: both("color_codeword"), faults=lambda: both("faults"))


@pytest.mark.parametrize("name", TASKS)
def test_killed_again_and_again(name: str, runs: Scenarios) -> None:
    undisturbed, killed, seed = runs[name]
    assert (killed.code, killed.err) == (0, ""), f"seed {seed}"
    assert killed.kills["write"] >= 1, f"seed {seed}"
    assert differences(killed.run, undisturbed) == [], f"seed {seed}"
