"""The table that mode=doctor and mode=replay share."""

from __future__ import annotations

import pytest

from vlmrl.errors import ParityError
from vlmrl.runs.verdicts import State, Verdict, as_table, conclude, failed, judged, not_visible

CONSEQUENCE = "so a run would learn nothing"


def test_the_error_names_the_lines_that_failed() -> None:
    verdicts = [
        judged("a", True, "fine"),
        judged("b", False, "2 apart", "0"),
        not_visible("c", "elsewhere"),
        Verdict("d", State.DIFFERS, "1 of 6 differ"),
        Verdict("e", State.ROUNDING, "1e-6 apart"),
    ]
    with pytest.raises(ParityError) as error:
        conclude(verdicts, CONSEQUENCE)
    expected = "2 of 5 lines failed, so a run would learn nothing:\n  b: 2 apart (0)\n  d: 1 of 6 differ"
    assert str(error.value) == expected
    assert error.value.exit_code == 1
    conclude([verdicts[0], verdicts[2], verdicts[4]], CONSEQUENCE)


def test_the_table_shows_state_finding_and_bound() -> None:
    verdicts = [judged("a", True, "3 tokens", "<= 1", tokens=3), failed("b", "no answer")]
    assert as_table(verdicts) == {"a": "ok           3 tokens (bound: <= 1)", "b": "FAILED       no answer"}


def test_doctor_json_and_replay_json_keep_their_keys() -> None:
    verdict = judged("a", False, "3 tokens", "0", tokens=3)
    assert verdict.as_json("bound") == {
        "name": "a",
        "verdict": "FAILED",
        "says": "3 tokens",
        "bound": "0",
        "figures": {"tokens": 3},
    }
    verdict = Verdict("b", State.DIFFERS, "one differs", first={"turn": 0}, metrics={"differing": 1})
    assert verdict.as_json("first") == {
        "name": "b",
        "verdict": "DIFFERS",
        "says": "one differs",
        "first": {"turn": 0},
        "figures": {"differing": 1},
    }
